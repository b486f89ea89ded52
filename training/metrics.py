"""How good are captions, answers, and searches? The field's scores, as their reference packages compute them.

    bleu4(said, references)             # Papineni et al. 2002
    rouge_l(said, references)           # Lin 2004
    cider(said, references)             # CIDEr-D, Vedantam et al. 2015
    meteor(said, references)            # Banerjee & Lavie 2005, as nltk has it
    recall_at(similarity, owner, 5)
    vqa_accuracy(answer, given)         # Antol et al. 2015

`said` are n texts, `references` for each of them the texts that are right. Words are what stands between spaces, in
small letters, without punctuation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mm_edge.errors import needs

METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.9, 3.0, 0.5
ROUGE_BETA = 1.2
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_NUMBERS["none"] = "0"
CIDER_SIGMA = 6.0  # words; lengths that differ by so much count little


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def bleu4(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Of the whole corpus, 0 to 1; without smoothing, so that it is 0 where no four words in a row are right."""
    right, total, length, wanted = np.zeros(4), np.zeros(4), 0, 0
    for text, those in zip(said, references, strict=True):
        tokens, others = words_of(text), [words_of(other) for other in those]
        length += len(tokens)
        wanted += min((abs(len(o) - len(tokens)), len(o)) for o in others)[1]  # the nearest, of two the shorter
        for n in range(1, 5):
            mine, most = _grams(tokens, n), Counter[tuple[str, ...]]()
            for other in others:
                most |= _grams(other, n)
            right[n - 1] += (mine & most).total()
            total[n - 1] += mine.total()
    if not right.all():
        return 0.0
    brevity = min(1.0, math.exp(1 - wanted / length))
    return float(brevity * np.exp(np.log(right / total).mean()))


def rouge_l(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over texts of the F score (beta 1.2) of the longest common subsequence of words; precision and recall are
    each the best that any reference gives, as in the COCO captions' evaluation."""
    scores = []
    for text, those in zip(said, references, strict=True):
        tokens = words_of(text)
        common = [(_longest_common(tokens, other), len(other)) for other in map(words_of, those)]
        precision = max((c / max(1, len(tokens)) for c, _ in common), default=0.0)
        recall = max((c / max(1, n) for c, n in common), default=0.0)
        both = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / both if both else 0.0)
    return float(np.mean(scores))


def cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D, 0 to 10: how alike rare runs of one to four words are, rare among the references of all n texts."""
    mine = [[_grams(words_of(text), n) for n in range(1, 5)] for text in said]
    theirs = [[[_grams(words_of(text), n) for n in range(1, 5)] for text in texts] for texts in references]
    seen_in: Counter[tuple[str, ...]] = Counter()
    for texts in theirs:
        seen_in.update({gram for grams in texts for counted in grams for gram in counted})
    all_texts = math.log(len(said))

    def weighed(counted: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: n * (all_texts - math.log(max(1, seen_in[gram]))) for gram, n in counted.items()}

    scores = []
    for grams, those in zip(mine, theirs, strict=True):
        total, length = 0.0, grams[1].total()  # as the reference has it, in pairs of words
        for other in those:
            near = math.exp(-((length - other[1].total()) ** 2) / (2 * CIDER_SIGMA**2))
            for a, b in zip(map(weighed, grams), map(weighed, other)):
                norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                if norm:
                    total += near * sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys()) / norm
        scores.append(10 * total / 4 / len(those))
    return float(np.mean(scores))


def meteor(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over texts of the best that any reference gives, 0 to 1: an F score of words that match, less for each break
    in their order. A word matches the same word, else one of the same stem (Porter's); no synonyms, which would take
    WordNet's data, so that the figures are a little below those of who has them. Raises MissingDependency without
    nltk, whose stemmer it is."""
    with needs("METEOR", "nltk", "train"):
        from nltk.stem.porter import PorterStemmer
    stem, scores = PorterStemmer().stem, []
    for text, those in zip(said, references, strict=True):
        tokens = words_of(text)
        scores.append(max((_meteor(tokens, words_of(other), stem) for other in those), default=0.0))
    return float(np.mean(scores))


def _meteor(said: list[str], reference: list[str], stem: Callable[[str], str]) -> float:
    match: dict[int, int] = {}  # place in said -> place in reference
    for form in (str, stem):
        free: dict[str, list[int]] = {}
        for j, word in enumerate(reference):
            if j not in match.values():
                free.setdefault(form(word), []).append(j)
        for i in reversed(range(len(said))):  # from the end on, as nltk does
            if i not in match and free.get(form(said[i])):
                match[i] = free[form(said[i])].pop()
    if not match:
        return 0.0
    precision, recall = len(match) / len(said), len(match) / len(reference)
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    chunks = sum(match.get(i - 1, -2) != j - 1 for i, j in match.items())
    return mean * (1 - METEOR_GAMMA * (chunks / len(match)) ** METEOR_BETA)


def recall_at(similarity: np.ndarray, right: np.ndarray, k: int) -> float:
    """similarity (queries, items), right bool (queries, items): the share of queries of which one of the k items that
    are most similar is right."""
    first = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(right, first, 1).any(1).mean())


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """How many of those who were asked agree, 3 being enough; the mean over leaving each of them out. Articles do not
    count, and two is 2; all as in the reference. Of one given answer: whether it is that."""
    said, *others = (" ".join(_NUMBERS.get(w, w) for w in words_of(t) if w not in _ARTICLES) for t in (answer, *given))
    if len(others) == 1:
        return float(said == others[0])
    agree = [min(1.0, sum(said == o for j, o in enumerate(others) if j != i) / 3) for i in range(len(others))]
    return float(np.mean(agree))


def pointing_game(weights: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the peak of attention (h, w) lies on the mask (h, w)."""
    return bool(mask.flat[weights.argmax()])


def attention_iou(weights: np.ndarray, mask: np.ndarray) -> float:
    """Of attention (h, w) and the mask (h, w): where it is at least half of its peak, over either."""
    strong = weights >= weights.max() / 2
    return float((strong & mask).sum() / (strong | mask).sum())


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
    return row[-1]
