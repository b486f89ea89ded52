"""A robot of your own: imitation of the commands in your recordings.

    python -m training.train drive --data FOLDER_OF_RECORDINGS [--label TOPIC] [--go-on]
    python -m training.train drive --data FOLDER_OF_RECORDINGS 'data.validation=["monday"]' train.patience=3
    python -m training.evaluate robot --data FOLDER_OF_RECORDINGS --bundle MY_BUNDLE

The recordings are checked first, and said what of them is wrong; with errors, training goes on with the rest only if
told to. Streams, their rates and their statistics, the action and its limits are measured (training/recordings.py), and
when a sensor is frozen, skewed or jittering (training/limits.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.errors import RecordingError, SampleError
from mm_edge.manifest import Tick
from mm_edge.preprocess import Vocabulary
from mm_edge.preprocess import check as check_sample
from mm_edge.types import StreamSpec
from training.batches import Batch, Lanes, make_batch
from training.check import check
from training.limits import watched
from training.models import ModelResult, MultiModalFusionNetwork, RobotMultiSensorModel
from training.recipe import Recipe, make_recipe
from training.recordings import (
    Label,
    Recording,
    commands_of,
    find,
    identity,
    label_of,
    streams_of,
    survey,
    tables_of,
    tick_of,
    words_of,
)
from training.supervised import build, modalities, rate_loss
from training.tables import Tables
from training.windows import inputs_at, r2

NEVER_SEEN = "never seen"
TERMS = {"rates": 1.0}  # of spikes, which are to be neither silent nor always there


def raw_recipe(raw: dict[str, Any], folder: Path, topic: str, go_on: bool) -> dict[str, Any]:
    """The recipe, as it was read, for the recordings in `folder`; `with_words` makes it whole. Prints what the check
    found; raises ValueError if that are errors and nobody said to go on, or if nothing is left."""
    recordings = find(folder)
    streams, label = streams_of(recordings), label_of(recordings, topic)
    report = check(recordings, streams, label)
    print(report)
    if report.errors and not go_on:
        raise ValueError(f"{folder}: errors in it: {len(report.errors)}, see above; --go-on trains with the rest")
    usable = report.usable(recordings)
    if not usable:
        raise ValueError(f"{folder}: no recording is left to train on")
    label = label_of(usable, label.topic)  # what is left out sets no limits
    streams = watched(streams_of(usable), usable)
    action = asdict(label)
    topic = action.pop("topic")
    return _plain(
        {
            **raw,
            "streams": [asdict(spec) for spec in streams],
            "tick": asdict(tick_of(streams)),
            "action": action,
            "data": {
                **raw["data"], "folder": str(folder), "label": topic,
                "words": {str(r.path): words_of([r]) for r in usable},
                "recordings": {str(r.path): identity(r, label) for r in usable},
            },
        }
    )  # fmt: skip


def with_words(recipe: Recipe) -> Recipe:
    """With the words of the recordings to learn from: told what it did not learn, a robot must stand. Prints them.
    Raises ValueError if of all that was said nothing is left."""
    text = _text(recipe)
    of_each = recipe.data["words"] if text else {}
    known, others = ({word for path in paths for word in of_each.get(str(path), ())} for paths in _split(recipe))
    if text and not known:
        raise ValueError(f"data.validation: {recipe.data['validation']} leaves no text to learn from")
    if known:
        print(f"words the model will know, and no others: {', '.join(sorted(known))}")
    if others - known:
        print(f"words that only recordings held out have, and it will not know: {', '.join(sorted(others - known))}")
    return make_recipe({**recipe.raw, "data": {**recipe.data, "words": sorted(known)}}, [], recipe.data["folder"])


def _plain(value: Any) -> Any:
    """As YAML can say it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def words(recipe: Recipe) -> list[str]:
    return list(recipe.data["words"])


def build_model(recipe: Recipe) -> MultiModalFusionNetwork:
    """Positions come as they are: what makes a velocity a stop would draw them to 0."""
    sizes = {key: value for key, value in recipe.model.items() if key != "modality"}
    configs, dims = modalities(recipe, len(recipe.data["words"])), len(recipe.action["names"])
    if recipe.action.get("interface") == "position":
        return build(MultiModalFusionNetwork, recipe, sizes, modality_configs=configs, output_dim=dims)
    return build(RobotMultiSensorModel, recipe, sizes, modalities=configs, action_dim=dims)


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Lanes:
    logs = _logs(recipe, _split(recipe)[0])
    return Lanes(logs, recipe.train.lanes, recipe.train.ticks, recipe.seed, _text(recipe))


def validation(recipe: Recipe) -> list[Batch]:
    """The recordings that data.validation names from begin to end, one after the other, in batches of one lane. What
    streams and limits are like was measured on them, too. Raises ValueError for one that tells nothing."""
    ticks, text, paths = recipe.train.ticks, _text(recipe), _split(recipe)[1]
    logs = _logs(recipe, paths)
    for log, path in zip(logs, paths):
        if not log.labels["weight"].any():
            name = name_in(Path(recipe.data["folder"]), path)
            raise ValueError(
                f"data.validation: {name}: there is no tick at which the model would drive: words unknown?"
            )
    return [
        make_batch([(log, begin, min(begin + ticks, len(log)))], [begin == 0], ticks, text)
        for log in logs
        for begin in range(0, len(log), ticks)
    ]


def identities(recipe: Recipe) -> dict[str, list[str]]:
    """Of the recordings, by what they were for. Raises ValueError for a recipe of before there were any."""
    known = recipe.data["recordings"]
    if not isinstance(known, dict):
        raise ValueError("data.recordings: an earlier version trained this, and kept no identities: train again")
    return {
        part: [known[str(path)] for path in paths] for part, paths in zip(("learned", "validation"), _split(recipe))
    }


def _split(recipe: Recipe) -> tuple[list[Path], list[Path]]:
    """The recordings to learn from, and those to validate by. Raises ValueError for one that is not there, or if none
    is left."""
    folder, wanted = Path(recipe.data["folder"]), recipe.data.get("validation", [])
    named = {name_in(folder, path): path for path in map(Path, recipe.data["recordings"])}
    if not isinstance(wanted, list) or not all(isinstance(name, str) and name in named for name in wanted):
        raise ValueError(f"data.validation: expected a list of some of {sorted(named)}, in quotes, got {wanted!r}")
    others = [path for name, path in named.items() if name not in wanted]
    if not others:
        raise ValueError(f"data.validation: {wanted} leaves nothing to learn from")
    return others, [named[name] for name in wanted]


def _logs(recipe: Recipe, paths: Sequence[Path]) -> list[Tables]:
    label = Label(recipe.data["label"], **{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.action.items()})
    vocabulary = Vocabulary(words(recipe)) if recipe.data["words"] else None
    tick, latency_ms, logs = Tick(**recipe.tick), recipe.data["latency_ms"], list[Tables]()
    for recording in map(survey, tqdm(paths, "recordings")):
        log = tables_of(recording, recipe.streams, label, tick, vocabulary, latency_ms, recipe.max_gap_ms)
        log.labels["weight"][_stands(recipe.streams, vocabulary, recording, log)] = 0
        logs.append(log)
    return logs


def _text(recipe: Recipe) -> str | None:
    return next((spec.name for spec in recipe.streams if spec.kind == "text"), None)


def loss(recipe: Recipe, model: MultiModalFusionNetwork, batch: Batch, out: ModelResult) -> tuple[Tensor, dict]:
    """Not squared: where a driver might pass on the left or on the right, the mean of both is the obstacle."""
    low, high = (out.output.new_tensor(recipe.action[key]) for key in ("min", "max"))
    # Of positions, too, with 0, where they begin: a joint that hardly moves would outweigh all others.
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = torch.where(high > low, high - low, 1.0) / 4  # what never moves has no range
    error = F.smooth_l1_loss(out.output / scale, batch.labels["action"] / scale, reduction="none", beta=0.15).mean(-1)
    weight = batch.labels["weight"] * batch.valid.squeeze(-1)
    action = (error * weight).sum() / weight.sum().clamp(min=1)
    rates, spread = rate_loss(batch, out)
    return action + {**TERMS, **recipe.train.weights}["rates"] * spread, {"action": action, **rates}


def name_in(folder: Path, path: Path) -> str:
    """Of a recording in a folder, or of the folder if it is one itself."""
    return str(path.relative_to(folder)) if path != folder else path.name


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """How near the model's actions come to the commands ("names") of each recording in the folder (or of those named),
    and to those of all that it never saw: by dimension the mean absolute error and R2; and R2 of the last command
    before the tick, as a prediction. "part": whether the model learned by this recording, or was chosen by it
    ("validation"); "missing": its streams that there are none of; "stands": the share of ticks at which the robot would
    stand, since a stream that is required is not there, or said what the model does not know, which are not scored;
    "error", why none can be.
    Raises RecordingError if no recording can be scored."""
    action, data = bundle.outputs.action, bundle.training["data"]
    if not isinstance(data["recordings"], dict):
        raise ValueError(
            f"{bundle.path}: an earlier version made it, and kept no identities of recordings: train again"
        )
    assert action is not None, "a robot's bundle has an action"
    label = Label(data["label"], action.names, action.units, action.min, action.max, action.max_rate, action.interface)
    recordings = {name_in(folder, recording.path): recording for recording in find(folder)}
    if unknown := set(only) - recordings.keys():
        raise ValueError(f"{folder}: expected recordings among {sorted(recordings)}, got {sorted(unknown)}")
    model, scores, unseen = load(bundle, "auto"), dict[str, Any](), list[tuple[np.ndarray, ...]]()
    for name in tqdm(only or sorted(recordings), "recordings", leave=False):
        try:
            log = tables_of(
                recordings[name], bundle.streams, label, bundle.tick, bundle.vocabulary, data["latency_ms"],
                bundle.max_gap_ms,
            )  # fmt: skip
        except RecordingError as error:
            scores[name] = {"error": str(error)}
            continue
        given = recordings[name].topics[label.topic].gives if label.topic in recordings[name].topics else ""
        if given and (given == "positions") != (label.interface == "position"):
            why = f"expected a {label.interface} of each of {list(label.names)}, got {given}"
            scores[name] = {"error": f"{recordings[name].path}: {why} (an old model knew no difference: train again)"}
            continue
        if not log.labels["weight"].any():
            scores[name] = {"error": f"{recordings[name].path}: expected commands {list(label.names)} on {label.topic}"}
            continue
        said = np.array([model.step(inputs_at(log, tick)).values["action"][0, 0] for tick in range(len(log))])
        unknown = _unknown_commands(bundle, recordings[name])
        stands = _stands(bundle.streams, bundle.vocabulary, recordings[name], log)
        at_ns, commands = commands_of(recordings[name], label)
        last = np.searchsorted(at_ns, log.now_ns) - 1  # before each tick
        before = commands[last]
        known = (log.labels["weight"] > 0) & (last >= 0) & np.isfinite(before).all(1) & ~stands
        true, before, said = log.labels["action"][known], before[known], said[known]
        missing = [spec.name for spec in bundle.streams if not _holds(recordings[name], spec)]
        if not known.any():
            why = f"expected ticks at which a robot would drive, got none; missing: {missing}, not known: {unknown}"
            scores[name] = {"error": f"{recordings[name].path}: {why}"}
            continue
        me = identity(recordings[name], label)
        part = next((part for part, others in data["recordings"].items() if me in others), NEVER_SEEN)
        unseen += [(said, true, before)] if part == NEVER_SEEN else []
        about = {"part": part, "missing": missing, "stands": round(float(stands.mean()), 3)}
        about |= {"unknown": unknown} if unknown else {}
        scores[name] = {**about, **_scored(said, true, before)}
    if all("error" in row for row in scores.values()):
        raise RecordingError("; ".join(row["error"] for row in scores.values()))
    whole = _scored(*(np.concatenate(rows) for rows in zip(*unseen))) if unseen else None
    return {"names": list(label.names), "recordings": scores, "all never seen": whole}


def _holds(recording: Recording, spec: StreamSpec) -> bool:
    return spec.name in recording.topics and len(recording.topics[spec.name].values) > 0


def _unknown_commands(bundle: Bundle, recording: Recording) -> list[str]:
    """Texts with words that the model does not know."""
    heard = [spec for spec in bundle.streams if spec.kind == "text" and _holds(recording, spec)]
    texts = {text: spec for spec in heard for text in recording.topics[spec.name].values}
    return sorted(text for text, spec in texts.items() if not _known(spec, text, bundle.vocabulary))


def _stands(
    streams: Sequence[StreamSpec], vocabulary: Vocabulary | None, recording: Recording, log: Tables
) -> np.ndarray:
    """bool (T,): whether the robot would stand, for want of a stream that is required, or as it was told last what its
    model does not know."""
    stands = ~log.mask[:, [spec.required for spec in streams]].all(1)
    stands |= ~log.mask[:, [not spec.latched for spec in streams]].any(1)  # a command alone is nothing to go by
    for spec in streams:
        if spec.kind == "text" and _holds(recording, spec):
            topic = recording.topics[spec.name]
            last = np.searchsorted(topic.arrival_ns, log.now_ns, side="right") - 1
            stands |= (last >= 0) & ~np.array([_known(spec, text, vocabulary) for text in topic.values])[last]
    return stands


def _known(spec: StreamSpec, text: str, vocabulary: Vocabulary | None) -> bool:
    try:
        check_sample(spec, text, vocabulary)
    except SampleError:
        return False
    return True


def _scored(said: np.ndarray, true: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    return {
        "ticks": len(true),
        "mean_error": [round(float(e), 4) for e in np.abs(said - true).mean(0)] if len(true) else None,
        "r2": r2(said, true), "r2_previous": r2(before, true),
    }  # fmt: skip
