"""A day in the life of a pipeline, faster than real time: `python -m tests.soak --hours 24 [--json]`

Random sensors and commands drive the shipped model; all the time something is wrong with one stream or another, now
and then the robot's clock jumps, or nothing ticks for seconds. Ends with status 1 unless

- no exception came out,
- every output has its stamp, masks, and either a finite action within the limits or a reason,
- resident memory grew by less than 1 % after the first hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.commands.bench import samples
from mm_edge.errors import EdgeError
from mm_edge.faults import KINDS, Fault, Faults, parse_fault
from mm_edge.pipeline import Pipeline
from mm_edge.types import NS, Output, Sample

HOUR_S = 3600
VALUES = {"drop": "=0.3", "delay": "=200ms", "jitter": "=50ms", "skew": "=300ms", "jump": "=-5s", "noise": "=2"}


def soak(hours: float, seed: int = 0) -> dict[str, Any]:
    """Counts of what happened; the least resident memory within each hour (or tenth, if less): what comes and goes with
    a frame is no growth, what leaks never goes; and by how much that grew since the second of them."""
    rng = np.random.default_rng(seed)
    bundle = Bundle.read(SHIPPED)
    pipeline = Pipeline(bundle, "cpu")
    for i in range(100_000):  # CPython's table of strings that come and go grows once, by 2 MB: now, not in hour six
        sys.intern(f"come and gone {i}")
    kinds = {spec.name: spec.kind for spec in bundle.streams}
    sensors = {spec.name: samples(spec, bundle) for spec in bundle.streams if not spec.latched}
    period_ns = round(bundle.tick.period_ms * 1e6)
    counts: Counter[str] = Counter()
    t_ns, offset_ns = NS, 0  # the sensors' clock, and the robot's beside it
    faults, until_ns = Faults([], kinds), 0
    bar = tqdm(total=round(hours * HOUR_S), unit=" s", unit_scale=True)
    look_ns = hour_ns = round(min(1.0, hours / 10) * HOUR_S * NS)
    hourly_mb, least_mb = list[float](), math.inf
    waiting: list[Sample] = []
    while t_ns < NS + hours * HOUR_S * NS:
        if t_ns >= until_ns:
            until_ns = t_ns + round(rng.uniform(1, 20) * NS)
            faults = Faults(_draw(kinds, rng), kinds, int(rng.integers(2**32)), t_ns)
            counts["faults"] += len(faults.faults)
        before_ns, t_ns = t_ns, t_ns + period_ns
        if rng.random() < 1e-3:  # nothing ticks for a while, and no sample comes
            before_ns, t_ns = t_ns, t_ns + round(rng.uniform(0, 5) * NS)
            before_ns = max(before_ns, t_ns - period_ns)
            counts["stalls"] += 1
        if rng.random() < 1e-4:
            offset_ns += round(rng.uniform(-10, 10) * NS)
            counts["clock jumps"] += 1
        arrived = [changed for sensor in sensors.values() for one in sensor(before_ns, t_ns) for changed in faults(one)]
        if rng.random() < 0.01:
            command = rng.choice(["stop", "drive to the red ball", "find the sound", "fly to the moon"])
            arrived.append(Sample("text", t_ns, t_ns, str(command)))
        waiting += arrived
        for sample in [one for one in waiting if one.arrival_ns <= t_ns]:
            sample = sample._replace(stamp_ns=sample.stamp_ns + offset_ns, arrival_ns=sample.arrival_ns + offset_ns)
            counts["samples"] += 1
            counts["refused"] += not pipeline.push(sample)
        waiting = [one for one in waiting if one.arrival_ns > t_ns]
        output = pipeline.tick(t_ns + offset_ns)
        _check(output, pipeline, t_ns + offset_ns)
        counts["ticks"] += 1
        counts["acted"] += output.action is not None
        if counts["ticks"] % 15 == 0:
            pipeline.health(t_ns + offset_ns)
            bar.update(round((t_ns - NS) / NS) - bar.n)
            least_mb = min(least_mb, resident_mb())
        if t_ns - NS >= look_ns:
            look_ns += hour_ns
            hourly_mb.append(round(least_mb, 1))
            least_mb = math.inf
    bar.close()
    growth = round(hourly_mb[-1] / hourly_mb[min(1, len(hourly_mb) - 1)] - 1, 4)
    return {"hours": hours, **counts, "resident_mb": hourly_mb, "growth": growth}


def _draw(kinds: dict[str, str], rng: np.random.Generator) -> list[Fault]:
    """None to three faults that make sense, which last until the next are drawn."""
    faults = []
    for _ in range(rng.integers(4)):
        stream, kind = str(rng.choice(list(kinds))), str(rng.choice(list(KINDS)))
        fault = parse_fault(f"{stream}:{kind}{VALUES.get(kind, '')}@0")
        with contextlib.suppress(EdgeError):
            Faults([fault], kinds)
            faults.append(fault)
    return faults


def _check(output: Output, pipeline: Pipeline, now_ns: int) -> None:
    assert output.stamp_ns == now_ns
    assert output.mask.keys() == output.ages_s.keys() == pipeline.specs.keys()
    assert (output.action is None) == bool(output.reasons), output
    if output.action is not None:
        spec = pipeline.bundle.outputs.action
        values = output.action.values
        assert np.isfinite(values).all() and (values >= spec.min).all() and (values <= spec.max).all(), output


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0, help="of robot time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    result = soak(args.hours, args.seed)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<14}{value}" for name, value in result.items()))
    return int(result["growth"] >= 0.01)


if __name__ == "__main__":
    sys.exit(main())
