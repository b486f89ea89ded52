"""Moments found in recordings: what an index holds, what it reads again, and what `mm-edge search` says of it.

The model knows how red and how blue a picture is, and the words for it: see toy_language.py.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="sheets are drawn with OpenCV")
pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("rosbags", reason="rosbags is not installed")

from toy_language import write_toy_language

from mm_edge import search
from mm_edge.cli import main
from mm_edge.errors import EdgeError, RecordingError
from mm_edge.language import Language
from mm_edge.recording import RecordingWriter
from mm_edge.search import Index, found, frame
from mm_edge.types import NS, Sample, StreamSpec

T0 = 1_000 * NS
CAMERA = StreamSpec("camera", "image", (8, 8, 3), rate_hz=10, max_age_ms=300)
REAR = StreamSpec("rear", "image", (8, 8, 3), rate_hz=10, max_age_ms=300)


def colour(red):
    """A picture whose embedding is (red, 255 - red), of length 1."""
    return np.full((8, 8, 3), (red, 0, 255 - red), np.uint8)


def record(path, reds, period_s=1.0, stream="camera"):
    """A frame each `period_s` from T0 on, which arrives 50 ms later."""
    with RecordingWriter(path, [CAMERA, REAR]) as recording:
        for i, red in enumerate(reds):
            stamp_ns = T0 + round(i * period_s * NS)
            recording.write(Sample(stream, stamp_ns, stamp_ns + NS // 20, colour(red)))


def score(red, query=(1.0, 0.0)):
    return float(np.dot(query, (red, 255 - red)) / np.hypot(red, 255 - red))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_language(tmp_path_factory.mktemp("bundle") / "toy").path


class Looks(Language):
    """Counts the frames that it looked at."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.n = 0

    def look(self, image):
        self.n += 1
        super().look(image)


@pytest.fixture
def language(bundle):
    return Looks(bundle)


def updated(folder, language, **options):
    """The index, its recordings, and what is wrong with them."""
    recordings = found([folder])[folder]
    index = Index(folder, language, **options)
    return index, recordings, index.update(recordings)


RED = np.float32([1, 0])


def test_moments_come_with_score_and_time_the_likest_first(tmp_path, language):
    record(tmp_path / "a", [0, 100, 0])
    record(tmp_path / "deep" / "b", [0, 0, 0, 250], stream="rear")
    index, recordings, troubles = updated(tmp_path, language)
    assert recordings == [tmp_path / "a", tmp_path / "deep" / "b"] and troubles == []
    first, second = index.search(RED, recordings, top=2)
    assert first._replace(score=0) == (str(tmp_path / "deep" / "b"), "rear", T0 + 3 * NS, T0 + 305 * NS // 100, 3.0, 0)
    assert second[:3] == (str(tmp_path / "a"), "camera", T0 + NS)
    assert (first.score, second.score) == pytest.approx((score(250), score(100)), abs=1e-6)
    assert (frame(first, language) == colour(250)).all() and (frame(second, language) == colour(100)).all()


def test_what_links_lead_to_is_found_once(tmp_path):
    record(tmp_path / "real", [0])
    (tmp_path / "all").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    assert found([tmp_path]) == {tmp_path: [tmp_path / "real"]}


def test_one_frame_a_second_of_capture_time_is_read(tmp_path, language):
    record(tmp_path / "a", range(30), period_s=0.1)
    updated(tmp_path, language)
    assert language.n == 3
    index, recordings, _ = updated(tmp_path, language, rate_hz=5.0)
    assert language.n == 3 + 15
    assert [m.stamp_ns for m in index.search(RED, recordings, 3, apart_s=0.2)] == [
        T0 + n * NS // 10 for n in (28, 26, 24)
    ]


def test_neighbours_are_one_moment(tmp_path, language):
    """Also where all that would come first is one sight: there are 400 frames of it, and of ten moments 200 are asked
    for at first."""
    record(tmp_path / "a", [*range(200, 210), 0, 0, 0, 0, 0, 150])
    index, recordings, _ = updated(tmp_path, language)
    assert [m.at_s for m in index.search(RED, recordings, 3)] == [9, 4, 15]
    assert [m.at_s for m in index.search(RED, recordings, 3, apart_s=1)] == [9, 8, 7]
    record(tmp_path / "b", [210] * 400 + [20])
    index, recordings, _ = updated(tmp_path, language)
    assert [m.at_s for m in index.search(RED, [tmp_path / "b"], 10, apart_s=400)] == [pytest.approx(0, abs=399), 400]


def test_what_was_read_is_not_read_again(tmp_path, language):
    record(tmp_path / "a", [0, 100])
    updated(tmp_path, language)
    record(tmp_path / "b", [200])
    index, recordings, _ = updated(tmp_path, language)
    assert language.n == 3
    index.update(recordings)
    assert language.n == 3 and len(index.search(RED, recordings)) == 2
    assert [Path(m.recording).name for m in index.search(RED, [tmp_path / "a"])] == ["a"]


def test_what_was_replaced_is_read_anew_and_what_is_gone_is_not_found(tmp_path, language):
    for name, red in (("a", 10), ("b", 20), ("c", 30)):
        record(tmp_path / name, [red])
    updated(tmp_path, language)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "c")
    record(tmp_path / "c", [200, 0])
    index, recordings, _ = updated(tmp_path, language)
    assert language.n == 3 + 2
    moments = index.search(RED, recordings, apart_s=1)
    assert [(Path(m.recording).name, m.at_s) for m in moments] == [("c", 0), ("b", 0), ("c", 1)]


def test_what_was_interrupted_goes_on(tmp_path, language, monkeypatch):
    monkeypatch.setattr(search, "FLUSH_FRAMES", 4)
    record(tmp_path / "a", range(3))
    record(tmp_path / "b", range(100, 110))

    def until_interrupted(frames, name, n):
        for i, sample in enumerate(frames):
            if (name, i) == ("b", 7):
                raise KeyboardInterrupt
            yield sample

    recordings = found([tmp_path])[tmp_path]
    with pytest.raises(KeyboardInterrupt):
        Index(tmp_path, language).update(recordings, until_interrupted)
    index, recordings, _ = updated(tmp_path, language)
    assert language.n == 13
    assert sorted(m.at_s for m in index.search(RED, [tmp_path / "b"], 20, apart_s=1)) == list(range(10))


def test_rows_that_were_written_when_the_power_went_are_not_written_twice(tmp_path, language, monkeypatch):
    record(tmp_path / "a", range(5))
    monkeypatch.setattr(Index, "_save", lambda index, save=Index._save: save(index) if index._table is None else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        updated(tmp_path, language)
    monkeypatch.undo()
    index, recordings, _ = updated(tmp_path, language)
    assert language.n == 5 and len(index.search(RED, recordings, 20, apart_s=1)) == 5


def test_another_model_has_an_index_of_its_own(tmp_path, language, bundle):
    record(tmp_path / "a", [10])
    updated(tmp_path, language)
    other = Looks(bundle)
    other.bundle = replace(other.bundle, id="f" * 64)
    index, recordings, _ = updated(tmp_path, other)
    assert other.n == 1 and len(index.search(RED, recordings)) == 1
    assert len(list((tmp_path / search.INDEX).iterdir())) == 2


def test_a_damaged_recording_is_told_of_and_the_others_are_searched(tmp_path, language):
    for name in "abc":
        record(tmp_path / name, [10, 20])
    mcap = tmp_path / "b" / "b.mcap"
    mcap.write_bytes(mcap.read_bytes()[:300])
    (tmp_path / "c" / "c.mcap").unlink()
    for _ in range(2):  # told again, though not read again
        index, recordings, troubles = updated(tmp_path, language)
        assert [t.split(":")[0] for t in troubles] == [str(tmp_path / "b"), str(tmp_path / "c")]
        assert {m.recording for m in index.search(RED, recordings)} == {str(tmp_path / "a")}
    assert language.n == 2


def test_a_recording_without_images_is_told_of(tmp_path, language):
    """Though it has a camera's topic."""
    text = StreamSpec("text", "text", (3,), rate_hz=0, max_age_ms=1000)
    with RecordingWriter(tmp_path / "a", [text, CAMERA]) as recording:
        recording.write(Sample("text", T0, T0, "go"))
    assert updated(tmp_path, language)[2] == [f"{tmp_path / 'a'}: has no images"]


def test_a_frame_of_which_the_model_makes_nothing_is_told_of_and_the_others_are_found(tmp_path, language):
    """A black one: its embedding is 0 / 0."""
    with RecordingWriter(tmp_path / "a", [CAMERA]) as recording:
        for i, seen in enumerate([colour(10), 0 * colour(10), colour(20)]):
            recording.write(Sample("camera", T0 + i * NS, T0 + i * NS, seen))
    index, recordings, (trouble,) = updated(tmp_path, language)
    assert trouble.startswith(f"{tmp_path / 'a'}: 1 frames cannot be read: ")
    assert [m.at_s for m in index.search(RED, recordings, apart_s=1)] == [2, 0]


def test_only_one_process_reads_at_a_time(tmp_path, language):
    record(tmp_path / "a", [10])

    def meanwhile(frames, name, n):
        with pytest.raises(EdgeError, match="another process reads recordings into it"):
            updated(tmp_path, language)
        return frames

    Index(tmp_path, language).update([tmp_path / "a"], meanwhile)


def test_a_spoilt_index_is_told_of(tmp_path, language):
    record(tmp_path / "a", [10])
    index, _, _ = updated(tmp_path, language)
    (index.path / "recordings.json").write_text("{")
    with pytest.raises(RecordingError, match=r"cannot be read or written \(if it is removed, it is made anew\)"):
        Index(tmp_path, language)


def test_an_index_that_is_removed_is_made_anew_also_by_who_has_it_open(tmp_path, language):
    record(tmp_path / "a", [10])
    index, recordings, _ = updated(tmp_path, language)
    shutil.rmtree(tmp_path / search.INDEX)
    assert index.update(recordings) == [] and language.n == 2
    assert len(index.search(RED, recordings)) == len(Index(tmp_path, language).search(RED, recordings)) == 1


@pytest.fixture
def searched(tmp_path, bundle, capsys):
    def run(*arguments):
        options = ["--bundle", bundle, "--sheet", tmp_path / "out" / "sheet.png"]
        status = main(["search", *map(str, [*arguments, *options])])
        return status, *capsys.readouterr()

    return run


def test_times_are_said_as_people_say_them():
    assert [search.clock(s) for s in (0, 9.96, 59.97, 3725.04)] == ["0:00.0", "0:10.0", "1:00.0", "1:02:05.0"]


def test_the_command_finds_words_and_draws_a_sheet(tmp_path, searched):
    record(tmp_path / "rec" / "0", [200, *[0] * 5, 255])
    status, out, log = searched(tmp_path / "rec", "a red gnome", "--json", "--top", "2")
    assert status == 0, log
    heading, first, second, sheet, last = out.splitlines()
    assert heading.split() == ["score", "at", "recording,", "stream"]
    assert first == f" 1.000     0:06.0  {tmp_path}/rec/0  camera" and second.split()[1] == "0:00.0"
    assert "words that the model does not know are left out: gnome" in log and "reading 1 of 1 recordings" in log
    told = json.loads(last)
    assert told["sheet"] == sheet and [m["stamp_ns"] for m in told["moments"]] == [T0 + 6 * NS, T0]
    drawn = cv2.imread(sheet)[..., ::-1]
    assert [drawn[150, x].tolist() for x in (172, 172 + 332)] == [[255, 0, 0], [200, 0, 55]]  # a thumbnail each
    status, out, log = searched(tmp_path / "rec", "blue")
    assert out.splitlines()[1].split()[1] == "0:01.0" and log == ""


def test_the_command_finds_what_is_like_a_picture(tmp_path, searched):
    record(tmp_path / "rec" / "0", [0, 90, 255])
    cv2.imwrite(str(tmp_path / "like.png"), np.ascontiguousarray(colour(90)[..., ::-1]))
    status, out, _ = searched(tmp_path / "rec" / "0", "--image", tmp_path / "like.png", "--apart-s", "0.5")
    assert status == 0 and [line.split()[1] for line in out.splitlines()[1:4]] == ["0:01.0", "0:00.0", "0:02.0"]


def test_what_makes_no_sense_is_one_line(tmp_path, searched):
    record(tmp_path / "rec" / "0", [0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jpg").write_text("no picture")
    (tmp_path / "void.jpg").touch()
    rec = tmp_path / "rec"
    for arguments, why in (
        ([tmp_path / "nowhere", "red"], "nowhere: expected a recording or a folder of them, there is nothing"),
        ([tmp_path / "empty", "red"], "empty: expected a recording or a folder of them, found none in it"),
        ([rec], "expected recordings and then what to look for: words, or --image FILE"),
        ([rec, " "], "text: expected some words, got ' '"),
        ([rec, "gnomes"], "text: expected words that the model knows, got unknown ['gnomes']"),
        ([rec, "--image", tmp_path / "words.jpg"], "words.jpg: expected a picture, got something else"),
        ([rec, "--image", tmp_path / "void.jpg"], "void.jpg: expected a picture, got something else"),
        ([rec, "--image", tmp_path / "none.jpg"], f"No such file or directory: '{tmp_path / 'none.jpg'}'"),
    ):
        status, out, log = searched(*arguments)
        assert status == 1 and out == "" and log.endswith(f"{why}\n") and log.count("\n") == 1, log
    assert not (rec / search.INDEX).exists()  # nothing was read in vain


def test_searching_needs_lancedb(tmp_path, language, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(EdgeError, match=r"searching needs lancedb: .* -m pip install .*\[search\]"):
        Index(tmp_path, language)
