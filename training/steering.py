"""How a person steers a car, from its camera.

    python -m training.train steering --data FOLDER         # learns by the first data.learned of the drive
    python -m training.evaluate steering --data FOLDER --json

The stamps of a Donkeycar tub are not real: a tick at each frame, at the nominal rate. Nothing is mirrored: it matters
on which side of the lane its yellow line is.
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
from training.real_data import Tub, read_donkey
from training.recipe import Recipe
from training.supervised import build_model, words
from training.tables import Tables, build_tables
from training.windows import TERMS, Change, Windows, loss, r2, reference, scored
from training.windows import exam as windows_of

__all__ = ["TERMS", "build_model", "evaluate", "exam", "loss", "reference", "score", "supply", "words"]

MEASURES = {"steering": "R2 of the steering"}


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Windows:
    tub, share = read_donkey(Path(recipe.data["folder"])), recipe.data["learned"]
    return Windows(
        [tables_of(tub, recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms, (0.0, share))], recipe
    )


def tables_of(
    tub: Tub, streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float, part: tuple[float, float],
    change: Change = list,
) -> Tables:  # fmt: skip
    """Of the part of the drive between two shares of its frames. "previous": the steering at the frame before."""
    (spec,), events = streams, list[Sample | Tick]()
    first, end = (round(share * len(tub.steering)) for share in part)
    for i in range(first, end):
        stamp_ns = NS + round((i - first) * period_s * NS)
        labels = {"target": tub.steering[i : i + 1], "known": np.float32(1)}
        labels["previous"] = tub.steering[max(i - 1, 0)][None]
        events += [Sample(spec.name, stamp_ns, stamp_ns, tub.images[i]), Tick(stamp_ns, labels)]
    return build_tables(change(events), streams, period_s, max_gap_ms, None, lambda tick: tick.labels)


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """R2 of the whole drive, and of what comes after the share that a model of this recipe learns by; of the steering
    at the frame before, as a prediction; and of the model, where 0 is as good as that."""
    if only:
        raise ValueError(f"{folder}: one drive, in which there is nothing to choose, got {only}")
    tub, learned = read_donkey(folder), bundle.training["data"]["learned"]
    scores = {}
    for what, part in (("whole", (0.0, 1.0)), ("not_learned", (learned, 1.0))):
        log = tables_of(tub, bundle.streams, bundle.tick.period_ms / 1e3, bundle.max_gap_ms, part)
        scores[what] = scored(bundle, log)
    return scores


def exam(recipe: Recipe, change: Change) -> Iterator[Batch]:
    """Windows of what comes after the share that is learned."""
    tub, period_s = read_donkey(Path(recipe.data["folder"])), recipe.tick["period_ms"] / 1e3
    log = tables_of(tub, recipe.streams, period_s, recipe.max_gap_ms, (recipe.data["learned"], 1.0), change)
    return windows_of([log], recipe.train.ticks)


def score(said: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float | None]:
    """said (n, 1), labels (n, ...) -> each of MEASURES."""
    return dict(zip(MEASURES, r2(said, labels["target"]) or ()))
