"""A car's speed and yaw rate a second ahead, from a second of its IMU and CAN messages as they came: with true jitter.

    python -m training.train imu_can --data FOLDER              # learns by the first data.learned of each segment
    python -m training.evaluate imu_can --data FOLDER --json

A tick at each IMU sample, on which the newest CAN message, if there is one, is new. The liquid cells get the true dt.
The model says by how much both change: no spike tells 25.1 m/s from 25.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.replay import Tick
from mm_edge.types import NS, Sample, StreamSpec
from training.protocols import motion
from training.real_data import Segment, read_comma
from training.recipe import Recipe
from training.supervised import build_model, words
from training.tables import Tables, build_tables
from training.windows import Windows, loss, predict, r2, window_ends

__all__ = ["build_model", "evaluate", "loss", "supply", "words"]

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
    segment: Segment, streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float, part: tuple[float, float]
) -> Tables:
    """Of the part of a segment between two shares of its time; what is asked lies within the part, too."""
    (imu, can), stamps_s = streams, segment.accel.stamps_s
    first_s, length_s = stamps_s[0], stamps_s[-1] - stamps_s[0]
    begin_s, end_s = (first_s + share * length_s for share in part)
    at_s = stamps_s[(stamps_s >= begin_s) & (stamps_s <= end_s)]
    gyro = segment.gyro.values[np.searchsorted(segment.gyro.stamps_s, at_s, side="right") - 1]
    accel = segment.accel.values[np.searchsorted(stamps_s, at_s)]
    present, ahead = motion(segment, at_s), motion(segment, at_s + HORIZON_S)
    known = np.isfinite(present + ahead).all(-1) & (at_s + HORIZON_S <= end_s)
    table = np.nan_to_num(np.concatenate([ahead - present, present], 1)).astype(np.float32)
    labels = [{"target": row[:2], "present": row[2:], "known": np.float32(k)} for row, k in zip(table, known)]
    rows = np.concatenate([accel, gyro], 1).astype(np.float32)
    events: list[tuple[float, int, Sample | Tick]] = []
    for t_s, row, label in zip(at_s, rows, labels):
        stamp_ns = _ns(t_s - begin_s)
        events += [(t_s, 1, Sample(imu.name, stamp_ns, stamp_ns, row)), (t_s, 2, Tick(stamp_ns, label))]
    t, speed = segment.speed
    steering = np.interp(t, segment.steering.stamps_s, segment.steering.values[:, 0])
    for t_s, row in zip(t, np.stack([speed[:, 0], steering], 1).astype(np.float32)):
        if begin_s <= t_s <= end_s:
            events.append((t_s, 0, Sample(can.name, _ns(t_s - begin_s), _ns(t_s - begin_s), row)))
    events.sort(key=lambda event: event[:2])
    return build_tables([e for *_, e in events], streams, period_s, max_gap_ms, None, lambda tick: tick.labels)


def _ns(since_s: float) -> int:
    return NS + round(since_s * NS)


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """R2 of each segment of the folder (or of those named): [speed, yaw rate] a second ahead, beside that of their
    present values; of the whole, and of what comes after the share that a model of this recipe learns by."""
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
                "windows": len(ends), "r2": r2(said, true), "r2_present": r2(present, true)
            }  # fmt: skip
    return {"segments": scores}
