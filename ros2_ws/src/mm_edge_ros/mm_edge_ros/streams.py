"""From a model's streams to subscriptions: topics, message types, and a QoS that follows what publishers offer."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy as Durability
from rclpy.qos import QoSProfile
from rclpy.qos import QoSReliabilityPolicy as Reliability

from mm_edge.errors import SampleError
from mm_edge.messages import MESSAGE_TYPES, TOPICS, from_ros, readable
from mm_edge.types import Sample, StreamSpec
from mm_edge_ros.node import ERROR, WARN, with_info

COMPRESSED = "sensor_msgs/msg/CompressedImage"
KEPT_S = 10.0  # for so long after us may come what was kept for us


def topics(specs: Iterable[StreamSpec]) -> dict[str, str]:
    """Stream -> relative topic: the usual name of its kind if it is the only one, else `<stream>/<usual name>`; of
    numbers the stream's own, but `joint_states` of the only one that is of joints."""
    specs = tuple(specs)
    usual = {spec.name: TOPICS.get(spec.kind, spec.name) for spec in specs}
    if len(joints := [spec.name for spec in specs if spec.joints]) == 1:
        usual[joints[0]] = "joint_states"
    counts = Counter(usual.values())
    return {name: topic if counts[topic] == 1 else f"{name}/{topic}" for name, topic in usual.items()}


def message_class(type_name: str) -> Any:
    """The class of "sensor_msgs/msg/Image"."""
    package, kind, name = type_name.split("/")
    return getattr(importlib.import_module(f"{package}.{kind}"), name)


class StreamSubscription:
    """One stream's subscription.

    Sensors are best effort, which every publisher satisfies. Sound and commands ask for what such topics usually offer,
    reliable and for commands transient local, and take less where a publisher offers less: see `follow`. It also takes
    sound as AudioChunk, and a vector as Odometry and all else that `from_ros` reads, where it is published as that.

    Args:
        topic: relative; remapped as usual, also for compressed images: `<remapped>/compressed`.
        push: takes each sample.
        refuse: takes the SampleError of each message that holds none.
    """

    def __init__(
        self,
        node: Node,
        spec: StreamSpec,
        topic: str,
        compressed: bool,
        push: Callable[[Sample], Any],
        refuse: Callable[[SampleError], Any],
    ):
        self._node, self.spec = node, spec
        self._push, self._refuse = push, refuse
        self._type_name = COMPRESSED if compressed and spec.kind == "image" else MESSAGE_TYPES[spec.kind]
        self.topic = node.resolve_topic_name(topic) + ("/compressed" if self._type_name == COMPRESSED else "")
        self._offers = self._usual = usual_offer(spec)
        self._came_s = self._sent_ns = 0  # when we did, in steady seconds; when the last command was sent
        self._subscribe()

    def follow(self) -> list[tuple[bytes, str]]:
        """Subscribe anew if publishers offer something else than before. Call it now and then. What is wrong, as
        diagnostics (level, message)."""
        infos = self._node.get_publishers_info_by_topic(self.topic)
        troubles = []
        types = {info.topic_type for info in infos}
        for type_name in readable(self.spec.kind) if self.spec.kind in ("audio", "vector") else ():
            if types == {type_name} != {self._type_name}:
                with contextlib.suppress(ImportError):  # of one that was not built is told below
                    message_class(type_name)
                    self._type_name = type_name
                    self.destroy()
                    self._subscribe()
        if other := sorted(types - {self._type_name}):
            hint = "; see the parameter image_transport" if self.spec.kind == "image" else ""
            troubles.append(
                (ERROR, f"{self.topic} is published as {', '.join(other)}, expected {self._type_name}{hint}")
            )
        qos = [info.qos_profile for info in infos if info.topic_type == self._type_name]
        if qos:
            reliable = self._usual[0] and all(q.reliability == Reliability.RELIABLE for q in qos)
            # Never back to what is kept: who kept an old command would give it again, after it was countermanded.
            kept = self._offers[1] and all(q.durability == Durability.TRANSIENT_LOCAL for q in qos)
            if (reliable, kept) != self._offers:
                self._offers = reliable, kept
                self.destroy()
                self._subscribe()
            if self._offers != self._usual:
                lacking = [
                    n for n, has, want in zip(("reliable", "transient local"), self._offers, self._usual) if want > has
                ]
                troubles.append(
                    (WARN, f"{self.topic}: QoS mismatch: its publisher does not offer {' and '.join(lacking)}")
                )
        return troubles

    def destroy(self) -> None:
        self._node.destroy_subscription(self._subscription)

    def _subscribe(self) -> None:
        reliable, kept = self._offers
        # A quarter of a second's samples; of sound, where each one counts, two seconds'.
        depth = max(5, math.ceil(self.spec.rate_hz * (2 if self.spec.kind == "audio" else 0.25)))
        qos = QoSProfile(
            depth=depth,
            reliability=Reliability.RELIABLE if reliable else Reliability.BEST_EFFORT,
            durability=Durability.TRANSIENT_LOCAL if kept else Durability.VOLATILE,
        )
        kind, self._came_s = message_class(self._type_name), time.monotonic()
        take = with_info(self._on_command) if self.spec.latched else self._on_message
        self._subscription = self._node.create_subscription(kind, self.topic, take, qos)

    def _on_command(self, msg: Any, info: Mapping[str, Any]) -> None:
        """The one that comes last counts. But each publisher may keep one for whoever comes later, and these come in no
        order: at first, the one that was sent last. Not later, since clocks differ."""
        sent_ns = info.get("source_timestamp", 0)
        if sent_ns < self._sent_ns and time.monotonic() - self._came_s < KEPT_S:
            text = f"{self.topic}: left out, since one that was sent later was here already: {msg}"
            self._node.get_logger().warning(text)
            return
        self._sent_ns = sent_ns
        self._on_message(msg)

    def _on_message(self, msg: Any) -> None:
        arrival_ns = self._node.get_clock().now().nanoseconds
        try:
            self._push(from_ros(self.spec, self._type_name, msg, arrival_ns))
        except SampleError as error:
            self._refuse(error)
        except Exception as error:  # whatever it is: one message must not end the node
            got = f"one that raises {type(error).__name__}: {error}"
            self._refuse(SampleError(self.spec.name, f"a usable {self._type_name}", got))


def usual_offer(spec: StreamSpec) -> tuple[bool, bool]:
    """Reliable? Transient local? As the topics of this kind usually are."""
    return spec.kind in ("audio", "text"), spec.kind == "text"
