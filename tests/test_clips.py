"""Clips of video with sound: what is read of a folder, how videos are decoded, and that they are learned from."""

from dataclasses import replace
from fractions import Fraction
from math import inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
av = pytest.importorskip("av", reason="clips are videos: pip install av")
for library in ("accelerate", "onnxscript", "onnxruntime", "mujoco", "nltk", "cv2"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from mm_edge.errors import EdgeError
from tests.test_tasks import scored
from training import clips, evaluate, train
from training.clips import Clip
from training.events import IGNORED
from training.recipe import read_recipe
from training.train import RECIPES

CAMERA, AUDIO = (replace(spec, shape=shape) for spec, shape in zip(
    read_recipe(RECIPES / "clips.yaml").streams, ((16, 16, 3), (2, 40, 24))))  # fmt: skip
RED, BLUE = (200, 20, 20), (20, 20, 200)
SMALL = [
    "streams.0.shape=[16, 16, 3]", "train.lanes=4", "train.mixed_precision=no",
    "model={fusion_dim: 16, num_attention_heads: 2, modality: {spiking_units: 16, liquid_units: 8, encoder_dim: 16, "
    "camera: {type: video, input_dim: [4, 3, 16, 16], preprocessing: early}}}",
]  # fmt: skip


def tone(hz: float, seconds: float, rate_hz: int = 16000) -> np.ndarray:
    return np.int16(8000 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz))[:, None]


def film(path: Path, pictures: list, sound: np.ndarray | None, fps: int = 8, rate_hz: int = 16000, late: int = 0):
    """Pictures, each of one colour, without a loss; sound int16 (n, channels), which begins `late` samples after them,
    or before them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="matroska") as file:
        video = file.add_stream("ffv1", rate=fps)
        video.width, video.height, video.pix_fmt = 32, 24, "bgr0"
        if sound is not None:
            layout = "mono" if sound.shape[1] == 1 else "stereo"
            track = file.add_stream("pcm_s16le", rate=rate_hz, layout=layout)
            frame = av.AudioFrame.from_ndarray(sound.reshape(1, -1), format="s16", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate_hz, max(0, late), Fraction(1, rate_hz)
        for k, colour in enumerate(pictures, max(0, -late) * fps // rate_hz):
            picture = av.VideoFrame.from_ndarray(np.full((24, 32, 3), colour, np.uint8), format="rgb24")
            picture.pts, picture.time_base = k, Fraction(1, fps)
            file.mux(video.encode(picture))
        file.mux(video.encode())
        if sound is not None:
            file.mux(track.encode(frame))
            file.mux(track.encode())
    return path


def small_mp4(path: Path, colour: tuple[int, int, int], hz: float, seconds: int) -> None:
    """As most videos are: MPEG-4 and AAC at 44.1 kHz in stereo, 25 frames a second."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 32, 24, "yuv420p"
        track = file.add_stream("aac", rate=44100, layout="stereo")
        for _ in range(25 * seconds):
            picture = av.VideoFrame.from_ndarray(np.full((24, 32, 3), colour, np.uint8), format="rgb24")
            file.mux(video.encode(picture))
        sound = tone(hz, seconds, 44100).repeat(2, 1)
        frame = av.AudioFrame.from_ndarray(sound.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = 44100
        file.mux(track.encode(frame))
        file.mux(video.encode())
        file.mux(track.encode())


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory) -> Path:
    """Three seconds each: what is red sounds at 500 Hz, what is blue at 2000 Hz; one has no sound, one is gone."""
    folder = tmp_path_factory.mktemp("kinetics")
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    (folder / "train.csv").write_text(
        f'{header}red,-a_1,10,13,train,0\n"blue, deep",b-2,0,3,train,0\nred,gone,5,15,train,0\nred,c,1,2,train,1\n'
    )
    (folder / "validate.csv").write_text(f'{header}red,d,0,3,validate,0\n"blue, deep",e,0,3,validate,0\n')
    film(folder / "train" / "red" / "-a_1_000010_000013.mkv", [RED] * 24, tone(500, 3))
    film(folder / "train" / "blue" / "b-2_000000_000003.mkv", [BLUE] * 24, tone(2000, 3))
    film(folder / "whole" / "c.mkv", [RED] * 24, None)
    small_mp4(folder / "d_000000_000003.mp4", RED, 500, 3)
    small_mp4(folder / "e.mp4", BLUE, 2000, 3)
    return folder


@pytest.fixture(scope="module")
def ave(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ave")
    (folder / "trainSet.txt").write_text(f"{clips.AVE}\nChurch bell&-x&good&1&2.5\nMale speech, man&y&good&0&3\n")
    (folder / "testSet.txt").write_text("Church bell&z&good&0&1\nChurch bell&gone&good&0&10\n")
    film(folder / "AVE" / "-x.mkv", [RED] * 24, tone(500, 3))
    film(folder / "AVE" / "y.mkv", [BLUE] * 8, tone(2000, 1))
    film(folder / "AVE" / "z.mkv", [RED] * 16, tone(500, 2))
    return folder


def recipe(folder: Path, *more: str):
    return clips.with_names(read_recipe(RECIPES / "clips.yaml", [*SMALL, f"data.folder={folder}", *more]))


def test_a_trimmed_file_is_all_of_what_it_is_of_and_a_whole_one_from_begin_to_end(kinetics, capsys):
    red, blue, whole = clips.read(kinetics, "train")
    assert red == Clip(kinetics / "train" / "red" / "-a_1_000010_000013.mkv", "red", 0, inf)
    assert (blue.path.name, blue.label) == ("b-2_000000_000003.mkv", "blue, deep")
    assert whole == Clip(kinetics / "whole" / "c.mkv", "red", 1, 2)
    assert capsys.readouterr().err == f"{kinetics}: 1 of 4 clips are left out: no video\n"
    assert [clip.path.name for clip in clips.read(kinetics, "test")] == ["d_000000_000003.mp4", "e.mp4"]
    assert capsys.readouterr().err == ""


def test_an_event_of_ave_has_its_place_in_the_file(ave, capsys):
    bell, speech = clips.read(ave, "train")
    assert bell == Clip(ave / "AVE" / "-x.mkv", "Church bell", 1, 2.5)
    assert speech == Clip(ave / "AVE" / "y.mkv", "Male speech, man", 0, 3)
    assert clips.read(ave, "test") == [Clip(ave / "AVE" / "z.mkv", "Church bell", 0, 1)]
    assert capsys.readouterr().err == f"{ave}: 1 of 2 clips are left out: no video\n"


def test_with_one_part_alone_both_read_it(tmp_path):
    (tmp_path / "testSet.txt").write_text("Church bell&z&good&0&1\n")
    film(tmp_path / "z.mkv", [RED], None)
    only = [Clip(tmp_path / "z.mkv", "Church bell", 0, 1)]
    assert clips.read(tmp_path, "train") == clips.read(tmp_path, "test") == only


def test_the_names_are_the_labels_of_clips_to_learn_from(kinetics, ave, capsys):
    assert recipe(kinetics).values == {"names": ["blue, deep", "red"], "classes": True}
    assert recipe(ave).values["names"] == ["Church bell", "Male speech, man"]
    assert capsys.readouterr().err == ""  # what is missing is told when it is learned from


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("train.csv", "label,time_start,time_end\n", "train.csv: line 1: expected columns .*, got no youtube_id"),
        ("train.csv", "label,youtube_id,time_start,time_end\na,z,0,1\na,z,x,9\n", "csv: line 3: .* got 'x' and '9'"),
        ("train.csv", "label,youtube_id,time_start,time_end\n,z,0,1\n", "csv: line 2: expected a label and a video"),
        ("train.csv", "label,youtube_id,time_start,time_end\na,z,2,1\n", "line 2: expected an end behind the begin"),
        ("train.csv", "label,youtube_id,time_start,time_end\na,y,7,9\na,x,0,1\n",
         "line 2: expected its video y.mp4, or y_000007_000009.mp4, below .*, and that of 1 more, got none of them"),
        ("trainSet.txt", "Bell&z&good&0&1\n\nBell&z&0&1\n", "trainSet.txt: line 3: expected Category&VideoID&.*, got "),
        ("trainSet.txt", "Category&VideoID&Quality&StartTime&EndTime\n", "trainSet.txt: expected clips, got none"),
        ("other.csv", "", "expected some of train.csv, .*testSet.txt, as Kinetics or AVE has them, got none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, name, text, why):
    (tmp_path / "z.mp4").touch()
    (tmp_path / name).write_text(text)
    with pytest.raises(EdgeError, match=why) as error:
        clips.read(tmp_path, "train")
    assert str(tmp_path) in str(error.value)


def test_a_video_that_is_there_twice_is_not_guessed(tmp_path):
    (tmp_path / "trainSet.txt").write_text("Bell&z&good&0&1\n")
    for name in ("z.mp4", "z.webm"):
        (tmp_path / name).touch()
    with pytest.raises(EdgeError, match=r"trainSet.txt: line 1: its video is there twice: .*z.mp4, .*z.webm"):
        clips.read(tmp_path, "train")


def test_a_frame_is_what_was_to_be_seen_by_then(tmp_path):
    """Of 20 pictures a second, 8 frames: at 0.125 s there was the picture of 0.1 s, at 0.25 s that of 0.25 s."""
    path = film(tmp_path / "a.mkv", [5 * k for k in range(40)], None, fps=20)
    frames, sound, has_sound = clips.decode(path, 8, CAMERA, AUDIO)
    assert frames.shape == (16, 16, 16, 3) and frames.dtype == np.uint8 and (frames == frames[:, :1, :1, :1]).all()
    assert (frames[:, 0, 0, 0] // 5).tolist() == [2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37, 39]
    assert not has_sound and sound.shape == (32000, 1) and not sound.any()


def test_a_slow_video_shows_each_picture_for_several_frames(tmp_path):
    path = film(tmp_path / "a.mkv", [10, 20, 30], None, fps=3)  # the second from 0.333 s, the third from 0.667 s on
    frames = clips.decode(path, 8, CAMERA, AUDIO).frames
    assert frames[:, 0, 0, 0].tolist() == [10, 10, 20, 20, 20, 30, 30, 30]


def test_colours_are_red_green_blue_and_the_middle_may_be_cropped(tmp_path):
    path = film(tmp_path / "a.mkv", [RED] * 8, None)
    assert clips.decode(path, 8, CAMERA, AUDIO).frames[3, 5, 5].tolist() == list(RED)
    assert clips.decode(path, 8, replace(CAMERA, fit="crop"), AUDIO).frames.shape == (8, 16, 16, 3)


@pytest.mark.parametrize("late", [0, 4000, -4000])
def test_sound_begins_with_the_first_picture(tmp_path, late):
    """A second of pictures and of sound: what is not there is silent, and what is before or behind is cut."""
    heard = np.int16(np.arange(1, 16001))[:, None]
    path = film(tmp_path / "a.mkv", [RED] * 8, heard, late=late)
    want = np.zeros((16000, 1), np.int16)
    want[max(0, late) : 16000 + min(0, late)] = heard[max(0, -late) : 16000 - max(0, late)]
    np.testing.assert_array_equal(clips.decode(path, 8, CAMERA, AUDIO).sound, want)


def test_sound_of_any_rate_and_channels_is_that_of_the_stream(tmp_path):
    stereo = np.concatenate([tone(500, 3, 44100), tone(2000, 3, 44100)], 1)
    path = film(tmp_path / "a.mkv", [BLUE] * 16, stereo, rate_hz=44100)
    film_ = clips.decode(path, 8, CAMERA, AUDIO)
    assert film_.has_sound and film_.sound.dtype == np.int16
    assert film_.sound.shape == (32000, 1)  # two seconds, as the pictures
    spectrum = np.abs(np.fft.rfft(film_.sound[:, 0]))
    assert sorted(np.argsort(spectrum)[-2:] / 2) == [500, 2000]
    both = clips.decode(path, 8, CAMERA, replace(AUDIO, channels=2)).sound
    assert [np.abs(np.fft.rfft(ear)).argmax() / 2 for ear in both.T] == [500, 2000]


def test_a_video_as_most_are_is_decoded(kinetics):
    frames, sound, has_sound = clips.decode(kinetics / "e.mp4", 8, CAMERA, AUDIO)
    assert frames.shape[0] == 24 and sound.shape == (48000, 1) and has_sound
    assert np.abs(frames[10, 8, 8].astype(int) - BLUE).max() < 8
    assert np.abs(np.fft.rfft(sound[:, 0])).argmax() / 3 == pytest.approx(2000, abs=1)


def test_what_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(EdgeError, match=r"a.mp4: expected a video, got one that cannot be decoded: .*Invalid data"):
        clips.decode(tmp_path / "a.mp4", 8, CAMERA, AUDIO)
    with av.open(str(tmp_path / "b.mkv"), "w") as file:
        track = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(500, 1).reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux(track.encode(frame))
    with pytest.raises(EdgeError, match=r"b.mkv: .*there are no pictures in it"):
        clips.decode(tmp_path / "b.mkv", 8, CAMERA, AUDIO)
    short = film(tmp_path / "c.mkv", [RED], None, fps=25)
    with pytest.raises(EdgeError, match=r"c.mkv: .*it has ended before 0.125 s"):
        clips.decode(short, 8, CAMERA, AUDIO)
    with pytest.raises(EdgeError, match="audio: channels: expected 1 or 2 of a video's sound, got 4"):
        clips.decode(short, 8, CAMERA, replace(AUDIO, channels=4))


def test_an_event_has_the_frames_within_it():
    path = Path("a.mkv")
    assert clips.span(Clip(path, "", 0, inf), 24, 8) == (0, 23)
    assert clips.span(Clip(path, "", 1, 2.5), 24, 8) == (7, 19)  # frame 7 is of 1.0 s
    assert clips.span(Clip(path, "", 2.9, 10), 24, 8) == (23, 23)
    with pytest.raises(EdgeError, match=r"a.mkv: expected a frame between 4 and 9 s, .* got a video of 3 s"):
        clips.span(Clip(path, "", 4, 9), 24, 8)


def test_only_frames_of_the_event_are_learned_from(ave, tmp_path):
    """The bell is frames 7 to 19 of its 24; the speech has 8 frames, and the batch 16."""
    supply = clips.supply(recipe(ave, "data.absent=0"), 0, tmp_path, 1)
    starts = set()
    for _ in range(20):
        batch = supply.next()
        for label, camera in zip(batch.labels["label"].numpy(), batch.steps["camera"].x.unflatten(0, (4, 16))):
            told = np.flatnonzero(label != IGNORED)
            assert len(told) and (np.diff(told) == 1).all() and len({*label[told]}) == 1
            blue = bool((camera[:, -1, 8, 8, 2] == BLUE[2]).all())
            assert label[told[0]] == blue  # the speech is
            if blue:
                assert told.tolist() == list(range(8))
            else:
                starts.add((int(told[0]), len(told)))
    assert starts == {(7 - at, min(16, 20 - at) - (7 - at)) for at in range(8)} | {(0, 12)}


def test_what_a_clip_does_not_have_is_absent(kinetics, tmp_path):
    """The red clip without sound has no sound; no clip is without both senses."""
    supply, seen = clips.supply(recipe(kinetics, "data.absent=0.4"), 0, tmp_path, 1), set()
    for _ in range(20):
        batch = supply.next()
        loud = [x.std() > 0.1 for x in batch.steps["audio"].x.unflatten(0, (4, 16))[:, :, 0]]
        seen |= {(bool(heard), *map(int, mask[0])) for heard, mask in zip(loud, batch.mask)}
        for name, mask in zip(("camera", "audio"), batch.mask.unbind(-1)):
            assert torch.equal(batch.steps[name].keep[..., 0], mask > 0)
    assert (True, 1, 1) in seen and (True, 0, 1) in seen and (True, 1, 0) in seen
    assert not any(camera + audio == 0 for _, camera, audio in seen)
    film_ = np.load(next((tmp_path / "clips").glob("c-*.npz")))
    assert not film_["has_sound"] and film_["count"] == 24 and len(list((tmp_path / "clips").iterdir())) == 3


def test_batches_go_on_exactly_where_they_were(kinetics, tmp_path, monkeypatch):
    first = clips.supply(recipe(kinetics), 0, tmp_path, 1)
    first.next()
    saved = first.state_dict()
    want = first.next()
    monkeypatch.setattr(clips, "decode", None)  # it was decoded once
    again = clips.supply(recipe(kinetics), 0, tmp_path, 1)
    again.load_state_dict(saved)
    got = again.next()
    assert torch.equal(got.mask, want.mask) and torch.equal(got.start, want.start)
    assert torch.equal(got.labels["label"], want.labels["label"])
    assert all(torch.equal(got.steps[name].x, want.steps[name].x) for name in ("camera", "audio"))


def test_noise_is_so_much_below_the_sound():
    sound, rng = tone(500, 1).repeat(2, 1), np.random.default_rng(0)
    for snr_db in clips.SNRS_DB:
        added = clips.in_noise(sound, snr_db, rng).astype(float) - sound
        assert 10 * np.log10(np.mean(sound.astype(float) ** 2) / np.mean(added**2)) == pytest.approx(snr_db, abs=0.1)


def test_from_a_folder_to_a_bundle_with_scores(kinetics, tmp_path, capsys):
    scores = scored("clips", kinetics, tmp_path, capsys, *SMALL)
    assert (scores["clips"], scores["without_sound"]) == (2, 0)
    assert all(scores[name] in (0, 0.5, 1) for name in ("fused", "camera", "audio"))
    assert scores["none"] == 0.5  # one of two, whatever it says
    assert scores["-5 dB"].keys() == {"fused", "audio"} and scores["by_class"].keys() == {"red", "blue, deep"}
    arguments = ["clips", "--data", str(kinetics), "--bundle", str(tmp_path / "bundle"), "--json", "--only"]
    assert evaluate.main([*arguments, "red"]) == 0 and '"clips": 1' in capsys.readouterr().out
    assert evaluate.main([*arguments, "green"]) == 1
    assert "no clips of ['green']" in capsys.readouterr().err


def bundle(names: list[str]) -> SimpleNamespace:
    outputs = SimpleNamespace(values=SimpleNamespace(names=names, events=None))
    return SimpleNamespace(streams=(CAMERA, AUDIO), tick=SimpleNamespace(period_ms=125), outputs=outputs)


class Sighted:
    """Stands in for a model: what is red, or sounds low, is the second. Without either it says the first."""

    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def step(self, inputs):
        red = False
        if "camera" in inputs.fresh:
            red = inputs.fresh["camera"].x[0, 0, 0] > 100
        elif "audio" in inputs.fresh:
            red = inputs.fresh["audio"].x[0].mean(-1).argmax() < 14  # 500 Hz is below that band, 2000 Hz above
        return SimpleNamespace(values={"values": np.float32([[1 - red, red]])})


def test_clips_are_scored_with_every_subset_of_senses_and_in_noise(kinetics, monkeypatch):
    model = Sighted()
    monkeypatch.setattr(clips, "load", lambda *_: model)
    scores = clips.evaluate(bundle(["blue, deep", "red"]), kinetics, [])
    all_of_it = {"fused": 1, "audio": 1}
    assert scores == {
        "clips": 2, "learned": False, "without_sound": 0, "fused": 1, "camera": 1, "audio": 1, "none": 0.5,
        "20 dB": all_of_it, "10 dB": all_of_it, "0 dB": all_of_it, "-5 dB": all_of_it,
        "by_class": {"blue, deep": 1, "red": 1},
    }  # fmt: skip
    assert model.resets == 2 * (4 + 4 * 2)  # each clip from rest
    assert clips.evaluate(bundle(["blue, deep", "red"]), kinetics, ["red"])["none"] == 0


def test_what_is_told_outside_of_the_event_does_not_count(ave, monkeypatch):
    """In the one second of two that is the event, the bell is told; then something else, and that surely."""
    model = SimpleNamespace(ticks=0, reset=lambda: setattr(model, "ticks", 0))

    def step(inputs):
        model.ticks += 1
        return SimpleNamespace(values={"values": np.float32([[0.6, 0.4] if model.ticks <= 8 else [0, 1]])})

    model.step = step
    monkeypatch.setattr(clips, "load", lambda *_: model)
    scores = clips.evaluate(bundle(["Church bell", "Male speech, man"]), ave, [])
    assert scores["fused"] == 1 and scores["by_class"] == {"Church bell": 1, "Male speech, man": None}


def test_labels_that_are_not_known_are_told(kinetics, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "load", lambda *_: Sighted())
    strange = replace(recipe(kinetics), values={"names": ["red"], "classes": True})
    why = r"expected clips of \['red'\], got some of \['blue, deep'\]"
    with pytest.raises(ValueError, match=why):
        clips.supply(strange, 0, tmp_path, 1)
    with pytest.raises(ValueError, match=why):
        clips.evaluate(bundle(["red"]), kinetics, [])


def test_data_are_asked_for(tmp_path, capsys):
    assert train.main(["clips", "--out", str(tmp_path)]) == 2
    assert "where are the data? --data FOLDER" in capsys.readouterr().err


def test_events_of_a_folder_are_scored_as_its_clips(tmp_path, capsys):
    assert evaluate.main(["events", "--data", str(tmp_path), "--json"]) == 1
    assert f"{tmp_path}: expected some of train.csv" in capsys.readouterr().err
