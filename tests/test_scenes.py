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


def test_questions_have_the_one_answer_that_is_right():
    numbers, sides = {}, {}
    for seed in range(50):
        asked = questions((BALL, BOX), np.random.default_rng(seed))
        answers = {q.text: q.answer for q in asked}
        assert answers["how many coloured objects are there"] == "two"
        numbers |= {text: answer for text, answer in answers.items() if text.startswith("how many")}
        sides |= {text: answer for text, answer in answers.items() if text.startswith("which")}
        assert answers["is the orange box to the left of the red ball"] == "no"
        assert [q.answer for q in asked if q.kind == "yes/no"].count("yes") == 2
        for q in asked:
            if q.text.startswith("is there"):
                assert (q.answer == "yes") == any(thing.name in q.text for thing in (BALL, BOX)), q

    assert numbers == {
        "how many coloured objects are there": "two",
        "how many coloured balls are there": "one",
        "how many coloured boxes are there": "one",
        "how many coloured pillars are there": "zero",
    }
    assert sides == {
        "which coloured object is left of the red ball": "nothing",
        "which coloured object is left of the orange box": "red ball",
        "which coloured object is right of the red ball": "orange box",
        "which coloured object is right of the orange box": "nothing",
    }


def test_a_colour_or_shape_that_is_there_twice_is_not_asked_for():
    two = (BALL, BALL._replace(colour="blue", column=0.9))
    for seed in range(20):
        assert not any(q.text == "what colour is the ball" for q in questions(two, np.random.default_rng(seed)))


def test_a_scene_is_the_same_again_and_shows_what_its_masks_say():
    scene, again = make_scene(5001), make_scene(5001)
    assert np.array_equal(scene.image, again.image) and scene.captions == again.captions
    assert scene.image.shape == (96, 128, 3) and scene.questions == again.questions
    columns = [thing.column for thing in scene.things]
    assert columns == sorted(columns)
    (red,) = (thing for thing in scene.things if thing.name == "red pillar")
    r, g, b = scene.image[red.mask].astype(float).mean(0)
    assert r > 2 * g and r > 2 * b


def test_every_scene_is_said_with_known_words():
    known = set(words())
    for seed in range(5000, 5010):
        scene = make_scene(seed)
        assert scene.things and len(scene.captions) == 5
        texts = [*scene.captions, *(q.text for q in scene.questions), *(q.answer for q in scene.questions)]
        assert {word for text in texts for word in text.replace(",", "").split()} <= known
