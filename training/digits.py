"""Spoken and written digits: a picture in heavy noise and a voice in heavy noise, of the same digit.

    python -m training.train digits --data FOLDER
    python -m training.train digits_text --data FOLDER          # and words, which say a little of it: "it is odd"
    python -m training.evaluate digits --data FOLDER --json

The protocol is `protocols.pair_digits`. Pictures and voices meet anew in every batch, in noise of their own, voices
from hardly heard to clear; one of the senses is absent in a share of the samples. Voices are changed a lot, but there
are few to learn by, and a model that learns from labels how far to trust them trusts one that it never heard far too
much. So labels are for each sense alone; all together learn the product of what each says (a product of experts, Hinton
2002), to the power of its `data.trust` (an inverse temperature, Guo et al. 2017; 0.6 was best for voices held out).
As that needs no label, a voice may also say another digit than the picture shows (`data.misheard`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.types import StreamSpec
from training import supervised
from training.batches import Batch, regular_batch, regular_steps
from training.models import ModelResult, MultiModalFusionNetwork
from training.nets import heard_as
from training.protocols import DIGIT_SAMPLES, DigitDraw, learned_from, pair_digits
from training.real_data import DigitClip, read_digits
from training.recipe import Recipe
from training.supervised import rate_loss
from training.voices import another_voice, faster
from training.windows import Change

__all__ = ["build_model", "evaluate", "exam", "loss", "score", "supply", "words"]

MEASURES = {"right": "share of digits told right"}

HINTS = (("it is even", "an odd one"), ("less than five", "five or more"))  # each halves what it can be
TERMS = {"alone": 0.3, "rates": 1.0}  # what each sense says by itself, beside what all say; rates of spikes
SNRS_DB = (20.0, 10.0, 0.0, -5.0)  # of voices
DRAWS = 3  # of noise, and of who says what
SPEED, SNR_DB, TRACT, MICROPHONE = (0.6, 1.6), (-8.0, 20.0), 0.25, 0.7  # how different voices are to learn from
LEVEL = 3000.0  # of a voice as a microphone with automatic gain gives it, of int16


def build_model(recipe: Recipe) -> MultiModalFusionNetwork:
    """With a head for each sense alone, which only training has. Raises ValueError."""
    if len(recipe.values["names"]) != 10:
        raise ValueError(f"values.names: expected ten, of the digits from 0 to 9, got {recipe.values['names']}")
    for name, trust in recipe.data["trust"].items():
        if not (isinstance(trust, (int, float)) and 0 < trust < math.inf):
            raise ValueError(f"data.trust.{name}: expected a number above 0, got {trust!r}")
    model = supervised.build_model(recipe, len(words(recipe)))
    for name, encoder in model.encoders.items():
        model.aux[name] = nn.Linear(encoder.units, model.output_dim)
    return model


def words(recipe: Recipe) -> list[str]:
    """Those of HINTS, if there is a text."""
    has_text = any(spec.kind == "text" for spec in recipe.streams)
    return sorted({word for pair in HINTS for hint in pair for word in hint.split()}) if has_text else []


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Digits:
    return Digits(recipe)


def loss(recipe: Recipe, model: MultiModalFusionNetwork, batch: Batch, out: ModelResult) -> tuple[Tensor, dict]:
    digit, heard = batch.labels["digit"][:, 0], batch.labels["heard"][:, 0]
    said, there = out.output[:, 0], batch.mask[:, 0]
    alone, evidence = said.new_zeros(()), torch.zeros_like(said)
    for i, name in enumerate(model.names):
        logits = model.aux[name](out.tokens[name][:, 0])
        alone = alone + F.cross_entropy(logits, heard if name == "audio" else digit)
        trust = recipe.data["trust"].get(name, 1.0) * there[:, i, None]
        evidence = evidence + trust * logits.detach().log_softmax(-1)
    wrong = F.cross_entropy(said, evidence.softmax(-1))
    rates, spread = rate_loss(batch, out)
    agree = digit == heard  # where a voice contradicts the picture there is no answer
    right = (agree & (said.argmax(-1) == digit)).sum() / agree.sum().clamp(min=1)
    weights = {**TERMS, **recipe.train.weights}
    return wrong + weights["alone"] * alone + weights["rates"] * spread, {"wrong": wrong, "right": right, **rates}


class Digits:
    """Batches of pictures and voices."""

    def __init__(self, recipe: Recipe):
        digits = read_digits(Path(recipe.data["folder"]))
        self.images, self.labels = digits.train_images, digits.train_labels
        learned = learned_from(recipe, {clip.speaker: 0 for clip in digits.clips})
        clips = [clip for clip in digits.clips if clip.speaker in learned]
        self._clips = {digit: [clip for clip in clips if clip.digit == digit] for digit in range(10)}
        if not all(self._clips.values()):
            raise ValueError(f"data.held_out: the speakers that are left, {learned}, do not say every digit")
        self.lanes, self.absent, self.misheard = recipe.train.lanes, recipe.data["absent"], recipe.data["misheard"]
        self._specs = {spec.name: spec for spec in recipe.streams}
        self._names, self._words = list(self._specs), words(recipe)
        self.steps_an_epoch = max(1, len(self.images) // self.lanes)
        self._rng = np.random.default_rng(recipe.seed)

    def next(self) -> Batch:
        rng, n = self._rng, self.lanes
        chosen = rng.integers(len(self.images), size=n)
        images = self.images[chosen]  # not moved: they are all centred
        by_digit = self.labels[chosen]
        # A voice never says a word twice in the same way, and there are few voices to learn from.
        heard = np.where(rng.random(n) < self.misheard, rng.integers(10, size=n), by_digit)
        clips = [_spoken(self._clips[digit][rng.integers(len(self._clips[digit]))], rng) for digit in heard.tolist()]
        draw = pair_digits(images, heard, clips, rng, snr_db=rng.uniform(*SNR_DB))._replace(labels=by_digit)
        x = inputs_of(draw, self._specs, self._words)
        if "audio" in x:
            x["audio"] = torch.from_numpy(another_voice(x["audio"].numpy(), rng, TRACT, MICROPHONE))
        mask = np.ones((n, 1, len(self._names)), np.float32)
        if len(self._names) > 1:
            gone = rng.random(n)
            mask[gone < self.absent, 0, 0] = 0
            mask[gone > 1 - self.absent, 0, 1] = 0
        if "text" in self._specs:
            mask[rng.random(n) < self.absent, 0, self._names.index("text")] = 0
        dt = torch.ones(n, 1, 1)
        steps = {name: regular_steps(x[name][:, None], dt, 1, 1.0) for name in self._names}
        labels = {"digit": torch.from_numpy(by_digit)[:, None], "heard": torch.from_numpy(heard)[:, None]}
        return regular_batch(steps, torch.from_numpy(mask), dt, labels)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]


def _spoken(clip: DigitClip, rng: np.random.Generator) -> DigitClip:
    """Faster or slower, which is also higher or lower; and not always from the very begin."""
    speed = math.exp(rng.uniform(*np.log(SPEED)))
    samples = faster(clip.samples, speed)
    late = np.zeros(rng.integers(0, 1 + max(0, DIGIT_SAMPLES - len(samples))))
    return clip._replace(samples=np.float32(np.concatenate([late, samples])))


def inputs_of(draw: DigitDraw, specs: Mapping[str, StreamSpec], words: list[str]) -> dict[str, Tensor]:
    """What a model of these streams, in their order, gets of a draw."""
    x = {}
    for name, spec in specs.items():
        if name == "image":
            x[name] = torch.from_numpy(as_frames(draw.images))
        elif name == "audio":
            x[name] = heard_as(torch.from_numpy(as_heard(draw.sounds)), spec)
        else:
            known = preprocess.Vocabulary(words)
            x[name] = torch.from_numpy(np.stack([known.encode(hint, spec.shape[0]) for hint in hints(draw)]))
    return x


def hints(draw: DigitDraw) -> list[str]:
    """Of each digit a text that fits half of all; which of the two, is as good as chance."""
    pairs = zip(draw.labels.tolist(), draw.clips.tolist())
    return [HINTS[1][digit >= 5] if clip % 2 else HINTS[0][digit % 2] for digit, clip in pairs]


def as_frames(images: np.ndarray) -> np.ndarray:
    """float (n, 28, 28), mostly within -3.5 and 4.5 -> uint8 (n, 28, 28, 3), as a camera gives them."""
    grey = np.clip(128 + 32 * (images - 0.5), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def as_heard(sounds: np.ndarray) -> np.ndarray:
    """float (n, samples) -> float32 (n, 1, samples), whole numbers of int16."""
    level = np.sqrt(np.mean(np.square(sounds, dtype=np.float64), -1, keepdims=True))
    return np.clip(np.rint(sounds / np.maximum(level, 1e-9) * LEVEL), -32768, 32767).astype(np.float32)[:, None]


def evaluate(bundle: Bundle, folder: Path, only: list[str]) -> dict[str, Any]:
    """Shares of digits told right: all the folder's test images, each with the clip of one of its speakers (of all, if
    none is named), in DRAWS draws of noise; by all senses ("fused") and by every subset of them; and of each speaker by
    all. "held_out": speakers whom the model did not learn by. Then the same, a draw each, with voices in more or less
    noise; the images are as noisy as ever."""
    digits = read_digits(folder)
    known = sorted({clip.speaker for clip in digits.clips})
    if unknown := set(only) - set(known):
        raise ValueError(f"{folder}: expected speakers among {known}, got {sorted(unknown)}")
    clips = [clip for clip in digits.clips if not only or clip.speaker in only]
    model = load(bundle, "auto")

    def draw(seed: int, **noise: float) -> DigitDraw:
        return pair_digits(digits.test_images, digits.test_labels, clips, np.random.default_rng(seed), **noise)

    draws = [draw(number) for number in range(DRAWS)]
    each = [_right(bundle, model, one, f"draw {i + 1} of {DRAWS}") for i, one in enumerate(draws)]
    right = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    speakers = np.array([clips[clip].speaker for one in draws for clip in one.clips.tolist()])
    noisy = {f"{db:g} dB": _right(bundle, model, draw(DRAWS, snr_db=db), f"{db:g} dB") for db in SNRS_DB}
    return {
        "images": len(digits.test_images), "draws": DRAWS, "held_out": bundle.training["data"]["held_out"],
        "speakers": {name: _share(right["fused"][speakers == name]) for name in sorted(set(speakers.tolist()))},
        **{name: _share(values) for name, values in right.items()},
        "by_noise_of_the_voice": {
            snr: {name: _share(values) for name, values in row.items()} for snr, row in noisy.items()
        },
    }  # fmt: skip


def _share(right: np.ndarray) -> float:
    return round(float(right.mean()), 4)


def _right(bundle: Bundle, model: Any, draw: DigitDraw, what: str) -> dict[str, np.ndarray]:
    """bool (n,): whether each digit was told right, by every subset of the senses; "fused" is all of them."""
    specs = {spec.name: spec for spec in bundle.streams}
    subsets = [some for n in range(len(specs) + 1) for some in itertools.combinations(specs, n)]
    masks = {"+".join(some) or "none": np.float32([one in some for one in specs]) for some in subsets}
    masks["fused"] = masks.pop("+".join(specs))
    frames, heard, said = as_frames(draw.images), as_heard(draw.sounds).astype(np.int16), hints(draw)
    words = list(bundle.vocabulary.words) if bundle.vocabulary else []
    right: dict[str, list[bool]] = {name: [] for name in masks}
    for i, digit in enumerate(tqdm(draw.labels.tolist(), what, leave=False)):
        fresh = {"image": Fresh(frames[i], 1.0, True)} if "image" in specs else {}
        if "audio" in specs:
            fresh["audio"] = Fresh(preprocess.log_mel(heard[i].T, None, specs["audio"]), 1.0, True)
        if "text" in specs:
            tokens = preprocess.Vocabulary(words).encode(said[i], specs["text"].shape[0])
            fresh["text"] = Fresh(tokens, 1.0, True)
        for name, mask in masks.items():
            inputs = ModelInputs(fresh, mask, np.zeros(len(specs), np.float32), 1.0, True)
            right[name].append(int(model.step(inputs).values["values"].argmax()) == digit)
    return {name: np.array(values) for name, values in right.items()}


def exam(recipe: Recipe, change: Change) -> Iterator[Batch]:
    """The test images, with voices of the speakers that data.held_out names; there is no time that could change."""
    digits, specs = read_digits(Path(recipe.data["folder"])), {spec.name: spec for spec in recipe.streams}
    learned = learned_from(recipe, {clip.speaker: 0 for clip in digits.clips})
    clips = [clip for clip in digits.clips if clip.speaker not in learned]
    if not clips:
        raise ValueError("data.held_out: expected speakers to be examined by, got none, as in data.held_out=[lucas]")
    draw, n = pair_digits(digits.test_images, digits.test_labels, clips, np.random.default_rng(0)), 250
    for i in range(0, len(draw.labels), n):
        some = DigitDraw(draw.images[i : i + n], draw.sounds[i : i + n], draw.labels[i : i + n], draw.clips[i : i + n])
        dt = torch.ones(len(some.labels), 1, 1)
        given = inputs_of(some, specs, words(recipe))
        steps = {name: regular_steps(x[:, None], dt, 1, 1.0) for name, x in given.items()}
        yield regular_batch(
            steps, torch.ones(len(dt), 1, len(specs)), dt, {"digit": torch.from_numpy(some.labels)[:, None]}
        )


def score(said: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """said (n, 10), labels (n,) -> each of MEASURES."""
    return {"right": round(float((said.argmax(-1) == labels["digit"]).mean()), 4)}
