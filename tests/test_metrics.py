"""Scores of captions, answers and searches equal those of the reference packages, and some by hand."""

import random

import numpy as np
import pytest

from training.metrics import attention_iou, bleu4, cider, meteor, pointing_game, recall_at, rouge_l, vqa_accuracy

WORDS = ["a", "the", "red", "blue", "ball", "box", "on", "left", "right", "of", "near", "and", "is", "there", "two"]


def corpus(seed: int, texts: int = 20) -> tuple[list[str], list[list[str]]]:
    """What was said is a reference with some words changed, so that runs of four are right now and then."""
    rng = random.Random(seed)

    def text() -> list[str]:
        return rng.choices(WORDS, k=rng.randint(5, 12))

    references = [[text() for _ in range(rng.randint(1, 5))] for _ in range(texts)]
    said = [[w if rng.random() < 0.8 else rng.choice(WORDS) for w in rng.choice(those)] for those in references]
    return [" ".join(s) for s in said], [[" ".join(t) for t in those] for those in references]


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_sacrebleus(seed):
    sacrebleu = pytest.importorskip("sacrebleu", reason="the reference: pip install sacrebleu")
    said, references = corpus(seed)
    most = max(map(len, references))
    streams = [[those[i] if i < len(those) else None for those in references] for i in range(most)]
    want = sacrebleu.corpus_bleu(said, streams, smooth_method="none", tokenize="none", force=True).score
    assert bleu4(said, references) == pytest.approx(want / 100)


@pytest.mark.parametrize("seed", range(3))
def test_all_are_as_the_coco_captions_evaluation_has_them(seed):
    pytest.importorskip("pycocoevalcap", reason="the reference: pip install pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, references = corpus(seed)
    res, gts = {i: [text] for i, text in enumerate(said)}, dict(enumerate(references))
    assert bleu4(said, references) == pytest.approx(Bleu(4).compute_score(gts, res, verbose=0)[0][3], rel=1e-6)
    assert rouge_l(said, references) == pytest.approx(Rouge().compute_score(gts, res)[0])
    assert cider(said, references) == pytest.approx(Cider().compute_score(gts, res)[0])


def test_the_longest_common_subsequence_is_rouge_scores():
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="the reference: pip install rouge-score")
    said, references = corpus(7)
    for text, those in zip(said, references):
        score = rouge.RougeScorer(["rougeL"]).score(those[0], text)["rougeL"]
        p, r = score.precision, score.recall
        want = 2.44 * p * r / (r + 1.44 * p) if p * r else 0.0
        assert rouge_l([text], [those[:1]]) == pytest.approx(want)


class NoSynonyms:
    """Stands in for WordNet, whose data are not at hand."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


@pytest.mark.parametrize("seed", range(20))
def test_meteor_is_nltks_without_synonyms(seed):
    nltk = pytest.importorskip("nltk.translate.meteor_score", reason="the reference: pip install nltk")
    said, references = corpus(seed)
    rng = random.Random(seed)
    said = [" ".join(w + rng.choice(["", "", "s"]) for w in text.split()) for text in said]  # the stems are the same
    each = [
        nltk.meteor_score([other.split() for other in those], text.split(), wordnet=NoSynonyms)
        for text, those in zip(said, references)
    ]
    assert [meteor([text], [those]) for text, those in zip(said, references)] == pytest.approx(each)
    assert meteor(said, references) == pytest.approx(np.mean(each))


def test_meteor_by_hand():
    pytest.importorskip("nltk", reason="its stemmer: pip install nltk")
    right = "a red ball near the box"
    assert meteor([right], [[right]]) == pytest.approx(1 - 0.5 * (1 / 6) ** 3)  # six words in one run
    assert meteor(["A red ball, near the boxes."], [["something else", right]]) == pytest.approx(1 - 0.5 / 6**3)
    assert meteor(["near the box a red ball"], [[right]]) == pytest.approx(1 - 0.5 * (2 / 6) ** 3)  # in two
    precision, recall = 3 / 4, 3 / 6
    f = precision * recall / (0.9 * precision + 0.1 * recall)
    assert meteor(["a red ball there"], [[right]]) == pytest.approx(f * (1 - 0.5 / 3**3))
    assert meteor(["nothing"], [[right]]) == meteor([""], [[right]]) == 0


def test_what_is_right_scores_best_and_what_is_wrong_worst():
    right = ["a red ball near a box", "two blue boxes on the left"]
    references = [[text] for text in right]
    assert bleu4(right, references) == pytest.approx(1) and rouge_l(right, references) == pytest.approx(1)
    assert cider(right, references) == pytest.approx(10)
    assert bleu4(["x y z u v w"] * 2, references) == rouge_l(["x"] * 2, references) == cider(["x"] * 2, references) == 0


def test_recall_by_hand():
    similarity = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.9], [0.3, 0.2, 0.1]])
    right = np.eye(3, dtype=bool)
    assert [recall_at(similarity, right, k) for k in (1, 2, 3)] == [pytest.approx(n / 3) for n in (1, 2, 3)]


def test_an_answer_is_right_as_far_as_others_agree():
    assert vqa_accuracy("Two.", ["2"]) == vqa_accuracy("the red ball", ["a red ball"]) == 1
    assert vqa_accuracy("red", ["red ball"]) == vqa_accuracy("three", ["2"]) == 0
    assert vqa_accuracy("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1


def test_the_peak_of_attention_points():
    weights = np.array([[0.1, 0.2], [0.6, 0.1]])
    assert pointing_game(weights, np.array([[0, 0], [1, 0]], bool))
    assert not pointing_game(weights, np.array([[1, 1], [0, 1]], bool))


def test_attention_covers_an_object_as_far_as_its_strong_half_does():
    weights = np.array([[0.1, 0.2], [0.6, 0.3]])
    assert attention_iou(weights, np.array([[0, 0], [1, 1]], bool)) == 1
    assert attention_iou(weights, np.array([[0, 1], [1, 0]], bool)) == pytest.approx(1 / 3)
    assert attention_iou(weights, np.array([[1, 1], [0, 0]], bool)) == 0
