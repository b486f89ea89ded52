"""What captions beside it cost the drive node: from a camera frame's stamp to the action's, in ms, with and without.

An episode of the simulator is recorded, and replayed in real time to the shipped drive model, alone and with a caption
node that listens to the same camera and never stops to speak. Both take turns, round by round; the first second of each
does not count. `raise_ms` and `raise_percent` are of the p99.

    .venv/bin/python -m tests.benchmarks.beside --json
"""

from __future__ import annotations

import argparse
import bisect
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import ros
from geometry_msgs.msg import TwistStamped
from sensor_msgs.msg import PointField
from std_msgs.msg import String

sys.path.insert(0, ros.ROS.env["PYTHONPATH"].split(":")[0])

from mm_edge_ros.sim_node import STREAMS
from mm_edge_ros.streams import message_class

from mm_edge.bundle import SHIPPED, SHIPPED_VLM, Bundle
from mm_edge.messages import MESSAGE_TYPES, TOPICS, to_ros
from mm_edge.sim.episode import Episode, ExpertDriver
from mm_edge.sim.sensors import KINDS
from mm_edge.types import NS, Sample

WARM_UP_S = 1.0


def record(seconds: float) -> list[Sample]:
    """What a robot senses that the expert drives, in the order of arrival: the first episode that is long enough."""
    for seed in count():
        episode, samples = Episode(seed), list[Sample]()
        episode.run(ExpertDriver(episode), samples.append)
        if samples[-1].arrival_ns - episode.start_ns >= seconds * NS:
            return [sample for sample in samples if sample.arrival_ns - episode.start_ns < seconds * NS]
    raise AssertionError


class Replay:
    """The samples as topics, and what the drive node makes of them."""

    def __init__(self, graph: ros.Graph, samples: Sequence[Sample]):
        self._graph, self._samples = graph, samples
        self._anchor = Bundle.read(SHIPPED).tick.anchor
        kinds = {name: message_class(MESSAGE_TYPES[KINDS[name]]) for name in STREAMS}
        self._messages = {name: kind() for name, kind in kinds.items()}
        self._publishers = {
            name: graph.node.create_publisher(kinds[name], TOPICS[KINDS[name]], qos)
            for name, (qos, _) in STREAMS.items()
        }
        self._actions = graph.subscribe(TwistStamped, "cmd_vel_raw")
        self.outputs = graph.subscribe(String, "edge/output")

    def round(self) -> list[float]:
        """The latency of each action in ms."""
        start_ns = time.time_ns()
        offset_ns = start_ns - self._samples[0].arrival_ns
        self._actions.clear()
        self.outputs.clear()
        for sample in self._samples:
            while (early_ns := sample.arrival_ns + offset_ns - time.time_ns()) > 0:
                self._graph.spin(early_ns / NS)
            msg, kind = self._messages[sample.stream], KINDS[sample.stream]
            to_ros(kind, msg, sample.stamp_ns + offset_ns, sample.data, sample.stream, PointField)
            self._publishers[sample.stream].publish(msg)
        end_s = time.monotonic() + 0.5  # for what is on its way
        self._graph.wait(lambda: time.monotonic() > end_s, "end")
        return self._latencies_ms(start_ns + round(WARM_UP_S * NS))

    def _latencies_ms(self, since_ns: int) -> list[float]:
        """An action belongs to the tick before it; of each frame, the first one counts."""
        acted_ns = [msg.header.stamp.sec * NS + msg.header.stamp.nanosec for msg in self._actions]
        latency_ms: dict[int, float] = {}
        for output in map(json.loads, (msg.data for msg in self.outputs)):
            at = bisect.bisect_left(acted_ns, output["stamp_ns"])
            if output["action"] and output["stamp_ns"] >= since_ns and at < len(acted_ns):
                frame_ns = output["sources"][self._anchor]
                latency_ms.setdefault(frame_ns, (acted_ns[at] - frame_ns) / 1e6)
        return [*latency_ms.values()]


def measure(vlm: Path, rounds: int, seconds: float) -> dict[str, Any]:
    samples = record(seconds)
    latency_ms: dict[str, list[list[float]]] = {"alone": [], "beside": []}
    with tempfile.TemporaryDirectory() as folder, ros.ros_graph(Path(folder)) as graph:
        graph.nodes.start("edge_node")
        replay = Replay(graph, samples)
        ticks, captions = graph.subscribe(String, "caption/output"), graph.subscribe(String, "caption")
        graph.wait(lambda: replay.outputs, "drive node", 60)
        replay.round()  # all caches warm
        for _ in tqdm(range(rounds), "rounds", disable=not sys.stderr.isatty()):
            latency_ms["alone"].append(replay.round())
            graph.nodes.start("caption_node", {"bundle": vlm.resolve(), "rate_hz": 100.0})
            ticks.clear()
            graph.wait(lambda: ticks, "caption node", 60)
            latency_ms["beside"].append(replay.round())
            graph.nodes.stop("caption_node")
    result: dict[str, Any] = {}
    for name, of_rounds in latency_ms.items():
        p50, p99 = np.percentile(np.concatenate(of_rounds), [50, 99])
        rounds_p99_ms = [round(float(np.percentile(values, 99)), 2) for values in of_rounds]
        result[name] = {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "rounds_p99_ms": rounds_p99_ms}
        result[name]["actions"] = sum(map(len, of_rounds))
    alone, beside = result["alone"]["p99_ms"], result["beside"]["p99_ms"]
    result["beside"]["captions_per_s"] = round(len(captions) / (rounds * seconds), 2)
    return {**result, "raise_ms": round(beside - alone, 2), "raise_percent": round(100 * (beside / alone - 1), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vlm", type=Path, default=SHIPPED_VLM, help="the bundle that speaks (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    result = measure(args.vlm, args.rounds, args.seconds)
    if args.json:
        print(json.dumps(result))
        return
    for name in ("alone", "beside"):
        print("{:<8}{p50_ms:8.2f} ms p50{p99_ms:8.2f} ms p99{actions:7} actions".format(name, **result[name]))
    print("raised by {raise_ms} ms, {raise_percent} %".format(**result))


if __name__ == "__main__":
    main()
