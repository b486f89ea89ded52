"""How soon the wheels are told to stand: from each fault to the first zero command on cmd_vel, in ms.

The processes, the faults and the measurement are those of tests/test_ros_faults.py.

    .venv/bin/python -m tests.benchmarks.watchdog --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import ros
from test_ros_faults import DEADLINE_MS, FAULTS, Drive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=10, help="how often each fault strikes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    results = {}
    if not args.json:
        print(f"deadline {DEADLINE_MS:.0f} ms       p50 ms  max ms  deaf ms  times")
    for name, (strike, mend) in FAULTS.items():
        delays = []
        with tempfile.TemporaryDirectory() as folder, ros.ros_graph(Path(folder) / "logs") as graph:
            drive = Drive(graph, Path(folder))
            drive.sense()
            for _ in range(args.repeat):
                drive.wait_until_driving()
                delays.append(drive.wheels.stop_delay(lambda: strike(drive)))  # noqa: B023
                mend(drive)
        delays_ms = np.array(delays) * 1e3
        results[name] = {
            "p50_ms": round(float(np.median(delays_ms[:, 0])), 1),
            "max_ms": round(float(delays_ms[:, 0].max()), 1),
            "deaf_ms": round(float(delays_ms[:, 1].max()), 1),  # the longest pause of the process that listens
            "repeat": args.repeat,
        }
        if not args.json:
            print(f"{name:<20}" + "{p50_ms:8.1f}{max_ms:8.1f}{deaf_ms:9.1f}{repeat:7}".format(**results[name]))
    if args.json:
        print(json.dumps({"deadline_ms": DEADLINE_MS, "faults": results}))


if __name__ == "__main__":
    main()
