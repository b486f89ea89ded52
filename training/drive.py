"""The drive task: demonstrations from the simulator, what is learned from them, and the student at the wheel.

    python -m training.train drive
    python -m training.compare drive --data runs/drive          # what others learn from the same lessons

Imitation with DAgger: in later rounds the student of the round before drives most of the time, and the expert says what
it would have done.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge.align import Aligner, Window
from mm_edge.engine.part import ModelInputs
from mm_edge.pipeline import model_inputs
from mm_edge.preprocess import Vocabulary
from mm_edge.replay import Tick
from mm_edge.sim.episode import GRID, Episode, ExpertDriver
from mm_edge.sim.expert import SEARCH
from mm_edge.sim.rooms import COLOURS, NAMED, SHAPES, SYNONYMS, vocabulary
from mm_edge.types import Sample, StreamSpec
from training.batches import Batch, Lanes, Singles, make_batch
from training.models import ModelResult, RobotMultiSensorModel
from training.recipe import Recipe, Round
from training.runner import TorchPipeline
from training.supervised import LOUD, QUIET, build, modalities
from training.tables import Tables, build_tables, load_tables, save_tables
from training.windows import Change, Event, r2

EXPERT = "expert/cmd_vel"
NEEDED = frozenset({"audio", "camera", "scan", "text"})  # streams without which the recipe says too little
DROPS = True  # lessons are without senses now and then
HEADINGS = 24  # auxiliary target of the scan: how free the way is in each
BESIDE_M = 0.24  # from the robot's centre: half its width and a margin
SEEN_PIXELS = 8
QUESTIONS = 256  # of a batch (of several processes, of each one's share), at most
ASKED_ALIKE = (0.75, 0.5)  # share of them that keep the colour, and the shape, of what they are about
LESSON_S = 20.0  # a student that is lost has shown it by then
LINGER_S = 1.5  # lessons go on after the target was reached, so that a student learns to stand there
MEASURES = {"speed": "R2 of the expert's speed", "turn": "R2 of the expert's rate of turn"}
EXAM, EXAM_LANES, EXAM_EVERY_TICKS = range(980_000, 980_020), 64, 16  # worlds; windows to a batch, and how far apart
LOOP, LOOP_S = range(970_000, 970_020), 25.0  # worlds, and how long each may take
TERMS = {
    "go": 0.2, "in_view": 0.2, "where": 0.3, "attention": 0.3, "kinds": 0.2, "questions": 1.0, "sound": 0.3,
    "scan": 5.0, "rates": 1.0,
}  # fmt: skip


def build_model(recipe: Recipe) -> RobotMultiSensorModel:
    """The model with the heads that only training has, seeded. Raises ValueError for streams or sizes that it cannot
    have."""
    if missing := NEEDED - {spec.name for spec in recipe.streams}:
        raise ValueError(f"streams: drive cannot be learned without {', '.join(sorted(missing))}")
    sizes = {key: value for key, value in recipe.model.items() if key != "modality"}
    model = build(
        RobotMultiSensorModel, recipe, sizes, modalities=modalities(recipe, len(vocabulary())),
        action_dim=len(recipe.action["names"]),
    )  # fmt: skip
    units = {name: encoder.units for name, encoder in model.encoders.items()}
    grid = model.encoders["camera"].net.dim
    model.aux["colour"] = torch.nn.Linear(grid, len(COLOURS) + 1)  # of the object in each cell; the first: none
    model.aux["shape"] = torch.nn.Linear(grid, len(SHAPES) + 1)
    model.aux["camera"] = torch.nn.Linear(units["camera"], 4)  # target in view; bearing's sine and cosine, nearness
    model.aux["audio"] = torch.nn.Linear(units["audio"], 5)  # alarm, beacon on; bearing's sine and cosine, nearness
    model.aux["scan"] = torch.nn.Linear(units["scan"], HEADINGS)
    return model


def load_model(recipe: Recipe, weights: Path) -> RobotMultiSensorModel:
    model = build_model(recipe)
    model.load_state_dict(load_file(weights))
    return model.eval()


def words(recipe: Recipe) -> list[str]:
    return vocabulary()


def label(tick: Tick) -> dict[str, Any]:
    """A tick's labels as arrays. The action is the expert's for the state the robot is in, in force once it is
    computed; never the action that was executed."""
    labels = tick.labels
    cells = np.zeros(GRID[0] * GRID[1], np.float16)
    for i, share in labels["cells"]:
        cells[int(i)] = share
    objects = np.zeros((2, GRID[0] * GRID[1]), np.int8)
    for i, colour, shape in labels["objects"]:
        objects[:, i] = colour + 1, shape + 1  # 0: no object
    beacon = (0.0, 0.0, 0.0, 0.0)
    if labels["beacon_m"] is not None:
        beacon = (1.0, *_whereabouts(labels["beacon_m"], labels["beacon_rad"]))
    target = _whereabouts(labels["distance_m"], labels["bearing_rad"])
    return {
        "action": labels[EXPERT][[0, 5]],  # of a twist: linear x, angular z
        "cells": cells,
        "objects": objects,
        "target": np.float32([labels["pixels"] >= SEEN_PIXELS, *target]),
        "sound": np.float32([labels["alarm"], *beacon]),
        "by_sound": np.float32(labels["by_sound"]),
    }


def _whereabouts(distance_m: float, bearing_rad: float) -> tuple[float, float, float]:
    return math.sin(bearing_rad), math.cos(bearing_rad), math.exp(-distance_m / 1.5)


def loss(
    recipe: Recipe, model: RobotMultiSensorModel, batch: Batch, out: ModelResult
) -> tuple[Tensor, dict[str, Tensor]]:
    """Imitation, plus what the simulator knows about each sense: that keeps every encoder's spikes meaningful.

    Where the sense that the task hangs on is absent, the expert's action cannot be known; it then counts little.
    """
    labels, valid = batch.labels, batch.valid.squeeze(-1).float()
    have = {name: batch.mask[..., i] for i, name in enumerate(model.names)}
    by_sound, alarm = labels["by_sound"], labels["sound"][..., 0]
    key = (
        torch.where(by_sound > 0, have["audio"], have["camera"])
        * have["text"]
        * torch.where(alarm > 0, have["audio"], 1.0)
    )
    # Not squared: where the expert would pass on the left or on the right, the mean of both is the obstacle.
    scale = out.output.new_tensor([2.0, 1.0])
    error = F.smooth_l1_loss(out.output * scale, labels["action"] * scale, reduction="none", beta=0.15).sum(-1)
    action = _mean(error, valid * (0.1 + 0.9 * key))
    go = _mean(F.binary_cross_entropy_with_logits(out.raw[..., -1], 1 - alarm, reduction="none"), valid * have["audio"])

    seen = labels["target"][..., 0]
    named = valid * have["camera"] * have["text"] * (1 - by_sound)
    camera = model.aux["camera"](out.tokens["camera"])
    in_view = _mean(F.binary_cross_entropy_with_logits(camera[..., 0], seen, reduction="none"), named)
    where = _mean(((camera[..., 1:] - labels["target"][..., 1:]) ** 2).sum(-1), named * seen)
    lane, tick = batch.steps["camera"].where[:, 0], batch.steps["camera"].tick
    visible = seen[lane, tick, None]
    cells = torch.cat([labels["cells"][lane, tick].float() * visible, 1 - visible], -1)  # the last: nothing to be seen
    attention = _mean(-(cells * out.scores["camera"].log_softmax(-1)).sum(-1), named[lane, tick])
    objects = labels["objects"][lane, tick].long()
    grid = out.grids["camera"].permute(0, 2, 3, 1).float().flatten(1, 2)
    kinds = sum(_by_cell(model.aux[name](grid), objects[:, i]) for i, name in enumerate(("colour", "shape")))
    few = torch.randperm(len(grid), device=grid.device)[:QUESTIONS]
    questions = _questions(model, out.grids["camera"][few], objects[few])

    audio, heard = model.aux["audio"](out.tokens["audio"]), valid * have["audio"]
    on = F.binary_cross_entropy_with_logits(audio[..., :2], labels["sound"][..., :2], reduction="none").sum(-1)
    beacon = ((audio[..., 2:] - labels["sound"][..., 2:]) ** 2).sum(-1) * labels["sound"][..., 1]
    sound = _mean(on + beacon, heard)

    steps = batch.steps["scan"]
    lane, slot = steps.where.T
    kept = steps.keep[lane, slot, 0]  # all, but for modality dropout
    scanned = next(spec for spec in recipe.streams if spec.name == "scan")
    blocked = torch.exp(-free_m((1 - steps.x[kept, 0]) * scanned.range_max_m) / 0.7)
    said = model.aux["scan"](out.by_step["scan"][lane[kept], slot[kept]])
    scan = ((said - blocked) ** 2).mean() if len(said) else said.sum()

    rates = {name: _mean(s.mean(-1), batch.steps[name].keep.squeeze(-1).float()) for name, s in out.spikes.items()}
    quiet_or_loud = sum((F.relu(QUIET - r) + F.relu(r - LOUD) for r in rates.values()), action.new_zeros(()))
    terms = {
        "go": go, "in_view": in_view, "where": where, "attention": attention, "kinds": kinds, "sound": sound,
        "questions": questions, "scan": scan, "rates": quiet_or_loud,
    }  # fmt: skip
    weights = {**TERMS, **recipe.train.weights}
    total = sum((weights[name] * term for name, term in terms.items()), action)
    return total, {"action": action, **terms, **{f"rate_{k}": v for k, v in rates.items()}}


def free_m(range_m: Tensor) -> Tensor:
    """Ranges (N, beams) over the full circle -> (N, HEADINGS): metres to drive straight on in each direction before
    something comes nearer than BESIDE_M."""
    angle = torch.arange(range_m.shape[1], device=range_m.device) * (2 * math.pi / range_m.shape[1])
    off = angle - torch.arange(HEADINGS, device=range_m.device)[:, None] * (2 * math.pi / HEADINGS)
    ahead, aside = range_m[:, None] * torch.cos(off), range_m[:, None] * torch.sin(off)
    before = ahead - (BESIDE_M**2 - aside**2).clamp(min=0).sqrt()
    in_the_way = (aside.abs() < BESIDE_M) & (torch.cos(off) > 0.3)
    return torch.where(in_the_way, before, range_m.amax(-1, keepdim=True)[:, None]).amin(-1).clamp(min=0)


def _questions(model: RobotMultiSensorModel, seen: Tensor, objects: Tensor) -> Tensor:
    """How well it finds other things than its command names: an episode has one command, and the colour alone tells its
    target from all else in most of them. A frame, seen (N, dim, rows, cols) with objects (N, 2, cells), is asked about
    something in it, now and then with another colour or shape; or about anything."""
    n, device = len(objects), objects.device
    if not n:
        return seen.new_zeros(())
    there = (objects[:, 0] > 0).float()
    cell = torch.multinomial(there + 1e-9, 1)
    wanted = []
    for i, (kinds, alike) in enumerate(zip((COLOURS, SHAPES), ASKED_ALIKE)):
        any_ = torch.randint(1, len(kinds) + 1, (n,), device=device)
        keep = (torch.rand(n, device=device) < alike) & (there.amax(1) > 0)
        wanted.append(torch.where(keep, objects[:, i].gather(1, cell).squeeze(1), any_))
    commands = _commands(model.encoders["text"].shape[0]).to(device)
    phrase = torch.randint(commands.shape[2], (n,), device=device)
    token = model.encoders["text"](commands[wanted[0] - 1, wanted[1] - 1, phrase][:, None]).squeeze(1)
    _, scores = model.encoders["camera"].net.ask(seen, token)
    answer = (objects == torch.stack(wanted, 1)[..., None]).all(1).float()
    answer = torch.cat([answer, 1 - answer.amax(1, keepdim=True)], 1)  # the last: nothing of it
    return -(answer / answer.sum(1, keepdim=True) * scores.log_softmax(-1)).sum(-1).mean()


@cache
def _commands(length: int) -> Tensor:
    """int64 (colours, shapes, phrases, length): all that name an object, as tokens."""
    known = Vocabulary(vocabulary())
    named = [
        [[phrase.format(f"{colour} {word}") for phrase in NAMED for word in SYNONYMS[shape]] for shape in SHAPES]
        for colour in COLOURS
    ]
    return torch.tensor([[[known.encode(c, length).tolist() for c in some] for some in row] for row in named])


def _by_cell(logits: Tensor, kind: Tensor) -> Tensor:
    """Cross entropy of logits (N, cells, kinds) and kind (N, cells); cells with and without an object weigh the same,
    few as the former are."""
    error = F.cross_entropy(logits.flatten(0, 1), kind.flatten(), reduction="none").view_as(kind)
    return _mean(error, (kind > 0).float()) + _mean(error, (kind == 0).float())


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum() / (weight.sum() + 1e-6)


class Dropout:
    """Modality dropout: which samples of an episode never come. Drawn before the tables are made, so that mask, age, dt
    and resets are those of a robot whose sensor died."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(np.random.SeedSequence([seed, 4]))
        self.spans: list[tuple[str, float, float]] = []  # stream, from s, to s
        if rng.random() < 0.3:  # the gyro tells what was just done, and a student that reads it goes on doing it
            self.spans.append(("imu", -1.0, np.inf))
        kind = rng.random()
        if kind < 0.3:
            stream = rng.choice(["camera", "scan", "audio", "imu"], p=[0.25, 0.45, 0.2, 0.1])
            self.spans.append((str(stream), -1.0, np.inf))
        elif kind < 0.5:
            for _ in range(rng.integers(1, 4)):
                begin = rng.uniform(0, 8)
                stream = rng.choice(["camera", "scan", "audio", "imu"], p=[0.3, 0.4, 0.15, 0.15])
                self.spans.append((str(stream), begin, begin + rng.uniform(0.5, 4)))

    def __call__(self, stream: str, t_s: float) -> bool:
        return any(stream == name and begin <= t_s < end for name, begin, end in self.spans)


class _Lesson(ExpertDriver):
    """The expert beside a student: now the one, now the other drives, half a second or so at a time. What is dropped
    reaches nobody, not even the rule for when to tick.

    Attributes: events, the samples and ticks of the episode so far.
    """

    def __init__(
        self, episode: Episode, round_: Round, student: TorchPipeline | None, dropped: Callable[[str, float], bool]
    ):
        super().__init__(episode, round_.bursts)
        self.events: list[Event] = []
        self._episode, self._student, self._share = episode, student, round_.student
        self._dropped = dropped
        self._turns = np.random.default_rng(np.random.SeedSequence([episode.world.seed, 5]))
        self._student_drives = self._turns.random() < self._share

    def push(self, sample: Sample) -> None:
        if self._dropped(sample.stream, self._episode.world.t_s):
            return
        super().push(sample)
        self.events.append(sample)
        if self._student is not None:
            self._student.push(sample)

    def tick(self, now_ns: int) -> np.ndarray:
        action = super().tick(now_ns)
        v, w = self.wanted
        self.events.append(
            Tick(now_ns, {**self._episode.labels(self.camera_ns), EXPERT: np.float32([v, 0, 0, 0, 0, w])})
        )
        if self._student is None:
            return action
        said = self._student.tick(now_ns)
        if self._turns.random() < 0.12:
            self._student_drives = self._turns.random() < self._share
        shaken = not np.array_equal(action, self.wanted)
        return said if self._student_drives and not shaken else action


def demonstrate(recipe: Recipe, seed: int, round_: Round, student: TorchPipeline | None) -> Tables:
    """One episode as tables."""
    episode = Episode(seed)
    episode.world.time_limit_s, episode.world.linger_s = LESSON_S, LINGER_S
    if student is not None:
        student.reset()
    lesson = _Lesson(episode, round_, student, Dropout(seed))
    episode.run(lesson)
    return _tables(lesson.events, recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms)


def _tables(events: Iterable[Event], streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float) -> Tables:
    return build_tables(events, streams, period_s, max_gap_ms, Vocabulary(vocabulary()), label)


def mirrored(tables: Tables) -> Tables:
    """The same in a mirror, left for right: another lesson, which nobody has to drive. The frames are shared, not
    copied. Where the expert searches, it turns to the left here, too."""
    labels = dict(tables.labels)
    searching = (labels["action"] == np.float32(SEARCH)).all(-1, keepdims=True)
    labels["action"] = np.where(searching, labels["action"], labels["action"] * np.float32([1, -1]))
    for name in ("cells", "objects"):
        grid = labels[name].reshape(*labels[name].shape[:-1], *GRID)
        labels[name] = grid[..., ::-1].reshape(labels[name].shape)
    labels["target"] = labels["target"] * np.float32([1, -1, 1, 1])
    labels["sound"] = labels["sound"] * np.float32([1, 1, -1, 1, 1])
    change: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "camera": lambda x: x[:, :, ::-1],
        "scan": lambda x: x[..., -np.arange(x.shape[-1])],  # sector 0 is ahead
        "imu": lambda x: x * np.float32([1, -1, 1, -1, 1, -1, 1]),  # of a turn the axis is mirrored, and its sense
        "audio": lambda x: x * np.float32([1, -1, 1])[:, None, None],  # loudness, left less right, heard
    }
    steps = {name: replace(s, x=change[name](s.x)) if name in change else s for name, s in tables.steps.items()}
    return replace(tables, steps=steps, labels=labels)


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Lanes | Singles:
    """The episodes of all rounds so far; those of this one with the student of the round before. With `data.folder`,
    that of a training that is done: all of its episodes, and none is made."""
    student = out / f"round{index - 1}.safetensors" if index else None
    episodes: list[Tables] = []
    if recipe.data:
        files = sorted(Path(recipe.data["folder"]).glob("episodes/round*/*.npz"))
        if not files:
            raise ValueError(f"{recipe.data['folder']}: expected a drive's training, as in runs/drive; got no episodes")
        episodes = [load_tables(file) for file in tqdm(files, "episodes")]
    else:
        for i in range(index + 1):
            folder = out / "episodes" / f"round{i}"
            episodes += demonstrations(recipe, i, folder, student if i == index else None, workers)
    episodes += [mirrored(episode) for episode in episodes]
    if recipe.train.ticks == 1:
        return Singles(episodes, recipe.train.lanes, recipe.seed + index)
    return Lanes(episodes, recipe.train.lanes, recipe.train.ticks, recipe.seed + index)


def demonstrations(recipe: Recipe, index: int, folder: Path, student: Path | None, workers: int) -> list[Tables]:
    """All episodes of a round, made by `workers` processes; those already in `folder` are only read."""
    round_ = recipe.rounds[index]
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(round_.first_seed, round_.first_seed + round_.episodes)
    missing = [seed for seed in seeds if not (folder / f"{seed}.npz").exists()]
    if missing:
        jobs = [(recipe, seed, round_, folder, student) for seed in missing]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in tqdm(pool.imap_unordered(_make, jobs, chunksize=4), f"round {index}: episodes", total=len(jobs)):
                pass
    return [load_tables(folder / f"{seed}.npz") for seed in tqdm(seeds, f"round {index}: read")]


def exam(recipe: Recipe, change: Change) -> Iterator[Batch]:
    """Windows of the expert's drives, shaken now and then, in worlds that none learned by."""
    logs = _drives(EXAM, recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms, change)
    ticks = recipe.train.ticks
    chunks = [(log, end - ticks, end) for log in logs for end in range(ticks, len(log) + 1, EXAM_EVERY_TICKS)]
    for i in range(0, len(chunks), EXAM_LANES):
        some = chunks[i : i + EXAM_LANES]
        yield make_batch(some, [True] * len(some), ticks, "text")


@cache  # variants by the dozen are examined by them
def _drives(
    worlds: range, streams: tuple[StreamSpec, ...], period_s: float, max_gap_ms: float, change: Change
) -> list[Tables]:
    return [_tables(change(_drive(seed)), streams, period_s, max_gap_ms) for seed in tqdm(worlds, "exam", leave=False)]


@cache
def _drive(seed: int) -> list[Event]:
    episode = Episode(seed)
    episode.world.time_limit_s = LESSON_S
    lesson = _Lesson(episode, Round(0, bursts=0.04), None, lambda stream, t_s: False)
    episode.run(lesson)
    return lesson.events


def score(said: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float | None]:
    """said (n, 2) -> each of MEASURES."""
    return dict(zip(MEASURES, r2(said, labels["action"]) or ()))


def in_the_loop(recipe: Recipe, model: RobotMultiSensorModel) -> dict[str, float]:
    """Shares of the worlds of LOOP in which the model, at the wheel, gets to where it was told, and in which it runs
    into nothing."""
    pipeline, outcomes = TorchPipeline(recipe, model), []
    for seed in tqdm(LOOP, "worlds", leave=False):
        pipeline.reset()
        episode = Episode(seed)
        episode.world.time_limit_s = LOOP_S
        outcomes.append(episode.run(pipeline))
    reached, free = ([o.status == "success" for o in outcomes], [o.collisions == 0 for o in outcomes])
    return {"success": float(np.mean(reached)), "no collision": float(np.mean(free))}


def rehearsal(recipe: Recipe, ticks: int) -> list[ModelInputs]:
    """What a model would be given on an expert's drives, with trouble: see `_TroubledDriver`."""
    known, made, seed = Vocabulary(vocabulary()), list[ModelInputs](), 990_000
    while len(made) < ticks:
        episode = Episode(seed)
        driver = _TroubledDriver(episode, recipe)
        episode.run(driver)
        drive = [model_inputs(recipe.streams, window, known) for window in driver.windows]
        made += [drive[0]._replace(reset=True), *drive[1:]]
        seed += 1
    return made[:ticks]


class _TroubledDriver(ExpertDriver):
    """Keeps the windows of a drive on which a fifth of all samples are lost, one sensor (another on each drive) falls
    silent for so long that its state starts anew, and shortly before it is back all state does."""

    def __init__(self, episode: Episode, recipe: Recipe):
        super().__init__(episode, burst_probability=0.03)
        self.windows: list[Window] = []
        self._world, self._back_s = episode.world, 1.5 + recipe.max_gap_ms / 1e3
        self._restarted = False
        self._aligner = Aligner(recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms)
        self._names = [spec.name for spec in recipe.streams if not spec.latched]
        self._losses = np.random.default_rng(episode.world.seed)

    def push(self, sample: Sample) -> None:
        silent = self._names[self._world.seed % len(self._names)]
        lost = sample.stream in self._names and self._losses.random() < 0.2
        if not lost and not (sample.stream == silent and 1.0 <= self._world.t_s < self._back_s):
            super().push(sample)
            self._aligner.push(sample)

    def tick(self, now_ns: int) -> np.ndarray:
        if not self._restarted and self._world.t_s > self._back_s - 0.2:
            self._aligner.restart()
            self._restarted = True
        self.windows.append(self._aligner.window(now_ns))
        return super().tick(now_ns)


_student: TorchPipeline | None = None


def _make(job: tuple[Recipe, int, Round, Path, Path | None]) -> None:
    global _student
    recipe, seed, round_, folder, checkpoint = job
    if checkpoint is not None and _student is None:  # once a process
        torch.set_num_threads(1)
        _student = TorchPipeline(recipe, load_model(recipe, checkpoint))
    save_tables(folder / f"{seed}.npz", demonstrate(recipe, seed, round_, _student))
