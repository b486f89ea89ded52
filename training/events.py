"""What falls, rolls or knocks, of what it is made and whether it is in view: told while it happens, by sight and sound.

    python -m training.train events                             # no data needed: clips are simulated
    python -m training.evaluate events --json
    python -m training.compare events --data runs/events        # what others learn from the same clips

A frame comes eight times a second, and with each of them the last half second of sound. What the sound is of and what
is seen to move are two things, and each sense also learns its own by itself. One of both is absent in a share of the
clips, so that the other must do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.errors import needs
from mm_edge.events import Spotter
from mm_edge.manifest import EventsSpec
from mm_edge.preprocess import AUDIO_HOP_S
from mm_edge.replay import Tick
from mm_edge.sim.events import DURATION_S, FRAME_HZ, FRAMES, LABELS, MOTIONS, QUIET, SAMPLE_RATE_HZ, Clip, make_clip
from mm_edge.types import NS, Audio, Sample, StreamSpec
from training.batches import Batch, StepBatch, regular_batch, regular_steps
from training.cached import cached
from training.models import AudioVideoModel, ModelResult
from training.nets import ModalityType, heard_as
from training.recipe import Recipe
from training.supervised import modalities, rate_loss, words
from training.tables import Tables, build_tables
from training.windows import Change, Event
from training.windows import exam as exam_of

__all__ = ["build_model", "evaluate", "exam", "loss", "score", "supply", "words"]

HEARD_S = 0.1  # after a sound began, until it must be told
HELD_S, FADED_S = 0.3, 0.7  # after its end: so long it is told; until then it may be
SEEN_S, LOOKED_S = 0.25, 1.2  # after something began to move, from when on and until when its motion is to be seen
IGNORED = -100
ENDS_S = np.arange(1, FRAMES + 1) / FRAME_HZ  # of frames
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # how sure an event may have to be
QUIET_WEIGHT = 0.3  # of the ticks on which nothing happens: most are
ANEW = 0.2  # of the clips are told of from rest, the others after another one
TERMS = {"rates": 1.0, "senses": 0.5}
FIRST_SEED, CLIPS = 5_000_000, 600  # to be scored on
SETTLED_S = 0.6  # of a clip, in which what was heard before it may still be told: it ends all at once, as nothing does
SOUNDS = ("", *LABELS[:9])
SENSED, BLANK = ("frames", "sound"), 128  # of a picture that was none: zero, to the net
NEEDED = frozenset({"camera", "audio"})  # by one sense alone half of what is asked cannot be told
MEASURES = {
    "right": "share of instants told right, the mean over all that can be told",
    "auc": "area under the ROC curve (is it this, or not?), the mean over all that can be told",
}
EXAM, EXAM_CLIPS = range(6_000_000, 6_001_000, 100), 12  # the first seed of each run, and clips in it
EXAM_EVERY_TICKS = 7  # windows are so far apart, and end now here, now there in a clip


def build_model(recipe: Recipe) -> AudioVideoModel:
    model = network(recipe, FRAMES, SAMPLE_RATE_HZ, FRAME_HZ)
    for name, kinds in ((model.picture, 1 + len(MOTIONS)), (model.sound, len(SOUNDS))):
        model.aux[name] = nn.Linear(model.encoders[name].units, kinds)
    return model


def network(recipe: Recipe, frames: int, sample_rate_hz: int, rate_hz: float) -> AudioVideoModel:
    """The model of a recipe, seeded."""
    torch.manual_seed(recipe.seed)
    sizes = {key: value for key, value in recipe.model.items() if key != "modality"}
    return AudioVideoModel(
        frames, sample_rate_hz, num_classes=len(recipe.values["names"]), frame_rate_hz=rate_hz,
        modalities=modalities(recipe), **sizes,
    )  # fmt: skip


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Clips:
    """The clips of all rounds so far. With `data.folder` those that lie there, made if they do not: from the same clips
    others are to learn."""
    made, folder = [], Path(recipe.data.get("folder", out))
    folder.mkdir(parents=True, exist_ok=True)
    for r in recipe.rounds[: index + 1]:
        file = folder / f"clips-{r.first_seed}-{r.episodes}.npz"
        made.append(cached(file, _arrays, range(r.first_seed, r.first_seed + r.episodes), workers))
    return Clips(recipe, {name: np.concatenate([part[name] for part in made]) for name in made[0]})


def _arrays(seed: int) -> dict[str, np.ndarray]:
    clip = make_clip(seed)
    label, seen, heard = labels(clip)
    return {"frames": clip.frames, "sound": clip.sound, "label": label, "seen": seen, "heard": heard}


def labels(clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 (FRAMES,) each: what is to be told at each frame; and for each sense by itself, the motion that is to be
    seen and the sound that is to be heard, 0 for none. IGNORED where either answer is right."""
    at_s = ENDS_S
    sounds = (at_s >= clip.onset_s + HEARD_S) & (at_s <= clip.end_s + HELD_S)
    fades = (at_s > clip.end_s + HELD_S) & (at_s <= clip.end_s + FADED_S) & (clip.label != QUIET)
    told = np.where(sounds, LABELS.index(clip.label), LABELS.index(QUIET))
    heard = np.where(sounds, SOUNDS.index(clip.sound_of), 0)
    moved_s = at_s - clip.begins_s
    seen = np.zeros(FRAMES, np.int64)
    if clip.motion:
        seen = np.where(moved_s < SEEN_S, IGNORED, 1 + MOTIONS.index(clip.motion))
        seen[moved_s <= 0], seen[moved_s > LOOKED_S] = 0, IGNORED
    told[fades], heard[fades] = IGNORED, IGNORED
    return told, seen, heard


class Takes:
    """Batches of clips of so many frames, in half the cases in a mirror; louder or softer, and at times without one of
    both senses. Most come after others, in which the model still is."""

    def __init__(self, recipe: Recipe, frames: int, rate_hz: float):
        self._frames, self._rate_hz = frames, rate_hz
        self._lanes, self._absent = recipe.train.lanes, recipe.data["absent"]
        self._camera, self._audio = recipe.streams
        config = modalities(recipe)[self._camera.name]
        self._looks = config.shape[0] if config.type is ModalityType.VIDEO else 1  # frames that make one sample
        self._rng = np.random.default_rng(recipe.seed)
        samples = ends(frames, rate_hz, self._audio.sample_rate_hz)[-1]
        self._before = {
            "frames": np.zeros((self._lanes, frames, *self._camera.shape), np.uint8),
            "sound": np.zeros((self._lanes, samples, self._audio.channels), np.int16),
        }

    def chosen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """A clip for each lane: frames uint8 (n, frames, h, w, 3), sound int16 (n, samples, channels), both to be kept;
        which senses there are of it, bool (n, 2), one at least; and its labels by name, (n, frames)."""
        raise NotImplementedError

    def next(self) -> Batch:
        rng, n = self._rng, self._lanes
        frames, sound, there, truth = self.chosen()
        start, mirrored = rng.random(n) < ANEW, rng.random(n) < 0.5
        frames[mirrored], sound[mirrored] = frames[mirrored, :, :, ::-1], sound[mirrored][..., ::-1]
        gain = np.float32(10 ** (rng.uniform(-12, 12, (n, 1, 1)) / 20))
        sound = np.clip(np.rint(sound * gain), -32768, 32767).astype(np.int16)
        self._before["frames"][start], self._before["sound"][start] = BLANK, 0
        gone = rng.random(n)
        left = np.stack([there[:, 0] & (gone >= self._absent), there[:, 1] & (gone <= 1 - self._absent)], 1)
        left = np.where(left.any(1, keepdims=True), left, there)  # never both are gone
        mask = np.float32(left)[:, None].repeat(self._frames, 1)
        dt = torch.full((n, self._frames, 1), 1 / self._rate_hz)
        mel = heard(self._before["sound"], sound, self._audio, self._rate_hz)
        steps = {
            self._camera.name: self._steps(self._looked(frames), dt, mask[..., 0]),
            self._audio.name: self._steps(mel, dt, mask[..., 1]),
        }
        self._before = {"frames": frames, "sound": sound}
        labels = {name: torch.from_numpy(label) for name, label in truth.items()}
        return replace(regular_batch(steps, torch.from_numpy(mask), dt, labels), start=torch.from_numpy(start))

    def _looked(self, frames: np.ndarray) -> Tensor:
        """uint8 (n, frames, h, w, 3) -> with each frame those before it, if the model looks at clips."""
        if self._looks == 1:
            return torch.from_numpy(frames)
        before = self._before["frames"][:, self._frames + 1 - self._looks :]
        return torch.from_numpy(np.concatenate([before, frames], 1)).unfold(1, self._looks, 1).movedim(-1, 2)

    def _steps(self, x: Tensor, dt: Tensor, there: np.ndarray) -> StepBatch:
        """What is absent takes no step."""
        steps = regular_steps(x, dt, self._frames, 1 / self._rate_hz)
        return replace(steps, keep=steps.keep & (torch.from_numpy(there) > 0)[..., None])

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state, **self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._before = {name: state[name] for name in SENSED}


class Clips(Takes):
    def __init__(self, recipe: Recipe, clips: dict[str, np.ndarray]):
        super().__init__(recipe, FRAMES, FRAME_HZ)
        self._clips = clips
        self.steps_an_epoch = max(1, len(clips["label"]) // self._lanes)

    def chosen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        chosen = self._rng.integers(len(self._clips["label"]), size=self._lanes)
        frames, sound, *truth = (self._clips[name][chosen] for name in (*SENSED, "label", "seen", "heard"))
        return frames, sound, np.ones((self._lanes, 2), bool), dict(zip(("label", "seen", "heard"), truth))


def heard(before: np.ndarray, sound: np.ndarray, spec: StreamSpec, rate_hz: float = FRAME_HZ) -> Tensor:
    """int16 (n, samples, channels) each: what was to be heard before the clip, and in it -> (n, frames, *spec.shape):
    with each frame the window that ends with it, as `preprocess.log_mel` makes it."""
    window, frames = _window(spec), round(sound.shape[1] / spec.sample_rate_hz * rate_hz)
    all_of_it = np.concatenate([before[:, -window:], sound], 1)
    at = ends(frames, rate_hz, spec.sample_rate_hz)
    waves = torch.from_numpy(np.stack([all_of_it[:, end : end + window] for end in at], 1))
    return heard_as(waves.flatten(0, 1).transpose(1, 2), spec).unflatten(0, (-1, frames))


def ends(frames: int = FRAMES, rate_hz: float = FRAME_HZ, sample_rate_hz: int = SAMPLE_RATE_HZ) -> list[int]:
    """Samples that were heard by each frame."""
    return [round((k + 1) / rate_hz * sample_rate_hz) for k in range(frames)]


def _window(spec: StreamSpec) -> int:
    """Samples that are heard with a frame."""
    return round(spec.window_ms * spec.sample_rate_hz / 1e3)


def loss(recipe: Recipe, model: AudioVideoModel, batch: Batch, out: ModelResult) -> tuple[Tensor, dict[str, Tensor]]:
    label, quiet = batch.labels["label"], LABELS.index(QUIET)
    wrong = _wrong(out.output, label, torch.where(label == quiet, QUIET_WEIGHT, 1.0))
    alone = {}
    for i, (name, truth) in enumerate(((model.picture, "seen"), (model.sound, "heard"))):
        target = batch.labels[truth]
        weight = torch.where(target == 0, QUIET_WEIGHT, 1.0) * batch.mask[..., i]
        alone[truth] = _wrong(model.aux[name](out.tokens[name]), target, weight)
    rates, spread = rate_loss(batch, out)
    told = (label != quiet) & (label != IGNORED)
    right = (out.output.argmax(-1) == label)[told].float().mean()
    weights = {**TERMS, **recipe.train.weights}
    total = wrong + weights["rates"] * spread + weights["senses"] * sum(alone.values())
    return total, {"wrong": wrong, "right": right, **alone, **rates}


def _wrong(output: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy (B, T, classes) against (B, T), weighted."""
    wrong = F.cross_entropy(
        output.flatten(0, 1), label.flatten(), reduction="none", label_smoothing=0.05, ignore_index=IGNORED
    )
    weight = weight.flatten() * (label.flatten() != IGNORED)
    return (wrong * weight).sum() / weight.sum().clamp(min=1)


def exam(recipe: Recipe, change: Change) -> Iterator[Batch]:
    """Windows of clips that none learned from, one clip after the other."""
    camera = recipe.streams[0]
    config = modalities(recipe)[camera.name]
    logs = _logs(recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms, change)
    if config.type is ModalityType.VIDEO:
        logs = [_looking(log, camera.name, config.shape[0]) for log in logs]
    return exam_of(logs, recipe.train.ticks, EXAM_EVERY_TICKS)


@cache  # variants by the dozen are examined by them
def _logs(streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float, change: Change) -> list[Tables]:
    return [
        build_tables(
            change(_watched(seed, *(s.name for s in streams))), streams, period_s, max_gap_ms, None, lambda t: t.labels
        )
        for seed in tqdm(EXAM, "exam", leave=False)
    ]


@cache
def _watched(first_seed: int, camera: str, audio: str) -> list[Event]:
    """A run of clips as a robot has it: sound in chunks, and with each frame a tick."""
    clips = [make_clip(seed) for seed in range(first_seed, first_seed + EXAM_CLIPS)]
    sound, chunk = np.concatenate([clip.sound for clip in clips]), round(AUDIO_HOP_S * SAMPLE_RATE_HZ)
    timed = list[tuple[int, Event]]()
    for first in range(0, len(sound) - chunk + 1, chunk):
        stamp_ns, came_ns = (NS + at * NS // SAMPLE_RATE_HZ for at in (first, first + chunk))
        data = Audio(sound[first : first + chunk], first, SAMPLE_RATE_HZ)
        timed.append((came_ns, Sample(audio, stamp_ns, came_ns, data)))
    for i, clip in enumerate(clips):
        told = labels(clip)[0]
        if i:  # what the clip before ended with may be told yet
            told[(told == LABELS.index(QUIET)) & (ENDS_S <= SETTLED_S)] = IGNORED
        for at_s, frame, label in zip(ENDS_S, clip.frames, told):
            now_ns = NS + round((i * DURATION_S + at_s) * NS)
            known = {"label": label, "known": np.float32(label != IGNORED)}
            timed += [(now_ns, Sample(camera, now_ns, now_ns, frame)), (now_ns, Tick(now_ns, known))]
    return [event for _, event in sorted(timed, key=lambda at: at[0])]


def _looking(log: Tables, camera: str, frames: int) -> Tables:
    """With each picture those before it, as a model that looks at clips has them."""
    steps = log.steps[camera]
    before = np.full((frames - 1, *steps.x.shape[1:]), BLANK, np.uint8)
    x = np.lib.stride_tricks.sliding_window_view(np.concatenate([before, steps.x]), frames, 0)
    return replace(log, steps={**log.steps, camera: replace(steps, x=np.moveaxis(x, -1, 1))})


def score(said: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """said (n, labels), logits -> each of MEASURES."""
    with needs("the area under a ROC curve", "scikit-learn", "compare"):
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    label, shares = labels["label"], torch.from_numpy(said).softmax(-1).numpy()
    curves = [roc_auc_score(label == i, shares[:, i]) for i in range(said.shape[1]) if (label == i).any()]
    right = balanced_accuracy_score(label, said.argmax(-1))
    return {"right": round(float(right), 4), "auc": round(float(np.mean(curves)), 4)}


def evaluate(bundle: Bundle, folder: Path | None, only: Sequence[str]) -> dict[str, Any]:
    """On CLIPS clips never trained on, one after the other and frame by frame, as a robot has them: the share told
    right ("fused", and with each sense missing), how long after the sound began an event was told, in how many quiet
    clips one was that did not happen, and what of that changes with how sure it must be, see `by_sure`."""
    model, specs = load(bundle, "auto"), list(bundle.streams)
    names, quiet = list(bundle.outputs.values.names), LABELS.index(QUIET)
    rule = bundle.outputs.values.events
    if names != list(LABELS) or rule is None:
        raise ValueError(f"{bundle.path}: expected a bundle that tells {list(LABELS)}, got {names}")
    subsets = [some for n in range(len(specs) + 1) for some in itertools.combinations(range(len(specs)), n)]
    clips = [make_clip(seed) for seed in tqdm(range(FIRST_SEED, FIRST_SEED + CLIPS), "clips", leave=False)]
    truth = np.array([LABELS.index(clip.label) for clip in clips])
    scores, shares = {}, np.zeros(0)
    for some in subsets:
        name = "+".join(specs[i].name for i in some) or "none"
        shares = told(model, specs, clips, set(some), name)
        scores[name] = round(float(np.mean(label_of(shares, rule) == truth)), 4)
    said = label_of(shares, rule)
    fused, right = scores.pop("+".join(spec.name for spec in specs)), said == truth
    late_s, _ = spotted(names, rule, clips, shares)
    return {
        "clips": CLIPS, "fused": fused, **scores,
        "told_after_s": {f"p{p}": round(float(np.percentile(late_s, p)), 3) for p in (50, 95)} if late_s else None,
        "told": len(late_s), "quiet_clips": int((truth == quiet).sum()),
        "quiet_clips_with_an_event": int((said != quiet)[truth == quiet].sum()),
        "by_sure": by_sure(names, rule, clips, shares),
        "by_class": {
            label: round(float(right[truth == i].mean()), 4) if (truth == i).any() else None
            for i, label in enumerate(LABELS)
        },
    }  # fmt: skip


def by_sure(
    names: Sequence[str], rule: EventsSpec, clips: Sequence[Clip], shares: np.ndarray
) -> list[dict[str, float | None]]:
    """For each of THRESHOLDS the share of events that were missed, and how many a minute did not happen."""
    curve = list[dict[str, float | None]]()
    happened = sum(clip.label != QUIET for clip in clips)
    minutes = len(clips) * int((ENDS_S > SETTLED_S).sum()) / FRAME_HZ / 60
    for sure in THRESHOLDS:
        late_s, false = spotted(names, replace(rule, sure=sure), clips, shares)
        missed = round(1 - len(late_s) / happened, 4) if happened else None
        curve.append({"sure": sure, "missed": missed, "false_a_minute": round(false / minutes, 2)})
    return curve


def spotted(
    names: Sequence[str], rule: EventsSpec, clips: Sequence[Clip], shares: np.ndarray
) -> tuple[list[float], int]:
    """How long after its sound began each event was told, s, of those that were; and how many were told that did not
    happen, from SETTLED_S of each clip on."""
    spotter, late_s, false = Spotter(names, rule), list[float](), 0
    for clip, share in zip(clips, shares):
        events = [(at, event) for at, one in zip(ENDS_S, share) if (event := spotter.take(0, one))]
        true = [at for at, event in events if event.label == clip.label and at > clip.onset_s]
        late_s += [at - clip.onset_s for at in true[:1]]
        false += sum(at > SETTLED_S for at, event in events if event.label != clip.label or at <= clip.onset_s)
    return late_s, false


def label_of(shares: np.ndarray, rule: EventsSpec) -> np.ndarray:
    """What clips are, (n, FRAMES, labels) -> (n,): the event that was surest at any frame, by the mean of as many as
    the rule says, if it was sure enough."""
    total = np.cumsum(np.pad(shares, ((0, 0), (1, 0), (0, 0))), 1)
    mean = (total[:, rule.ticks :] - total[:, : -rule.ticks]) / rule.ticks
    mean = mean[:, max(0, round(SETTLED_S * FRAME_HZ) - rule.ticks + 1) :]
    events = np.array([i for i, label in enumerate(LABELS) if label not in rule.quiet])
    peak = mean.max(1)[:, events]
    return np.where(peak.max(1) >= rule.sure, events[peak.argmax(1)], LABELS.index(QUIET))


def told(model: Any, specs: Sequence[StreamSpec], clips: Sequence[Clip], there: set[int], name: str) -> np.ndarray:
    """(clips, FRAMES, labels): each label's share at each frame; `there`: which streams are. One clip comes after the
    other, without a reset."""
    before, shares = np.zeros((_window(specs[1]), specs[1].channels), np.int16), []
    model.reset()
    for clip in tqdm(clips, name, leave=False):
        shares.append(shares_of(model, specs, clip.frames, clip.sound, there, FRAME_HZ, before))
        before = clip.sound
    return np.stack(shares)


def shares_of(
    model: Any, specs: Sequence[StreamSpec], frames: np.ndarray, sound: np.ndarray, there: set[int], rate_hz: float,
    before: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """(frames, labels): each label's share at each frame of a clip, by the graphs as on a robot; `there`: which streams
    are; `before`: what was heard before the clip, silence."""
    camera, audio = specs
    window, shares, mask = _window(audio), [], np.array([i in there for i in range(2)], np.float32)
    if before is None:
        before = np.zeros((window, audio.channels), np.int16)
    all_of_it = np.concatenate([before[-window:], sound])
    for frame, end in zip(frames, ends(len(frames), rate_hz, audio.sample_rate_hz)):
        fresh = {}
        if 0 in there:
            fresh[camera.name] = Fresh(preprocess.fitted(camera, frame), 1 / rate_hz, False)
        if 1 in there:
            mel = preprocess.log_mel(all_of_it[end : end + window], None, audio)
            fresh[audio.name] = Fresh(mel, 1 / rate_hz, False)
        inputs = ModelInputs(fresh, mask, np.zeros(2, np.float32), 1 / rate_hz, False)
        shares.append(model.step(inputs).values["values"][0].copy())
    return np.array(shares)
