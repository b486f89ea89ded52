"""What is said of a picture is what it shows."""

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="scenes are simulated")

from training.scenes import NEAR_M, Seen, captions, make_scene, questions, words

BLANK = np.zeros((2, 2), bool)
BALL, BOX = Seen("red", "ball", 0.1, NEAR_M - 0.1, BLANK), Seen("orange", "box", 0.5, NEAR_M + 0.1, BLANK)


def plain(text: str) -> str:
    """With the first of each two names."""
    for name, other in (("sphere", "ball"), ("cube", "box"), ("column", "pillar")):
        text = text.replace(name, other)
    return text


def test_five_captions_say_all_that_there_is():
    said = captions((BALL, BOX), np.random.default_rng(0))
    assert list(map(plain, said)) == [
        "a red ball and an orange box from left to right",
        "the robot sees a red ball and an orange box",
        "a red ball on the left and an orange box in the middle",
        "there are a red ball close by and an orange box far away",
        "a red ball to the left of an orange box",
    ]
    alone = captions((BALL,), np.random.default_rng(0))
    assert plain(alone[0]) == "a red ball" and plain(alone[3]) == "there is a red ball close by"


def test_a_picture_of_nothing_is_said_in_five_ways_and_asked_about():
    rng = np.random.default_rng(0)
    assert captions((), rng)[:2] == ("no coloured object", "the robot sees no coloured object")
    for _ in range(20):
        asked = questions((), rng)
        assert [q.answer for q in asked] == ["zero", "zero", "no", "nothing"]


def test_questions_have_the_one_answer_that_is_right():
    """Whatever the wording, and by whichever name: each kind of question, with the first of several wordings."""
    answers: dict[str, set[str]] = {}
    texts = set()
    for seed in range(300):
        for q in questions((BALL, BOX), np.random.default_rng(seed)):
            texts.add(q.text)
            text = plain(q.text).replace("boxs", "boxes").replace(" to the ", " ")
            if text.startswith("how many"):
                text = text.rsplit(" are there")[0].rsplit(" do you see")[0].rsplit(" can you see")[0]
            for other in ("which coloured object is", "which object is"):
                text = text.replace(other, "what is")
            for other in ("do you see", "can you see"):
                text = text.replace(other, "is there")
            for other in ("what colour is the ball", "which colour is the ball"):
                text = text.replace(other, "what is the colour of the ball")
            for other in ("what shape is", "which shape is"):
                text = text.replace(other, "what is")
            answers.setdefault(text, set()).add(q.answer)
    present = {f"is there a{'n' * (t is BOX)} {t.name}" for t in (BALL, BOX)}
    asked_for = {text: said for text, said in answers.items() if text.startswith("is there")}
    assert {text for text, said in asked_for.items() if said == {"yes"}} == present
    assert all(said == {"no"} for text, said in asked_for.items() if text not in present) and len(asked_for) > 10
    rest = {text: said for text, said in answers.items() if text not in asked_for}
    assert rest == {
        "how many coloured objects": {"two"}, "how many coloured balls": {"one"}, "how many coloured boxes": {"one"},
        "how many coloured pillars": {"zero"},
        "what is the colour of the ball": {"red"}, "what is the red object": {"ball"},
        "what is the orange object": {"box"},
        "what is left of the red ball": {"nothing"}, "what is left of the orange box": {"red ball"},
        "what is right of the red ball": {"orange box"}, "what is right of the orange box": {"nothing"},
        "is the red ball close by": {"yes"}, "is the red ball far away": {"no"},
        "is the orange box close by": {"no"}, "is the orange box far away": {"yes"},
        "is the red ball left of the orange box": {"yes"}, "is the orange box right of the red ball": {"yes"},
        "is the red ball right of the orange box": {"no"}, "is the orange box left of the red ball": {"no"},
    }  # fmt: skip
    assert {"what is to the left of the red ball", "which object is right of the orange cube"} <= texts


def test_a_colour_or_shape_that_is_there_twice_is_not_asked_for():
    two = (BALL, BALL._replace(colour="blue", column=0.9))
    for seed in range(20):
        asked = questions(two, np.random.default_rng(seed))
        assert not any("colour is the" in q.text or "colour of the" in q.text for q in asked)


def test_a_scene_is_the_same_again_and_shows_what_its_masks_say():
    scene, again = make_scene(5001), make_scene(5001)
    assert np.array_equal(scene.image, again.image) and scene.captions == again.captions
    assert scene.image.shape == (96, 128, 3) and scene.questions == again.questions
    columns = [thing.column for thing in scene.things]
    assert columns == sorted(columns)
    (red,) = (thing for thing in scene.things if thing.colour == "red")
    r, g, b = scene.image[red.mask].astype(float).mean(0)
    assert r > 2 * g and r > 2 * b


def test_every_scene_is_said_with_known_words():
    known = set(words())
    for seed in range(5000, 5010):
        scene = make_scene(seed)
        assert len(scene.captions) == 5
        texts = [*scene.captions, *(q.text for q in scene.questions), *(q.answer for q in scene.questions)]
        assert {word for text in texts for word in text.replace(",", "").split()} <= known
