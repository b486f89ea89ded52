"""Words and sounds: what is learned from, what is kept apart, and that they are heard as on a robot."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
for library in ("accelerate", "onnxscript", "onnxruntime", "soundfile", "rosbags"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from mm_edge.manifest import EventsSpec
from mm_edge.preprocess import log_mel
from tests.test_real_data import DATA, ESC, WORDS, real, sound, write_zip
from tests.test_tasks import scored
from training import evaluate, hearing
from training.hearing import Clip, Sounds, held_out, placed
from training.recipe import read_recipe
from training.train import RECIPES, main
from training.voices import another_voice, faster

SAID = ["stop", "go", "silence"]
RATE_HZ = hearing.RATE_HZ


def tone(hz: float, seconds: float = 1.0) -> np.ndarray:
    return np.float32(0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE_HZ)) / RATE_HZ))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Two words as two tones, by three speakers that nobody knows; and two silences, with a little noise."""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    clips = {f"{word}/{who}_nohash_0.flac": sound(tone(hz), RATE_HZ) for word, hz in (("stop", 500), ("go", 2000))
             for who in ("zoe", "abe", "eve")}  # fmt: skip
    quiet = {f"_silence_/{n}.flac": sound(1e-3 * rng.standard_normal(RATE_HZ), RATE_HZ) for n in (17, 18)}
    write_zip(folder / WORDS, clips | quiet)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """A short bark and long rain, in two folds; one is too long, one too short."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    bark = np.concatenate([tone(1000, 0.2), np.zeros(4 * RATE_HZ, np.float32)])
    rain = np.float32(0.1 * rng.standard_normal(7 * RATE_HZ))
    clips = {f"00{k} - {name}/{fold}-{k}-A.ogg": sound(samples, RATE_HZ, "OGG") for fold in (1, 4)
             for k, (name, samples) in enumerate((("Dog bark", bark), ("Rain", rain)))}  # fmt: skip
    write_zip(folder / ESC, clips)
    return folder


def recipe(task: str, folder: Path, names: list[str], *more: str):
    options = [f"values.names={names}", f"data.folder={folder}", "train.lanes=8", *more]
    return read_recipe(RECIPES / f"{task}.yaml", options)


def test_a_group_is_kept_apart_by_its_name():
    assert held_out("4", [4]) and held_out("zoe", ["zoe"]) and not held_out("14", [4])
    speakers = [f"speaker{i}" for i in range(1000)]
    apart = {name for name in speakers if held_out(name, 0.2)}
    assert 170 < len(apart) < 230 and apart < {name for name in speakers if held_out(name, 0.4)}
    assert not any(held_out(name, 0) for name in speakers)


def test_nothing_is_learned_from_who_is_kept_apart(words, monkeypatch):
    heard = set()

    def listen(self, clip: Clip, late_s: float, length: int) -> np.ndarray:
        heard.add((clip.label, clip.group))
        return np.zeros(length, np.float32)

    monkeypatch.setattr(Sounds, "_heard", listen)
    supply = Sounds(recipe("words", words, SAID, "data.held_out=[zoe, 17]"))
    for _ in range(20):
        supply.next()
    assert heard == {("stop", "abe"), ("stop", "eve"), ("go", "abe"), ("go", "eve"), ("silence", "18")}
    assert supply.steps_an_epoch == 1


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("data.held_out=[zoo]", r"data.held_out: there is no zoo; did you mean zoe\?"),
        ("data.held_out=1", "expected a list of speakers or folds, or a share below 1, got 1"),
        ("data.held_out=zoe", "or a share below 1, got 'zoe'"),
        ("data.held_out=true", "or a share below 1, got True"),
        ("data.held_out=[17, 18]", r"expected sounds of every class to learn from, got none of \['silence'\]"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(words, option, why):
    with pytest.raises(ValueError, match=why):
        Sounds(recipe("words", words, SAID, option))


def test_folds_of_another_folder_are_told_and_all_is_learned_from(words, capsys):
    Sounds(recipe("words", words, SAID, "data.held_out=[8]"))
    assert "data.held_out: there is no 8 among 17, 18, " in capsys.readouterr().err


def test_a_sound_is_in_the_middle_or_later_or_cut():
    clip = np.float32([1, 2, 3])
    assert placed(clip, 5, 0).tolist() == [0, 1, 2, 3, 0]
    assert placed(clip, 5, 2).tolist() == [0, 0, 0, 1, 2] and placed(clip, 5, -2).tolist() == [2, 3, 0, 0, 0]
    assert placed(clip, 1, 0).tolist() == [2] and placed(clip, 3, 9).tolist() == [0, 0, 0]
    assert placed(clip[:0], 2, 0).tolist() == [0, 0]


def test_what_is_learned_from_is_what_the_robot_makes_of_it():
    spec = read_recipe(RECIPES / "sounds.yaml").streams[0]
    length = hearing.samples_of(spec, 3, period_s=0.5)
    assert length == 2 * RATE_HZ
    heard = np.float32(0.1 * np.random.default_rng(0).standard_normal((2, length)))
    made = hearing.windows(heard, spec, 3, period_s=0.5)
    assert made.shape == (2, 3, *spec.shape)
    second = np.rint(heard[1, RATE_HZ // 2 :][:RATE_HZ] * 32767).astype(np.int16)
    np.testing.assert_allclose(made[1, 1], log_mel(second[:, None], None, spec), atol=1e-4)


def test_batches_go_on_exactly_where_they_were(words):
    first = Sounds(recipe("words", words, SAID, "data.held_out=[zoe]"))
    first.next()
    saved = first.state_dict()
    want = first.next()
    again = Sounds(recipe("words", words, SAID, "data.held_out=[zoe]"))
    again.load_state_dict(saved)
    got = again.next()
    assert torch.equal(got.steps["audio"].x, want.steps["audio"].x) and torch.equal(got.start, want.start)
    assert torch.equal(got.labels["label"], want.labels["label"])


def test_most_sounds_are_heard_after_another_one(words):
    """As on a robot, which does not begin anew with each word."""
    supply = Sounds(recipe("words", words, SAID, "data.held_out=[zoe]"))
    start = torch.cat([supply.next().start for _ in range(50)]).float().mean()
    assert start.item() == pytest.approx(hearing.ANEW, abs=0.08)


def test_of_a_short_sound_nothing_gets_lost(sounds, monkeypatch):
    monkeypatch.setattr(hearing, "another_voice", lambda mel, *_, **__: mel)
    supply = Sounds(recipe("sounds", sounds, ["Dog bark", "Rain"]))
    nothing = hearing.windows(np.zeros((1, RATE_HZ), np.float32), supply._recipe.streams[0], 1, 0.5)[0, 0, 0].max()
    for _ in range(5):
        batch = supply.next()
        assert batch.labels["label"].shape == (8, 9)
        loudest = batch.steps["audio"].x[:, 0].reshape(8, -1).amax(1)
        assert (loudest > nothing + 1).all()


def test_faster_is_shorter_and_higher():
    fast = faster(tone(500), 2.0)
    assert len(fast) == 8000 and np.abs(np.fft.rfft(fast)).argmax() == 500  # cycles in half a second: 1000 Hz
    assert np.array_equal(faster(tone(500), 1.0), tone(500)[:-1]) and len(faster(np.ones(1, np.float32), 1.1)) == 0


def test_another_voice_moves_bands_and_leaves_out_some():
    rng = np.random.default_rng(0)
    mel = np.stack([rng.normal(size=(20, 40, 49)), np.ones((20, 40, 49))], 1).astype(np.float32)
    before = mel.copy()
    same = another_voice(mel, rng, tract=0.0, microphone=0.0)
    assert np.array_equal(mel, before) and same.dtype == np.float32 and np.array_equal(same[:, 1], mel[:, 1])
    changed = ~np.isclose(same[:, 0], mel[:, 0], atol=1e-5)
    assert 0 < changed.mean() < 0.4
    at, hop = np.nonzero(changed[0])
    np.testing.assert_allclose(same[0, 0, at, hop], mel[0, 0].mean(), atol=1e-5)
    ramp = np.tile(np.arange(40, dtype=np.float32)[:, None], (20, 2, 1, 49))
    warped = np.median(another_voice(ramp, rng, tract=0.25, microphone=0.0)[:, 0, 20], -1) / 20
    assert warped.min() > 0.74 and warped.max() < 1.26 and warped.std() > 0.05  # of the band that is heard there


class Ear:
    """Stands in for a model: which of two tones is louder, or neither. It keeps what it was given."""

    def __init__(self, sure: float = 1.0):
        self.sure, self.given, self.resets = sure, [], 0

    def reset(self) -> None:
        self.resets += 1

    def step(self, inputs):
        (fresh,) = inputs.fresh.values()
        assert not inputs.reset and not fresh.reset
        level = fresh.x[0].mean(-1)
        loudest = int(level.argmax())
        word = 2 if level.max() < 0.5 else int(loudest > 14)  # 500 Hz is below band 14, 2000 Hz above
        self.given.append(word)
        shares = np.full(3, (1 - self.sure) / 2, np.float32)
        shares[word] = self.sure
        return SimpleNamespace(values={"values": shares[None]})


def bundle(held_out: object = 0.2) -> SimpleNamespace:
    spec = read_recipe(RECIPES / "words.yaml").streams[0]
    return SimpleNamespace(
        task="words", path="toy", streams=(spec,), tick=SimpleNamespace(period_ms=500),
        outputs=SimpleNamespace(values=SimpleNamespace(names=SAID, events=EventsSpec(("silence",), 0.5, 1))),
        training={"data": {"held_out": held_out, "windows": 1}},
    )  # fmt: skip


def test_words_are_heard_one_after_the_other_in_any_order(words, monkeypatch):
    """And in noise; and what is right is counted."""
    ear = Ear(sure=0.6)
    monkeypatch.setattr(hearing, "load", lambda *_: ear)
    scores = hearing.evaluate(bundle(["zoe", "17"]), words, [])
    assert (scores["clips"], scores["unheard"], scores["unheard_groups"]) == (8, 3, 1)
    assert list(scores)[3:] == ["clean", "20 dB", "10 dB", "0 dB", "-5 dB", "stop"] and ear.resets == 10
    assert sorted(ear.given[:8]) == [0, 0, 0, 1, 1, 1, 2, 2] and np.count_nonzero(np.diff(ear.given[:8])) > 2
    clean = scores["clean"]
    assert clean["all"] == clean["unheard"] == 1 and clean["by_class"] == {"stop": 1, "go": 1, "silence": 1}
    stop = scores["stop"]["clean"]
    curve = {point["sure"]: (point["missed"], point["false_an_hour"]) for point in stop["curve"]}
    assert stop["stops"] == 1 and curve[0.5] == (0, 0) and curve[0.7] == (1, 0)


def test_a_stop_that_nobody_said_is_counted(words, monkeypatch):
    """To this ear every word is a stop, and so the "go" is a false one."""
    ear = Ear()
    step = ear.step

    def deaf(inputs):
        out = step(inputs)
        out.values["values"][0] = [0.96, 0.04, 0.0] if ear.given[-1] < 2 else [0.0, 0.1, 0.9]
        return out

    ear.step = deaf
    clips = [clip for clip in hearing.read("words", words) if clip.group in ("zoe", "17")]
    stop = hearing.stop_curve(bundle(), ear, clips, None)
    seconds = 3600 * stop["hours"]
    for point in stop["curve"]:
        assert point["missed"] == 0 and point["false_an_hour"] == pytest.approx(3600 / seconds, rel=0.01)


def test_who_is_not_there_is_told(words, monkeypatch):
    monkeypatch.setattr(hearing, "load", lambda *_: Ear())
    with pytest.raises(ValueError, match=r"no such speakers or folds: \['bob'\]"):
        hearing.evaluate(bundle(), words, ["bob"])
    clean = hearing.evaluate(bundle([]), words, ["abe"])["clean"]
    assert clean == {"all": 1.0, "unheard": None, "by_class": dict.fromkeys(SAID)}
    less = bundle()
    less.outputs.values.names = ["stop", "go"]
    with pytest.raises(ValueError, match=r"expected sounds of \['stop', 'go'\], got some of \['silence'\]"):
        hearing.evaluate(less, words, [])


@pytest.mark.parametrize("task", ["words", "sounds"])
def test_from_an_archive_to_a_bundle_with_scores(task, request, tmp_path, capsys):
    folder, names = request.getfixturevalue(task), SAID if task == "words" else ["Dog bark", "Rain"]
    apart = "zoe" if task == "words" else "4"
    options = [f"values.names={names}", f"data.held_out=[{apart}]", "train.lanes=4", "train.mixed_precision=no"]
    options += ["values.events.quiet=[silence]"] if task == "words" else []
    scores = scored(task, folder, tmp_path, capsys, *options)
    assert scores["unheard"] == 2 and scores["unheard_groups"] == 1
    assert all(0 <= scores[name]["unheard"] <= 1 for name in ("clean", "0 dB"))
    assert ("stop" in scores) == (task == "words")
    arguments = [task, "--data", str(folder), "--bundle", str(tmp_path / "bundle"), "--only", apart, "--json"]
    assert evaluate.main(arguments) == 0 and '"clips": 2' in capsys.readouterr().out


@real
def test_real_sounds_train(tmp_path):
    options = ["--data", str(DATA), "--out", str(tmp_path), "rounds=[{steps: 2}]", "train.lanes=4"]
    assert main(["sounds", *options, "train.mixed_precision=no"]) == 0
    clips = hearing.read("sounds", DATA)
    assert {clip.label for clip in clips} == set(read_recipe(RECIPES / "sounds.yaml").values["names"])
    assert {clip.group for clip in clips} > {"4"}


@real
def test_real_words_have_speakers_to_learn_from_and_others():
    clips, names = hearing.read("words", DATA), read_recipe(RECIPES / "words.yaml").values["names"]
    apart = [clip for clip in clips if held_out(clip.group, 0.2)]
    assert {clip.label for clip in apart} == {clip.label for clip in clips} == set(names)
    assert 0.15 < len(apart) / len(clips) < 0.3
