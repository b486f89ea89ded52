"""Records a robot: its streams, what the model made of them and the commands; or any topics by name.

`mm-edge record` becomes this node. Messages are kept as they come: a callback only notes when, and `mm_edge.tape`
writes them in a thread of its own.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy as Durability
from rclpy.qos import QoSProfile
from rclpy.qos import QoSReliabilityPolicy as Reliability
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription
from std_msgs.msg import String

from mm_edge import recording
from mm_edge.bundle import Bundle
from mm_edge.errors import EdgeError
from mm_edge.messages import MESSAGE_TYPES
from mm_edge.repair import repair
from mm_edge.tape import MB, TURN_S, Tape, Topic
from mm_edge_ros.node import STEADY, declare, run, with_info
from mm_edge_ros.streams import message_class, topics, usual_offer

SILENT_S = 3.0  # until it is told that nothing came


class RecordNode(Node):
    def __init__(self):
        super().__init__("record_node")
        out = declare(self, "out", "recording", "folder of the recording, which must not exist")
        bundle = declare(self, "bundle", "", "folder of a bundle: its streams, outputs and commands are recorded")
        streams = declare(self, "streams", [""], "STREAM=TOPIC where a stream of the bundle has not its usual topic")
        names = declare(self, "topics", [""], "topics to record, of whatever type")
        min_free_mb = declare(self, "min_free_mb", 200.0, "the recording ends when its disk has less", 0.0, 1e9)
        self._out, self._bundle = Path(out), Bundle.read(bundle) if bundle else None
        specs = self._bundle.streams if self._bundle else ()
        given = dict(stream.partition("=")[::2] for stream in streams if stream)
        if wrong := [name for name, topic in given.items() if not topic or name not in [spec.name for spec in specs]]:
            raise EdgeError(f"expected STREAM=TOPIC with a stream of {[spec.name for spec in specs]}, got {wrong}")

        self._sources: dict[str, Source] = {}
        self._stamped: dict[str, str] = {}  # stream -> topic, where Output.sources has the stamp of the header
        self._metadata: dict[str, Any] = {"robot": socket.gethostname(), "streams": {}}
        for spec in specs:
            topic = self._resolve({**topics(specs), **given}[spec.name])
            depth = max(10, math.ceil(spec.rate_hz))
            kept = usual_offer(spec)[1]
            self._sources[topic] = Source(self, topic, self._take, MESSAGE_TYPES[spec.kind], kept, depth)
            self._metadata["streams"][spec.name] = topic
            if spec.kind not in ("audio", "text"):
                self._stamped[spec.name] = topic
        if self._bundle:
            self._metadata["bundle"] = self._bundle.id
            action = self._bundle.outputs.action
            commands = "joint_trajectory" if action and action.interface == "position" else "cmd_vel"
            names = ["edge/output", f"{commands}_raw", commands, *names]
        for topic in map(self._resolve, filter(None, names)):
            self._sources.setdefault(topic, Source(self, topic, self._take))
        if own := sorted({recording.TICK, recording.META, recording.OUTCOME} & self._sources.keys()):
            raise EdgeError(f"expected topics of the robot, got {own}, where a recording keeps its own notes")
        self._output = self.resolve_topic_name("edge/output")
        self._told, self._min_free_bytes = 0, round(min_free_mb * MB)
        self._tape: Tape | None = None
        self._beginning = self.create_timer(0.0, self._begin, clock=STEADY)  # from when on Ctrl-C ends it well

    def _resolve(self, name: str) -> str:
        try:
            return self.resolve_topic_name(name)
        except RuntimeError as error:  # rcl's
            raise EdgeError(f"expected the name of a topic, got {name!r}: {str(error).partition(', at ')[0]}") from None

    def _begin(self) -> None:
        self.destroy_timer(self._beginning)
        self._tape = Tape(self._out, self._metadata, self._min_free_bytes)
        print(f"{self._out}: recording until Ctrl-C", flush=True)
        self._look()
        self.create_timer(TURN_S, self._look, clock=STEADY)
        self._silence = self.create_timer(SILENT_S, self._tell_silence, clock=STEADY)

    def _take(self, topic: Topic, data: bytes) -> None:
        arrival_ns = self.get_clock().now().nanoseconds
        self._tape.put(topic, data, arrival_ns)
        if self._bundle and topic.name == self._output:
            self._tick(data)

    def _tick(self, data: bytes) -> None:
        try:
            output = json.loads(deserialize_message(data, String).data)
            sources = {self._stamped[name]: int(ns) for name, ns in output["sources"].items() if name in self._stamped}
            if not 0 < (now_ns := int(output["stamp_ns"])) < 2**63:
                raise ValueError(f"a stamp of {now_ns} ns")
            self._tape.tick(now_ns, sources)
        except Exception as error:  # anything may come on a topic
            self.get_logger().warning(f"{self._output}: no output of an edge_node ({error!r}), and no tick", once=True)

    def _look(self) -> None:
        """At the publishers, once there is a time, and at how the disk fares."""
        if self._tape.trouble:
            raise ExternalShutdownException
        if self.get_clock().now().nanoseconds:
            for source in self._sources.values():
                source.follow()
        dropped = dict(self._tape.dropped)
        if sum(dropped.values()) > self._told:
            self._told = sum(dropped.values())
            self.get_logger().warning(f"the disk is too slow; messages dropped so far: {dropped}")

    def _tell_silence(self) -> None:
        self.destroy_timer(self._silence)
        if not self._tape.counts:
            domain = os.environ.get("ROS_DOMAIN_ID", "0")
            topics = ", ".join(self._sources)
            self.get_logger().warning(f"nothing came yet on {topics} in ROS domain {domain}")

    def destroy_node(self) -> None:
        """End the recording, and say what is in it. Status 1 if anything is wrong with it."""
        if self._tape is None:  # it was refused, or ended before it began
            super().destroy_node()
            return
        for source in self._sources.values():
            source.destroy()
        self._tape.close()
        troubles = [self._tape.trouble, *(source.trouble for source in self._sources.values())]
        if recording.partial(self._out).exists():
            try:
                print(repair(self._out))
            except EdgeError as error:
                full = isinstance(error.__cause__, OSError)
                hint = f"; once there is room, `mm-edge record {self._out}` repairs it" if full else ""
                troubles.append(f"{error}{hint}")
        else:
            for name, source in self._sources.items():
                lost = {"to a slow disk": self._tape.dropped[name], "on their way here": source.missed}
                text = "".join(f", {n} lost {how}" for how, n in lost.items() if n)
                print(f"{self._tape.counts[name]:8} {name}{text}")
        super().destroy_node()
        if any(troubles):
            print(*filter(None, troubles), sep="\n", file=sys.stderr)
            sys.exit(1)


class Source:
    """A topic's subscription, by the type that its publishers give it.

    Best effort, so that no publisher ever waits for us, or for what a reliable reader leaves locked when it is killed.
    Only where publishers keep what they said before we came we are reliable, since no others get that.

    Args:
        take: called with the topic and each message as it comes, in CDR.
        type_name: what to expect until there is a publisher; empty: wait for one.
        kept: whether to ask for transient local, where every publisher offers it.

    Attributes: trouble, why it cannot be recorded; missed, messages that never came here, as far as can be told.
    """

    def __init__(
        self,
        node: Node,
        name: str,
        take: Callable[[Topic, bytes], None],
        type_name: str = "",
        kept: bool = True,
        depth: int = 100,
    ):
        self._node, self._name, self._take = node, name, take
        self._asked, self._depth = kept, depth
        self._type_name, self._types, self._heard = type_name, list[str](), False
        self._had: tuple[str, bool] | None = None
        self._subscription: Subscription | None = None
        self._alone, self._number = False, 0  # one publisher; the number it gave its last message
        self.trouble, self.missed = "", 0

    def follow(self) -> None:
        """Subscribe, or subscribe anew if publishers offer something else than before. Call it now and then."""
        infos = self._node.get_publishers_info_by_topic(self._name)
        types, alone = sorted({info.topic_type for info in infos}), len(infos) == 1
        self._alone, self._number = alone, self._number if alone and self._alone else 0
        if types and self._type_name not in types and not self._heard:
            self._type_name = types[0]
        if not self._type_name or (self._subscription and not infos):
            return
        if types != self._types and len({self._type_name, *types}) > 1:
            text = f"{self._name} is published as {', '.join(types)}; only {self._type_name} is recorded"
            self._node.get_logger().warning(text)
        self._types = types
        qos = [info.qos_profile for info in infos if info.topic_type == self._type_name]
        kept = self._asked and all(q.durability == Durability.TRANSIENT_LOCAL for q in qos)
        if self._heard and self._had:  # what was kept once would come again, and be recorded as new
            kept = kept and self._had[1]
        if self._had != (self._type_name, kept):
            self._had = self._type_name, kept
            self.destroy()
            self._subscribe(kept)

    def destroy(self) -> None:
        if self._subscription:
            self._node.destroy_subscription(self._subscription)
        self._subscription = None

    def _subscribe(self, kept: bool) -> None:
        try:
            kind, store = message_class(self._type_name), recording.typestore_of(self._type_name, definition)
        except Exception as error:  # many are the ways in which a package can be missing
            why = f"its definition is not installed here ({error!r}); source the workspace that has it"
            self.trouble = f"{self._name} is not recorded: it is a {self._type_name}, and {why}"
            self._node.get_logger().error(self.trouble)
            return
        self.trouble, topic = "", Topic(self._name, self._type_name, store)
        qos = QoSProfile(
            depth=self._depth,
            reliability=Reliability.RELIABLE if kept else Reliability.BEST_EFFORT,
            durability=Durability.TRANSIENT_LOCAL if kept else Durability.VOLATILE,
        )
        take = with_info(partial(self._on_message, topic))
        self._subscription = self._node.create_subscription(kind, self._name, take, qos, raw=True)

    def _on_message(self, topic: Topic, data: bytes, info: dict[str, Any]) -> None:
        self._take(topic, data)
        number = info.get("publication_sequence_number") or 0
        if number <= self._number:  # another publisher's
            self._alone = False
        elif self._alone and self._number:
            self.missed += number - self._number - 1
        self._number, self._heard = number, True


def definition(type_name: str) -> str:
    """As it is installed here: releases of ROS differ."""
    package, kind, name = type_name.split("/")
    return Path(get_package_share_directory(package), kind, f"{name}.msg").read_text(encoding="utf-8")


def main() -> None:
    os.nice(5)  # the robot comes first
    sys.setswitchinterval(5e-4)  # and a callback before the thread that writes: it notes the time
    run(RecordNode)


if __name__ == "__main__":
    main()
