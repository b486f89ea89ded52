"""Recipes: YAML in, frozen dataclasses out, with `key=value` overrides and a hint for keys that are not there."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from mm_edge.manifest import Tick
from mm_edge.types import StreamSpec

# Of a task's own data, by name, what is a number: from, to.
NUMBERS = {
    "absent": (0, 1), "latency_ms": (0, math.inf), "learned": (0, 1), "min_count": (1, math.inf), "misheard": (0, 1),
    "windows": (1, math.inf),
}  # fmt: skip


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
    modality_dropout: float = 0.0  # share of (lane, modality) that is absent for a whole batch; one sense always stays
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)  # factor of a modality's encoder
    progressive: tuple[float, ...] = ()  # (a, b): encoders alone until share a of the steps, fusion alone until b
    contrastive: float = 0.0  # weight of aligning the modalities' tokens, see `contrastive` in training/supervised.py
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # of a task's terms by name
    # Stop after so many saves without a better loss: of the data to validate by, if a task has some, or else of the
    # batches since the save before. 0: never.
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("lanes", "ticks", "save_every_steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: expected at least 1, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"train.clip: expected more than 0, got {self.clip}")
        for name in ("learning_rate", "weight_decay", "warm_up_steps", "epochs", "contrastive", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.modality_dropout <= 1:
            raise ValueError(f"train.modality_dropout: expected a share from 0 to 1, got {self.modality_dropout}")
        shares = (0.0, *self.progressive, 1.0)
        if len(self.progressive) > 2 or list(shares) != sorted(shares):
            raise ValueError(f"train.progressive: expected two shares of the steps that rise, got {self.progressive}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"train.mixed_precision: expected no, bf16 or fp16, got {self.mixed_precision!r}")


@dataclass(frozen=True)
class Round:
    """Make `episodes` from `first_seed` on, then train for `steps` on all episodes so far, with lanes and ticks of its
    own if it has any."""

    steps: int
    episodes: int = 0
    first_seed: int = 0
    student: float = 0.0
    bursts: float = 0.0
    lanes: int = 0
    ticks: int = 0


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

    def of_round(self, index: int) -> Recipe:
        """As that round has it."""
        round_, train = self.rounds[index], self.train
        lanes, ticks = round_.lanes or train.lanes, round_.ticks or train.ticks
        return dataclasses.replace(self, train=dataclasses.replace(train, lanes=lanes, ticks=ticks))


def read_recipe(path: Path, overrides: list[str] = []) -> Recipe:  # noqa: B006 (not changed)
    """Read a recipe; each override is `dotted.key=value` with a YAML value. Raises ValueError naming what is wrong."""
    return make_recipe(read_yaml(path.read_text(), str(path)), overrides, str(path))


def make_recipe(raw: dict[str, Any], overrides: list[str], path: str) -> Recipe:
    """As `read_recipe`, of what was read; `path` says where."""
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a recipe, keys with values, got {raw!r}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override}: expected key=value")
        set_value(raw, key, read_yaml(value, key))
    recipe = make(Recipe, {**raw, "raw": raw}, path)
    tick = make(Tick, recipe.tick, f"{path}: tick")
    if tick.anchor not in (names := [spec.name for spec in recipe.streams]):
        raise ValueError(f"{path}: tick.anchor: expected one of {names}, got {tick.anchor!r}")
    if not tick.period_ms > 0:
        raise ValueError(f"{path}: tick.period_ms: expected more than 0, got {tick.period_ms}")
    if not recipe.max_gap_ms > 0:
        raise ValueError(f"{path}: max_gap_ms: expected more than 0, got {recipe.max_gap_ms}")
    for name, value in recipe.data.items():
        low, high = NUMBERS.get(name, (None, None))
        if low is not None and not (type(value) in (int, float) and low <= value <= high):  # and no bool
            raise ValueError(f"{path}: data.{name}: expected a number from {low} to {high}, got {value!r}")
    if (scale := recipe.data.get("scale")) is not None:
        names = recipe.values["names"]
        fits = isinstance(scale, list) and len(scale) == len(names)
        if not (fits and all(isinstance(unit, (int, float)) and unit > 0 for unit in scale)):
            raise ValueError(f"{path}: data.scale: expected a number above 0 for each of {names}, got {scale!r}")
    if not recipe.rounds:
        raise ValueError(f"{path}: rounds: expected at least one")
    for i, round_ in enumerate(recipe.rounds):
        if min(round_.steps, round_.episodes, round_.lanes, round_.ticks) < 0:
            raise ValueError(f"{path}: rounds.{i}: expected no steps, episodes, lanes and ticks below 0, got {round_}")
    return recipe


class _Loader(yaml.SafeLoader):
    """Takes 1e-3 for a number, which YAML 1.1 does not."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+e[-+]?\d+$", re.I), list("-+0123456789"))


def read_yaml(text: str, where: str) -> Any:
    """Raises ValueError for what is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {error}") from None


def set_value(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set what the dotted key says. Raises ValueError if there is no such key."""
    node: Any = raw
    *path, last = dotted.split(".")
    for key in path:
        known = _known(node, key, dotted)
        if isinstance(node, dict):
            node.setdefault(known, {})
        node = node[known]
    node[_known(node, last, dotted)] = value


def _known(node: Any, key: str, dotted: str) -> Any:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ValueError(f"{dotted}: expected a number below {len(node)}, got {key!r}")
        return int(key)
    if not isinstance(node, dict):
        raise ValueError(f"{dotted}: no key {key!r}, this is {node!r}")
    if dotted.split(".")[0] not in ("model", "rounds", "streams", "train"):  # of these, who reads them knows all keys
        check_keys([key], node, dotted)
    return key


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises ValueError for one that is not known."""
    known = list(known)
    for key in keys:
        if key not in known:
            raise ValueError(f"{where}: no key {key!r}{hint(key, known)}")


def make(cls: Any, fields: Any, where: str) -> Any:
    """A dataclass. Raises ValueError for a field that it does not have, that it lacks, or that is of another type."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected keys with values, got {fields!r}")
    kinds = get_type_hints(cls)
    check_keys(fields, kinds, where)
    fitting = {key: _fit(value, kinds[key], f"{where}: {key}") for key, value in fields.items()}
    try:
        return cls(**fitting)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _fit(value: Any, kind: Any, where: str) -> Any:
    """A field's value, if it is of its kind; lists as tuples."""
    if dataclasses.is_dataclass(kind):
        return make(kind, value, where)
    if inspect.isclass(kind) and issubclass(kind, Enum) and isinstance(value, str):
        if value not in (known := [each.value for each in kind]):
            raise ValueError(f"{where}: expected one of {known}, got {value!r}")
        return kind(value)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    types = {get_origin(kind) or kind for kind in kinds}
    if types == {str} and value is False:
        return "no"  # what YAML takes for False
    if tuple in types and isinstance(value, list):
        value = tuple(value)
    if float in types:
        types.add(int)
    if Any not in types and (not isinstance(value, tuple(types)) or (isinstance(value, bool) and bool not in types)):
        raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    if get_origin(kind) is tuple:
        return tuple(_fit(item, get_args(kind)[0], f"{where}.{i}") for i, item in enumerate(value))
    if get_origin(kind) is dict:
        return {key: _fit(item, get_args(kind)[1], f"{where}.{key}") for key, item in value.items()}
    return value


def hint(key: str, known: Iterable[str]) -> str:
    """What may have been meant, to end a sentence with."""
    known = list(known)
    close = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"
