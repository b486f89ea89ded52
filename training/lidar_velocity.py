"""How fast a robot goes and turns, from the last scans of its LiDAR.

    python -m training.train lidar_velocity --data FOLDER         # learns by the logs that data.held_out does not name
    python -m training.evaluate lidar_velocity --data FOLDER --json

Every log is seen in a mirror, too. Stamps are true, so a scan that was lost, or late, shows in dt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.replay import Tick
from mm_edge.types import NS, Sample, Scan, StreamSpec
from training.real_data import LaserLog, read_carmen
from training.recipe import Recipe
from training.supervised import build_model, words
from training.tables import Steps, Tables, build_tables
from training.windows import Windows, loss, predict, r2, window_ends

__all__ = ["build_model", "evaluate", "loss", "supply", "words"]


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Windows:
    logs = read_carmen(Path(recipe.data["folder"]))
    learned = [log for name, log in logs.items() if name not in recipe.data["held_out"]]
    tables = [tables_of(log, recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms) for log in learned]
    return Windows([*tables, *map(mirrored, tables)], recipe)


def tables_of(log: LaserLog, streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float) -> Tables:
    """A tick at each scan whose stamp can be true."""
    velocity = np.stack([log.linear_mps, log.angular_radps], -1)
    (spec,), events = streams, list[Sample | Tick]()
    for i in np.flatnonzero(log.rising):
        stamp_ns = round((log.stamps_s[i] - log.stamps_s[0] + 1) * NS)
        scan = Scan(log.ranges[i], log.angle_min, log.angle_increment, 0.0, log.range_max_m)
        known = np.isfinite(velocity[i]).all()
        labels = {"target": np.nan_to_num(velocity[i]).astype(np.float32), "known": np.float32(known)}
        events += [Sample(spec.name, stamp_ns, stamp_ns, scan), Tick(stamp_ns, labels)]
    return build_tables(events, streams, period_s, max_gap_ms, None, lambda tick: tick.labels)


def mirrored(log: Tables) -> Tables:
    """Left and right changed."""
    (name, steps), target = next(iter(log.steps.items())), log.labels["target"] * np.float32([1, -1])
    x = np.roll(steps.x[..., ::-1], 1, -1)  # beam 0 is straight ahead
    labels = {**log.labels, "target": target}
    return Tables(**{**vars(log), "steps": {name: Steps(x, steps.dt, steps.reset, steps.tick)}, "labels": labels})


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """R2 of each log of the folder (or of those named): [linear, angular]; and of the velocity one scan before."""
    logs, ticks = read_carmen(folder), bundle.training["ticks"]
    if unknown := set(only) - logs.keys():
        raise ValueError(f"{folder}: expected logs among {sorted(logs)}, got {sorted(unknown)}")
    scores = {}
    for name in only or logs:
        log = tables_of(logs[name], bundle.streams, bundle.tick.period_ms / 1e3, bundle.max_gap_ms)
        ends = [end for end in window_ends(log, ticks) if log.labels["known"][end - 2]]
        newest = np.array(ends, int) - 1
        true, before = log.labels["target"][newest], log.labels["target"][newest - 1]
        said = predict(bundle, log, ends, ticks)
        scores[name] = {"windows": len(ends), "r2": r2(said, true), "r2_previous": r2(before, true)}
    return {"logs": scores}
