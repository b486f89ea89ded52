"""What a model of pictures and words is worth on scenes that it never saw: of weights in torch, or of a bundle.

score(InTorch(model), scenes)
score(InBundle(Language("mm_edge/bundles/vlm")), scenes)
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mm_edge.engine.decoder import Decoder
from mm_edge.language import Language, caption_of
from mm_edge.sim.rooms import COLOURS
from training import scenes
from training.lessons import Texts
from training.metrics import attention_iou, bleu4, cider, meteor, pointing_game, recall_at, rouge_l, vqa_accuracy
from training.scenes import Scene
from training.vision_language import ImageCode, VisionLanguageModel
from training.vlm import labelled, shapes_after

LONGEST = 32  # tokens that are said at once


class Speaker(Protocol):
    """One that looks at pictures, and speaks of the last."""

    def look(self, image: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3) -> its embedding (D,)."""

    def embed(self, text: str) -> np.ndarray: ...
    def caption(self) -> str: ...
    def answer(self, question: str) -> str: ...

    def looked(self, caption: str) -> np.ndarray:
        """Where it looked before each word of a caption that it did not choose, (words + 1, rows, cols)."""


class InTorch:
    def __init__(self, model: VisionLanguageModel):
        self._model, self._texts = model.eval(), Texts(scenes.words())
        self._seen: ImageCode

    @torch.no_grad()
    def look(self, image: np.ndarray) -> np.ndarray:
        self._seen = self._model.encode_image(torch.from_numpy(image)[None])
        return self._seen.embedding[0].numpy()

    @torch.no_grad()
    def embed(self, text: str) -> np.ndarray:
        return self._model.encode_text(torch.tensor([self._texts.tokens(text)]))[0].numpy()

    def caption(self) -> str:
        return self._said(self._model.begin(1))

    def answer(self, question: str) -> str:
        return self._said(torch.tensor([self._texts.question(question)]))

    def _said(self, prompt: Tensor) -> str:
        return self._texts.text(self._model.generate(self._seen, prompt, LONGEST)[0].tolist())

    @torch.no_grad()
    def looked(self, caption: str) -> np.ndarray:
        looked = self._model.decode(torch.tensor([self._texts.caption(caption)]), self._seen).attention[-1]
        return looked[0, 0, :-1, :-1].unflatten(-1, self._model.image.grid).numpy()


class InBundle:
    def __init__(self, language: Language):
        self._language = language

    def look(self, image: np.ndarray) -> np.ndarray:
        self._language.look(image)
        return self._language.seen()

    def embed(self, text: str) -> np.ndarray:
        return self._language.embed(text)

    def caption(self) -> str:
        return caption_of(self._language.say(self._language.prompt("caption"), LONGEST)).text

    def answer(self, question: str) -> str:
        return caption_of(self._language.say(self._language.prompt("question", question), LONGEST)).text

    def looked(self, caption: str) -> np.ndarray:
        decoder = Decoder(self._language.model.graphs["decoder"])
        tokens = [*self._language.prompt("caption"), *self._language.tokens(caption)]
        return np.stack([decoder.feed(token)["attention"][0].copy() for token in tokens])


def score(speaker: Speaker, shown: list[Scene], distinct: int = 100) -> dict[str, Any]:
    """Scores on scenes, each seen with nothing before it: recall of `distinct` scenes of which no two show the same,
    among their first captions; captions against five references, to which a wrong one comes near, too, and so how many
    name all objects in their order ("names_right"); answers by kind, and by how many objects there are; how often
    attention lies on the object that is about to be named, and how well it covers it, as the first caption is dictated;
    and of scenes that show one object how often, of the names of all objects, its own is nearest ("zero_shot": no
    classifier learned it, but pictures with these names it did)."""
    captions, hits, covered, answers = [], list[bool](), list[float](), dict[str, list[float]]()
    named, by_objects = list[bool](), dict[int, list[float]]()
    labels, nearest = labelled(), list[bool]()
    label = np.stack([speaker.embed(text) for text in labels.values()])
    asked_blind: dict[str, Counter[str]] = {}
    embeddings, found = list[np.ndarray](), dict[tuple[str, ...], Scene]()
    for scene in tqdm(shown, "scenes", leave=False):
        embedding = speaker.look(scene.image)
        captions.append(speaker.caption())
        named.append([name for name in shapes_after(captions[-1]) if name] == [thing.name for thing in scene.things])
        for weights, mask in on_things(speaker, scene):
            hits.append(pointing_game(weights, mask))
            covered.append(attention_iou(weights, mask))
        if len(scene.things) == 1:
            nearest.append(list(labels)[int((label @ embedding).argmax())] == scene.things[0].name)
        for question in scene.questions:
            answer = speaker.answer(question.text)
            agrees = vqa_accuracy(answer, [question.answer])
            answers.setdefault(question.kind, []).append(agrees)
            by_objects.setdefault(len(scene.things), []).append(agrees)
            alike = " ".join(word for word in question.text.split() if word not in COLOURS)
            asked_blind.setdefault(alike, Counter())[question.answer] += 1
        key = tuple(thing.name for thing in scene.things)
        if key not in found and len(found) < distinct:
            found[key] = scene
            embeddings.append(embedding)
    similarity = np.stack(embeddings) @ np.stack([speaker.embed(scene.captions[0]) for scene in found.values()]).T
    right, references = np.eye(len(found), dtype=bool), [scene.captions for scene in shown]
    every = [value for values in answers.values() for value in values]
    return {
        "scenes": len(shown), "distinct": len(found),
        "image_to_text": {f"recall@{k}": round(recall_at(similarity, right, k), 4) for k in (1, 5, 10)},
        "text_to_image": {f"recall@{k}": round(recall_at(similarity.T, right, k), 4) for k in (1, 5, 10)},
        "bleu4": round(bleu4(captions, references), 4), "rouge_l": round(rouge_l(captions, references), 4),
        "cider": round(cider(captions, references), 4), "meteor": round(meteor(captions, references), 4),
        "names_right": round(float(np.mean(named)), 4),
        "vqa": {"overall": round(float(np.mean(every)), 4)}
        | {kind: round(float(np.mean(values)), 4) for kind, values in sorted(answers.items())},
        "vqa_by_objects": {str(n): round(float(np.mean(values)), 4) for n, values in sorted(by_objects.items())},
        # Who cannot see, and knows of each kind of question the answer that is right most often.
        "vqa_blind": round(sum(max(counted.values()) for counted in asked_blind.values()) / len(every), 4),
        "questions": len(every),
        "zero_shot": round(float(np.mean(nearest)), 4) if nearest else None, "zero_shot_scenes": len(nearest),
        "attention_hit": round(float(np.mean(hits)), 4), "words_looked_at": len(hits),
        "attention_iou": round(float(np.mean(covered)), 4),
        "attention_by_chance": round(float(np.mean([t.mask.mean() for scene in shown for t in scene.things])), 4),
    }  # fmt: skip


def on_things(speaker: Speaker, scene: Scene) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each object of the first caption, where the speaker looked as it said its shape, float (h, w), and its mask,
    bool (h, w)."""
    height, width = scene.image.shape[:2]
    masks = {thing.name: thing.mask for thing in scene.things}
    return [
        (cv2.resize(weights, (width, height), interpolation=cv2.INTER_CUBIC), masks[name])  # as the overlay
        for weights, name in zip(speaker.looked(scene.captions[0]), shapes_after(scene.captions[0]))
        if name in masks
    ]
