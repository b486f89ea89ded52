"""How long it takes from the end of a spoken "stop" until the robot stands, over real ROS 2, in ms.

The simulated robot drives; somebody whom the model never heard says "stop" in the room. Each node is a process of its
own: simulator, model, watchdog, and the one that hears words. A stop counts from the last loud moment of the recording
until the robot stands for 0.3 s; it is missed if no "stop" was heard within SECONDS. Then the robot is told to drive
on. Where the episode ended, or the robot stood before, it counts as nothing. Without --data a tone is the voice and a
toy that knows it hears, while it sounds: before its end.

`ear_percent_of_a_core` is the processor time that the node took which hears, all that ROS costs it included.

    .venv/bin/python -m tests.benchmarks.spoken_stop [--data FOLDER] --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import ros
from geometry_msgs.msg import TwistStamped
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import String
from toy_ear import STOP_HZ, tone, write_toy_ear

from mm_edge.bundle import SHIPPED_WORDS, Bundle
from mm_edge.messages import to_ros
from mm_edge.types import Audio
from training.hearing import RATE_HZ, held_out
from training.real_data import read_words

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
SECONDS = 3.0
FRAME, LOUD = 320, 0.02  # samples; share of the loudest frame's power: what is softer is no word any more
PEAK = 0.5  # of the voice in the microphones
DRIVES_MPS = 0.15  # from when on it counts as driving


def stops(folder: Path, bundle: Bundle) -> list[np.ndarray]:
    """What those say that the model never heard, int16 (n,)."""
    rule = bundle.training["data"]["held_out"]
    clips = [clip for clip in read_words(folder) if clip.word == "stop" and held_out(clip.speaker, rule)]
    return [np.int16(32767 * PEAK * clip.samples / np.abs(clip.samples).max()) for clip in clips]


def end_s(samples: np.ndarray) -> float:
    """Of the word in a recording."""
    frames = samples[: len(samples) // FRAME * FRAME].astype(np.float64).reshape(-1, FRAME)
    power = np.square(frames).mean(1)
    return (int(np.flatnonzero(power > LOUD * power.max())[-1]) + 1) * FRAME / RATE_HZ


class Room:
    """The robot in its rooms, and what a person there hears, sees and says."""

    def __init__(self, graph: ros.Graph):
        self._graph = graph
        self._reports = graph.subscribe(String, "episode", QoSProfile(depth=100))
        self._wheels = graph.subscribe(TwistStamped, "cmd_vel")
        self.events = graph.subscribe(String, "events")
        self._voice = graph.node.create_publisher(PointCloud2, "voice", QoSProfile(depth=1))
        self._person = graph.node.create_publisher(String, "command_text", LATCHED)
        self._text = ""

    def wait_until_it_drives(self) -> None:
        """Well in an episode, and for some time."""
        since_s, told_s = None, time.monotonic()

        def drives() -> bool:
            nonlocal since_s, told_s
            for msg in self._reports:
                report = json.loads(msg.data)
                self._text = report.get("text", self._text) if report["event"] == "start" else self._text
            self._reports.clear()
            now_s, moves = time.monotonic(), bool(self._wheels) and self._wheels[-1].twist.linear.x >= DRIVES_MPS
            self._wheels.clear() if len(self._wheels) > 100 else None
            since_s = (since_s or now_s) if moves else None
            if since_s is None and self._text and now_s - told_s > 1.0:  # again: it stood because of us
                told_s = now_s
                self._person.publish(String(data=self._text))
            return since_s is not None and now_s - since_s > 0.4

        self._graph.wait(drives, "driving robot", 120)

    def say(self, samples: np.ndarray) -> float | None:
        """ms from the word's end until it stood; None if no stop was heard, NaN if there is nothing to be told."""
        msg, heard = PointCloud2(), {}
        to_ros("audio", msg, time.time_ns(), Audio(samples[:, None], 0, RATE_HZ), "person", PointField)
        self._reports.clear()
        told = len(self.events)
        self._voice.publish(msg)
        until_s = time.monotonic() + len(samples) / RATE_HZ + SECONDS

        def over() -> bool:
            for report in self._reports:
                fields = json.loads(report.data)
                heard.setdefault(fields["event"], fields)
            for fields in (json.loads(event.data) for event in self.events[told:]):
                heard.setdefault(fields["label"], fields)
            return {"stood", "stop"} <= heard.keys() or "end" in heard or time.monotonic() > until_s

        self._graph.wait(over, "end of the wait", SECONDS + 5)
        if "end" in heard or "voice" not in heard:
            return float("nan")  # nothing to be said of it
        if not {"stood", "stop"} <= heard.keys():
            return None
        if heard["stood"]["stamp_ns"] < heard["stop"]["stamp_ns"]:
            return float("nan")  # it stood anyway
        return (heard["stood"]["stamp_ns"] - heard["voice"]["start_ns"]) / 1e6 - 1e3 * end_s(samples)


def measure(said: list[np.ndarray], words: Path, n: int) -> dict[str, Any]:
    rng, delays_ms, missed, void = np.random.default_rng(0), list[float](), 0, 0
    with tempfile.TemporaryDirectory() as logs, ros.ros_graph(Path(logs)) as graph:
        room = Room(graph)
        for node in ("edge_node", "watchdog_node"):
            graph.nodes.start(node)
        ear = graph.nodes.start("events_node", {"bundle": words.resolve(), "commands": ["stop=stop"]})
        graph.nodes.start("sim_node", {"seed": 900_000, "pause_s": 1.0})
        room.wait_until_it_drives()
        begun_s, spent_s = time.monotonic(), cpu_s(ear.pid)
        with tqdm(total=n, desc="stops", disable=not sys.stderr.isatty()) as bar:
            while len(delays_ms) + missed < n and void < 2 * n:
                room.wait_until_it_drives()
                delay_ms = room.say(said[rng.integers(len(said))])
                if delay_ms is None:
                    missed += 1
                elif np.isnan(delay_ms):
                    void += 1
                    continue
                else:
                    delays_ms.append(delay_ms)
                bar.update()
        minutes, spent_s = (time.monotonic() - begun_s) / 60, cpu_s(ear.pid) - spent_s
        told = [json.loads(msg.data)["label"] for msg in room.events]
    p50, p95 = np.percentile(delays_ms, [50, 95]) if delays_ms else (np.nan, np.nan)
    return {
        "stops": len(delays_ms) + missed, "missed": missed, "void": void,
        "p50_ms": round(p50, 1), "p95_ms": round(p95, 1),
        "stops_heard": told.count("stop"), "other_words_heard": len(told) - told.count("stop"),
        "minutes": round(minutes, 2), "ear_percent_of_a_core": round(100 * spent_s / (60 * minutes), 1),
    }  # fmt: skip


def cpu_s(pid: int) -> float:
    """What a process has spent."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the archive of spoken words")
    parser.add_argument("--words", type=Path, default=SHIPPED_WORDS, help="the bundle that hears (%(default)s)")
    parser.add_argument("--stops", type=int, default=60, help="how many (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            said, words = stops(args.data, Bundle.read(args.words)), args.words
        else:
            said, words = [tone(STOP_HZ, 0.5, PEAK)], Path(folder) / "ear"
            write_toy_ear(words)
        result = measure(said, words, args.stops)
    if args.json:
        print(json.dumps(result))
    else:
        print("{stops} stops: {missed} missed, p50 {p50_ms} ms, p95 {p95_ms} ms".format(**result))


if __name__ == "__main__":
    main()
