"""Moments in what robots saw, found by words or by a picture.

    language = Language("mm_edge/bundles/vlm")
    for folder, recordings in found(["runs/rec"]).items():
        index = Index(folder, language)
        index.update(recordings)
        index.search(language.embed("a red ball"), recordings)      # -> [Moment, ...], the likest first

An index lies in the folder of the recordings, and holds the embedding of one frame a second of each of their cameras:

    .mm_edge-index/<the bundle's id, its beginning>/recordings.json     which recordings, as which files, how far
                                                    frames.lance        a row a frame, kept by LanceDB

A recording that is there already is not read again; one whose files changed is read anew, and one whose files are gone
leaves the index. What was not finished goes on where it was left.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mm_edge.errors import EdgeError, EngineError, RecordingError, SampleError, needs
from mm_edge.language import Language
from mm_edge.overlay import draw_sheet
from mm_edge.recording import first_messages, named, read, read_metadata, reading
from mm_edge.types import NS, Sample

INDEX, RECORDINGS, FRAMES = ".mm_edge-index", "recordings.json", "frames"
RATE_HZ = 1.0
APART_S = 5.0  # between two moments of one camera
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
BAGS = (".mcap", ".db3", ".bag")
FLUSH_FRAMES = 1000  # that are lost at most when the power is
# A query is compared with all rows; that is faster where LanceDB keeps them in an index, by parts of some 4000 that are
# alike. It pays from some number on.
INDEXED_ROWS, ALL_PARTS = 40_000, 10_000

Watch = Callable[[Iterator[Sample | SampleError], str, int], Iterable[Sample | SampleError]]


class Moment(NamedTuple):
    """Something found. `score`: how alike, -1 to 1; `at_s` after the recording's first frame."""

    recording: str
    stream: str
    stamp_ns: int
    arrival_ns: int
    at_s: float
    score: float


@dataclass
class _Recording:
    id: int  # of its rows; never used again
    files: list[list[Any]]  # name, bytes, mtime in ns
    rate_hz: float
    done: bool = False
    trouble: str = ""


def found(paths: Iterable[str | Path]) -> dict[Path, list[Path]]:
    """Folder of an index -> its recordings, in order. A folder's index covers all recordings in it, at any depth; a
    recording's own is that of the folder it lies in. Raises RecordingError where there are none."""
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        path = path if path.name not in ("", "..") else path.resolve()
        if not path.exists():
            raise RecordingError(f"{path}: expected a recording or a folder of them, there is nothing")
        alone = path.is_file() or (path / "metadata.yaml").exists()
        recordings = [path] if alone else sorted(_inside(path, set()))
        if not recordings:
            raise RecordingError(f"{path}: expected a recording or a folder of them, found none in it")
        known = folders.setdefault(path.parent if alone else path, [])
        known += [recording for recording in recordings if recording not in known]
    return folders


def _inside(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Not in what is being written or was not ended well, nor in what is hidden. Links are followed, but what they lead
    to is found once, if it can be by its own name."""
    seen.add(os.path.realpath(folder))
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name)):
        if path.name.startswith(".") or path.suffix == ".partial" or (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        if path.is_dir():
            yield from [path] if (path / "metadata.yaml").exists() else _inside(path, seen)
        elif path.suffix in BAGS:
            yield path


class Index:
    """What the recordings of a folder show. For one thread at a time; a second process may search meanwhile.

    Args:
        folder: where the recordings lie. Created in it: `.mm_edge-index`.
        language: whose embeddings are compared.
        rate_hz: frames a second of capture time. Recordings that were read at another rate are read anew.

    Raises MissingDependency without lancedb; EdgeError or OSError where an index cannot be read or written.
    """

    def __init__(self, folder: str | Path, language: Language, rate_hz: float = RATE_HZ):
        with needs("searching", "lancedb", "search"):
            import lancedb
        self.folder, self.language, self.rate_hz = Path(folder), language, rate_hz
        self.path = self.folder / INDEX / language.bundle.id[:16]
        self._recordings: dict[str, _Recording] = {}
        self._table: Any = None
        self._loaded_ns = -1  # when the file was written
        self._connect = lancedb.connect
        self._load()

    def outdated(self, recordings: Iterable[Path]) -> list[Path]:
        """Those of `recordings` that must be read: new, changed, or not finished."""
        return [path for path in recordings if not self._is_done(path)]

    def update(self, recordings: Sequence[Path], watch: Watch = lambda frames, name, n: frames) -> list[str]:
        """Read what is new of `recordings`, and forget what is gone. What is damaged is kept as far as it can be read.

        Args:
            watch: gives back the frames that it is given; told the recording's name and how many frames there are.

        Returns what is wrong with recordings, as lines. Raises EdgeError while another process does the same.
        """
        self._load()
        if self._gone() or self.outdated(recordings):
            self.path.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._load()
                self._forget(gone := self._gone())
                reading = self.outdated(recordings)
                self._read(reading, watch)
                if gone or reading:
                    self._tidy()
        known = (self._recordings[self._name(path)] for path in recordings)
        return [recording.trouble for recording in known if recording.trouble]

    def search(
        self, query: np.ndarray, recordings: Iterable[Path], top: int = 10, apart_s: float = APART_S
    ) -> list[Moment]:
        """The moments most like `query`, float32 (D,) of length 1, each the best of its camera within `apart_s`."""
        wanted = {self._name(path) for path in recordings}
        names = {known.id: name for name, known in self._recordings.items() if name in wanted}
        if self._table is None or not names:
            return []
        limit = 20 * top
        while True:
            rows = self._nearest(query, names, limit)
            moments = self._apart(rows, names, top, apart_s)
            if len(moments) == top or len(rows) < limit:
                return moments
            limit *= 8  # a robot that stood still has many neighbours that are all alike

    def _nearest(self, query: np.ndarray, names: Mapping[int, str], limit: int) -> list[dict[str, Any]]:
        with self._named():
            search = self._table.search(query).distance_type("dot").nprobes(ALL_PARTS).limit(limit)
            if len(names) < len(self._recordings):
                search = search.where(f"recording IN ({', '.join(map(str, names))})", prefilter=True)
            return search.select(["recording", "stream", "stamp_ns", "arrival_ns", "at_s", "_distance"]).to_list()

    def _apart(self, rows: list[dict[str, Any]], names: Mapping[int, str], top: int, apart_s: float) -> list[Moment]:
        moments: list[Moment] = []
        for row in rows:
            if row["recording"] not in names:  # another process has just begun with it
                continue
            path = str(self.folder / names[row["recording"]])
            moment = Moment(path, row["stream"], row["stamp_ns"], row["arrival_ns"], row["at_s"], 1 - row["_distance"])
            if len(moments) < top and not any(_near(moment, other, apart_s) for other in moments):
                moments.append(moment)
        return moments

    # ---- what it holds

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _is_done(self, path: Path) -> bool:
        known = self._recordings.get(self._name(path))
        return known is not None and known.done and self._same(known, path)

    def _same(self, known: _Recording, path: Path) -> bool:
        return known.files == _files(path) and known.rate_hz == self.rate_hz

    def _gone(self) -> list[str]:
        return [name for name in self._recordings if not (self.folder / name).exists()]

    def _load(self) -> None:
        """Unless it is known as it is now."""
        file = self.path / RECORDINGS
        written_ns = file.stat().st_mtime_ns if file.exists() else -1
        if written_ns == self._loaded_ns:
            return
        self._loaded_ns, self._recordings, self._table = written_ns, {}, None
        if written_ns == -1:  # somebody removed it
            return
        with self._named():
            self._recordings = {name: _Recording(**known) for name, known in json.loads(file.read_bytes()).items()}
            db = self._connect(self.path)
            self._table = db.open_table(FRAMES) if FRAMES in db.list_tables().tables else None

    def _save(self) -> None:
        file = self.path / RECORDINGS
        new = file.with_suffix(".new")
        new.write_text(json.dumps({name: asdict(known) for name, known in self._recordings.items()}, indent=1))
        os.replace(new, file)
        self._loaded_ns = file.stat().st_mtime_ns

    def _forget(self, names: Sequence[str]) -> None:
        """First the rows, and then the id by which they are known."""
        ids = [self._recordings[name].id for name in names]
        if ids and self._table is not None:
            with self._named():
                self._table.delete(f"recording IN ({', '.join(map(str, ids))})")
        for name in names:
            del self._recordings[name]
        if ids:
            self._save()

    # ---- reading recordings

    def _read(self, paths: Sequence[Path], watch: Watch) -> None:
        """Rows are written many at a time, of several recordings. These are noted before their rows, and as done after:
        however it ends, the rows that are there say how far it came."""
        rows: list[tuple[Any, ...]] = []
        finished: list[_Recording] = []

        def flush() -> None:
            self._save()
            self._add(rows)
            for recording in finished:
                recording.done = True
            self._save()
            rows.clear()
            finished.clear()

        try:
            for path in paths:
                known = self._recordings.get(self._name(path))
                if known and not self._same(known, path):
                    self._forget([self._name(path)])
                    known = None
                if known is None:
                    known = _Recording(self._new_id(), _files(path), self.rate_hz)
                    self._recordings[self._name(path)] = known
                for row in self._frames(path, known, watch):
                    rows.append(row)
                    if len(rows) >= FLUSH_FRAMES:
                        flush()
                finished.append(known)
        finally:  # also what was seen before Ctrl-C
            flush()

    def _new_id(self) -> int:
        used = [known.id for known in self._recordings.values()]
        return 1 + max(used, default=0)

    def _frames(self, path: Path, known: _Recording, watch: Watch) -> Iterator[tuple[Any, ...]]:
        """The rows of a recording that are not there yet. What is wrong with it is noted in `known`."""
        known.trouble = ""
        try:
            cameras = _cameras(path)
        except RecordingError as error:
            known.trouble = str(error)
            return
        if not cameras:
            known.trouble = f"{path}: has no images"
            return
        there = self._there(known.id)
        slot: dict[str, int] = {}
        begin_ns, refused = None, list[str]()
        period_ns = round(NS / self.rate_hz)
        specs = [replace(self.language.stream, name=stream) for stream in cameras]
        topics = {stream: topic for stream, (topic, _) in cameras.items()}
        records = (r for r in read(path, specs, topics) if isinstance(r, (Sample, SampleError)))
        try:
            for record in watch(records, path.name, sum(n for _, n in cameras.values())):
                if isinstance(record, SampleError):
                    refused.append(str(record))
                    continue
                begin_ns = record.stamp_ns if begin_ns is None else begin_ns
                if slot.get(record.stream) == record.stamp_ns // period_ns:
                    continue
                slot[record.stream] = record.stamp_ns // period_ns
                if (record.stream, record.stamp_ns) in there:
                    continue
                try:
                    self.language.look(record.data)
                    seen = self.language.seen()
                except (SampleError, EngineError) as error:
                    refused.append(str(error))
                    continue
                at_s = (record.stamp_ns - begin_ns) / NS
                yield known.id, record.stream, record.stamp_ns, record.arrival_ns, at_s, seen
        except RecordingError as error:
            known.trouble = str(error)
        if refused and not known.trouble:
            known.trouble = f"{path}: {len(refused)} frames cannot be read: {refused[0]}"

    def _there(self, id: int) -> set[tuple[str, int]]:
        """Stream and stamp of each row of a recording."""
        if self._table is None:
            return set()
        with self._named():
            columns = ["stream", "stamp_ns"]
            rows = self._table.search().where(f"recording = {id}").select(columns).limit(None).to_list()
        return {(row["stream"], row["stamp_ns"]) for row in rows}

    # ---- LanceDB

    def _add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        if not rows:
            return
        import pyarrow as pa

        *columns, vectors = zip(*rows)
        vector = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors)), len(vectors[0]))
        types = {
            "recording": pa.int64(), "stream": pa.string(), "stamp_ns": pa.int64(), "arrival_ns": pa.int64(),
            "at_s": pa.float64(),
        }  # fmt: skip
        arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values())]
        table = pa.table([*arrays, vector], [*types, "vector"])
        with self._named():
            if self._table is None:
                self._table = self._connect(self.path).create_table(FRAMES, table)
            else:
                self._table.add(table)

    def _tidy(self) -> None:
        """Few large files of many small ones, all rows in the index, and nothing of what was before."""
        if self._table is None:
            return
        with self._named():
            if self._table.count_rows() >= INDEXED_ROWS and not self._table.list_indices():
                from lancedb.index import IvfFlat

                self._table.optimize()
                self._table.create_index("vector", config=IvfFlat(distance_type="dot"))
            self._table.optimize(cleanup_older_than=np.timedelta64(1, "s").item())
        self._save()  # so that others open it anew: the files that they know are gone

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EdgeError(f"{self.path}: another process reads recordings into it; wait for its end") from None
            yield

    @contextmanager
    def _named(self) -> Iterator[None]:
        with named(self.path, "cannot be read or written (if it is removed, it is made anew)"):
            yield


def _near(a: Moment, b: Moment, apart_s: float) -> bool:
    return (a.recording, a.stream) == (b.recording, b.stream) and abs(a.stamp_ns - b.stamp_ns) < apart_s * NS


def _files(path: Path) -> list[list[Any]]:
    """What tells a recording from what it was before."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _cameras(path: Path) -> dict[str, tuple[str, int]]:
    """Stream -> its topic and number of messages. A topic that is no stream is one by its own name."""
    with reading(path):  # another's metadata may hold anything
        told = {topic: stream for stream, topic in (read_metadata(path).get("streams") or {}).items()}
    return {
        told.get(topic, topic): (topic, count)
        for topic, (kind, count, _) in sorted(first_messages(path).items())
        if kind in IMAGES and count
    }


def frame(moment: Moment, language: Language) -> np.ndarray:
    """What was seen in a moment, uint8 (h, w, 3) RGB. Raises RecordingError if it is not there any more."""
    topic = _cameras(Path(moment.recording)).get(moment.stream, ("",))[0]
    spec = replace(language.stream, name=moment.stream)
    if topic:
        for record in read(moment.recording, [spec], {moment.stream: topic}, log_time_ns=moment.arrival_ns):
            if isinstance(record, Sample) and record.stamp_ns == moment.stamp_ns:
                return record.data
    raise RecordingError(f"{moment.recording}: has no frame of {moment.stream} stamped {moment.stamp_ns} ns any more")


def picture(path: str | Path) -> np.ndarray:
    """A picture's file, uint8 (h, w, 3) RGB. Raises EdgeError if it is none, OSError if it cannot be read."""
    cv2, data = _cv2(), Path(path).read_bytes()
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), 1)
    except cv2.error:  # nothing at all, or more pixels than it takes
        bgr = None
    if bgr is None:
        raise EdgeError(f"{path}: expected a picture, got something else")
    return np.ascontiguousarray(bgr[..., ::-1])


def write_sheet(path: str | Path, moments: Sequence[Moment], language: Language, title: str) -> None:
    """A picture of moments: the frame of each, its score, time and recording. Raises RecordingError if one of them is
    not there any more, EdgeError for a file that is none of a picture."""
    pictures = [
        (
            frame(m, language),
            f"{m.score:.3f}   {clock(m.at_s)}",
            f"{'/'.join(Path(m.recording).parts[-2:])}  {m.stream}",
        )
        for m in moments
    ]
    sheet = draw_sheet(pictures, title)
    cv2 = _cv2()
    try:
        _, data = cv2.imencode(Path(path).suffix, np.ascontiguousarray(sheet[..., ::-1]))
    except cv2.error:
        raise EdgeError(f"{path}: expected a picture's name: .jpg or .png") from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.tobytes())


def clock(seconds: float) -> str:
    """h:mm:ss.s, or m:ss.s."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    s = f"{tenths // 10:02}.{tenths % 10}"
    return f"{minutes // 60}:{minutes % 60:02}:{s}" if minutes >= 60 else f"{minutes}:{s}"


def _cv2() -> Any:
    with needs("pictures", "cv2", "camera"):
        import cv2
    return cv2
