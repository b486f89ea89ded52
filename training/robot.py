"""A robot of your own: imitation of the commands in your recordings.

    python -m training.train drive --data FOLDER_OF_RECORDINGS [--label TOPIC] [--go-on]

The recordings are checked first, and said what of them is wrong; with errors, training goes on with the rest only if
told to. Streams, their rates and their statistics, the action and its limits are measured (training/recordings.py).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge.manifest import Tick
from mm_edge.preprocess import Vocabulary
from training.batches import Batch, Lanes
from training.check import check
from training.models import ModelResult, RobotMultiSensorModel
from training.recipe import Recipe
from training.recordings import Label, find, label_of, streams_of, survey, tables_of, tick_of, words_of
from training.supervised import build, modalities, rate_loss

TERMS = {"rates": 1.0}  # of spikes, which are to be neither silent nor always there


def raw_recipe(template: Path, folder: Path, topic: str, go_on: bool) -> dict[str, Any]:
    """A recipe for the recordings in `folder`. Prints what the check found; raises ValueError if that are errors and
    nobody said to go on, or if nothing is left."""
    recordings = find(folder)
    streams, label = streams_of(recordings), label_of(recordings, topic)
    report = check(recordings, streams, label)
    print(report)
    if report.errors and not go_on:
        raise ValueError(f"{folder}: {len(report.errors)} errors, see above; --go-on trains with the rest")
    usable = report.usable(recordings)
    if not usable:
        raise ValueError(f"{folder}: no recording is left to train on")
    streams, label = streams_of(usable), label_of(usable, label.topic)  # what is left out sets no limits
    raw = yaml.safe_load(template.read_text())
    limits = asdict(label)
    topic = limits.pop("topic")
    plain = {key: list(value) for key, value in limits.items()}
    return _plain(
        {
            **raw,
            "streams": [asdict(spec) for spec in streams],
            "tick": asdict(tick_of(streams)),
            "action": plain,
            "data": {
                **raw["data"], "folder": str(folder), "label": topic, "words": words_of(usable),
                "recordings": [str(recording.path) for recording in usable],
            },
        }
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """As YAML can say it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def words(recipe: Recipe) -> list[str]:
    return list(recipe.data["words"])


def build_model(recipe: Recipe) -> RobotMultiSensorModel:
    sizes = {key: value for key, value in recipe.model.items() if key != "modality"}
    return build(
        RobotMultiSensorModel, recipe, sizes, modalities=modalities(recipe, len(recipe.data["words"])),
        action_dim=len(recipe.action["names"]),
    )  # fmt: skip


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Lanes:
    label = Label(recipe.data["label"], **{key: tuple(value) for key, value in recipe.action.items()})
    vocabulary = Vocabulary(words(recipe)) if recipe.data["words"] else None
    tick = Tick(**recipe.tick)
    tables = [
        tables_of(
            survey(Path(path)), recipe.streams, label, tick, vocabulary, recipe.data["latency_ms"], recipe.max_gap_ms
        )
        for path in tqdm(recipe.data["recordings"], "recordings")
    ]
    text = next((spec.name for spec in recipe.streams if spec.kind == "text"), None)
    return Lanes(tables, recipe.train.lanes, recipe.train.ticks, recipe.seed, text)


def loss(recipe: Recipe, model: RobotMultiSensorModel, batch: Batch, out: ModelResult) -> tuple[Tensor, dict]:
    """Not squared: where a driver might pass on the left or on the right, the mean of both is the obstacle."""
    low, high = (out.output.new_tensor(recipe.action[key]) for key in ("min", "max"))
    scale = torch.where(high > low, high - low, 1.0) / 4  # what never moves has no range
    error = F.smooth_l1_loss(out.output / scale, batch.labels["action"] / scale, reduction="none", beta=0.15).mean(-1)
    weight = batch.labels["weight"] * batch.valid.squeeze(-1)
    action = (error * weight).sum() / weight.sum().clamp(min=1)
    rates, spread = rate_loss(batch, out)
    return action + {**TERMS, **recipe.train.weights}["rates"] * spread, {"action": action, **rates}
