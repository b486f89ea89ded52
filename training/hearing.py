"""Spoken words and sounds of the world, heard through one microphone.

    python -m training.train words --data FOLDER                # stop, go, left ...: words that command a robot
    python -m training.train sounds --data FOLDER               # a dog, rain, a chainsaw ...
    python -m training.evaluate words --data FOLDER --json

A sound goes by in windows of a second, one each tick; what is said of it is the mean over the ticks. As on a robot, the
model comes to it from what it heard before, and a word need not be in the middle of its window. Every time a sound is
heard it is another one: louder, earlier, faster, by another voice and another microphone, in white noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.types import StreamSpec
from training.batches import Batch, regular_batch, regular_steps
from training.models import ModelResult, MultiModalFusionNetwork
from training.nets import log_mel
from training.protocols import add_noise
from training.real_data import read_sounds, read_words
from training.recipe import Recipe
from training.supervised import build_model, rate_loss, words
from training.voices import another_voice, faster

__all__ = ["build_model", "evaluate", "loss", "supply", "words"]

RATE_HZ = 16000
INT16 = 32767.0
SNRS_DB = (None, 20.0, 10.0, 0.0, -5.0)  # of the evaluation; None: as recorded
GAIN_DB = (-12.0, 12.0)
LATE_S = 0.25  # by how much a word may be off the middle of its window, of which one begins every half second
ANEW = 0.2  # of the sounds are heard from rest, the others after another one
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TERMS = {"rates": 1.0}


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


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Sounds:
    return Sounds(recipe)


def loss(
    recipe: Recipe, model: MultiModalFusionNetwork, batch: Batch, out: ModelResult
) -> tuple[Tensor, dict[str, Tensor]]:
    label = batch.labels["label"][:, 0]
    said = out.output.mean(1)
    wrong = F.cross_entropy(out.output.flatten(0, 1), label.repeat_interleave(out.output.shape[1]), label_smoothing=0.1)
    wrong = wrong + F.cross_entropy(said, label, label_smoothing=0.1)
    rates, spread = rate_loss(batch, out)
    right = (said.argmax(-1) == label).float().mean()
    weights = {**TERMS, **recipe.train.weights}
    return wrong + weights["rates"] * spread, {"wrong": wrong, "right": right, **rates}


class Sounds:
    """Batches of sounds, as many of each class."""

    def __init__(self, recipe: Recipe):
        folder, rule = recipe.data["folder"], recipe.data["held_out"]
        every = read(recipe.task, Path(folder))
        if isinstance(rule, list):
            if unknown := set(map(str, rule)) - {clip.group for clip in every}:
                raise ValueError(f"data.held_out: {folder} has no such speakers or folds: {sorted(unknown)}")
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
        rng, n, ticks = self._rng, self._lanes, self._recipe.train.ticks
        label = rng.integers(len(self._classes), size=n)
        length = samples_of(self._spec, ticks)
        sounds = np.stack(
            [self._heard(self._clips[i][rng.integers(len(self._clips[i]))], length) for i in label.tolist()]
        )
        x = windows(sounds, self._spec, ticks)
        mel = another_voice(x.flatten(0, 1).numpy(), rng, tract=0.2, microphone=0.3)
        x = torch.from_numpy(mel).unflatten(0, (n, ticks))
        dt = torch.full((n, ticks, 1), self._recipe.tick["period_ms"] / 1e3)
        steps = {self._spec.name: regular_steps(x, dt, ticks, float(dt[0, 0]))}
        labels = {"label": torch.from_numpy(label)[:, None].expand(-1, ticks).contiguous()}
        batch = regular_batch(steps, torch.ones(n, ticks, 1), dt, labels)
        return replace(batch, start=torch.from_numpy(rng.random(n) < ANEW))

    def _heard(self, clip: Clip, length: int) -> np.ndarray:
        """float32 (length,): another take of it."""
        rng = self._rng
        samples = faster(clip.samples, float(np.exp(rng.uniform(-0.2, 0.2))))
        if self._recipe.task == "words":
            samples = placed(samples, length, lateness(rng))
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


def lateness(rng: np.random.Generator) -> int:
    """By how many samples a word is off the middle of its window."""
    return int(rng.integers(-LATE_S * RATE_HZ, LATE_S * RATE_HZ + 1))


def placed(samples: np.ndarray, length: int, late: int) -> np.ndarray:
    """float32 (length,): a sound's middle in the middle, or `late`; silence where it is not."""
    out = np.zeros(length, np.float32)
    at = (length - len(samples)) // 2 + late
    first, end = max(0, at), min(length, at + len(samples))
    if end > first:
        out[first:end] = samples[first - at : end - at]
    return out


def samples_of(spec: StreamSpec, ticks: int) -> int:
    """As many as `ticks` windows need, each half a window after the one before."""
    window = round(spec.window_ms * spec.sample_rate_hz / 1e3)
    return window + (ticks - 1) * window // 2


def windows(sounds: np.ndarray, spec: StreamSpec, ticks: int) -> Tensor:
    """float (n, samples) in [-1, 1] -> log-mel (n, ticks, *spec.shape), normalised."""
    window = round(spec.window_ms * spec.sample_rate_hz / 1e3)
    heard = torch.from_numpy(np.clip(np.rint(sounds * INT16), -32768, 32767).astype(np.float32))
    cut = torch.stack([heard[:, t * window // 2 :][:, :window] for t in range(ticks)], 1)
    mel = log_mel(cut.flatten(0, 1)[:, None], spec.shape, spec.sample_rate_hz)
    mel[:, 0] = (mel[:, 0] - spec.mean[0]) / spec.std[0]
    return mel.unflatten(0, (len(sounds), ticks))


def evaluate(bundle: Bundle, folder: Path, only: Sequence[str]) -> dict[str, Any]:
    """Shares told right of all sounds in the folder, or of the speakers or folds in `only`, as recorded and in white
    noise, which is so much below each sound itself, and so quiet where the sound is silence; the same of those never
    learned from, by the rule in the manifest; of words also how often "stop" was missed, and heard where it was not
    said, by threshold. One sound is heard after the other, without a reset. Clips of silence are cut out of the same
    few recordings, be they learned from or not."""
    clips = [clip for clip in read(bundle.task, folder) if not only or clip.group in only]
    if unknown := set(only) - {clip.group for clip in clips}:
        raise ValueError(f"{folder}: no such speakers or folds: {sorted(unknown)}")
    spec, names = bundle.streams[0], list(bundle.outputs.values.names)
    if strange := sorted({clip.label for clip in clips} - set(names)):
        raise ValueError(f"{folder}: expected sounds of {names}, got some of {strange}")
    # In any order: in the archive those of a class are in a row, and what came before would tell what comes.
    mixed = np.random.default_rng(0)
    clips = [clips[i] for i in mixed.permutation(len(clips))]
    off = [lateness(mixed) if bundle.task == "words" else 0 for _ in clips]
    model, period_s, ticks = load(bundle, "auto"), bundle.tick.period_ms / 1e3, bundle.training["ticks"]
    rule = bundle.training.get("data", {}).get("held_out", [])
    apart = np.array([held_out(clip.group, rule) for clip in clips])
    truth = np.array([names.index(clip.label) for clip in clips])
    table: dict[str, Any] = {}
    for snr_db in SNRS_DB:
        rng, said = np.random.default_rng(0), []
        model.reset()
        name = "clean" if snr_db is None else f"{snr_db:g} dB"
        for clip, by in zip(tqdm(clips, name, leave=False), off):
            sound = placed(clip.samples, samples_of(spec, ticks), by)
            if snr_db is not None:
                sound = add_noise(sound, snr_db, rng)
            said.append(_told(model, spec, sound, ticks, period_s))
        shares = np.array(said)
        right = shares.argmax(1) == truth
        row: dict[str, Any] = {"all": _mean(right), "unheard": _mean(right[apart])}
        row["by_class"] = {label: _mean(right[apart & (truth == i)]) for i, label in enumerate(names)}
        if "stop" in names:
            row["stop"] = _curve(shares[:, names.index("stop")][apart], (truth == names.index("stop"))[apart])
        table[name] = row
    groups = {clip.group for clip, one in zip(clips, apart) if one}
    return {"clips": len(clips), "unheard": int(apart.sum()), "unheard_groups": len(groups), **table}


def _told(model: Any, spec: StreamSpec, sound: np.ndarray, ticks: int, period_s: float) -> np.ndarray:
    """The mean over ticks of each class's share, by the graphs as on a robot."""
    window = round(spec.window_ms * spec.sample_rate_hz / 1e3)
    heard = np.clip(np.rint(sound * INT16), -32768, 32767).astype(np.int16)
    shares, one, zero = [], np.ones(1, np.float32), np.zeros(1, np.float32)
    for tick in range(ticks):
        chunk = heard[tick * window // 2 :][:window]
        fresh = {spec.name: Fresh(preprocess.log_mel(chunk[:, None], None, spec), period_s, False)}
        shares.append(model.step(ModelInputs(fresh, one, zero, period_s, False)).values["values"][0])
    return np.mean(shares, axis=0)


def _curve(score: np.ndarray, stop: np.ndarray) -> list[dict[str, float]]:
    return [
        {"threshold": t, "missed": _mean(score[stop] < t), "false": _mean(score[~stop] >= t)} for t in THRESHOLDS
    ]  # fmt: skip


def _mean(values: np.ndarray) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None
