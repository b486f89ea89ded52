"""Sight and sound of what happens: simulated clips, the model that tells, and what it learns from and is scored on."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("mujoco", reason="clips are simulated")

from mm_edge import preprocess
from mm_edge.manifest import EventsSpec
from mm_edge.sim import events as sim
from mm_edge.sim.events import FRAME_HZ, FRAMES, LABELS, QUIET, SAMPLE_RATE_HZ, UNSEEN, make_clip
from training import events
from training.compare import every_third
from training.models import AudioVideoModel
from training.recipe import make_recipe, read_recipe, read_yaml
from training.train import RECIPES

SMALL = {"fusion_dim": 16, "num_attention_heads": 2, "num_classes": 3, "frame_size": (3, 24, 32)}


@pytest.fixture(scope="module")
def clips():
    return [make_clip(seed) for seed in range(40)]


def test_the_same_seed_gives_the_same_clip(clips):
    again = make_clip(3)
    np.testing.assert_array_equal(again.frames, clips[3].frames)
    np.testing.assert_array_equal(again.sound, clips[3].sound)
    assert again[2:] == clips[3][2:]


def test_clips_have_frames_and_the_sound_of_the_same_time(clips):
    for clip in clips:
        assert clip.frames.shape == (FRAMES, sim.HEIGHT, sim.WIDTH, 3) and clip.frames.dtype == np.uint8
        assert clip.sound.shape == (FRAMES / FRAME_HZ * SAMPLE_RATE_HZ, 2) and clip.sound.dtype == np.int16
        assert clip.label in LABELS
    assert len(Counter(clip.label for clip in clips)) > 8


def test_what_is_struck_is_heard_from_its_onset_on(clips):
    alone = [clip for clip in clips if clip.label != QUIET and not clip.noises and clip.label.split()[-1] != "rolls"]
    assert len(alone) > 5
    for clip in alone:
        onset = round(clip.onset_s * SAMPLE_RATE_HZ)
        before, after = clip.sound[: onset - 160], clip.sound[onset : onset + 800]
        assert after.std() > 3 * before.std()


def test_what_is_out_of_view_moves_no_pixel_but_by_noise(clips):
    def moved(clip):
        smooth = clip.frames.mean(-1).reshape(FRAMES, sim.HEIGHT // 4, 4, sim.WIDTH // 4, 4).mean((2, 4))
        return np.abs(smooth[-1] - smooth[0]).max()

    unseen = [moved(clip) for clip in clips if clip.label == UNSEEN]
    falls = [moved(clip) for clip in clips if clip.label.endswith("falls")]
    assert max(unseen) < 6 < np.median(falls)


def test_sound_is_louder_on_the_side_it_comes_from(clips):
    sides = [clip for clip in clips if clip.sound_of and not clip.noises and abs(np.sin(clip.direction_rad)) > 0.2]
    assert {clip.label == UNSEEN for clip in sides} == {True, False}
    for clip in sides:
        left, right = np.abs(clip.sound.astype(float)).max(0)
        assert (left > right) == (clip.direction_rad > 0)


def test_two_ears_cannot_tell_what_is_behind_from_what_is_in_front():
    struck = np.random.default_rng(0).normal(size=1000)
    front, behind = sim._ears(struck, 0.3, 1.0), sim._ears(struck, np.pi - 0.3, 1.0)
    np.testing.assert_allclose(front, behind)


def test_materials_ring_at_their_own_pitch_and_length():
    struck = np.zeros(SAMPLE_RATE_HZ)
    struck[0] = 1.0
    rings = {material: sim._ring(struck, material, 0.05) for material in sim.MATERIALS}
    for material, ring in rings.items():
        spectrum = np.abs(np.fft.rfft(ring[: SAMPLE_RATE_HZ // 2]))
        assert 2 * spectrum.argmax() == pytest.approx(sim.MODES[material][0], abs=6)  # bins of 2 Hz
    late = {material: np.abs(ring[4000:]).max() for material, ring in rings.items()}  # after a quarter of a second
    assert late["metal"] > 10 * late["glass"] > 10 * late["wood"]


def test_an_event_is_to_be_told_while_it_is_heard(clips):
    clip = clips[0]._replace(
        label="wood falls", onset_s=0.85, end_s=1.2, sound_of="wood falls", motion="falls", begins_s=0.45
    )
    told, seen, heard = events.labels(clip)
    quiet, either = LABELS.index(QUIET), events.IGNORED
    # A frame comes every 0.125 s: the eighth, at 1.0 s, is the first that is 0.1 s after the onset.
    assert told.tolist() == [quiet] * 7 + [0] * 5 + [either] * 3 + [quiet] * 9
    assert heard.tolist() == [0] * 7 + [1] * 5 + [either] * 3 + [0] * 9
    assert seen.tolist() == [0] * 3 + [either] * 2 + [1] * 8 + [either] * 11


def test_of_a_quiet_clip_there_is_nothing_to_be_told(clips):
    soft = clips[0]._replace(label=QUIET, onset_s=3.0, end_s=3.0, sound_of="", motion="rolls", begins_s=0.5)
    told, seen, heard = events.labels(soft)
    assert set(told) == {LABELS.index(QUIET)} and set(heard) == {0}
    assert 1 + sim.MOTIONS.index("rolls") in seen  # what is soft is seen, though


def test_a_clip_is_the_event_that_was_surest_at_any_frame():
    rule, quiet = EventsSpec((QUIET,), sure=0.5, ticks=2), LABELS.index(QUIET)
    shares = np.zeros((4, FRAMES, len(LABELS)), np.float32)
    shares[..., quiet] = 0.6
    shares[0, 7:9, 2], shares[0, 9:11, 3] = 0.7, 0.8
    shares[1, 7, 2] = 0.9  # for one frame only: 0.45 is not sure
    shares[2, 0:3, 2] = 0.9  # that was the clip before
    assert events.label_of(shares, rule).tolist() == [3, quiet, quiet, quiet]


def test_events_are_told_late_and_others_falsely(clips):
    rule, quiet = EventsSpec((QUIET,), sure=0.5, ticks=1), LABELS.index(QUIET)
    shares = np.zeros((2, FRAMES, len(LABELS)), np.float32)
    shares[..., quiet] = 0.4
    shares[0, 11:13, 2] = 0.9  # told by the frame that ends at 1.5 s
    shares[0, 15, 3] = 0.7  # did not happen
    shares[1, 2, 4] = 0.7  # that was the clip before
    heard = [clips[0]._replace(label=LABELS[2], onset_s=1.25), clips[0]._replace(label=QUIET, onset_s=3.0)]
    assert events.spotted(LABELS, rule, heard, shares) == ([0.25], 1)
    assert events.spotted(LABELS, replace(rule, sure=0.8), heard, shares) == ([0.25], 0)
    curve = {one["sure"]: (one["missed"], one["false_a_minute"]) for one in events.by_sure(LABELS, rule, heard, shares)}
    a_minute = round(60 / (2 * 20 / 8), 2)  # 20 frames of each clip, at 8 Hz
    assert (curve[0.7], curve[0.8], curve[0.9]) == ((0.0, a_minute), (0.0, 0.0), (0.0, 0.0))


def test_what_a_batch_hears_is_what_a_robot_hears(clips):
    recipe = read_recipe(RECIPES / "events.yaml")
    spec, clip, before = recipe.streams[1], clips[0], clips[1]
    mel = events.heard(before.sound[None], clip.sound[None], spec)[0]
    for k in (0, 7, FRAMES - 1):
        end, window = events.ends()[k], round(spec.window_ms * spec.sample_rate_hz / 1e3)
        chunk = np.concatenate([before.sound, clip.sound])[len(before.sound) + end - window :][:window]
        np.testing.assert_allclose(mel[k].numpy(), preprocess.log_mel(chunk, None, spec), atol=2e-4)


@torch.no_grad()
def test_a_clip_as_a_whole_says_what_its_frames_said_one_by_one():
    torch.manual_seed(0)
    model = AudioVideoModel(4, 16000, **SMALL).eval()
    video, audio = torch.randn(2, 4, 3, 24, 32), torch.randint(-3000, 3000, (2, 8000), dtype=torch.int16)
    whole = model(video, audio)
    assert whole.output.shape == (2, 3) and whole.modality_weights.shape == (2, 4, 2)
    state, windows = model.zero_state(2), model.aligned(audio[:, None])
    for k in range(4):
        inputs = {"video": video[:, [k]], "audio": windows[:, [k]]}
        batch = model._regular(inputs, 2, 1, None, None)
        batch.start[:] = k == 0
        result, state = model.scan(batch, state)
    torch.testing.assert_close(result.output[:, 0], whole.output)


def test_the_sound_with_a_frame_ends_with_it():
    model = AudioVideoModel(4, 16000, audio_s=0.25, **SMALL)
    audio = torch.arange(8000.0)[None, None]
    windows = model.aligned(audio)
    assert windows.shape == (1, 4, 1, model.window)
    assert windows[0, :, 0, -1].tolist() == [1999, 3999, 5999, 7999] and windows[0, 0, 0, 0] == 0  # silence before


@pytest.mark.parametrize(
    ("video", "audio", "why"),
    [
        ((1, 3, 3, 24, 32), (1, 8000), r"video: expected \(batch, 4, ...\), got \(1, 3, 3, 24, 32\)"),
        ((1, 4, 3, 24, 32), (1, 7999), r"audio: expected \(batch, \[channels,\] 8000 or more\), got \(1, 1, 7999\)"),
        ((1, 4, 3, 24, 30), (1, 8000), r"video: expected .* got float32 \(1, 4, 3, 24, 30\)"),
    ],
)
def test_clips_that_do_not_fit_are_refused(video, audio, why):
    with pytest.raises(ValueError, match=why):
        AudioVideoModel(4, 16000, **SMALL)(torch.randn(video), torch.rand(audio))


def test_what_is_examined_is_what_was_learned_as_a_robot_has_it(monkeypatch):
    """Frames each with those before it, and, where chunks of sound end with them, the sound that training has."""
    first, second = 6_000_000, 6_000_001
    monkeypatch.setattr(events, "EXAM", range(first, second))
    monkeypatch.setattr(events, "EXAM_CLIPS", 2)
    monkeypatch.setattr(events, "EXAM_EVERY_TICKS", 1)
    recipe = read_recipe(RECIPES / "events.yaml")
    one, other = make_clip(first), make_clip(second)
    (batch,) = events.exam(recipe, list)
    told = [events.labels(clip)[0] for clip in (one, other)]
    begin = told[1][:4]  # half a second, in which what the first clip ended with may still be told
    begin[begin == LABELS.index(QUIET)] = events.IGNORED
    whole = np.concatenate(told)
    ends = [end for end in range(FRAMES, 2 * FRAMES + 1) if whole[end - 1] != events.IGNORED]
    assert batch.start.all() and batch.labels["label"].tolist() == [whole[end - FRAMES : end].tolist() for end in ends]
    frames = np.concatenate([np.full((3, *one.frames.shape[1:]), events.BLANK, np.uint8), one.frames, other.frames])
    camera, audio = (batch.steps[name].x.unflatten(0, (len(ends), FRAMES)) for name in ("camera", "audio"))
    for window, end in zip(camera, ends):
        for k, x in enumerate(window):
            assert (x.numpy() == frames[end - FRAMES + k :][:4]).all()
    learned = events.heard(np.zeros_like(one.sound[None]), one.sound[None], recipe.streams[1])[0]
    for tick in (7, 15, 23):  # at whole seconds
        assert torch.allclose(audio[0, tick], learned[tick], atol=1e-3)
    (thin,) = events.exam(recipe, every_third)
    assert thin.labels["label"].tolist() == batch.labels["label"].tolist()
    assert 0.3 < len(thin.steps["camera"].x) / len(batch.steps["camera"].x) < 0.36


def test_scores_by_hand():
    pytest.importorskip("sklearn", reason="comparing needs scikit-learn")
    label = np.array([0, 0, 0, 1])
    sure = np.float32([[3, 1], [3, 2], [1, 2], [0, 4]])
    known = {"right": round((2 / 3 + 1) / 2, 4), "auc": 1.0}
    assert events.score(sure, {"label": label}) == known
    assert events.score(sure + np.float32([[9], [0], [-9], [5]]), {"label": label}) == known  # the same shares
    assert events.score(np.zeros((4, 2), np.float32), {"label": label}) == {"right": 0.5, "auc": 0.5}


def test_clips_that_are_not_there_are_made_and_then_read(tmp_path):
    options = [f"data.folder={tmp_path / 'new' / 'clips'}", "rounds.0.episodes=2", "train.lanes=2"]
    raw = read_yaml((RECIPES / "events.yaml").read_text(), "events")
    raw["data"]["folder"] = ""
    recipe = make_recipe(raw, options, "events")
    batch = events.supply(recipe, 0, tmp_path / "out", workers=1).next()
    made = tmp_path / "new" / "clips" / "clips-1000000-2.npz"
    when = made.stat().st_mtime_ns
    again = events.supply(recipe, 0, tmp_path / "out", workers=1).next()
    assert made.stat().st_mtime_ns == when and torch.equal(batch.labels["label"], again.labels["label"])
