"""Recipes: YAML in, frozen dataclasses out, with `key=value` overrides and a hint for keys that are not there."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mm_edge.types import StreamSpec


@dataclass(frozen=True)
class TrainConfig:
    lanes: int
    ticks: int
    learning_rate: float
    weight_decay: float
    warm_up_steps: int
    clip: float
    save_every_steps: int
    mixed_precision: str  # of the preprocessing nets: no, bf16, fp16; cells and fusion stay in float32
    epochs: int = 0  # instead of the rounds' steps, where a task's data have an end
    accumulate: int = 1  # batches whose gradients make one step
    modality_dropout: float = 0.0  # share of (lane, modality) that is absent for a whole batch
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)  # factor of a modality's encoder
    progressive: tuple[float, ...] = ()  # (a, b): encoders alone until share a of the steps, fusion alone until b
    contrastive: float = 0.0  # weight of aligning the modalities' tokens, see `contrastive` in training/supervised.py
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # of a task's terms by name
    patience: int = 0  # stop after so many saves without a better loss; 0: never


@dataclass(frozen=True)
class Round:
    """Make `episodes` from `first_seed` on, then train for `steps` on all episodes so far."""

    steps: int
    episodes: int = 0
    first_seed: int = 0
    student: float = 0.0
    bursts: float = 0.0


@dataclass(frozen=True)
class Recipe:
    task: str
    seed: int
    tick: dict[str, Any]
    max_gap_ms: float
    streams: tuple[StreamSpec, ...]
    model: dict[str, Any]
    train: TrainConfig
    rounds: tuple[Round, ...]
    raw: dict[str, Any]  # as it was read, overrides applied
    action: dict[str, Any] = dataclasses.field(default_factory=dict)  # what comes out, as in the manifest: this,
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # or this
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # the task's own


def read_recipe(path: Path, overrides: list[str] = []) -> Recipe:  # noqa: B006 (not changed)
    """Read a recipe; each override is `dotted.key=value` with a YAML value. Raises ValueError naming what is wrong."""
    return make_recipe(yaml.safe_load(path.read_text()), overrides, str(path))


def make_recipe(raw: dict[str, Any], overrides: list[str], path: str) -> Recipe:
    """As `read_recipe`, of what was read; `path` says where."""
    for override in overrides:
        key, _, value = override.partition("=")
        _set(raw, key.split("."), yaml.safe_load(value), key)
    if raw["train"]["mixed_precision"] is False:  # what YAML makes of no
        raw["train"]["mixed_precision"] = "no"
    fields = dict(raw)
    fields["streams"] = tuple(_make(StreamSpec, s, f"{path}: streams") for s in raw["streams"])
    fields["train"] = _make(TrainConfig, raw["train"], f"{path}: train")
    fields["rounds"] = tuple(_make(Round, r, f"{path}: rounds") for r in raw["rounds"])
    return _make(Recipe, {**fields, "raw": raw}, path)


def _set(node: Any, keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        node = node[_known(node, key, whole)]
    node[_known(node, keys[-1], whole)] = value


def _known(node: Any, key: str, whole: str) -> Any:
    if isinstance(node, list):
        return int(key)
    known = {*node, *(f.name for f in dataclasses.fields(TrainConfig))} if whole.startswith("train.") else node
    if key not in known:
        raise ValueError(f"{whole}: no key {key!r}{hint(key, known)}")
    return key


def _make(cls: Any, fields: dict[str, Any], where: str) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise ValueError(f"{where}: no key {key!r}{hint(key, known)}")
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def hint(key: str, known: Any) -> str:
    """What may have been meant, to end a sentence with."""
    close = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(map(str, known))}"
