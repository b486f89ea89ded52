"""A folder in the layout of COCO and VQA v2: what is read of it, what is refused, and that it is learned from."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("mujoco", reason="training imports the simulator")
pytest.importorskip("nltk", reason="METEOR's stemmer: pip install nltk")
cv2 = pytest.importorskip("cv2", reason="pictures are files")

from mm_edge.errors import EdgeError
from mm_edge.preprocess import Vocabulary
from training import coco, evaluate, train, vlm
from training.recipe import read_recipe

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (30, 30, 230)}
SMALL = [
    "streams.0.shape=[32, 48, 3]", "model={fusion_dim: 16, text_seq_length: 16, layers: 1, heads: 2, "
    "spiking_units: 24, liquid_units: 8}", "train.lanes=4", "train.mixed_precision=no", "data.min_count=2",
]  # fmt: skip


def picture(colour: str, disc: bool) -> np.ndarray:
    """BGR, as cv2 writes it: a disc or a square on grey."""
    image = np.full((60, 80, 3), 128, np.uint8)
    if disc:
        return cv2.circle(image, (40, 30), 20, COLOURS[colour][::-1], -1)
    return cv2.rectangle(image, (20, 10), (60, 50), COLOURS[colour][::-1], -1)


def contents(part: str) -> dict[str, dict]:
    """Six pictures with two captions and two questions each; by name of the JSON file."""
    shown = [(colour, disc) for colour in COLOURS for disc in (True, False)]
    names = [(f"a {colour} {'disc' if disc else 'square'}", colour) for colour, disc in shown]
    images = [{"id": 100 + i, "file_name": f"{part}_{i}.png"} for i in range(len(shown))]
    said = [{"id": 2 * i + k, "image_id": 100 + i, "caption": text} for i, (name, _) in enumerate(names)
            for k, text in enumerate((f"{name.capitalize()}.", f"There's {name}, on GREY!"))]  # fmt: skip
    asked = [(2 * i, 100 + i, "What colour is it?", "what colour", "other", colour) for i, (_, colour) in
             enumerate(names)]  # fmt: skip
    asked += [(2 * i + 1, 100 + i, "Is it a disc?", "is it", "yes/no", "yes" if disc else "no") for i, (_, disc) in
              enumerate(shown)]  # fmt: skip
    keys = ("question_id", "image_id", "question")
    answers = [
        {"question_id": q, "image_id": i, "question_type": first, "answer_type": kind, "multiple_choice_answer": answer,
         "answers": [{"answer": answer, "answer_id": k} for k in range(9)] + [{"answer": "grey", "answer_id": 9}]}
        for q, i, _, first, kind, answer in asked
    ]  # fmt: skip
    return {
        f"annotations/captions_{part}.json": {"images": images, "annotations": said},
        f"vqa/v2_OpenEnded_{part}_questions.json": {"questions": [dict(zip(keys, row)) for row in asked]},
        f"vqa/v2_{part}_annotations.json": {"annotations": answers},
    }


def write(folder: Path, files: dict[str, dict], part: str) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "images" / part).mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(COLOURS):
        for k, disc in enumerate((True, False)):
            cv2.imwrite(str(folder / "images" / part / f"{part}_{2 * i + k}.png"), picture(colour, disc))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pictures"), contents("one"), "one")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    fast = ["rounds=[{steps: 200}]", "train.learning_rate=0.01", "train.warm_up_steps=5"]
    assert train.main(["vlm", "--data", str(folder), "--out", str(out), *fast, *SMALL]) == 0
    return out / "final.safetensors"


def test_a_folder_is_pictures_with_captions_and_questions(folder):
    pictures = coco.read(folder, "train")
    assert len(pictures) == 6 and pictures[1].file == folder / "images" / "one" / "one_1.png"
    assert pictures[1].captions == ("A red square.", "There's a red square, on GREY!")
    colour, shape = pictures[1].questions
    assert colour == ("What colour is it?", "what colour", "other", "red", ("red",) * 9 + ("grey",))
    assert (shape.kind, shape.answer) == ("yes/no", "no")


def test_training_and_evaluation_read_their_own_files(tmp_path, trained, capsys):
    for part in ("train", "val"):
        write(tmp_path, contents(part), part)
    assert {p.file.parent.name for p in coco.read(tmp_path, "train")} == {"train"}
    assert {p.file.parent.name for p in coco.read(tmp_path, "val")} == {"val"}
    assert evaluate.main(["vlm", "--data", str(tmp_path), "--checkpoint", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learned"] is False
    (only,) = tmp_path.rglob("*captions*train*.json")
    only.rename(only.with_name("captions_mine.json"))  # and now no file is of training: all are learned
    assert evaluate.main(["vlm", "--data", str(tmp_path), "--checkpoint", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learned"] is True


def test_words_are_small_letters_of_any_script_as_the_robot_reads_them():
    text = "Il y a DÉJÀ deux cafe\u0301s, d'accord? 狗 и Ёлка 3x!"
    said = coco.words_of(text)
    assert said == ["il", "y", "a", "déjà", "deux", "cafés", "d", "accord", "狗", "и", "ёлка", "3x"]
    assert Vocabulary(said).encode(" ".join(said), 12).tolist() == list(range(1, 13))
    assert coco.within("A red, RED cat", {"a", "red", "cat"}, 3) == "a red red"
    assert coco.within("a striped cat", {"a", "cat"}, 3) == "a cat"


def test_the_vocabulary_is_what_the_folder_says_often_enough(trained):
    recipe = read_recipe(trained.parent / "recipe.yaml")
    assert vlm.words(recipe) == sorted(
        "a red green blue disc square there s on grey what colour is it yes no".split()  # noqa: SIM905
    )
    assert vlm.build_model(recipe).words == len(vlm.words(recipe)) and not vlm.build_model(recipe).aux


def test_a_lesson_is_a_picture_and_what_was_said_of_it(folder, tmp_path):
    recipe = coco.with_words(read_recipe(train.RECIPES / "vlm_folder.yaml", [*SMALL, f"data.folder={folder}"]))
    supply, texts = vlm.supply(recipe, 0, tmp_path, 1), vlm.Texts(vlm.words(recipe))
    label = {name: value[:, 0] for name, value in supply.next().labels.items()}
    assert label.keys() == {"image", "names", "caption", "text", "wrong", "hidden", "question", "asked"}
    for i in range(4):
        number, right = int(label["names"][i]), texts.text(label["text"][i].tolist())
        shown = coco.read(folder, "train")[number]
        assert right in [" ".join(coco.words_of(text)) for text in shown.captions]
        assert texts.text(label["caption"][i].tolist()) == right != texts.text(label["wrong"][i].tolist())
        said, at = label["question"][i].tolist(), label["asked"][i]
        assert said[at] == texts.ask and texts.text(said[at:]) in {question.answer for question in shown.questions}
        colour = COLOURS[list(COLOURS)[number // 2]]
        assert label["image"][i, 16, 24].tolist() == pytest.approx(colour, abs=3)  # the middle, in RGB
    saved, again = supply.state_dict(), vlm.supply(recipe, 0, tmp_path, 1)
    want = supply.next().labels
    again.load_state_dict(saved)
    assert all(torch.equal(value, want[name]) for name, value in again.next().labels.items())  # it goes on exactly


def test_what_was_learned_is_scored(folder, trained, capsys):
    assert evaluate.main(["vlm", "--data", str(folder), "--checkpoint", str(trained), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["pictures"] == scores["recall_among"] == 6 and scores["learned"] is True
    assert scores["captions"] == scores["questions"] == 12
    assert {"bleu4", "rouge_l", "cider", "meteor"} <= scores.keys()
    assert scores["vqa"].keys() == {"overall", "yes/no", "other"}
    assert scores["vqa_blind"] == round((2 + 3) / 12, 4)  # always the same colour, always yes
    assert scores["vqa"]["overall"] > 0.5  # it sees
    assert scores["text_to_image"]["recall@1"] > 1 / 6


def test_without_questions_there_is_nothing_to_answer(tmp_path, capsys):
    files = {name: content for name, content in contents("one").items() if "captions" in name}
    folder = str(write(tmp_path / "data", files, "one"))
    assert train.main(["vlm", "--data", folder, "--out", str(tmp_path / "run"), "rounds=[{steps: 2}]", *SMALL]) == 0
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "final.safetensors")
    assert evaluate.main(["vlm", "--data", folder, "--checkpoint", checkpoint, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["questions"] == 0 and "vqa" not in scores
    assert evaluate.main(["vlm", "--checkpoint", checkpoint]) == 1  # it knows nothing of scenes
    assert "learned from a folder" in capsys.readouterr().err


CAPTIONS, QUESTIONS, ANSWERS = contents("one")


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (CAPTIONS, lambda c: c["images"][2].update(file_name="gone.png"), "image 102 is gone.png, .*; 1 of 6"),
        (CAPTIONS, lambda c: c["annotations"][0].update(image_id=7), "a caption is of image 7, which is not among"),
        (CAPTIONS, lambda c: c["annotations"][3].pop("caption"), r"annotations.3: expected image_id \(int\), caption"),
        (CAPTIONS, lambda c: c.pop("images"), "expected an object with a list 'images'"),
        (CAPTIONS, lambda c: c["images"].append({"id": 100, "file_name": "b.png"}), "image 100 is b.png, and one_0"),
        (CAPTIONS, lambda c: c["annotations"].clear(), "expected captions in annotations, got none"),
        (QUESTIONS, lambda c: c["questions"][0].update(image_id=7), "question 0 is of image 7, which no captions"),
        (QUESTIONS, lambda c: c["questions"].pop(0), "question 0: no .*questions.json asks it"),
        (ANSWERS, lambda c: c["annotations"].pop(), "1 are not answered, such as 11"),
        (ANSWERS, lambda c: c["annotations"][0].update(image_id=101), "question 0: are of image 101, .* is of 100"),
        (ANSWERS, lambda c: c["annotations"][0].update(answer_type="long"), "answer_type: expected one of yes/no"),
        (ANSWERS, lambda c: c["annotations"][0]["answers"].clear(), "question 0: expected some, got none"),
        (ANSWERS, lambda c: c["annotations"][0]["answers"][1].pop("answer"), r"answers.1: expected answer \(str\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, name, change, why):
    files = contents("one")
    change(files[name])
    write(tmp_path, files, "one")
    with pytest.raises(EdgeError, match=why) as error:
        coco.read(tmp_path, "train")
    assert str(tmp_path) in str(error.value)


def test_broken_files_are_named(tmp_path, capsys):
    with pytest.raises(EdgeError, match=r"expected annotations/captions_\*.json in the layout of COCO, got none"):
        coco.read(tmp_path, "train")
    assert train.main(["vlm", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    write(tmp_path, contents("one"), "one")
    (tmp_path / "images" / "one" / "one_4.png").write_bytes(b"no picture")
    options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 1}]", *SMALL]
    assert train.main(["vlm", "--data", str(tmp_path), *options]) == 2
    assert "one_4.png: expected an image, got 10 bytes that are none" in capsys.readouterr().err
    (tmp_path / CAPTIONS).write_text('{"images": [')
    with pytest.raises(EdgeError, match=r"captions_one.json: expected JSON, got .*line 1 column 13"):
        coco.read(tmp_path, "train")


def test_an_image_that_is_there_twice_is_not_guessed(tmp_path):
    write(tmp_path, contents("one"), "one")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "one_0.png").write_bytes(b"")
    with pytest.raises(EdgeError, match=r"image 100 is one_0\.png, which is there twice"):
        coco.read(tmp_path, "train")


def test_too_rare_words_are_told(folder, tmp_path, capsys):
    options = ["--out", str(tmp_path / "run"), *SMALL, "data.min_count=99"]
    assert train.main(["vlm", "--data", str(folder), *options]) == 2
    assert "data.min_count: no word is there 99 times, the most frequent are [('a'," in capsys.readouterr().err
