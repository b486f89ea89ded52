"""Chunks of episodes as padded batches.

Each of B lanes plays one episode after another, T ticks at a time; the model's state is carried along, so that a chunk
begins with what the robot would have remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.tables import Tables


@dataclass
class StepBatch:
    """One stream's steps in a chunk: N in all, at most S in a lane."""

    x: Tensor  # (N, *spec.shape)
    where: Tensor  # int64 (N, 2): lane, slot
    tick: Tensor  # int64 (N,): the chunk's tick on which it stepped
    text_at: Tensor  # int64 (N,): the text's steps by then
    dt: Tensor  # (B, S, 1) seconds
    keep: Tensor  # bool (B, S, 1): a step, not padding
    reset: Tensor  # bool (B, S, 1)
    at: Tensor  # int64 (B, T): how many of the chunk's steps had been taken by each tick

    def lanes(self, first: int, end: int) -> StepBatch:
        lane = self.where[:, 0]
        here = (lane >= first) & (lane < end)
        where = self.where[here] - self.where.new_tensor([first, 0])
        by_lane = {name: getattr(self, name)[first:end] for name in ("dt", "keep", "reset", "at")}
        return StepBatch(self.x[here], where, self.tick[here], self.text_at[here], **by_lane)


@dataclass
class Batch:
    """B lanes, T ticks, M streams."""

    steps: dict[str, StepBatch]
    mask: Tensor  # (B, T, M)
    age: Tensor  # (B, T, M) seconds
    dt: Tensor  # (B, T, 1) seconds
    reset: Tensor  # bool (B, T, 1)
    valid: Tensor  # bool (B, T, 1): a tick, not padding
    start: Tensor  # bool (B,): the lane begins anew
    labels: dict[str, Tensor]  # (B, T, ...)

    def lanes(self, first: int, end: int) -> Batch:
        """Some of the lanes."""
        if (first, end) == (0, len(self.start)):
            return self
        cut = {name: value[first:end] for name, value in vars(self).items() if isinstance(value, Tensor)}
        labels = {name: value[first:end] for name, value in self.labels.items()}
        return Batch(steps={name: s.lanes(first, end) for name, s in self.steps.items()}, labels=labels, **cut)

    def to(self, device: torch.device) -> Batch:
        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            if isinstance(value, StepBatch):
                return StepBatch(**move(vars(value)))
            return value.to(device)

        return Batch(**move(vars(self)))


def regular_steps(x: Tensor, dt: Tensor, ticks: int, first_dt_s: float, text_steps: int = 0) -> StepBatch:
    """x (B, T, ...): a sample at each of `ticks` ticks, or at the first alone (T = 1), or none at all (T = 0); dt (B,
    ticks, 1) seconds between ticks, of which the first is replaced; `text_steps`: of the text, as many, 1 or 0."""
    lanes, count = x.shape[:2]
    lane = torch.arange(lanes, device=x.device).repeat_interleave(count)
    slot = torch.arange(count, device=x.device).repeat(lanes)
    slots = max(1, count)
    first = dt.new_full((lanes, 1, 1), first_dt_s)
    return StepBatch(
        x=x.flatten(0, 1),
        where=torch.stack([lane, slot], 1),
        tick=slot,
        text_at=(slot + 1).clamp(max=text_steps),
        dt=torch.cat([first, dt[:, 1:slots]], 1),
        keep=torch.full((lanes, slots, 1), count > 0, device=x.device),
        reset=torch.zeros(lanes, slots, 1, dtype=torch.bool, device=x.device),
        at=torch.arange(1, ticks + 1, device=x.device).clamp(max=count).expand(lanes, -1),
    )


def regular_batch(steps: dict[str, StepBatch], mask: Tensor, dt: Tensor, labels: dict[str, Tensor]) -> Batch:
    """Lanes that begin anew, at regular ticks. mask (B, T, M), dt (B, T, 1). What is absent may be NaN."""
    for j, (name, s) in enumerate(steps.items()):
        absent = (mask[s.where[:, 0], s.tick, j] <= 0).view(-1, *[1] * (s.x.dim() - 1))
        x = s.x.masked_fill(absent & ~s.x.isfinite(), 0)  # 0 times NaN would be the gradient
        steps = {**steps, name: replace(s, x=x)}
    no = torch.zeros_like(dt, dtype=torch.bool)
    age = torch.zeros_like(mask)
    return Batch(steps, mask, age, dt, reset=no, valid=~no, start=~no[:, 0, 0], labels=labels)


class Lanes:
    """An endless supply of batches; `state_dict` makes resuming exact. A lane starts from zero state where its episode
    does, and nowhere else: in the middle of one it would not know the command."""

    def __init__(self, episodes: Sequence[Tables], lanes: int, ticks: int, seed: int, text: str | None = "text"):
        if not episodes:
            raise ValueError("rounds: expected episodes to learn from, got none")
        self._episodes, self._ticks, self._text = episodes, ticks, text
        self.steps_an_epoch = max(1, sum(map(len, episodes)) // (lanes * ticks))
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []
        self._lanes = [[self._next_episode(), 0] for _ in range(lanes)]

    def next(self) -> Batch:
        chunks, start = [], []
        for lane in self._lanes:
            episode, begin = lane
            end = min(begin + self._ticks, len(self._episodes[episode]))
            chunks.append((self._episodes[episode], begin, end))
            start.append(begin == 0)
            lane[1] = end
            if end >= len(self._episodes[episode]):
                lane[:] = [self._next_episode(), 0]
        return make_batch(chunks, start, self._ticks, self._text)

    def _next_episode(self) -> int:
        if not self._order:
            self._order = self._rng.permutation(len(self._episodes)).tolist()
        return self._order.pop()

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state, "order": self._order, "lanes": self._lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._order, self._lanes = state["order"], state["lanes"]


class Singles:
    """An endless supply of batches of single ticks from anywhere, each from zero state, as if every stream had begun
    with its newest sample: nets learn sooner from samples that have nothing to do with each other."""

    def __init__(self, episodes: Sequence[Tables], lanes: int, seed: int, text: str | None = "text"):
        if not episodes:
            raise ValueError("rounds: expected episodes to learn from, got none")
        self._episodes, self._lanes, self._text = episodes, lanes, text
        self._ends = np.cumsum([len(episode) for episode in episodes])
        self.steps_an_epoch = max(1, int(self._ends[-1]) // lanes)
        self._rng = np.random.default_rng(seed)

    def next(self) -> Batch:
        chunks = []
        for at in self._rng.integers(self._ends[-1], size=self._lanes).tolist():
            i = int(np.searchsorted(self._ends, at, "right"))
            tick = at - int(self._ends[i]) + len(self._episodes[i])
            chunks.append((self._episodes[i], tick, tick + 1))
        return make_batch(chunks, [True] * self._lanes, 1, self._text, newest=True)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]


def make_batch(
    chunks: Sequence[tuple[Tables, int, int]], start: Sequence[bool], ticks: int, text: str | None, newest: bool = False
) -> Batch:
    """`chunks`: for each lane its episode and the ticks [begin, end) of it, at most `ticks` many. With `newest` a
    stream that does not step in a chunk steps on its newest sample of before."""
    streams = list(chunks[0][0].steps)
    steered = streams.index(text) if text else None
    b, t, m = len(chunks), ticks, len(streams)
    mask, age = np.zeros((b, t, m), np.float32), np.zeros((b, t, m), np.float32)
    dt, valid, reset = np.ones((b, t, 1), np.float32), np.zeros((b, t, 1), bool), np.zeros((b, t, 1), bool)
    labels = {k: np.zeros((b, t, *v.shape[1:]), v.dtype) for k, v in chunks[0][0].labels.items()}
    for i, (tables, begin, end) in enumerate(chunks):
        n = end - begin
        mask[i, :n], age[i, :n], dt[i, :n, 0] = tables.mask[begin:end], tables.age[begin:end], tables.dt[begin:end]
        valid[i, :n], reset[i, :n, 0] = True, tables.reset[begin:end]
        for k, v in labels.items():
            v[i, :n] = tables.labels[k][begin:end]
    return Batch(
        steps={name: _steps(chunks, ticks, name, j, steered, newest) for j, name in enumerate(streams)},
        mask=torch.from_numpy(mask), age=torch.from_numpy(age), dt=torch.from_numpy(dt), reset=torch.from_numpy(reset),
        valid=torch.from_numpy(valid), start=torch.tensor(list(start)),
        labels={k: torch.from_numpy(v) for k, v in labels.items()},
    )  # fmt: skip


def _steps(
    chunks: Sequence[tuple[Tables, int, int]], ticks: int, name: str, j: int, text: int | None, newest: bool
) -> StepBatch:
    spans = []  # of each lane's steps within the chunk
    at = np.zeros((len(chunks), ticks), np.int64)
    for i, (tables, begin, end) in enumerate(chunks):
        first = _first(tables, begin, j, text)
        if newest:
            first = max(0, min(first, int(tables.newest[end - 1, j]) - 1))
        spans.append((first, int(tables.newest[end - 1, j])))
        at[i, : end - begin] = tables.newest[begin:end, j] - first
        at[i, end - begin :] = at[i, end - begin - 1]
    most = max(1, *(b - a for a, b in spans))
    dt = np.ones((len(chunks), most, 1), np.float32)
    keep, reset = np.zeros(dt.shape, bool), np.zeros(dt.shape, bool)
    x, where, tick, text_at = [], [], [], []
    for i, ((tables, begin, _), (a, b)) in enumerate(zip(chunks, spans)):
        steps, n = tables.steps[name], b - a
        dt[i, :n, 0], keep[i, :n], reset[i, :n, 0] = steps.dt[a:b], True, steps.reset[a:b]
        x.append(steps.x[a:b])
        where.append(np.stack([np.full(n, i), np.arange(n)], 1))
        on = np.maximum(steps.tick[a:b].astype(np.int64), begin)  # what is stepped on again is there from the first on
        tick.append(on - begin)
        if text is None:
            text_at.append(np.zeros(n, np.int64))
        else:
            text_at.append(tables.newest[on, text].astype(np.int64) - _first(tables, begin, text, text))
    return StepBatch(
        x=torch.from_numpy(np.concatenate(x)), where=torch.from_numpy(np.concatenate(where)),
        tick=torch.from_numpy(np.concatenate(tick)), text_at=torch.from_numpy(np.concatenate(text_at)),
        dt=torch.from_numpy(dt), keep=torch.from_numpy(keep), reset=torch.from_numpy(reset), at=torch.from_numpy(at),
    )  # fmt: skip


def _first(tables: Tables, begin: int, j: int, text: int | None) -> int:
    """The first of stream j's steps that a chunk from tick `begin` on takes. The command in force is stepped on again
    in every chunk: it starts from rest, so the numbers are the same, and its encoder learns from all that follows."""
    taken = int(tables.newest[begin - 1, j]) if begin else 0
    return max(0, taken - 1) if j == text else taken
