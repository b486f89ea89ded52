"""A car's speed and yaw rate a second ahead, from a second of its IMU and CAN messages as they came: with true jitter.

    python -m training.train imu_can --data FOLDER              # learns by the first data.learned of each segment
    python -m training.evaluate imu_can --data FOLDER --json

A tick at each IMU sample, on which the newest CAN message, if there is one, is new. The liquid cells get the true dt.
The model says by how much both change: no spike tells 25.1 m/s from 25.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.replay import Tick
from mm_edge.types import NS, Sample, StreamSpec
from training.batches import Batch
from training.protocols import motion
from training.real_data import Segment, Series, read_comma
from training.recipe import Recipe
from training.supervised import build_model, words
from training.tables import Tables, build_tables
from training.windows import TERMS, Change, Windows, loss, predict, r2, window_ends
from training.windows import exam as windows_of

__all__ = ["TERMS", "build_model", "evaluate", "exam", "loss", "score", "supply", "words"]

# Of what a model says, and nothing else: of the speed itself it need not know how great it is.
MEASURES = {"speed": "R2 of the change of the speed in a second", "yaw": "R2 of the change of the yaw rate in a second"}

HORIZON_S = 1.0
EVERY_S = 0.1  # a window to be scored


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Windows:
    segments, share = read_comma(Path(recipe.data["folder"])), recipe.data["learned"]
    period_s = recipe.tick["period_ms"] / 1e3
    logs = [
        tables_of(segment, recipe.streams, period_s, recipe.max_gap_ms, (0, share)) for segment in segments.values()
    ]
    return Windows(logs, recipe)


def tables_of(
    segment: Segment, streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float, part: tuple[float, float],
    change: Change = list,
) -> Tables:  # fmt: skip
    """Of the part of a segment between two shares of its time; what is asked lies within the part, too. Nothing is
    known before it was measured: gyro and steering are the newest of each instant."""
    modalities, stamps_s = {spec.name: spec for spec in streams}, segment.accel.stamps_s
    first_s, length_s = stamps_s[0], stamps_s[-1] - stamps_s[0]
    begin_s, end_s = (first_s + share * length_s for share in part)
    at_s = stamps_s[(stamps_s >= max(begin_s, segment.gyro.stamps_s[0])) & (stamps_s <= end_s)]
    gyro, accel = _newest(segment.gyro, at_s), _newest(segment.accel, at_s)
    present, ahead = motion(segment, at_s), motion(segment, at_s + HORIZON_S)
    known = np.isfinite(present + ahead).all(-1) & (at_s + HORIZON_S <= end_s)
    table = np.nan_to_num(np.concatenate([ahead - present, present], 1)).astype(np.float32)
    labels = [{"target": row[:2], "present": row[2:], "known": np.float32(k)} for row, k in zip(table, known)]
    rows = np.concatenate([accel, gyro], 1).astype(np.float32)
    events: list[tuple[float, int, Sample | Tick]] = []
    for t_s, row, label in zip(at_s, rows, labels):
        stamp_ns = _ns(t_s - begin_s)
        events += [(t_s, 1, Sample("imu", stamp_ns, stamp_ns, row)), (t_s, 2, Tick(stamp_ns, label))]
    t_s = segment.speed.stamps_s
    t_s = t_s[(t_s >= max(begin_s, segment.steering.stamps_s[0])) & (t_s <= end_s)]
    can = np.concatenate([_newest(segment.speed, t_s), _newest(segment.steering, t_s)], 1).astype(np.float32)
    events += [(t, 0, Sample("can", _ns(t - begin_s), _ns(t - begin_s), row)) for t, row in zip(t_s, can)]
    events.sort(key=lambda event: event[:2])
    told = [e for *_, e in events if isinstance(e, Tick) or e.stream in modalities]
    return build_tables(change(told), streams, period_s, max_gap_ms, None, lambda tick: tick.labels)


def _newest(series: Series, at_s: np.ndarray) -> np.ndarray:
    """(n, d): the last value at each instant, none of which lies before the first."""
    return series.values[np.searchsorted(series.stamps_s, at_s, side="right") - 1]


def _ns(since_s: float) -> int:
    return NS + round(since_s * NS)


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """R2 of each segment of the folder (or of those named): [speed, yaw rate] a second ahead, by their present values
    and the change that is said; of the present values alone; and where 0 is as good as these. Of the whole, and of what
    comes after the share that a model of this recipe learns by."""
    segments, ticks, learned = read_comma(folder), bundle.training["ticks"], bundle.training["data"]["learned"]
    if unknown := set(only) - segments.keys():
        raise ValueError(f"{folder}: expected segments among {sorted(segments)}, got {sorted(unknown)}")
    scores: dict[str, Any] = {}
    for name in only or segments:
        for what, part in (("whole", (0.0, 1.0)), ("not_learned", (learned, 1.0))):
            log = tables_of(segments[name], bundle.streams, bundle.tick.period_ms / 1e3, bundle.max_gap_ms, part)
            step = max(1, round(EVERY_S / (bundle.tick.period_ms / 1e3)))
            ends = window_ends(log, ticks)[::step]
            newest = np.array(ends, int) - 1
            present = log.labels["present"][newest]
            true, said = (
                present + change for change in (log.labels["target"][newest], predict(bundle, log, ends, ticks))
            )
            scores.setdefault(name, {})[what] = {
                "windows": len(ends), "r2": r2(said, true), "r2_present": r2(present, true),
                "r2_over_present": r2(said, true, present),
            }  # fmt: skip
    return {"segments": scores}


def exam(recipe: Recipe, change: Change) -> Iterator[Batch]:
    """Windows of what comes after the share of each segment that is learned."""
    segments, learned = read_comma(Path(recipe.data["folder"])), recipe.data["learned"]
    period_s = recipe.tick["period_ms"] / 1e3
    logs = [
        tables_of(segment, recipe.streams, period_s, recipe.max_gap_ms, (learned, 1.0), change)
        for segment in segments.values()
    ]
    return windows_of(logs, recipe.train.ticks, every=max(1, round(EVERY_S / period_s)))


def score(said: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float | None]:
    """said (n, 2), the changes; labels (n, ...) -> each of MEASURES, 0 being as good as that nothing changes."""
    target = labels["target"]
    return dict(zip(MEASURES, r2(said, target, np.zeros_like(target)) or ()))


def reference(labels: dict[str, np.ndarray]) -> np.ndarray:
    """No change."""
    return np.zeros_like(labels["target"])
