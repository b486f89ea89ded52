"""What aligning costs a message: `python -m tests.benchmarks.aligner [--json]`

Four streams, a camera at 30 Hz, a microphone at 50, a LiDAR at 10 and an IMU at 200, and a window at 30 Hz. All is
thread CPU time. `us_per_message` is everything, pushes and windows, divided by messages; `push_us` is what a callback
pays, one read of the clock included; `worst_ms` the longest single call. The same again with windows ten times as long,
of which a window has to copy more, and with contents compared, by which frozen sensors are found.

Where `message_filters` can be imported (a sourced ROS 2), its ApproximateTimeSynchronizer takes the same messages in
the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_edge.align import Aligner
from mm_edge.types import NS, Audio, Sample, Scan, StreamSpec

TICK_NS = NS // 30
SPECS = (
    StreamSpec("camera", "image", (96, 128, 3), 30, 300, frozen_ms=200),
    StreamSpec("audio", "audio", (3, 24, 7), 50, 250, window_ms=152, sample_rate_hz=16000, channels=2, frozen_ms=100),
    StreamSpec("scan", "scan", (2, 120), 10, 400, range_max_m=6, frozen_ms=150),
    StreamSpec("imu", "imu", (20, 7), 200, 200, window_ms=100, frozen_ms=60),
)
DATA = {
    "camera": lambda i, random: random.integers(0, 255, (480, 640, 3), np.uint8),
    "audio": lambda i, random: Audio(random.integers(-3000, 3000, (320, 2), np.int16), 320 * i, 16000),
    "scan": lambda i, random: Scan(random.uniform(0, 6, 360).astype(np.float32), -3.14, 0.0175, 0.05, 6.0),
    "imu": lambda i, random: random.normal(size=6).astype(np.float32),
}


def messages(seconds: float) -> list[list[Sample]]:
    """What arrives between two windows, in order, for each of them."""
    random = np.random.default_rng(0)
    pools = {spec.name: [DATA[spec.name](i, random) for i in range(8)] for spec in SPECS}
    samples = []
    for spec in SPECS:
        for i in range(int(seconds * spec.rate_hz)):
            stamp_ns = NS + round(i * NS / spec.rate_hz)
            data = pools[spec.name][i % 8]
            data = data._replace(first_sample=320 * i) if isinstance(data, Audio) else data
            samples.append(Sample(spec.name, stamp_ns, stamp_ns + int(random.integers(1, 10)) * 1_000_000, data))
    samples.sort(key=lambda sample: sample.arrival_ns)
    windows: list[list[Sample]] = [[] for _ in range(int(seconds * NS) // TICK_NS + 2)]
    for sample in samples:
        windows[(sample.arrival_ns - NS) // TICK_NS].append(sample)
    return windows


class Ours:
    def __init__(self, long: bool = False, frozen: bool = False):
        specs = [
            replace(spec, window_ms=spec.window_ms * (10 if long else 1), frozen_ms=spec.frozen_ms if frozen else 0)
            for spec in SPECS
        ]
        if long:
            specs[3] = replace(specs[3], shape=(200, 7))
        self._aligner = Aligner(specs, TICK_NS / NS)

    def __call__(self, number: int, arrived: list[Sample]) -> None:
        for sample in arrived:
            self._aligner.push(sample)
        self._aligner.window(NS + (number + 1) * TICK_NS)

    def calls_ns(self, number: int, arrived: list[Sample]) -> tuple[list[int], int]:
        """The same, with the thread CPU time of each push and of the window."""
        pushes, clock = [], time.thread_time_ns
        for sample in arrived:
            begun = clock()
            self._aligner.push(sample)
            pushes.append(clock() - begun)
        begun = clock()
        self._aligner.window(NS + (number + 1) * TICK_NS)
        return pushes, clock() - begun


class MessageFilters:
    """The Python ApproximateTimeSynchronizer, as it is usually set up: a queue of 10 and a slop of 50 ms."""

    def __init__(self) -> None:
        from message_filters import ApproximateTimeSynchronizer, SimpleFilter

        self._inputs = {spec.name: SimpleFilter() for spec in SPECS}
        synchronizer = ApproximateTimeSynchronizer(list(self._inputs.values()), 10, 0.05)
        synchronizer.registerCallback(lambda *_: None)

    def __call__(self, number: int, arrived: list[tuple[str, SimpleNamespace]]) -> None:
        for stream, message in arrived:
            self._inputs[stream].signalMessage(message)


def as_message(sample: Sample) -> tuple[str, SimpleNamespace]:
    """Its stream, and what has a header with its stamp."""
    sec, nanosec = divmod(sample.stamp_ns, NS)
    return sample.stream, SimpleNamespace(header=SimpleNamespace(stamp=SimpleNamespace(sec=sec, nanosec=nanosec)))


def measure(seconds: float) -> dict[str, float | None]:
    """All forms take turns at the same messages, second by second."""
    forms: dict[str, Callable[[int, list[Any]], None]] = {
        "ours": Ours(),
        "long": Ours(long=True),
        "frozen": Ours(frozen=True),
    }
    with contextlib.suppress(ImportError):
        forms["peer"] = MessageFilters()
    spent_ns, single = Counter[str](), Ours()
    pushes_ns, windows_ns = list[int](), list[int]()
    windows = messages(seconds)
    for second in tqdm(range(0, len(windows), NS // TICK_NS), unit=" s", leave=False):
        numbered = list(enumerate(windows[second : second + NS // TICK_NS], second))
        for name, form in forms.items():
            given = [(n, list(map(as_message, arrived))) for n, arrived in numbered] if name == "peer" else numbered
            begun = time.thread_time_ns()
            for number, arrived in given:
                form(number, arrived)
            spent_ns[name] += time.thread_time_ns() - begun
        for number, arrived in numbered:
            pushed, window = single.calls_ns(number, arrived)
            pushes_ns += pushed
            windows_ns.append(window)
    n = len(pushes_ns)
    each_us = {name: spent / n / 1e3 for name, spent in spent_ns.items()}
    return {
        "messages": n,
        "us_per_message": round(each_us["ours"], 3),
        "messages_per_s": round(1e6 / each_us["ours"]),
        "worst_ms": round(max(*pushes_ns, *windows_ns) / 1e6, 3),
        "push_us": round(statistics.median(pushes_ns) / 1e3, 3),
        "us_per_message_long_windows": round(each_us["long"], 3),
        "comparing_contents_us": round(each_us["frozen"] - each_us["ours"], 3),
        "message_filters_us": round(each_us["peer"], 3) if "peer" in each_us else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of sensor data (%(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    result = measure(args.seconds)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<28}{'-' if value is None else value:>12}")


if __name__ == "__main__":
    main()
