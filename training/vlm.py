"""A small model that says what it sees in the simulator, answers questions, and finds pictures by words and words by
pictures.

    python -m training.train vlm                                        # no data needed: scenes are simulated
    python -m training.evaluate vlm --checkpoint runs/vlm/final.safetensors --json      # or --bundle
    python -m training.plots runs/vlm/final.safetensors                 # where it looks, and what it finds alike
    python -m training.train vlm --data FOLDER                          # or pictures of your own, see training/coco.py

One loss of many: captions, answers, pictures and texts that belong together (InfoNCE, with a caption beside each right
one that is wrong in one word), words that are hidden, and what the simulator knows: what fills each cell, and where the
decoder is to look when it says an object's shape. A folder of pictures knows nothing of the last two, and its wrong
captions are those of other pictures.
"""

from __future__ import annotations

import inspect
import itertools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mm_edge.sim.rooms import COLOURS, SHAPES, SYNONYMS
from training import coco, scenes
from training.batches import Batch
from training.cached import cached
from training.lessons import Lessons, Texts
from training.models import ModelState
from training.recipe import Recipe, check_keys, read_recipe
from training.scenes import Seen
from training.vision_language import PADDING, SPECIALS, Decoded, ImageCode, VisionLanguageModel, special

__all__ = [
    "SPECIALS", "Texts", "VisionLanguageLearner", "VisionLanguageModel", "build_model", "loss", "read_model", "special",
    "supply", "words",
]  # fmt: skip

THINGS, GRID = 5, (12, 16)  # most in a picture; cells of 8 x 8 pixels
FILLED_SHARE = 0.3  # of a cell's pixels, for it to be an object's
MAX_SCALE = 100.0  # of similarities, as CLIP has it
SIZES = inspect.signature(VisionLanguageModel).parameters.keys() - {"image_size", "text_vocab_size", "period_s"}
TERMS = {"caption": 1.0, "answer": 2.0, "match": 1.0, "hidden": 0.3, "cells": 1.0, "look": 0.5}
COLOUR, SHAPE = list(COLOURS), list(SHAPES)
SHAPE_OF = {name: shape for shape, names in SYNONYMS.items() for name in names}


class VlmResult(NamedTuple):
    """What a batch gives."""

    seen: ImageCode
    right: Tensor  # (B, dim) embeddings of the captions
    wrong: Tensor  # of those that are wrong in one word
    caption: Decoded
    answer: Decoded | None  # if anything was asked
    hidden: Tensor  # (B, L, tokens) guesses
    cells: Tensor | None  # (B, colours + shapes + 2, N), of scenes
    tokens: dict[str, Tensor]
    spikes: dict[str, Tensor]


class VisionLanguageLearner(VisionLanguageModel):
    """The model as the loop trains it, with heads that only training has."""

    names = ("image",)
    text = None

    def __init__(self, **sizes: Any):
        super().__init__(**sizes)
        self.aux = nn.ModuleDict({"cells": nn.Linear(self.dim, len(COLOUR) + len(SHAPE) + 2)})

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"image": self.image}

    def zero_state(self, batch: int) -> ModelState:
        """Each picture stands alone."""
        nothing = self.place.new_zeros(batch, 1)
        return ModelState({}, {}, nothing, nothing)

    def scan(self, batch: Batch, state: ModelState) -> tuple[VlmResult, ModelState]:
        label = {name: value[:, 0] for name, value in batch.labels.items()}
        seen = self._after_others(label["image"])
        texts = self.encode_text(torch.cat([label["text"], label["wrong"]]))
        right, wrong = texts.chunk(2)
        answer = self.decode(label["question"], seen) if "question" in label else None
        cells = self.aux["cells"](seen.cells[:, :-1]).transpose(1, 2) if "cells" in self.aux else None
        return VlmResult(
            seen, right, wrong, self.decode(label["caption"], seen), answer,
            self.to_logits(self.text_states(label["hidden"])), cells, {}, {"image": seen.spikes},
        ), state  # fmt: skip

    def _after_others(self, frames: Tensor) -> ImageCode:
        """Pictures as a robot comes to see them: some at once, some after another one or for the second time, and not
        by the clock. Frames cost, what is remembered of them does not: so each stands in for others' past, too."""
        cells, current = self.image.look(frames)
        past = torch.stack([current.roll(1, 0), current, current], 1)
        seen = torch.rand_like(past[..., :1]) < 0.5
        seen[:, -1] = True
        periods = 2.0 ** (4 * torch.rand_like(past[..., :1]) - 1)  # a half to eight
        return self.image.remember(cells, past, dt=self.period_s * periods, keep=seen)


def words(recipe: Recipe) -> list[str]:
    return coco.words(recipe) if recipe.data else scenes.words()


def build_model(recipe: Recipe) -> VisionLanguageLearner:
    torch.manual_seed(recipe.seed)
    height, width, channels = recipe.streams[0].shape
    check_keys(recipe.model, SIZES, "model")
    if not recipe.data and (empty := [r for r in recipe.rounds if r.episodes < 1]):
        raise ValueError(f"rounds: expected episodes, which are scenes here, got {empty[0]}")
    model = VisionLanguageLearner(
        image_size=(channels, height, width), text_vocab_size=len(words(recipe)),
        period_s=recipe.tick["period_ms"] / 1e3, **recipe.model,
    )  # fmt: skip
    if recipe.data:
        model.aux.clear()  # nobody knows what fills a cell of a photograph
    return model


def read_model(checkpoint: Path) -> tuple[Recipe, VisionLanguageLearner]:
    """What was learned, and the recipe that lies beside it. Raises ValueError or OSError for what is no such thing."""
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: expected weights (*.safetensors), got no such file")
    recipe = read_recipe(checkpoint.parent / "recipe.yaml")
    if recipe.task != "vlm":
        raise ValueError(f"{checkpoint}: expected weights of vlm, got some of {recipe.task}")
    model = build_model(recipe)
    try:
        model.load_state_dict(load_file(checkpoint))
    except (RuntimeError, SafetensorError) as error:  # of another size; no weights at all
        raise ValueError(f"{checkpoint}: {str(error).partition(chr(10))[0]}") from None
    return recipe, model.eval()


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Lessons:
    if recipe.data:
        return coco.Captioned(recipe, out, workers)
    made = []
    for r in recipe.rounds[: index + 1]:
        file = out / f"scenes-{r.first_seed}-{r.episodes}.npz"
        made.append(cached(file, _arrays, range(r.first_seed, r.first_seed + r.episodes), workers))
    return Scenes(recipe, made)


def _arrays(seed: int) -> dict[str, np.ndarray]:
    """A scene: its image, and of each thing colour and shape (-1: there is none), column, distance, share of cells."""
    scene = scenes.make_scene(seed)
    row = {
        "image": scene.image, "kind": np.full((THINGS, 2), -1, np.int8), "where": np.zeros((THINGS, 2), np.float32),
        "cells": np.zeros((THINGS, *GRID), np.float16),
    }  # fmt: skip
    for i, thing in enumerate(scene.things):
        row["kind"][i] = COLOUR.index(thing.colour), SHAPE.index(thing.shape)
        row["where"][i] = thing.column, thing.distance_m
        row["cells"][i] = by_cell(thing.mask)
    return row


def object_cells(shares: Tensor) -> Tensor:
    """shares (..., N) of cells -> bool: those that a thing fills at least half as much as it does any."""
    return shares >= (shares.amax(-1, keepdim=True) / 2).clip(min=1e-3)


def by_cell(mask: np.ndarray) -> np.ndarray:
    """bool (h, w) -> the share of each cell (GRID)."""
    rows, cols = GRID
    return mask.reshape(rows, mask.shape[0] // rows, cols, mask.shape[1] // cols).mean((1, 3), dtype=np.float32)


class Scenes(Lessons):
    """Scenes, each with another caption and question every time, and in half the cases in a mirror."""

    def __init__(self, recipe: Recipe, parts: list[dict[str, np.ndarray]]):
        self._scenes = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        super().__init__(recipe, len(self._scenes["image"]), words(recipe))

    def lesson(self, i: int) -> dict[str, Any]:
        """As of Lessons; "look" and "search": on which thing to look for the word that comes after each token of the
        caption and the question, -1 for none; "shares" (things, N) of each cell; "cell" (2, N): what fills it."""
        rng, texts = self.rng, self.texts
        image, cells = self._scenes["image"][i], self._scenes["cells"][i].astype(np.float32)
        kind, where = self._scenes["kind"][i], self._scenes["where"][i]
        order = np.flatnonzero(kind[:, 0] >= 0)
        mirrored = rng.random() < 0.5
        if mirrored:
            image, cells, order = image[:, ::-1], cells[..., ::-1], order[::-1]
        blank = np.zeros((0, 0), bool)
        things = tuple(
            Seen(
                COLOUR[kind[j, 0]], SHAPE[kind[j, 1]], 1 - where[j, 0] if mirrored else where[j, 0], where[j, 1], blank
            )
            for j in order
        )
        caption = scenes.captions(things, rng)[rng.integers(5)]
        asked = scenes.questions(things, rng)
        question = asked[rng.integers(len(asked))]
        tokens, said = texts.tokens(caption), texts.question(question.text, question.answer)
        hidden = self.hidden(tokens)
        at = {name: int(order[j]) for j, name in enumerate(thing.name for thing in things)}
        look, search = ([at.get(name, -1) for name in shapes_after(text)] for text in (caption, question.text))
        return {
            "image": np.ascontiguousarray(image),
            "text": tokens, "wrong": texts.tokens(spoilt(caption, things, rng)), "hidden": hidden,
            "caption": texts.caption(caption), "look": look,
            "question": said, "search": search, "asked": np.int64(said.index(texts.ask)),
            "names": np.int64(zlib.crc32(" ".join(sorted(thing.name for thing in things)).encode())),
            "shares": cells.reshape(THINGS, -1), "cell": np.stack(self._filled(cells, kind)),
        }  # fmt: skip

    @staticmethod
    def _filled(cells: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Colour and shape of what fills each cell; one more than there are for nothing."""
        most, which = cells.max(0).ravel(), cells.argmax(0).ravel()
        there = most >= FILLED_SHARE
        colour, shape = (np.where(there, kind[which, k], n) for k, n in enumerate((len(COLOUR), len(SHAPE))))
        return colour.astype(np.int64), shape.astype(np.int64)


def shapes_after(text: str) -> list[str]:
    """For each token from the begin on: the object, such as "red ball", of which the next word is the shape, or ""."""
    said = ["", *text.replace(",", "").split(), ""]
    return [f"{a} {SHAPE_OF[b]}" if a in COLOURS and b in SHAPE_OF else "" for a, b in itertools.pairwise(said)]


def spoilt(caption: str, things: tuple[Seen, ...], rng: np.random.Generator) -> str:
    """A caption that is wrong in one thing: its colour, its shape, or its place among the others."""
    said = caption.replace(",", " ,").split()
    pairs = [k for k in range(len(said) - 1) if said[k] in COLOURS and said[k + 1] in SHAPE_OF]
    if not pairs:  # nothing is there
        return str(rng.choice(list(labelled().values())))
    k = int(rng.choice(pairs))
    names = {thing.name for thing in things}
    ordered = "from left to right" in caption or " to the left of " in caption
    if ordered and len(pairs) > 1 and rng.random() < 0.6:
        other = int(rng.choice([p for p in pairs if p != k]))
        said[k : k + 2], said[other : other + 2] = said[other : other + 2], said[k : k + 2]
        return _with_articles(said)
    while True:
        colour, shape = said[k], said[k + 1]
        if rng.random() < 0.5:
            colour = str(rng.choice([c for c in COLOUR if c != said[k]]))
        else:
            shape = str(rng.choice([s for s in SHAPE_OF if SHAPE_OF[s] != SHAPE_OF[said[k + 1]]]))
        if f"{colour} {SHAPE_OF[shape]}" not in names:
            said[k : k + 2] = colour, shape
            return _with_articles(said)


def _with_articles(said: list[str]) -> str:
    """With a or an as it fits the next word: what is wrong is not to be told by its grammar."""
    fitting = [
        ("an" if after[0] in "aeiou" else "a") if word in ("a", "an") else word
        for word, after in zip(said, [*said[1:], ""])
    ]
    return " ".join(fitting)


def labelled() -> dict[str, str]:
    """Of each object that there may be, such as "orange ball", what it is: "an orange ball"."""
    return {f"{colour} {shape}": _with_articles(["a", colour, shape]) for colour in COLOUR for shape in SHAPE}


def loss(
    recipe: Recipe, model: VisionLanguageLearner, batch: Batch, out: VlmResult
) -> tuple[Tensor, dict[str, Tensor]]:
    label = {name: value[:, 0] for name, value in batch.labels.items()}
    scale = model.log_scale.exp().clamp(max=MAX_SCALE)
    by_text = scale * out.right @ out.seen.embedding.T
    alike = label["names"][:, None] == label["names"]  # pictures of the same things are no wrong answers
    by_text = by_text.masked_fill(alike.fill_diagonal_(False), -torch.inf)
    spoilt_too = torch.cat([by_text.T, scale * (out.seen.embedding * out.wrong).sum(-1, keepdim=True)], 1)
    own = torch.arange(len(by_text), device=by_text.device)
    parts = {
        "caption": _next_token(out.caption.logits, label["caption"][:, 1:]),
        "match": (F.cross_entropy(by_text, own) + F.cross_entropy(spoilt_too, own)) / 2,
        "hidden": _guessed(out.hidden, label["text"], label["hidden"]),
    }
    if out.answer is not None:
        place = torch.arange(label["question"].shape[1] - 1, device=by_text.device)
        answered = label["question"][:, 1:].masked_fill(place < label["asked"][:, None], PADDING)
        parts["answer"] = _next_token(out.answer.logits, answered)
    if out.cells is not None:
        parts["cells"] = _filled_right(out.cells, label["cell"])
        parts["look"] = _looked(out.caption.attention[-1][:, 0], label["look"], label["shares"])
        parts["look"] = parts["look"] + _looked(out.answer.attention[-1][:, 0], label["search"], label["shares"])
    total = sum({**TERMS, **recipe.train.weights}[name] * part for name, part in parts.items())
    return total, {**parts, "rate": out.seen.spikes.mean()}


def _next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits (B, L, n) of what comes after each token, tokens (B, L - 1) that came."""
    wrong = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens.flatten(), ignore_index=PADDING, reduction="sum")
    return wrong / (tokens != PADDING).sum().clamp(min=1)  # of no picture was anything asked


def _filled_right(logits: Tensor, filled: Tensor) -> Tensor:
    """logits (B, colours + shapes + 2, N), filled (B, 2, N): colour and shape of what fills each cell."""
    n = len(COLOUR) + 1
    weight = torch.where(filled[:, 0] < len(COLOUR), 1.0, 0.1)  # most cells are empty
    wrong = F.cross_entropy(logits[:, :n], filled[:, 0], reduction="none")
    wrong = wrong + F.cross_entropy(logits[:, n:], filled[:, 1], reduction="none")
    return (wrong * weight).sum() / weight.sum()


def _guessed(logits: Tensor, tokens: Tensor, shown: Tensor) -> Tensor:
    hidden = (tokens != shown).float()
    wrong = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(hidden)
    return (wrong * hidden).sum() / hidden.sum().clamp(min=1)


def _looked(attention: Tensor, look: Tensor, shares: Tensor) -> Tensor:
    """How little of the attention (B, L, N + 1) lay on the thing that was spoken of; look (B, L), shares (B, things,
    N)."""
    there = (look >= 0).float()
    on = object_cells(shares).gather(1, look.clamp(min=0)[..., None].expand(-1, -1, shares.shape[-1]))
    share = (attention[..., :-1] * on).sum(-1)
    return -(share.clamp(min=1e-4).log() * there).sum() / there.sum().clamp(min=1)
