"""How fast a robot goes and turns, from the last scans of its LiDAR.

    python -m training.train lidar_velocity --data FOLDER         # learns by the logs that data.held_out does not name
    python -m training.evaluate lidar_velocity --data FOLDER --json

Every log is seen in a mirror, too. Stamps are true, so a scan that was lost, or late, shows in dt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.replay import Tick
from mm_edge.types import NS, Sample, Scan, StreamSpec
from training.batches import Batch
from training.protocols import learned_from
from training.real_data import LaserLog, read_carmen
from training.recipe import Recipe
from training.supervised import build_model, words
from training.tables import Steps, Tables, build_tables
from training.windows import TERMS, Change, Windows, loss, r2, reference, scored
from training.windows import exam as windows_of

__all__ = ["TERMS", "build_model", "evaluate", "exam", "loss", "reference", "score", "supply", "words"]

MEASURES = {"linear": "R2 of the linear velocity", "angular": "R2 of the angular velocity"}


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Windows:
    logs = read_carmen(Path(recipe.data["folder"]))
    learned = [logs[name] for name in learned_from(recipe, logs)]
    tables = [tables_of(log, recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms) for log in learned]
    return Windows([*tables, *map(mirrored, tables)], recipe)


def tables_of(
    log: LaserLog, streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float, change: Change = list
) -> Tables:
    """A tick at each scan whose stamp can be true. "previous": the last velocity that was known before (0)."""
    velocity = np.stack([log.linear_mps, log.angular_radps], -1)
    (spec,), events, previous = streams, list[Sample | Tick](), np.zeros(2, np.float32)
    for i in np.flatnonzero(log.rising):
        stamp_ns = round((log.stamps_s[i] - log.stamps_s[0] + 1) * NS)
        scan = Scan(log.ranges[i], log.angle_min, log.angle_increment, 0.0, log.range_max_m)
        known, target = np.isfinite(velocity[i]).all(), np.nan_to_num(velocity[i]).astype(np.float32)
        labels = {"target": target, "known": np.float32(known), "previous": previous}
        events += [Sample(spec.name, stamp_ns, stamp_ns, scan), Tick(stamp_ns, labels)]
        previous = target if known else previous
    return build_tables(change(events), streams, period_s, max_gap_ms, None, lambda tick: tick.labels)


def mirrored(log: Tables) -> Tables:
    """Left and right changed."""
    ((name, steps),), turn = log.steps.items(), np.float32([1, -1])
    x = np.roll(steps.x[..., ::-1], 1, -1)  # beam 0 is straight ahead
    labels = {**log.labels, **{key: log.labels[key] * turn for key in ("target", "previous")}}
    return Tables(**{**vars(log), "steps": {name: Steps(x, steps.dt, steps.reset, steps.tick)}, "labels": labels})


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """R2 of each log of the folder (or of those named): [linear, angular]; of the last velocity known before; and of
    the model, where 0 is as good as that; and whether its name is one of those that were held out of the training (of
    another folder's logs, which need not have the same names, that says nothing)."""
    logs = read_carmen(folder)
    if unknown := set(only) - logs.keys():
        raise ValueError(f"{folder}: expected logs among {sorted(logs)}, got {sorted(unknown)}")
    scores = {}
    for name in only or logs:
        log = tables_of(logs[name], bundle.streams, bundle.tick.period_ms / 1e3, bundle.max_gap_ms)
        scores[name] = {"held_out": name in bundle.training["data"]["held_out"], **scored(bundle, log)}
    return {"logs": scores}


def exam(recipe: Recipe, change: Change) -> Iterator[Batch]:
    """Windows of the logs that data.held_out names."""
    logs = read_carmen(Path(recipe.data["folder"]))
    learned = learned_from(recipe, logs)
    held_out = [log for name, log in logs.items() if name not in learned]
    if not held_out:
        raise ValueError(f"data.held_out: expected some of {sorted(logs)} to be examined by, got none")
    period_s = recipe.tick["period_ms"] / 1e3
    tables = [tables_of(log, recipe.streams, period_s, recipe.max_gap_ms, change) for log in held_out]
    return windows_of(tables, recipe.train.ticks, every=2)


def score(said: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float | None]:
    """said (n, 2), labels (n, ...) -> each of MEASURES."""
    return dict(zip(MEASURES, r2(said, labels["target"]) or ()))
