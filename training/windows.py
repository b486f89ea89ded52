"""Numbers predicted from windows of irregular time: what lidar_velocity and imu_can have in common.

A log becomes tables (training/tables.py) whose ticks carry "target" (d,) and "known", 1 where there is a target. A
window is the last `train.ticks` ticks before one that is known, from rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.replay import Tick
from mm_edge.types import Sample
from training.batches import Batch, make_batch
from training.models import ModelResult, MultiModalFusionNetwork
from training.recipe import Recipe
from training.supervised import rate_loss
from training.tables import Tables

TERMS = {"rates": 1.0}  # of spikes, which are to be neither silent nor always there
Event = Sample | Tick
Change = Callable[[list[Event]], Iterable[Event]]  # what becomes of a log on its way to the tables


class Windows:
    """Batches of windows, each from anywhere in any of the logs."""

    def __init__(self, logs: Sequence[Tables], recipe: Recipe):
        self._logs, self._lanes, self._ticks = logs, recipe.train.lanes, recipe.train.ticks
        self._ends = [(i, end) for i, log in enumerate(logs) for end in window_ends(log, self._ticks)]
        if not self._ends:
            raise ValueError(f"data.folder: expected logs of at least {self._ticks} samples with a target, got none")
        self._rng = np.random.default_rng(recipe.seed)
        self.steps_an_epoch = max(1, len(self._ends) // self._lanes)

    def next(self) -> Batch:
        chosen = [self._ends[i] for i in self._rng.integers(len(self._ends), size=self._lanes)]
        chunks = [(self._logs[i], end - self._ticks, end) for i, end in chosen]
        return make_batch(chunks, [True] * self._lanes, self._ticks, None)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]


def window_ends(log: Tables, ticks: int) -> list[int]:
    """One past the last tick of each window."""
    return [end for end in range(ticks, len(log) + 1) if log.labels["known"][end - 1]]


def exam(logs: Sequence[Tables], ticks: int, every: int = 1, lanes: int = 64) -> Iterator[Batch]:
    """Each `every`th window of the logs, once."""
    chunks = [(log, end - ticks, end) for log in logs for end in window_ends(log, ticks)[::every]]
    for i in range(0, len(chunks), lanes):
        some = chunks[i : i + lanes]
        yield make_batch(some, [True] * len(some), ticks, None)


def loss(recipe: Recipe, model: MultiModalFusionNetwork, batch: Batch, out: ModelResult) -> tuple[Tensor, dict]:
    """In units of `data.scale`, of the second half of each window: by then there is something to go by."""
    if (got := out.output.shape[-1]) != (want := batch.labels["target"].shape[-1]):
        raise ValueError(f"values.names: expected {want}, as the data have, got {got}")
    half = batch.mask.shape[1] // 2
    scale = out.output.new_tensor(recipe.data["scale"])
    error = F.smooth_l1_loss(out.output / scale, batch.labels["target"] / scale, reduction="none").mean(-1)
    weight = batch.labels["known"] * batch.valid.squeeze(-1)
    weight = weight[:, half:]
    wrong = (error[:, half:] * weight).sum() / weight.sum().clamp(min=1)
    rates, spread = rate_loss(batch, out)
    return wrong + {**TERMS, **recipe.train.weights}["rates"] * spread, {"wrong": wrong, **rates}


def predict(bundle: Bundle, log: Tables, ends: Sequence[int], ticks: int) -> np.ndarray:
    """(n, d): what the bundle says at the end of each window, having begun anew `ticks` ticks before."""
    model, said = load(bundle, "auto"), []
    for end in tqdm(ends, "windows", leave=False):
        for tick in range(end - ticks, end):
            values = model.step(inputs_at(log, tick, end - ticks)).values["values"]
        said.append(values[0])
    return np.array(said, np.float32).reshape(len(ends), log.labels["target"].shape[-1])


def scored(bundle: Bundle, log: Tables) -> dict[str, Any]:
    """R2 of the bundle at every window of a log; of what was known last ("previous" of the labels), as a prediction;
    and of the bundle, where 0 is as good as that."""
    ticks = bundle.training["ticks"]
    ends = window_ends(log, ticks)
    newest = np.array(ends, int) - 1
    true, previous = log.labels["target"][newest], log.labels["previous"][newest]
    said = predict(bundle, log, ends, ticks)
    return {
        "windows": len(ends), "r2": r2(said, true), "r2_previous": r2(previous, true),
        "r2_over_previous": r2(said, true, previous),
    }  # fmt: skip


def reference(labels: dict[str, np.ndarray]) -> np.ndarray:
    """What was known last."""
    return labels["previous"]


def inputs_at(log: Tables, tick: int, begin: int = 0) -> ModelInputs:
    """What a model that began anew at the tick `begin` is given: of each stream what has come since. (A robot's gets
    what it still holds, too.)"""
    taken = log.newest[begin - 1] if begin else np.zeros(len(log.steps), int)
    fresh = {}
    for j, (name, steps) in enumerate(log.steps.items()):
        if (newest := int(log.newest[tick, j])) > (log.newest[tick - 1, j] if tick else 0):
            reset = bool(steps.reset[newest - 1]) or newest - 1 == taken[j]
            fresh[name] = Fresh(steps.x[newest - 1], float(steps.dt[newest - 1]), reset)
    anew = tick == begin or bool(log.reset[tick])
    return ModelInputs(fresh, log.mask[tick], log.age[tick], float(log.dt[tick]), anew)


def r2(said: np.ndarray, true: np.ndarray, instead: np.ndarray | None = None) -> list[float | None] | None:
    """Of each column: 1 is perfect, 0 as good as the mean of what is true, or as what is said `instead`; None where
    these leave nothing to be explained, and of no rows."""
    if not len(true):
        return None
    said, true = said.astype(float), true.astype(float)  # of many floats a constant's mean is not that constant
    against = true.mean(0) if instead is None else instead
    wrong, spread = ((said - true) ** 2).sum(0), ((true - against) ** 2).sum(0)
    nothing = spread <= 1e-24 * (true**2).sum(0)  # but for the rounding of doubles
    return [None if none else round(1 - float(w / s), 4) for w, s, none in zip(wrong, spread, nothing)]
