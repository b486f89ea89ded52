"""Pictures of your own, with captions and, if there are, questions: a folder in the layout of COCO and VQA v2.

    python -m training.train vlm --data FOLDER [data.min_count=5] [streams.0.shape='[224, 224, 3]']
    python -m training.evaluate vlm --data FOLDER --checkpoint runs/vlm/final.safetensors --json

    FOLDER/annotations/captions_*.json        images: id, file_name; annotations: image_id, caption
    FOLDER/**/*OpenEnded*questions.json       questions: question_id, image_id, question
    FOLDER/**/*annotations.json               annotations: question_id, image_id, question_type, answer_type,
                                              multiple_choice_answer, answers: answer
    FOLDER/**/*.jpg                           wherever they lie below it

Of files with "train" or "val" in their names, training reads the first and evaluation the second; otherwise each reads
all there are. Pictures are squashed to the model's shape. Words are those that are there `data.min_count` times; others
are left out of texts, and a question whose answer has one is not learned from.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mm_edge.errors import EdgeError
from mm_edge.preprocess import resize, words_of
from training.lessons import Lessons, Texts, padded
from training.metrics import bleu4, cider, meteor, recall_at, rouge_l, vqa_accuracy
from training.recipe import Recipe, make_recipe
from training.vision_language import VisionLanguageModel

ANSWER_WORDS = 5  # of the longest answer
RECALL_AMONG = 1000  # pictures, as in the field's "1K test"
AT_ONCE = 32  # pictures
CAPTIONS = "annotations/captions_*.json"
KINDS = ("yes/no", "number", "other")


class Question(NamedTuple):
    text: str
    type: str  # its first words, as VQA v2 has it
    kind: str  # of its answer, one of KINDS
    answer: str  # that most people gave
    given: tuple[str, ...]  # by each of them


class Picture(NamedTuple):
    file: Path
    captions: tuple[str, ...]
    questions: tuple[Question, ...]


def words(recipe: Recipe) -> list[str]:
    return recipe.data["words"].split()


def with_words(recipe: Recipe) -> Recipe:
    """With the vocabulary of its folder, as one text: in a list, YAML would take some for numbers."""
    folder, least = Path(recipe.data["folder"]), recipe.data["min_count"]
    counted: Counter[str] = Counter()
    for picture in read(folder, "train"):
        asked = [text for question in picture.questions for text in (question.text, question.answer)]
        for text in (*picture.captions, *asked):
            counted.update(words_of(text))
    known = sorted(word for word, n in counted.items() if n >= least)
    if not known:
        raise ValueError(f"{folder}: data.min_count: no word is there {least} times, the most frequent are "
                         f"{counted.most_common(3)}")  # fmt: skip
    return make_recipe({**recipe.raw, "data": {**recipe.data, "words": " ".join(known)}}, [], str(folder))


def read(folder: Path, part: str) -> list[Picture]:
    """The pictures that have a caption, of a part, "train" or "val", in the order of their ids. Raises EdgeError naming
    the file and what is wrong in it."""
    caption_files = _files(folder, CAPTIONS, part)
    if not caption_files:
        raise EdgeError(f"{folder}: expected {CAPTIONS} in the layout of COCO, got none")
    names, told_by, captions = dict[int, str](), dict[int, Path](), dict[int, list[str]]()
    for file in caption_files:
        whole = _read(file)
        for image in _rows(file, whole, "images", id=int, file_name=str):
            if names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
                raise EdgeError(f"{file}: image {image['id']} is {image['file_name']}, and {names[image['id']]}")
        for row in _rows(file, whole, "annotations", image_id=int, caption=str):
            if row["image_id"] not in names:
                raise EdgeError(f"{file}: a caption is of image {row['image_id']}, which is not among its images")
            told_by.setdefault(row["image_id"], file)
            captions.setdefault(row["image_id"], []).append(row["caption"])
    if not captions:
        raise EdgeError(f"{caption_files[0]}: expected captions in annotations, got none")
    questions = _questions(folder, part, names)
    paths = _find(folder, {i: (names[i], told_by[i]) for i in captions})
    return [Picture(paths[i], tuple(captions[i]), tuple(questions.get(i, ()))) for i in sorted(captions)]


def _questions(folder: Path, part: str, images: dict[int, str]) -> dict[int, list[Question]]:
    """Of each image."""
    asked = dict[int, tuple[int, str]]()
    for file in _files(folder, "**/*OpenEnded*questions.json", part):
        for row in _rows(file, _read(file), "questions", question_id=int, image_id=int, question=str):
            if row["image_id"] not in images:
                raise EdgeError(f"{file}: question {row['question_id']} is of image {row['image_id']}, "
                                "which no captions_*.json has")  # fmt: skip
            asked[row["question_id"]] = row["image_id"], row["question"]
    questions, answered = dict[int, list[Question]](), set[int]()
    files = _files(folder, "**/*annotations.json", part) if asked else []
    for file in files:
        rows = _rows(
            file, _read(file), "annotations", question_id=int, image_id=int, question_type=str, answer_type=str,
            multiple_choice_answer=str, answers=list,
        )  # fmt: skip
        for row in rows:
            number, where = row["question_id"], f"{file}: the answers to question {row['question_id']}"
            if number not in asked:
                raise EdgeError(f"{where}: no *OpenEnded*questions.json asks it")
            image, text = asked[number]
            if image != row["image_id"]:
                raise EdgeError(f"{where}: are of image {row['image_id']}, the question is of {image}")
            if row["answer_type"] not in KINDS:
                raise EdgeError(f"{where}: answer_type: expected one of {', '.join(KINDS)}, got {row['answer_type']}")
            given = tuple(answer["answer"] for answer in _rows(file, row, "answers", answer=str))
            if not given:
                raise EdgeError(f"{where}: expected some, got none")
            answer = row["multiple_choice_answer"]
            questions.setdefault(image, []).append(
                Question(text, row["question_type"], row["answer_type"], answer, given)
            )
            answered.add(number)
    if unanswered := asked.keys() - answered:
        got = ", ".join(file.name for file in files) or "no such file"
        raise EdgeError(f"{folder}: expected *annotations.json to answer all questions, got {got}; "
                        f"{len(unanswered)} are not answered, such as {min(unanswered)}")  # fmt: skip
    return questions


def _files(folder: Path, pattern: str, part: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    return [file for file in files if part in file.name] or files


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise EdgeError(f"{file}: expected JSON, got {error}") from None


def _rows(file: Path, whole: Any, key: str, **fields: type) -> list[dict[str, Any]]:
    """The list at this key, if all that is in it has these fields."""
    rows = whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(rows, list):
        raise EdgeError(f"{file}: expected an object with a list {key!r}, got {_shown(whole)}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise EdgeError(f"{file}: {key}.{i}: expected {wanted}, got {_shown(row)}")
    return rows


def _shown(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 200 else f"{said[:200]}..."


def _find(folder: Path, names: dict[int, tuple[str, Path]]) -> dict[int, Path]:
    """Where each image lies, by its name and the file that has it."""
    there: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        there.setdefault(path.name, []).append(path)
    found, missing = dict[int, Path](), list[str]()
    for i, (name, told_by) in names.items():
        fitting = [p for p in there.get(Path(name).name, []) if f"/{p.as_posix()}".endswith(f"/{name.lstrip('/')}")]
        if len(fitting) > 1:
            raise EdgeError(f"{told_by}: image {i} is {name}, which is there twice: {fitting[0]}, {fitting[1]}")
        if fitting:
            found[i] = fitting[0]
        else:
            missing.append(f"{told_by}: image {i} is {name}")
    if missing:
        raise EdgeError(f"{missing[0]}, which is not below {folder}; {len(missing)} of {len(names)} images are missing")
    return found


def read_image(file: Path, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3) RGB. Raises EdgeError."""
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None:
        raise EdgeError(f"{file}: expected an image, got {file.stat().st_size} bytes that are none")
    return np.ascontiguousarray(resize(image, height, width)[..., ::-1])


def within(text: str, known: set[str], most: int) -> str:
    """The words of a text that are known, and no more of them than that."""
    return " ".join([word for word in words_of(text) if word in known][:most])


def asked_within(question: Question, known: set[str], length: int) -> str:
    """What is asked, with begin, ask and end and an answer no longer than `length`."""
    return within(question.text, known, length - 3 - ANSWER_WORDS)


class Captioned(Lessons):
    """Pictures, each with one of its captions and one of its questions; a wrong caption is another picture's."""

    def __init__(self, recipe: Recipe, out: Path, workers: int):
        folder, known = Path(recipe.data["folder"]), set(words(recipe))
        length, least = recipe.model["text_seq_length"], 4 + ANSWER_WORDS
        if length < least:
            raise ValueError(f"model.text_seq_length: expected at least {least}, got {length}")
        self._captions, self._asked, files = list[list[str]](), list[list[tuple[str, str]]](), list[Path]()
        for picture in read(folder, "train"):
            captions = [said for text in picture.captions if (said := within(text, known, length - 2))]
            if captions:
                files.append(picture.file)
                self._captions.append(captions)
                answers = [(q, words_of(q.answer)) for q in picture.questions]
                self._asked.append([
                    (asked_within(question, known, length), " ".join(answer))
                    for question, answer in answers
                    if 0 < len(answer) <= ANSWER_WORDS and known.issuperset(answer)
                ])  # fmt: skip
        if len(files) < 2:
            raise ValueError(f"{folder}: expected at least two pictures with captions in known words, got {len(files)}")
        self._asks = any(self._asked)
        super().__init__(recipe, len(files), words(recipe))
        height, width, _ = recipe.streams[0].shape
        self._images = _squashed(files, height, width, out, workers)

    def lesson(self, i: int) -> dict[str, Any]:
        rng, texts = self.rng, self.texts
        caption, wrong = self._one_of(self._captions[i]), self._of_another(i)
        tokens = texts.tokens(caption)
        row = {
            "image": np.array(self._images[i]), "names": np.int64(i), "caption": texts.caption(caption),
            "text": tokens, "wrong": texts.tokens(wrong), "hidden": self.hidden(tokens),
        }  # fmt: skip
        question = ""
        if self._asks:
            question, answer = self._one_of(self._asked[i]) if self._asked[i] else ("", "")
            said = texts.question(question, answer) if answer else []
            row |= {"question": said, "asked": np.int64(said.index(texts.ask) if said else 0)}
        if rng.random() < 0.5 and not {"left", "right"} & {*caption.split(), *question.split()}:
            row["image"] = np.ascontiguousarray(row["image"][:, ::-1])
        return row

    def _one_of(self, those: list[Any]) -> Any:
        return those[self.rng.integers(len(those))]

    def _of_another(self, i: int) -> str:
        """A caption of another picture that is none of this one's; nothing, if they are hard to find."""
        others = (i + self.rng.integers(1, len(self._captions), size=8)) % len(self._captions)
        texts = (self._one_of(self._captions[j]) for j in others)
        return next((text for text in texts if text not in self._captions[i]), "")


def _squashed(files: list[Path], height: int, width: int, out: Path, workers: int) -> np.ndarray:
    """uint8 (n, height, width, 3), which lie on the disk; made if they are not there."""
    made_of = "\n".join(f"{file} {file.stat().st_mtime_ns}" for file in files)
    file = out / f"images-{height}x{width}-{zlib.crc32(made_of.encode()):08x}.npy"
    if not file.exists():
        part = file.with_suffix(".part")
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), height, width, 3))
        with ThreadPool(workers) as pool:
            squashed = pool.imap(lambda path: read_image(path, height, width), files)
            for i, image in enumerate(tqdm(squashed, "images", total=len(files), leave=False)):
                images[i] = image
        images.flush()
        part.rename(file)
    return np.load(file, mmap_mode="r")


@torch.no_grad()
def score(model: VisionLanguageModel, vocabulary: list[str], folder: Path) -> dict[str, Any]:
    """Of the pictures in the folder that are not to learn from: recall among the first RECALL_AMONG of them and all
    their captions; captions against all of a picture's; answers by what most people said, as VQA v2 has it, and those
    of one who cannot see and knows of each type of question the answer that most people give ("vqa_blind"). All is
    compared in small letters without punctuation, words that the model does not know among them. "learned": whether
    the folder has no others for training, so that these may be what was learned from."""
    model.eval()
    texts, known, (_, height, width) = Texts(vocabulary), set(vocabulary), model.image_size
    pictures = read(folder, "val")
    captions, embeddings, answers = [], list[Tensor](), list[tuple[Question, str]]()
    for first in tqdm(range(0, len(pictures), AT_ONCE), "pictures", leave=False):
        some = pictures[first : first + AT_ONCE]
        images = np.stack([read_image(picture.file, height, width) for picture in some])
        seen = model.encode_image(torch.from_numpy(images))
        embeddings.append(seen.embedding)
        captions += [texts.text(said) for said in model.generate(seen, model.begin(len(some))).tolist()]
        asked = [(k, question) for k, picture in enumerate(some) for question in picture.questions]
        if asked:
            tokens = [texts.question(asked_within(question, known, model.length)) for _, question in asked]
            of_each = seen._replace(cells=seen.cells[[k for k, _ in asked]])
            said = model.generate(of_each, padded(tokens, before=True), most=ANSWER_WORDS + 1).tolist()
            answers += [(question, texts.text(answer)) for (_, question), answer in zip(asked, said)]
    references = [[" ".join(words_of(text)) for text in picture.captions] for picture in pictures]
    scores = {
        "learned": not set(_files(folder, CAPTIONS, "val")).isdisjoint(_files(folder, CAPTIONS, "train")),
        "pictures": len(pictures), "captions": sum(map(len, references)), **_recall(model, texts, known,
        pictures[:RECALL_AMONG], torch.cat(embeddings)[:RECALL_AMONG]),
        **{m.__name__: round(m(captions, references), 4) for m in (bleu4, rouge_l, cider, meteor)},
        "questions": len(answers),
    }  # fmt: skip
    return scores | _answered(answers) if answers else scores


def _recall(
    model: VisionLanguageModel, texts: Texts, known: set[str], pictures: list[Picture], seen: Tensor
) -> dict[str, Any]:
    """Of embeddings (n, dim) of the pictures, and their captions."""
    told = [(i, text) for i, picture in enumerate(pictures) for text in picture.captions]
    tokens = [texts.tokens(within(text, known, model.length)) for _, text in told]
    embeddings = [model.encode_text(padded(tokens[k : k + 256])) for k in range(0, len(tokens), 256)]
    similarity = (seen @ torch.cat(embeddings).T).numpy()
    right = np.arange(len(pictures))[:, None] == np.array([i for i, _ in told])
    return {
        "recall_among": len(pictures),
        "image_to_text": {f"recall@{k}": round(recall_at(similarity, right, k), 4) for k in (1, 5, 10)},
        "text_to_image": {f"recall@{k}": round(recall_at(similarity.T, right.T, k), 4) for k in (1, 5, 10)},
    }


def _answered(answers: list[tuple[Question, str]]) -> dict[str, Any]:
    usual = dict[str, Counter[str]]()  # of each type of question
    for question, _ in answers:
        usual.setdefault(question.type, Counter())[question.answer] += 1
    right, blind = dict[str, list[float]](), []
    for question, said in answers:
        given = [" ".join(words_of(text)) for text in question.given]
        right.setdefault(question.kind, []).append(vqa_accuracy(said, given))
        blind.append(vqa_accuracy(usual[question.type].most_common(1)[0][0], given))
    every = [value for values in right.values() for value in values]
    kinds = {"overall": every} | {kind: right[kind] for kind in KINDS if kind in right}
    return {
        "vqa": {kind: round(float(np.mean(values)), 4) for kind, values in kinds.items()},
        "vqa_blind": round(float(np.mean(blind)), 4),
    }
