"""Episodes as tables of irregular time.

An episode (timed samples and ticks) runs once through mm_edge's own aligner and preprocessing. What the model would
have been given on the robot is written down: for each stream the samples it stepped on with their dt and resets, for
each tick the mask, the ages and which step of each stream was the newest. Training reads these tables and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.align import Aligner
from mm_edge.errors import SampleError
from mm_edge.pipeline import ears, model_inputs
from mm_edge.preprocess import Vocabulary
from mm_edge.replay import Tick
from mm_edge.types import Sample, StreamSpec


@dataclass
class Steps:
    """The samples a stream's encoder stepped on."""

    x: np.ndarray  # (steps, *spec.shape)
    dt: np.ndarray  # float32 (steps,) seconds
    reset: np.ndarray  # bool (steps,)
    tick: np.ndarray  # int32 (steps,): on which tick


@dataclass
class Tables:
    """One episode. T ticks, M streams."""

    steps: dict[str, Steps]
    newest: np.ndarray  # int32 (T, M): steps the stream has taken up to and with this tick
    mask: np.ndarray  # float32 (T, M)
    age: np.ndarray  # float32 (T, M) seconds
    dt: np.ndarray  # float32 (T,) seconds
    reset: np.ndarray  # bool (T,)
    now_ns: np.ndarray  # int64 (T,)
    labels: dict[str, np.ndarray]  # (T, ...)

    def __len__(self) -> int:
        return len(self.dt)


def build_tables(
    events: Iterable[Sample | SampleError | Tick],
    specs: Sequence[StreamSpec],
    tick_period_s: float,
    max_gap_ms: float,
    vocabulary: Vocabulary | None,
    labels: Callable[[Tick], dict[str, Any]],
) -> Tables:
    """Replay `events` (in order of arrival) through the aligner. `labels(tick)` gives arrays of fixed shapes."""
    aligner, heard = Aligner(specs, tick_period_s, max_gap_ms), ears(specs)
    known = {spec.name for spec in specs}
    steps: dict[str, list[tuple[np.ndarray, float, bool, int]]] = {spec.name: [] for spec in specs}
    ticks: list[tuple[Any, ...]] = []
    tick_labels: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, SampleError):
            continue  # refused on the robot, too
        if isinstance(event, Sample):
            if event.stream in known:
                aligner.push(event)
            continue
        inputs = model_inputs(specs, aligner.window(event.now_ns), vocabulary, heard)
        for name, (x, dt_s, reset) in inputs.fresh.items():
            steps[name].append((x, dt_s, reset, len(ticks)))
        newest = [len(steps[spec.name]) for spec in specs]
        ticks.append((newest, inputs.mask, inputs.age, inputs.dt_s, inputs.reset, event.now_ns))
        tick_labels.append(labels(event))
    newest, mask, age, dt, reset, now_ns = zip(*ticks)
    return Tables(
        steps={spec.name: _stack(spec, steps[spec.name]) for spec in specs},
        newest=np.array(newest, np.int32), mask=np.array(mask), age=np.array(age), dt=np.array(dt, np.float32),
        reset=np.array(reset), now_ns=np.array(now_ns, np.int64),
        labels={k: np.stack([row[k] for row in tick_labels]) for k in tick_labels[0]},
    )  # fmt: skip


def _stack(spec: StreamSpec, rows: list[tuple[np.ndarray, float, bool, int]]) -> Steps:
    x = np.stack([row[0] for row in rows]) if rows else np.zeros((0, *spec.shape), spec.dtype)
    _, dt, reset, tick = zip(*rows) if rows else ((), (), (), ())
    return Steps(x, np.array(dt, np.float32), np.array(reset, bool), np.array(tick, np.int32))


def save_tables(path: Path, tables: Tables) -> None:
    """As .npz without pickle, whole or not at all."""
    arrays = {f: getattr(tables, f) for f in ("newest", "mask", "age", "dt", "reset", "now_ns")}
    arrays |= {f"label.{k}": v for k, v in tables.labels.items()}
    for name, steps in tables.steps.items():
        arrays |= {f"step.{name}.{f}": getattr(steps, f) for f in ("x", "dt", "reset", "tick")}
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.rename(path)


def load_tables(path: Path) -> Tables:
    with np.load(path, allow_pickle=False) as file:
        arrays = {k: file[k] for k in file.files}
    streams = [k.split(".")[1] for k in arrays if k.startswith("step.") and k.endswith(".x")]
    return Tables(
        steps={n: Steps(*(arrays[f"step.{n}.{f}"] for f in ("x", "dt", "reset", "tick"))) for n in streams},
        labels={k.removeprefix("label."): v for k, v in arrays.items() if k.startswith("label.")},
        **{f: arrays[f] for f in ("newest", "mask", "age", "dt", "reset", "now_ns")},
    )
