"""Spoken words and sounds of the world, heard through one microphone.

    python -m training.train words --data FOLDER                # stop, go, left ...: words that command a robot
    python -m training.train sounds --data FOLDER               # a dog, rain, a chainsaw ...
    python -m training.evaluate words --data FOLDER --json

A sound goes by in windows of a second, one each tick; what is said of it is the mean over some ticks. As on a robot,
the model comes to it from what it heard before, and a word need not be in the middle of its window; if less than half
of it is in there, nothing was said. Every time a sound is heard it is another one: louder, earlier, faster, by another
voice and another microphone, in white noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.events import Spotter
from mm_edge.manifest import EventsSpec
from mm_edge.types import NS, StreamSpec
from training import supervised
from training.batches import Batch, regular_batch, regular_steps
from training.models import ModelResult, MultiModalFusionNetwork
from training.nets import heard_as
from training.protocols import add_noise, learned_from, noise, power
from training.real_data import read_sounds, read_words
from training.recipe import Recipe
from training.supervised import rate_loss, words
from training.voices import another_voice, faster

__all__ = ["build_model", "evaluate", "loss", "supply", "words"]

RATE_HZ = 16000
INT16 = 32767.0
SNRS_DB = (None, 20.0, 10.0, 0.0, -5.0)  # of the evaluation; None: as recorded
GAIN_DB = (-12.0, 12.0)
LATE_S = 0.25  # by how much a word may be off the middle of its window
CUT_S = (0.5, 0.9)  # or so much, and then it is as good as not there
CUT = 0.5  # of the windows in which nothing is said have the rest of a word
ANEW = 0.2  # of the sounds are heard from rest, the others after another one
PAUSE_S = (0.3, 1.5)  # between what is said in a stream
LATE_TICKS = 4  # after a clip ended, in which "stop" may still be told
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TERMS = {"rates": 1.0, "features": 1.0}


class Clip(NamedTuple):
    label: str
    group: str  # who speaks, or the fold: what is kept apart
    samples: np.ndarray  # float32 (n,) in [-1, 1], 16 kHz


def read(task: str, folder: Path) -> list[Clip]:
    if task == "words":
        return [Clip(clip.word.strip("_"), clip.speaker, clip.samples) for clip in read_words(folder)]
    return [Clip(clip.sound, str(clip.fold), clip.samples) for clip in read_sounds(folder)]


def held_out(group: str, rule: Any) -> bool:
    """Whether nothing is learned from a group: `rule` is a list of them, or a share of all, chosen by their names."""
    if isinstance(rule, list):
        return group in map(str, rule)
    return zlib.crc32(group.encode()) % 1000 < 1000 * rule


def build_model(recipe: Recipe) -> MultiModalFusionNetwork:
    """With a head on what the net hears, before the spikes: it learns from few voices what to listen for long before
    gradients that come through spikes would tell it."""
    model = supervised.build_model(recipe)
    for name, encoder in model.encoders.items():
        model.aux[name] = nn.Linear(encoder.config.encoder_dim or encoder.net.features, model.output_dim)
    return model


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Sounds:
    return Sounds(recipe)


def loss(
    recipe: Recipe, model: MultiModalFusionNetwork, batch: Batch, out: ModelResult
) -> tuple[Tensor, dict[str, Tensor]]:
    label = batch.labels["label"][:, 0]
    said = out.output.mean(1)
    wrong = F.cross_entropy(out.output.flatten(0, 1), label.repeat_interleave(out.output.shape[1]), label_smoothing=0.1)
    wrong = wrong + F.cross_entropy(said, label, label_smoothing=0.1)
    heard = torch.stack(
        [
            F.cross_entropy(model.aux[name](features), label[batch.steps[name].where[:, 0]], label_smoothing=0.1)
            for name, features in out.features.items()
        ]
    ).mean()
    rates, spread = rate_loss(batch, out)
    right = (said.argmax(-1) == label).float().mean()
    weights = {**TERMS, **recipe.train.weights}
    total = wrong + weights["rates"] * spread + weights["features"] * heard
    return total, {"wrong": wrong, "right": right, "features": heard, **rates}


class Sounds:
    """Batches of sounds, as many of each class."""

    def __init__(self, recipe: Recipe):
        folder, rule = recipe.data["folder"], recipe.data["held_out"]
        every = read(recipe.task, Path(folder))
        if isinstance(rule, list):
            learned_from(recipe, sorted({clip.group for clip in every}))  # tells of those that are not there
        elif isinstance(rule, bool) or not isinstance(rule, (int, float)) or not 0 <= rule < 1:
            raise ValueError(f"data.held_out: expected a list of speakers or folds, or a share below 1, got {rule!r}")
        clips = [clip for clip in every if not held_out(clip.group, rule)]
        self._classes = list(recipe.values["names"])
        self._clips = [[clip for clip in clips if clip.label == name] for name in self._classes]
        if missing := [name for name, those in zip(self._classes, self._clips) if not those]:
            raise ValueError(f"{folder}: expected sounds of every class to learn from, got none of {missing}")
        self._quiet = [clip for clip in clips if clip.label == "silence"]
        self._recipe, self._spec, self._lanes = recipe, recipe.streams[0], recipe.train.lanes
        self._rng = np.random.default_rng(recipe.seed)
        self.steps_an_epoch = max(1, sum(map(len, self._clips)) // self._lanes)

    def next(self) -> Batch:
        rng, n, ticks, period_s = self._rng, self._lanes, self._recipe.train.ticks, self._recipe.tick["period_ms"] / 1e3
        label = rng.integers(len(self._classes), size=n)
        length = samples_of(self._spec, ticks, period_s)
        sounds = np.stack([self._heard(*self._chosen(i), length) for i in label.tolist()])
        x = windows(sounds, self._spec, ticks, period_s)
        mel = another_voice(x.flatten(0, 1).numpy(), rng, tract=0.2, microphone=0.3)
        x = torch.from_numpy(mel).unflatten(0, (n, ticks))
        dt = torch.full((n, ticks, 1), period_s)
        steps = {self._spec.name: regular_steps(x, dt, ticks, period_s)}
        labels = {"label": torch.from_numpy(label)[:, None].expand(-1, ticks).contiguous()}
        batch = regular_batch(steps, torch.ones(n, ticks, 1), dt, labels)
        return replace(batch, start=torch.from_numpy(rng.random(n) < ANEW))

    def _chosen(self, label: int) -> tuple[Clip, float]:
        """A sound of that class, and by how many seconds it is late."""
        rng, late_s = self._rng, self._rng.uniform(-LATE_S, LATE_S)
        if self._classes[label] == "silence" and rng.random() < CUT:
            label, late_s = rng.integers(len(self._classes)), rng.choice([-1, 1]) * rng.uniform(*CUT_S)
        return self._clips[label][rng.integers(len(self._clips[label]))], late_s

    def _heard(self, clip: Clip, late_s: float, length: int) -> np.ndarray:
        """float32 (length,): another take of it."""
        rng = self._rng
        samples = faster(clip.samples, float(np.exp(rng.uniform(-0.2, 0.2))))
        if self._recipe.task == "words":
            samples = placed(samples, length, round(late_s * RATE_HZ))
        else:  # from anywhere on, but all of it: many are short, with nothing behind them
            samples = placed(np.roll(samples, rng.integers(len(samples))), length, 0)
        if self._quiet and rng.random() < 0.5:  # somewhere else
            room = self._quiet[rng.integers(len(self._quiet))].samples
            samples = samples + placed(room, length, 0) * np.float32(rng.uniform(0, 2))
        if rng.random() < 0.7:
            samples = add_noise(samples, float(rng.uniform(-6, 25)), rng)
        return samples * np.float32(10 ** (rng.uniform(*GAIN_DB) / 20))

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]


def placed(samples: np.ndarray, length: int, late: int) -> np.ndarray:
    """float32 (length,): a sound's middle in the middle, or `late`; silence where it is not."""
    out = np.zeros(length, np.float32)
    at = (length - len(samples)) // 2 + late
    first, end = max(0, at), min(length, at + len(samples))
    if end > first:
        out[first:end] = samples[first - at : end - at]
    return out


def samples_of(spec: StreamSpec, ticks: int, period_s: float) -> int:
    """As many as the windows of so many ticks need."""
    return round(spec.window_ms * spec.sample_rate_hz / 1e3) + round((ticks - 1) * period_s * spec.sample_rate_hz)


def windows(sounds: np.ndarray, spec: StreamSpec, ticks: int, period_s: float) -> Tensor:
    """float (n, samples) in [-1, 1] -> log-mel (n, ticks, *spec.shape), normalised."""
    window, hop = round(spec.window_ms * spec.sample_rate_hz / 1e3), round(period_s * spec.sample_rate_hz)
    heard = torch.from_numpy(np.clip(np.rint(sounds * INT16), -32768, 32767).astype(np.float32))
    cut = torch.stack([heard[:, t * hop :][:, :window] for t in range(ticks)], 1)
    return heard_as(cut.flatten(0, 1)[:, None], spec).unflatten(0, (len(sounds), ticks))


def evaluate(bundle: Bundle, folder: Path, only: Sequence[str]) -> dict[str, Any]:
    """Shares told right of all sounds in the folder, or of the speakers or folds in `only`, as recorded and in white
    noise, which is so much below each sound itself, and so quiet where the sound is silence; the same of those never
    learned from, by the rule in the manifest. One sound is heard after the other, without a reset. Clips of silence are
    cut out of the same few recordings, be they learned from or not. Of words also how "stop" is told in a stream of
    what the unheard speakers say, see `stop_curve`."""
    clips = [clip for clip in read(bundle.task, folder) if not only or clip.group in only]
    if unknown := set(only) - {clip.group for clip in clips}:
        raise ValueError(f"{folder}: no such speakers or folds: {sorted(unknown)}")
    names = list(bundle.outputs.values.names)
    if bundle.outputs.values.events is None:
        raise ValueError(f"{bundle.path}: expected a bundle that tells events, got one without outputs.values.events")
    if strange := sorted({clip.label for clip in clips} - set(names)):
        raise ValueError(f"{folder}: expected sounds of {names}, got some of {strange}")
    # In any order: in the archive those of a class are in a row, and what came before would tell what comes.
    clips = [clips[i] for i in np.random.default_rng(0).permutation(len(clips))]
    model, ear = load(bundle, "auto"), Ear(bundle)
    rule = bundle.training["data"]["held_out"]
    apart = np.array([held_out(clip.group, rule) for clip in clips])
    truth = np.array([names.index(clip.label) for clip in clips])
    groups = {clip.group for clip, one in zip(clips, apart) if one and clip.label != "silence"}  # which nobody says
    table: dict[str, Any] = {"clips": len(clips), "unheard": int(apart.sum()), "unheard_groups": len(groups)}
    for snr_db in SNRS_DB:
        rng, name = np.random.default_rng(0), "clean" if snr_db is None else f"{snr_db:g} dB"
        model.reset()
        said = []
        for clip in tqdm(clips, name, leave=False):
            sound = placed(clip.samples, ear.samples, 0)
            if snr_db is not None:
                sound = sound + noise(sound.shape, power(clip.samples), snr_db, rng)
            said.append(ear.shares(model, sound, ear.ticks).mean(0))
        right = np.argmax(said, 1) == truth
        row: dict[str, Any] = {"all": _mean(right), "unheard": _mean(right[apart])}
        row["by_class"] = {label: _mean(right[apart & (truth == i)]) for i, label in enumerate(names)}
        table[name] = row
    if bundle.task == "words" and any(clips[i].label == "stop" for i in np.flatnonzero(apart)):
        strangers = [clip for clip, one in zip(clips, apart) if one]
        table["stop"] = {
            "clean" if snr_db is None else f"{snr_db:g} dB": stop_curve(bundle, model, strangers, snr_db)
            for snr_db in SNRS_DB
        }
    return table


class Ear:
    """How a bundle hears a sound: its windows and ticks."""

    def __init__(self, bundle: Bundle):
        self.spec, self.period_s = bundle.streams[0], bundle.tick.period_ms / 1e3
        self.ticks = bundle.training["data"]["windows"]  # whose mean tells what a clip is
        self.samples = samples_of(self.spec, self.ticks, self.period_s)
        self.window = round(self.spec.window_ms * self.spec.sample_rate_hz / 1e3)
        self.hop = round(self.period_s * self.spec.sample_rate_hz)

    def shares(self, model: Any, sound: np.ndarray, ticks: int) -> np.ndarray:
        """(ticks, classes): each class's share at each tick, by the graphs as on a robot."""
        heard = np.clip(np.rint(sound * INT16), -32768, 32767).astype(np.int16)
        shares, one, zero = [], np.ones(1, np.float32), np.zeros(1, np.float32)
        for tick in range(ticks):
            chunk = heard[tick * self.hop :][: self.window]
            fresh = {self.spec.name: Fresh(preprocess.log_mel(chunk[:, None], None, self.spec), self.period_s, False)}
            shares.append(model.step(ModelInputs(fresh, one, zero, self.period_s, False)).values["values"][0])
        return np.array(shares)


def stop_curve(bundle: Bundle, model: Any, clips: Sequence[Clip], snr_db: float | None) -> dict[str, Any]:
    """All clips in one stream, with pauses in what is to be heard of silence, in steady noise so much below the words'
    mean power. How often "stop" was missed, and how often an hour it was heard where nobody said it, by the share from
    which it counts: a stop that is told from the word's begin until half a second after its clip is one that was."""
    rng, ear = np.random.default_rng(0), Ear(bundle)
    said = [clip for clip in clips if clip.label != "silence"]
    room = [clip.samples for clip in clips if clip.label == "silence"] or [np.zeros(RATE_HZ, np.float32)]
    parts, at = [np.zeros(ear.window, np.float32)], ear.window
    stops = []  # first and last sample of each
    for clip in said:
        pause = np.resize(room[rng.integers(len(room))], round(rng.uniform(*PAUSE_S) * RATE_HZ))
        if clip.label == "stop":
            stops.append((at + len(pause), at + len(pause) + len(clip.samples)))
        parts += [pause, clip.samples]
        at += len(pause) + len(clip.samples)
    parts.append(np.zeros(ear.window, np.float32))
    sound = np.concatenate(parts)
    if snr_db is not None:
        sound = sound + noise(sound.shape, float(np.mean([power(clip.samples) for clip in said])), snr_db, rng)
    model.reset()
    ticks = (len(sound) - ear.window) // ear.hop + 1
    shares = ear.shares(model, sound, ticks)
    spans = (np.array(stops).reshape(-1, 2) - ear.window) / ear.hop  # in ticks
    curve = []
    for sure in THRESHOLDS:
        spec = EventsSpec(bundle.outputs.values.events.quiet, sure, bundle.outputs.values.events.ticks)
        spotter, told = Spotter(bundle.outputs.values.names, spec), list[int]()
        for tick, share in enumerate(shares):
            event = spotter.take(round(tick * ear.period_s * NS), share)
            if event is not None and event.label == "stop":
                told.append(tick)
        heard = [any(a <= t <= b + LATE_TICKS for t in told) for a, b in spans]
        false = sum(not any(a <= t <= b + LATE_TICKS for a, b in spans) for t in told)
        hours = ticks * ear.period_s / 3600
        curve.append({"sure": sure, "missed": _mean(~np.array(heard)), "false_an_hour": round(false / hours, 2)})
    return {"stops": len(stops), "hours": round(ticks * ear.period_s / 3600, 5), "curve": curve}


def _mean(values: np.ndarray) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None
