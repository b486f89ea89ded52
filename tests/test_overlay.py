"""What the overlay shows can be found again in its pixels."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from mm_edge.clip import Clip
from mm_edge.errors import EdgeError
from mm_edge.language import Token, words_of
from mm_edge.overlay import BAD, BAR, COLUMNS, GOOD, INK, LINE, Lingering, draw, draw_words
from mm_edge.types import NS, Action, Attention, Caption, Event, Output

ACTION = Action(("linear_x", "angular_z"), np.float32([[0.4, 0.8]]), 0.1)


def output(**kwargs):
    mask, ages = {"camera": True, "scan": False}, {"camera": 0.04, "scan": float("inf")}
    return Output(0, {}, mask, ages, **kwargs)


def near(picture, colour):
    """Pixels of about that colour: (n, 2), row and column."""
    return np.argwhere(np.abs(picture.astype(int) - colour).max(axis=2) < 12)


def test_a_model_that_says_or_tells_something_does_not_lack_an_action():
    rgb, caption = np.full((480, 640, 3), 90, np.uint8), Caption("a red ball", 0.9)
    for what in ({"caption": caption}, {"values": {"left": 0.75, "right": 0.25}}):
        said, refused = draw(rgb, output(**what)), draw(rgb, output(**what, reasons=("camera dead",)))
        assert not len(near(said[440:480], BAD)) and len(near(said[440:480], INK)) > 20
        assert len(near(refused[440:480], BAD)) > 20
    assert len(near(draw(rgb, output())[440:480], BAD)) > 20  # silence is told


def test_an_event_stands_long_enough_to_be_read():
    rgb, event = np.zeros((480, 640, 3), np.uint8), Event("door", 0.93, 0)
    lingering = Lingering()
    stands = {}
    for at_s, events in {0.0: (), 1.0: (event,), 2.9: (), 3.1: (), 4.0: (event,), 0.5: ()}.items():
        shown = lingering(replace(output(action=ACTION), stamp_ns=round(at_s * NS), events=events))
        stands[at_s] = shown.events == (event,) and len(near(draw(rgb, shown)[:80], GOOD)) > 50
    assert stands == {0.0: False, 1.0: True, 2.9: True, 3.1: False, 4.0: True, 0.5: False}  # the clock went back


def test_small_frames_are_enlarged_and_stay_as_they_were():
    rgb = np.full((96, 128, 3), 90, np.uint8)
    picture = draw(rgb, output(action=ACTION))
    assert picture.shape == (480 + BAR, 640, 3) and picture.dtype == np.uint8
    assert (rgb == 90).all()


@pytest.mark.parametrize("shape", [(97, 131), (480, 640), (721, 1283)])
def test_sides_are_even_as_video_wants_them(shape):
    picture = draw(np.zeros((*shape, 3), np.uint8), output())
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0


@pytest.mark.parametrize("cell", [(0, 0), (5, 9), (11, 15)])
def test_the_heat_glows_where_the_model_looked(cell):
    rgb = np.full((480, 640, 3), 90, np.uint8)
    weights = np.full((12, 16), 0.5 / 192, np.float32)
    weights[cell] += 0.5
    plain, heated = draw(rgb, output()), draw(rgb, output(attention=(Attention("camera", 0, weights),)))
    change = np.abs(heated[:480].astype(int) - plain[:480]).sum(axis=2)
    row, column = np.unravel_index(change.argmax(), change.shape)
    assert (row // 40, column // 40) == cell


def test_even_attention_leaves_the_frame_as_it_is():
    rgb = np.full((480, 640, 3), 90, np.uint8)
    even = Attention("camera", 0, np.full((12, 16), 1 / 192, np.float32))
    assert np.array_equal(draw(rgb, output(attention=(even,))), draw(rgb, output()))


EVEN = np.full((12, 16), 1 / 192, np.float32)


def looking_at(cell):
    weights = np.full((12, 16), 0.5 / 192, np.float32)
    weights[cell] += 0.5
    return weights


def hottest(change):
    return np.unravel_index(change.astype(int).sum(axis=2).argmax(), change.shape[:2])


def test_each_word_has_a_tile_that_glows_where_the_model_looked():
    rgb, cells = np.full((480, 640, 3), 90, np.uint8), [(0, 0), (5, 9), (11, 15)]
    words = [(word, looking_at(cell)) for word, cell in zip(("a", "red", "ball"), cells)]
    picture, plain = (draw_words(rgb, "a red ball", said) for said in (words, [(word, EVEN) for word, _ in words]))
    height, width = 480 // COLUMNS, 640 // COLUMNS
    assert picture.shape == (480 + (LINE + 8) + height + LINE, 640, 3)
    change = np.abs(picture.astype(int) - plain)
    assert not change[:480].any()  # of several words none has the frame for itself
    for i, (row, column) in enumerate(cells):
        y, x = hottest(change[-height - LINE : -LINE, i * width : (i + 1) * width])
        assert (y * 12 // height, x * 16 // width) == (row, column)
    assert (rgb == 90).all()


def test_where_the_model_looked_for_a_single_word_is_seen_on_the_frame():
    rgb = np.full((480, 640, 3), 90, np.uint8)
    picture = draw_words(rgb, "red", [("red", looking_at((5, 9)))], "what colour is the ball")
    y, x = hottest(np.abs(picture[:480].astype(int) - 90))
    assert (y // 40, x // 40) == (5, 9) and picture.shape == (480 + 2 * (LINE + 8), 640, 3)


@pytest.mark.parametrize("text", ["", "它", "word " * 500, "x" * 1000])
def test_any_text_can_be_drawn(text):
    picture = draw_words(np.zeros((97, 131, 3), np.uint8), text, [(word, EVEN) for word in text.split()], text)
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0


def test_where_nobody_knows_where_the_model_looked_there_are_no_tiles():
    picture = draw_words(np.zeros((480, 640, 3), np.uint8), "a ball", [("a", None), ("ball", None)])
    assert picture.shape == (480 + LINE + 8, 640, 3)


def test_a_word_looks_where_its_pieces_look():
    one, other = looking_at((0, 0)), looking_at((5, 9))
    pieces = [("a", one), ("a re", one), ("a red", other), ("a red ball", None)]
    words = words_of(Token(text, 0.0, weights) for text, weights in pieces)
    assert [word for word, _ in words] == ["a", "red", "ball"] and words[2][1] is None
    np.testing.assert_allclose(words[1][1], (one + other) / 2)


def test_the_arrow_bends_the_way_the_robot_turns():
    rgb = np.zeros((480, 640, 3), np.uint8)
    left = near(draw(rgb, output(action=ACTION))[:440], GOOD)
    right = near(draw(rgb, output(action=Action(ACTION.names, ACTION.values * (1, -1), 0.1)))[:440], GOOD)
    assert left[:, 1].mean() < 310 and right[:, 1].mean() > 330


def test_a_robot_that_stands_has_no_arrow():
    picture = draw(np.zeros((480, 640, 3), np.uint8), output(action=Action(ACTION.names, ACTION.values * 0, 0.1)))
    assert len(near(picture[440:480], INK)) > 100 and not len(near(picture[:480], GOOD))


def test_joints_are_told_in_words():
    arm = replace(ACTION, names=("shoulder", "elbow"))
    picture = draw(np.zeros((480, 640, 3), np.uint8), output(action=arm))
    assert len(near(picture[440:480], INK)) > 100 and not len(near(picture[:480], GOOD))  # and no arrow


def test_a_missing_stream_is_red_and_a_present_one_green():
    bar = draw(np.zeros((480, 640, 3), np.uint8), output(action=ACTION))[480:]
    assert len(near(bar[:, :320], GOOD)) and not len(near(bar[:, :320], BAD))
    assert len(near(bar[:, 320:], BAD)) and not len(near(bar[:, 320:], GOOD))


def test_without_an_action_the_reason_is_written():
    rgb = np.zeros((480, 640, 3), np.uint8)
    assert len(near(draw(rgb, output(reasons=("camera stale 412 ms > 300 ms",)))[:480], BAD)) > 50
    assert not len(near(draw(rgb, output(action=ACTION))[:480], BAD))


def test_a_clip_can_be_played_and_its_strip_has_a_row_an_episode(tmp_path):
    clip = Clip(tmp_path / "new")
    for i in range(150):
        clip.add(np.full((96, 128, 3), i, np.uint8), episode=i // 100)
    video, strip = clip.close()
    player = cv2.VideoCapture(str(video))
    assert player.get(cv2.CAP_PROP_FRAME_COUNT) == 150
    picture = cv2.imread(str(strip))
    assert picture.shape == (2 * 240, 5 * 320, 3)
    middles = picture[120::240, 160::320, 0].astype(int)
    assert np.abs(middles - [[6, 29, 52, 75, 98], [106, 117, 128, 138, 149]]).max() <= 2


def test_a_clip_that_a_full_disk_cut_short_is_no_clip(tmp_path, monkeypatch):
    """cv2 says nothing of it."""
    clip = Clip(tmp_path)
    clip.add(np.zeros((48, 64, 3), np.uint8), 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(EdgeError, match="cut short: its disk is full"):
        clip.close()


def test_no_frames_no_files(tmp_path):
    assert Clip(tmp_path).close() == []


@pytest.mark.parametrize(("shape", "drawn"), [((30_000, 1), (30_000 + BAR, 2)), ((1, 30_000), (2 + BAR, 30_000))])
def test_a_frame_that_is_hardly_one_is_not_enlarged_to_gigabytes(shape, drawn):
    picture = draw(np.zeros((*shape, 3), np.uint8), output(), "drive to the red ball")
    assert picture.shape == (*drawn, 3)


def test_a_reason_of_any_length_is_cut_to_the_frame_at_once():
    """Letter by letter, a hundred thousand would take minutes."""
    said = [draw(np.zeros((480, 640, 3), np.uint8), output(reasons=("x" * n,))) for n in (300, 100_000)]
    np.testing.assert_array_equal(*said)
