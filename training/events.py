"""What falls, rolls or knocks, of what it is made and whether it is in view: told while it happens, by sight and sound.

    python -m training.train events                             # no data needed: clips are simulated
    python -m training.evaluate events --json

A frame comes eight times a second, and with each of them the last half second of sound. What the sound is of and what
is seen to move are two things: one of both senses is absent in a share of the clips, so that the other must do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.sim.events import FRAME_HZ, FRAMES, LABELS, QUIET, SAMPLE_RATE_HZ, make_clip
from mm_edge.types import StreamSpec
from training.batches import Batch, regular_batch, regular_steps
from training.cached import cached
from training.models import AudioVideoModel, ModelResult
from training.nets import log_mel
from training.recipe import Recipe
from training.supervised import modalities, rate_loss, words

__all__ = ["build_model", "evaluate", "loss", "supply", "words"]

HEARD_S = 0.1  # after a sound began, until it must be told
QUIET_WEIGHT = 0.3  # of the ticks on which nothing happens yet: most are
TERMS = {"rates": 1.0}
FIRST_SEED, CLIPS = 5_000_000, 600  # to be scored on
SURE = 0.5  # share from which a label counts as told


def build_model(recipe: Recipe) -> AudioVideoModel:
    torch.manual_seed(recipe.seed)
    sizes = {key: value for key, value in recipe.model.items() if key != "modality"}
    return AudioVideoModel(
        FRAMES, SAMPLE_RATE_HZ, num_classes=len(recipe.values["names"]), frame_rate_hz=FRAME_HZ,
        modalities=modalities(recipe), **sizes,
    )  # fmt: skip


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Clips:
    made = []
    for r in recipe.rounds[: index + 1]:
        file = out / f"clips-{r.first_seed}-{r.episodes}.npz"
        made.append(cached(file, _arrays, range(r.first_seed, r.first_seed + r.episodes), workers))
    return Clips(recipe, {name: np.concatenate([part[name] for part in made]) for name in made[0]})


def _arrays(seed: int) -> dict[str, np.ndarray]:
    clip = make_clip(seed)
    return {
        "frames": clip.frames, "sound": clip.sound, "label": np.int64(LABELS.index(clip.label)),
        "onset_s": np.float32(clip.onset_s),
    }  # fmt: skip


def told_at(label: np.ndarray, onset_s: np.ndarray) -> np.ndarray:
    """(n,) -> int64 (n, FRAMES): what is to be told at each frame; nothing before it was to be heard."""
    at_s = np.arange(1, FRAMES + 1) / FRAME_HZ
    return np.where(at_s >= onset_s[:, None] + HEARD_S, label[:, None], LABELS.index(QUIET))


class Clips:
    """Batches of clips, in half the cases in a mirror; louder or softer, and at times without one of both senses."""

    def __init__(self, recipe: Recipe, clips: dict[str, np.ndarray]):
        self._clips, self._lanes, self._absent = clips, recipe.train.lanes, recipe.data["absent"]
        self._camera, self._audio = recipe.streams
        self._rng = np.random.default_rng(recipe.seed)
        self.steps_an_epoch = max(1, len(clips["label"]) // self._lanes)

    def next(self) -> Batch:
        rng, n = self._rng, self._lanes
        chosen = np.sort(rng.integers(len(self._clips["label"]), size=n))
        frames, sound = self._clips["frames"][chosen], np.float32(self._clips["sound"][chosen])
        mirrored = rng.random(n) < 0.5
        frames[mirrored], sound[mirrored] = frames[mirrored, :, :, ::-1], sound[mirrored][..., ::-1]
        sound *= np.float32(10 ** (rng.uniform(-12, 12, (n, 1, 1)) / 20))
        mask = np.ones((n, FRAMES, 2), np.float32)
        gone = rng.random(n)
        mask[gone < self._absent, :, 0] = 0
        mask[gone > 1 - self._absent, :, 1] = 0
        dt = torch.full((n, FRAMES, 1), 1 / FRAME_HZ)
        steps = {
            self._camera.name: regular_steps(torch.from_numpy(frames), dt, FRAMES, 1 / FRAME_HZ),
            self._audio.name: regular_steps(heard(sound, self._audio), dt, FRAMES, 1 / FRAME_HZ),
        }
        label = told_at(self._clips["label"][chosen], self._clips["onset_s"][chosen])
        return regular_batch(steps, torch.from_numpy(mask), dt, {"label": torch.from_numpy(label)})

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]


def heard(sound: np.ndarray, spec: StreamSpec) -> Tensor:
    """float32 (n, samples, channels), in the range of int16 -> (n, FRAMES, *spec.shape): with each frame the window
    that ends with it, as `preprocess.log_mel` makes it of all that was heard."""
    window = round(spec.window_ms * spec.sample_rate_hz / 1e3)
    padded = np.pad(np.clip(np.rint(sound), -32768, 32767), ((0, 0), (window, 0), (0, 0)))
    cut = [padded[:, end : end + window] for end in ends()]
    waves = torch.from_numpy(np.stack(cut, 1)).flatten(0, 1).transpose(1, 2)
    return log_mel(waves, spec.shape, spec.sample_rate_hz).unflatten(0, (len(sound), FRAMES))


def ends() -> list[int]:
    """Samples that were heard by each frame."""
    return [round((k + 1) / FRAME_HZ * SAMPLE_RATE_HZ) for k in range(FRAMES)]


def loss(recipe: Recipe, model: AudioVideoModel, batch: Batch, out: ModelResult) -> tuple[Tensor, dict[str, Tensor]]:
    label, quiet = batch.labels["label"], LABELS.index(QUIET)
    wrong = F.cross_entropy(out.output.flatten(0, 1), label.flatten(), reduction="none", label_smoothing=0.05)
    weight = torch.where(label.flatten() == quiet, QUIET_WEIGHT, 1.0)
    wrong = (wrong * weight).sum() / weight.sum()
    rates, spread = rate_loss(batch, out)
    right = (out.output[:, -1].argmax(-1) == label[:, -1]).float().mean()
    weights = {**TERMS, **recipe.train.weights}
    return wrong + weights["rates"] * spread, {"wrong": wrong, "right": right, **rates}


def evaluate(bundle: Bundle, folder: Path | None, only: Sequence[str]) -> dict[str, Any]:
    """On CLIPS clips never trained on, one frame after the other: the share told right at the end ("fused", and with
    each sense missing), when an event was told, and how often one was that did not happen."""
    model, specs = load(bundle, "auto"), list(bundle.streams)
    names, quiet = list(bundle.outputs.values.names), LABELS.index(QUIET)
    if names != list(LABELS):
        raise ValueError(f"{bundle.path}: expected a bundle that tells {list(LABELS)}, got {names}")
    subsets = [some for n in range(len(specs) + 1) for some in itertools.combinations(range(len(specs)), n)]
    right: dict[str, list[bool]] = {}
    late_s, false, silent, classes = [], 0, 0, {label: list[bool]() for label in LABELS}
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + CLIPS), "clips", leave=False):
        clip = make_clip(seed)
        truth = LABELS.index(clip.label)
        for some in subsets:
            name = "+".join(specs[i].name for i in some) or "none"
            shares = told(model, specs, clip.frames, clip.sound, set(some))
            right.setdefault(name, []).append(int(shares[-1].argmax()) == truth)
            if len(some) < len(specs):
                continue
            classes[clip.label].append(right[name][-1])
            said = (shares.argmax(1) == truth) & (shares.max(1) >= SURE)
            if truth != quiet and said.any():
                late_s.append((int(said.argmax()) + 1) / FRAME_HZ - clip.onset_s)
            if truth == quiet:
                silent += 1
                false += bool(((shares.argmax(1) != quiet) & (shares.max(1) >= SURE)).any())
    scores = {name: round(float(np.mean(values)), 4) for name, values in right.items()}
    fused = scores.pop("+".join(spec.name for spec in specs))
    return {
        "clips": CLIPS, "fused": fused, **scores,
        "told_after_s": {f"p{p}": round(float(np.percentile(late_s, p)), 3) for p in (50, 95)},
        "told": len(late_s), "quiet_clips": silent, "quiet_clips_with_an_event": false,
        "by_class": {label: round(float(np.mean(values)), 4) if values else None for label, values in classes.items()},
    }  # fmt: skip


def told(model: Any, specs: Sequence[StreamSpec], frames: np.ndarray, sound: np.ndarray, there: set[int]) -> np.ndarray:
    """(FRAMES, labels): each label's share at each frame, by the graphs as on a robot; `there`: which streams are."""
    camera, audio = specs
    window, shares = round(audio.window_ms * audio.sample_rate_hz / 1e3), []
    padded = np.concatenate([np.zeros((window, sound.shape[1]), np.int16), sound])
    mask = np.array([i in there for i in range(2)], np.float32)
    for k, (frame, end) in enumerate(zip(frames, ends())):
        fresh = {}
        if 0 in there:
            fresh[camera.name] = Fresh(preprocess.fitted(camera, frame), 1 / FRAME_HZ, k == 0)
        if 1 in there:
            mel = preprocess.log_mel(padded[end : end + window], None, audio)
            fresh[audio.name] = Fresh(mel, 1 / FRAME_HZ, k == 0)
        inputs = ModelInputs(fresh, mask, np.zeros(2, np.float32), 1 / FRAME_HZ, k == 0)
        shares.append(model.step(inputs).values["values"][0].copy())
    return np.stack(shares)
