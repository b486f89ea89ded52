"""Texts as tokens, and batches of pictures with what is to be said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.batches import Batch, regular_batch
from training.recipe import Recipe
from training.vision_language import PADDING, SPECIALS, special

HIDDEN = 0.2  # of the words, for those to be guessed
TOGETHER = (("text", "wrong", "hidden"), ("caption", "look"), ("question", "search"))  # of one length
NOTHING = {"look": -1, "search": -1}  # what they are padded with


class Texts:
    """Texts as tokens of a model with this vocabulary."""

    def __init__(self, vocabulary: list[str]):
        self._ids = {word: i + 1 for i, word in enumerate(vocabulary)}
        self._words = {i: word for word, i in self._ids.items()}
        self.begin, self.end, self.ask, self.hidden = (special(name, len(vocabulary)) for name in SPECIALS)

    def tokens(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.replace(",", " ,").split() if word != ","]

    def caption(self, text: str) -> list[int]:
        return [self.begin, *self.tokens(text), self.end]

    def question(self, text: str, answer: str = "") -> list[int]:
        said = [self.begin, *self.tokens(text), self.ask]
        return [*said, *self.tokens(answer), self.end] if answer else said

    def text(self, tokens: list[int]) -> str:
        return " ".join(self._words[token] for token in tokens if token in self._words)


def padded(texts: list[list[int]], before: bool = False) -> Tensor:
    """Tokens as int64 (B, L), padded behind them or `before`."""
    longest = max(1, *map(len, texts))
    gaps = [[PADDING] * (longest - len(text)) for text in texts]
    return torch.tensor([gap + text if before else text + gap for text, gap in zip(texts, gaps)])


class Lessons:
    """Batches of `count` pictures drawn at random; who inherits it says what there is to learn from one. `state_dict`
    makes resuming exact."""

    def __init__(self, recipe: Recipe, count: int, words: list[str]):
        self._count, self._lanes, self._length = count, recipe.train.lanes, recipe.model["text_seq_length"]
        self.texts = Texts(words)
        self.rng = np.random.default_rng(recipe.seed)
        self.steps_an_epoch = max(1, count // self._lanes)

    def lesson(self, i: int) -> dict[str, Any]:
        """Of the i-th picture: "image" uint8 (h, w, 3), "names" (pictures of the same name are not told apart); lists
        of tokens: "text", "wrong" (one that does not fit), "hidden" (the text, some of its words hidden), "caption",
        and, where questions are asked, "question" and "asked", where the answer begins. What else there is, is as
        `loss` in vlm.py has it."""
        raise NotImplementedError

    def next(self) -> Batch:
        rows = [self.lesson(int(i)) for i in self.rng.integers(self._count, size=self._lanes)]
        labels = {name: [row[name] for row in rows] for name in rows[0]}
        for group in TOGETHER:
            there = [name for name in group if name in labels]
            longest = max((len(tokens) for name in there for tokens in labels[name]), default=0)
            if longest > self._length:
                raise ValueError(f"model.text_seq_length: expected at least {longest}, got {self._length}")
            for name in there:
                padding = NOTHING.get(name, PADDING)
                labels[name] = [np.array(t + [padding] * (max(1, longest) - len(t)), np.int64) for t in labels[name]]
        ones = torch.ones(self._lanes, 1, 1)
        return regular_batch({}, ones, ones, {n: torch.from_numpy(np.stack(v)[:, None]) for n, v in labels.items()})

    def hidden(self, tokens: list[int]) -> list[int]:
        return [self.texts.hidden if self.rng.random() < HIDDEN else token for token in tokens]

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
