"""Clips of video with sound, of what they are: a folder in the layout of Kinetics or AVE.

    python -m training.train clips --data FOLDER
    python -m training.evaluate clips --data FOLDER --bundle BUNDLE --json

    FOLDER/**/train.csv, val.csv, validate.csv, test.csv        Kinetics: label, youtube_id, time_start, time_end
    FOLDER/**/<youtube_id>_<start>_<end>.mp4                    both of six digits: all of it is what it is of; or
    FOLDER/**/<youtube_id>.mp4                                  from time_start to time_end it is
    FOLDER/**/trainSet.txt, valSet.txt, testSet.txt             AVE: Category&VideoID&Quality&StartTime&EndTime
    FOLDER/**/<VideoID>.mp4                                     from StartTime to EndTime it is

Training reads what is told by train.csv or trainSet.txt, evaluation what the others tell; where there is but one of
both, either reads all there is. Videos may also be mkv, webm or avi; those that are not there are left out, since many
are gone from where they were. A model has each clip as a robot would: a frame each tick, and with it the sound that
ends with it. A clip is what was told of it in the mean over its event's frames.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge.bundle import Bundle
from mm_edge.engine import load
from mm_edge.errors import EdgeError, needs
from mm_edge.preprocess import fitted
from mm_edge.types import StreamSpec
from training.batches import Batch
from training.events import IGNORED, Takes, ends, network, shares_of
from training.models import AudioVideoModel, ModelResult
from training.protocols import noise, power
from training.recipe import Recipe, make_recipe
from training.supervised import rate_loss, words

__all__ = ["build_model", "evaluate", "loss", "supply", "words"]

TABLES = ("train.csv", "val.csv", "validate.csv", "test.csv", "trainSet.txt", "valSet.txt", "testSet.txt")
COLUMNS = ("label", "youtube_id", "time_start", "time_end")
AVE = "Category&VideoID&Quality&StartTime&EndTime"
FILMS = (".mp4", ".mkv", ".webm", ".avi")
LAYOUTS = {1: "mono", 2: "stereo"}
SNRS_DB = (20.0, 10.0, 0.0, -5.0)  # of the evaluation
TERMS = {"rates": 1.0, "mean": 1.0}


class Clip(NamedTuple):
    path: Path
    label: str
    start_s: float  # of what it is of, in the file
    end_s: float  # inf: until the file's end


class Row(NamedTuple):
    """A line of a table."""

    where: str  # file and line
    label: str
    video: str
    start_s: float
    end_s: float


def read(folder: Path, part: str) -> list[Clip]:
    """The clips of a part, "train" or "test", whose videos are there; how many are not is told on stderr. Raises
    EdgeError naming the file and what is wrong in it."""
    clips, missing = _read(folder, part)
    if missing:
        print(f"{folder}: {missing} of {missing + len(clips)} clips are left out: no video", file=sys.stderr)
    return clips


def with_names(recipe: Recipe) -> Recipe:
    """With the labels that its folder has clips of to learn from."""
    folder = recipe.data["folder"]
    names = sorted({clip.label for clip in _read(Path(folder), "train")[0]})
    return make_recipe({**recipe.raw, "values": {**recipe.values, "names": names}}, [], folder)


def _read(folder: Path, part: str) -> tuple[list[Clip], int]:
    """The clips, and how many have no video."""
    there = sorted(folder.rglob("*"))
    tables = [path for path in there if path.name in TABLES]
    tables = [path for path in tables if path.name.startswith("train") == (part == "train")] or tables
    if not tables:
        raise EdgeError(f"{folder}: expected some of {', '.join(TABLES)}, as Kinetics or AVE has them, got none")
    films: dict[str, list[Path]] = {}
    for path in there:
        if path.suffix.lower() in FILMS:
            films.setdefault(path.stem, []).append(path)
    rows = [row for table in tables for row in (_kinetics(table) if table.suffix == ".csv" else _ave(table))]
    if not rows:
        raise EdgeError(f"{tables[0]}: expected clips, got none")
    clips = [clip for row in rows if (clip := _found(row, films)) is not None]
    if not clips:
        row = rows[0]
        raise EdgeError(f"{row.where}: expected its video {row.video}.mp4, or {_trimmed(row)}.mp4, below {folder}, and "
                        f"that of {len(rows) - 1} more, got none of them")  # fmt: skip
    return clips, len(rows) - len(clips)


def _kinetics(table: Path) -> Iterator[Row]:
    lines = csv.DictReader(_lines(table))
    if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
        raise EdgeError(f"{table}: line 1: expected columns {', '.join(COLUMNS)}, got no {', '.join(missing)}")
    for line in lines:
        yield _row(f"{table}: line {lines.line_num}", *(line[name] or "" for name in COLUMNS))


def _ave(table: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(table), 1):
        if not line.strip() or line.startswith("Category&VideoID&"):
            continue
        fields = line.strip().split("&")
        if len(fields) != 5:
            raise EdgeError(f"{table}: line {number}: expected {AVE}, got {line[:200]!r}")
        label, video, _, start, end = fields
        yield _row(f"{table}: line {number}", label, video, start, end)


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise EdgeError(f"{table}: expected text in UTF-8, got {error}") from None


def _row(where: str, label: str, video: str, start: str, end: str) -> Row:
    try:
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise EdgeError(f"{where}: expected seconds of begin and end, got {start!r} and {end!r}") from None
    if not 0 <= start_s < end_s < math.inf:  # False for NaN
        raise EdgeError(f"{where}: expected an end behind the begin, got {start} to {end} s")
    if not (label and video):
        raise EdgeError(f"{where}: expected a label and a video, got {label!r} and {video!r}")
    return Row(where, label, video, start_s, end_s)


def _found(row: Row, films: dict[str, list[Path]]) -> Clip | None:
    for name, start_s, end_s in ((_trimmed(row), 0.0, math.inf), (row.video, row.start_s, row.end_s)):
        if len(paths := films.get(name, [])) > 1:
            raise EdgeError(f"{row.where}: its video is there twice: {paths[0]}, {paths[1]}")
        if paths:
            return Clip(paths[0], row.label, start_s, end_s)
    return None


def _trimmed(row: Row) -> str:
    return f"{row.video}_{int(row.start_s):06d}_{int(row.end_s):06d}"


class Film(NamedTuple):
    """A decoded file. Frame k is what was to be seen (k + 1) / rate_hz after the first picture; sound begins with that
    picture and ends with the last frame."""

    frames: np.ndarray  # uint8 (n, h, w, 3)
    sound: np.ndarray  # int16 (samples, channels)
    has_sound: bool


def decode(path: Path, rate_hz: float, camera: StreamSpec, audio: StreamSpec) -> Film:
    """A file, as these two streams would have it. Raises EdgeError."""
    with needs("reading video clips", "av", "train"):
        import av
    if audio.channels not in LAYOUTS:
        raise EdgeError(f"{audio.name}: channels: expected 1 or 2 of a video's sound, got {audio.channels}")
    try:
        with av.open(str(path)) as file:
            return _decode(av, file, rate_hz, camera, audio)
    except (av.error.FFmpegError, ValueError) as error:
        raise EdgeError(f"{path}: expected a video, got one that cannot be decoded: {error}") from None


def _decode(av: Any, file: Any, rate_hz: float, camera: StreamSpec, audio: StreamSpec) -> Film:
    """Raises ValueError."""
    if not file.streams.video:
        raise ValueError("there are no pictures in it")
    video, tracks, period_s = file.streams.video[0], file.streams.audio[:1], 1 / Fraction(rate_hz)
    resampler = av.AudioResampler(format="s16", layout=LAYOUTS[audio.channels], rate=audio.sample_rate_hz)
    frames, heard, begin_s, heard_s, shown, shown_s = list[np.ndarray](), [], None, None, None, Fraction(0)
    for frame in file.decode(video, *tracks):
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is None:
            raise ValueError("there is no time in its frames")
        at_s = stamp * frame.time_base
        if isinstance(frame, av.AudioFrame):
            heard_s = at_s if heard_s is None else heard_s
            heard += resampler.resample(frame)
            continue
        begin_s = at_s if begin_s is None else begin_s
        frames += _until(at_s - begin_s, shown, len(frames), period_s, camera)
        shown, shown_s = frame, at_s - begin_s
    # The last one is shown as long as others, at its end, too; stamps in whole ms may be a little early.
    end_s = shown_s + 1 / Fraction(video.guessed_rate or rate_hz) + Fraction(1, 500)
    frames += _until(end_s, shown, len(frames), period_s, camera)
    if not frames:
        raise ValueError(f"it has ended before {float(period_s):g} s")
    sound = np.zeros((ends(len(frames), rate_hz, audio.sample_rate_hz)[-1], audio.channels), np.int16)
    if heard_s is not None:
        heard = [wave for wave in (*heard, *resampler.resample(None)) if wave is not None]
        wave = np.concatenate([wave.to_ndarray().reshape(-1, audio.channels) for wave in heard])
        late = round((heard_s - begin_s) * audio.sample_rate_hz)
        wave = wave[max(0, -late) :][: max(0, len(sound) - late)]
        sound[max(0, late) :][: len(wave)] = wave
    return Film(np.stack(frames), sound, heard_s is not None)


def _until(end_s: Fraction, shown: Any, done: int, period_s: Fraction, camera: StreamSpec) -> list[np.ndarray]:
    """What is shown, once for each tick before `end_s` that is not done."""
    ticks = math.ceil(end_s / period_s) - 1 - done
    return [fitted(camera, shown.to_ndarray(format="rgb24"))] * ticks if ticks > 0 else []


def decoded(
    clips: Sequence[Clip], rate_hz: float, camera: StreamSpec, audio: StreamSpec, out: Path, workers: int
) -> dict[Path, tuple[Path, int]]:
    """Each video as an .npz in the folder `out`, made if it is not there, and how many frames it has."""
    out.mkdir(parents=True, exist_ok=True)

    def keep(path: Path) -> tuple[Path, int]:
        made_of = (path.resolve(), path.stat().st_mtime_ns, rate_hz, camera.shape, camera.fit, audio.sample_rate_hz,
                   audio.channels)  # fmt: skip
        file = out / f"{path.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.npz"
        if not file.exists():
            film = decode(path, rate_hz, camera, audio)
            with file.with_suffix(".part").open("wb") as part:
                np.savez(part, **film._asdict(), count=len(film.frames))
            file.with_suffix(".part").rename(file)
        with np.load(file) as kept:
            return file, int(kept["count"])

    paths = sorted({clip.path for clip in clips})
    with ThreadPool(workers) as pool:
        return dict(zip(paths, tqdm(pool.imap(keep, paths), "videos", total=len(paths), leave=False)))


def span(clip: Clip, count: int, rate_hz: float) -> tuple[int, int]:
    """First and last of a file's frames that show what the clip is of. Raises EdgeError if none does."""
    at_s = np.arange(1, count + 1) / rate_hz
    inside = np.flatnonzero((at_s >= clip.start_s) & (at_s <= clip.end_s))
    if not len(inside):
        raise EdgeError(f"{clip.path}: expected a frame between {clip.start_s:g} and {clip.end_s:g} s, at {rate_hz:g} "
                        f"frames a second, got a video of {at_s[-1]:g} s")  # fmt: skip
    return int(inside[0]), int(inside[-1])


def build_model(recipe: Recipe) -> AudioVideoModel:
    return network(recipe, recipe.train.ticks, recipe.streams[1].sample_rate_hz, _rate_hz(recipe.tick["period_ms"]))


def supply(recipe: Recipe, index: int, out: Path, workers: int) -> Clips:
    return Clips(recipe, out / "clips", workers)


def _rate_hz(period_ms: float) -> float:
    return 1e3 / period_ms


class Clips(Takes):
    """From anywhere in a clip where it is what it is of. Frames that are not of it are not learned from."""

    def __init__(self, recipe: Recipe, out: Path, workers: int):
        rate_hz, (camera, audio) = _rate_hz(recipe.tick["period_ms"]), recipe.streams
        super().__init__(recipe, recipe.train.ticks, rate_hz)
        clips, names = read(Path(recipe.data["folder"]), "train"), recipe.values["names"]
        if strange := sorted({clip.label for clip in clips} - set(names)):
            raise ValueError(f"{recipe.data['folder']}: expected clips of {names}, got some of {strange}")
        files = decoded(clips, rate_hz, camera, audio, out, workers)
        self._clips = [
            (files[clip.path][0], names.index(clip.label), span(clip, files[clip.path][1], rate_hz)) for clip in clips
        ]
        self.steps_an_epoch = max(1, len(clips) // self._lanes)

    def chosen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        takes = [self._take(*self._clips[i]) for i in self._rng.integers(len(self._clips), size=self._lanes)]
        frames, sound, has_sound, label = map(np.stack, zip(*takes))
        return frames, sound, np.stack([np.ones_like(has_sound), has_sound], 1), {"label": label}

    def _take(self, file: Path, label: int, of_it: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, bool, np.ndarray]:
        """What is behind a clip's end looks as its last frame, and is silent."""
        n, (first, last) = self._frames, of_it
        with np.load(file) as kept:
            film = Film(kept["frames"], kept["sound"], bool(kept["has_sound"]))
        at = int(self._rng.integers(max(0, first - n + 1), max(0, min(last, len(film.frames) - n)) + 1))
        frames = film.frames[np.minimum(np.arange(at, at + n), len(film.frames) - 1)]
        from_sample = round(at / self._rate_hz * self._audio.sample_rate_hz)
        sound = np.zeros(self._before["sound"].shape[1:], np.int16)
        part = film.sound[from_sample:][: len(sound)]
        sound[: len(part)] = part
        labels = np.full(n, IGNORED)
        labels[max(0, first - at) : last - at + 1] = label
        return frames, sound, film.has_sound, labels


def loss(recipe: Recipe, model: AudioVideoModel, batch: Batch, out: ModelResult) -> tuple[Tensor, dict[str, Tensor]]:
    """Of each frame, and of all of a clip's frames together."""
    label = batch.labels["label"]
    there = (label != IGNORED).float()
    said = (out.output * there[..., None]).sum(1) / there.sum(1, keepdim=True)
    target = label.amax(1)
    wrong = F.cross_entropy(
        out.output.flatten(0, 1), label.flatten(), reduction="none", label_smoothing=0.1, ignore_index=IGNORED
    )
    wrong = (wrong.view_as(there).sum(1) / there.sum(1)).mean()
    mean = F.cross_entropy(said, target, label_smoothing=0.1)
    rates, spread = rate_loss(batch, out)
    right = (said.argmax(-1) == target).float().mean()
    weights = {**TERMS, **recipe.train.weights}
    total = wrong + weights["mean"] * mean + weights["rates"] * spread
    return total, {"wrong": wrong, "mean": mean, "right": right, **rates}


def evaluate(bundle: Bundle, folder: Path, only: Sequence[str]) -> dict[str, Any]:
    """Shares of clips told right, those with a label in `only`: each from rest and frame by frame, as a robot has it.
    With all senses ("fused") and every subset of them; and in white noise, which is so much below each clip's own
    sound, with and without the camera. Clips without sound are scored as if it were absent. "learned": whether a model
    learns by some of them, too, the folder having no clips for a test alone."""
    model, specs, rate_hz = load(bundle, "auto"), list(bundle.streams), _rate_hz(bundle.tick.period_ms)
    names, every = list(bundle.outputs.values.names), read(folder, "test")
    if unknown := set(only) - {clip.label for clip in every}:
        raise ValueError(f"{folder}: no clips of {sorted(unknown)}")
    clips = [clip for clip in every if not only or clip.label in only]
    if strange := sorted({clip.label for clip in clips} - set(names)):
        raise ValueError(f"{folder}: expected clips of {names}, got some of {strange}")
    subsets = [some for n in range(3) for some in itertools.combinations(range(2), n)]
    of = {some: "+".join(specs[i].name for i in some) or "none" for some in subsets} | {(0, 1): "fused"}
    right, silent = {(snr_db, some): list[bool]() for snr_db in (None, *SNRS_DB) for some in subsets}, 0
    rngs = {snr_db: np.random.default_rng(0) for snr_db in SNRS_DB}
    for clip in tqdm(clips, "clips", leave=False):
        film = decode(clip.path, rate_hz, *specs)
        first, last = span(clip, len(film.frames), rate_hz)
        silent += not film.has_sound
        for snr_db in (None, *SNRS_DB):
            sound = film.sound if snr_db is None else in_noise(film.sound, snr_db, rngs[snr_db])
            for some in subsets if snr_db is None else ((0, 1), (1,)):
                there = set(some) if film.has_sound else set(some) - {1}
                model.reset()
                shares = shares_of(model, specs, film.frames, sound, there, rate_hz)
                told = int(shares[first : last + 1].mean(0).argmax())
                right[snr_db, some].append(names[told] == clip.label)
    fused = np.array(right[None, (0, 1)])
    return {
        "clips": len(clips), "learned": not set(every).isdisjoint(_read(folder, "train")[0]),
        "without_sound": silent,
        **{of[some]: _mean(right[None, some]) for some in reversed(subsets)},
        **{f"{snr_db:g} dB": {of[some]: _mean(right[snr_db, some]) for some in ((0, 1), (1,))} for snr_db in SNRS_DB},
        "by_class": {name: _mean(fused[[clip.label == name for clip in clips]]) for name in names},
    }  # fmt: skip


def in_noise(sound: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """int16 (samples, channels), in white noise so much below it."""
    heard = sound + noise(sound.shape, power(sound.ravel()), snr_db, rng)
    return np.clip(np.rint(heard), -32768, 32767).astype(np.int16)


def _mean(values: Sequence[bool] | np.ndarray) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None
