"""Datasets in the LeRobotDataset v3 layout <-> recordings.

    python -m training.lerobot from DATASET OUT                          # an episode a recording: OUT/0, OUT/1, ...
    python -m training.lerobot to FOLDER OUT [--label TOPIC] [--fps N]   # a dataset of all recordings in FOLDER

    feature                      topic                        message
    observation.images.front     /observation/images/front    Image
    observation.state            /observation/state           JointState; so with every vector of observations; joints
                                                              are called elbow, or elbow.position, elbow.velocity, ...
    action                       /cmd_vel                     TwistStamped, if its names are those of a twist
                                 /action                      else JointTrajectory, with the names as joints
    task                         /command_text                String

A dataset has no clock and no missing samples: each frame lies at frame_index / fps, with all its observations. On the
way there a frame is what was newest at that instant and the first command after it; where a sensor is stale or nobody
commands, an episode ends, and another begins after it. Vectors and IMUs on other topics become parts of
observation.state; sound, scans and points have no place in the layout. Numbers stay what they are, float32; pictures
are as good as H.264 keeps them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.align import Aligner
from mm_edge.cli import at_least
from mm_edge.errors import EdgeError, RecordingError, needs
from mm_edge.messages import DRIVEN, TWIST, positions_to_ros
from mm_edge.recording import RecordingWriter, empty_message, named, read, read_metadata, typestore
from mm_edge.types import NS, Action, Sample, StreamSpec
from training.recordings import (
    TRAJECTORY,
    Label,
    Recording,
    alike,
    commands_after,
    commands_of,
    find,
    good,
    label_of,
    streams_of,
    tick_of,
)  # fmt: skip

T0_NS = 1_000_000_000 * NS  # when an episode without a clock begins
FILES = 1000  # in a folder
HELD = ("image", "imu", "vector", "text")  # kinds of streams for which the layout has a place
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
JOINT_FIELDS = ("position", "velocity", "effort")
VELOCITY = ".velocity"  # ends the names of an action's dimensions that are speeds of joints
COLUMNS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
H264 = {"crf": "18", "g": "2", "bf": "0"}  # a key frame every other: training jumps about in the file
PIXELS, FRAMES = 16, 10  # statistics of pictures are of every 16th pixel each way, of every 10th frame


def from_lerobot(dataset: Path, out: Path) -> list[Path]:
    """Write each episode of a dataset as a recording in the folder `out`; returns their paths.

    Raises RecordingError if it is no dataset of version 3, is damaged, or a recording exists already.
    """
    with named(dataset, "is no dataset in the LeRobotDataset v3 layout"):
        source = _Dataset(dataset)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for episode in tqdm(source.episodes, "episodes", disable=not sys.stderr.isatty()):
        paths.append(out / str(episode["episode_index"]))
        with named(dataset, f"episode {episode['episode_index']} cannot be converted"):
            _write_recording(source, episode, paths[-1])
    return paths


class _Dataset:
    """`streams`: feature -> stream. `episodes`: rows of meta/episodes, in order."""

    def __init__(self, path: Path):
        self.path, self.info = path, json.loads((path / "meta" / "info.json").read_text())
        if not str(version := self.info["codebase_version"]).startswith("v3"):
            raise RecordingError(f"{path}: expected version v3.x, got {version}; LeRobot has a script that converts it")
        self.features, self.fps = self.info["features"], self.info["fps"]
        self.streams = {
            key: StreamSpec(
                _stream(key), kind, tuple(feature["shape"]), self.fps, 4e3 / self.fps, joints=_joints(kind, feature)
            )
            for key, feature in self.features.items()
            if (kind := _kind_of(key, feature))
        }
        rows = _pq().read_table(path / "meta" / "tasks.parquet").to_pylist()
        self.tasks = {row["task_index"]: next(v for v in row.values() if isinstance(v, str)) for row in rows}
        files = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
        every = [row for file in files for row in _pq().read_table(file).to_pylist()]
        if not (episodes := sorted(every, key=lambda row: row["episode_index"])):
            raise RecordingError(f"{path}: expected episodes in meta/episodes, got none")
        self.episodes = episodes
        names = _names(self.features["action"])
        self.twist = set(DRIVEN) <= set(names) <= set(TWIST)
        self.action_names = tuple(names)
        self.left_out = sorted(self.features.keys() - self.streams.keys() - COLUMNS.keys() - {"action"})

    def rows(self, episode: dict[str, Any]) -> list[dict[str, Any]]:
        where = {k: episode[f"data/{k}"] for k in ("chunk_index", "file_index")}
        file = self.path / self.info["data_path"].format(**where)
        table = _pq().read_table(file, filters=[("episode_index", "=", episode["episode_index"])])
        rows = table.sort_by("frame_index").to_pylist()
        if len(rows) != episode["length"]:
            raise RecordingError(f"{file}: expected {episode['length']} frames of the episode, got {len(rows)}")
        return rows

    def pictures(self, key: str, episode: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[np.ndarray]:
        if self.features[key]["dtype"] == "image":
            return (_decoded(row[key]["bytes"], self.path / (row[key]["path"] or "")) for row in rows)
        where = {k: episode[f"videos/{key}/{k}"] for k in ("chunk_index", "file_index")}
        file = self.path / self.info["video_path"].format(video_key=key, **where)
        return _film(file, episode[f"videos/{key}/from_timestamp"], self.fps, len(rows))


def _kind_of(key: str, feature: dict[str, Any]) -> str:
    """Of the stream that a feature becomes; empty if it becomes none: depth, rewards."""
    if feature["dtype"] in ("video", "image"):
        return "image" if 3 in feature["shape"] else ""
    is_vector = feature["dtype"].startswith("float") and len(feature["shape"]) == 1
    return "vector" if is_vector and key.startswith("observation.") else ""


def _stream(key: str) -> str:
    return key.removeprefix("observation.").removeprefix("images.").replace(".", "_")


def _names(feature: dict[str, Any]) -> list[str]:
    """A name for each dimension; numbers where there are none."""
    return _given_names(feature) or list(map(str, range(feature["shape"][0])))


def _given_names(feature: dict[str, Any]) -> list[str]:
    """A name for each dimension: a list, a dict that holds one, or none at all."""
    names = feature.get("names")
    names = next(iter(names.values()), None) if isinstance(names, dict) else names
    return list(map(str, names)) if isinstance(names, list) and len(names) == feature["shape"][0] else []


def _joints(kind: str, feature: dict[str, Any]) -> tuple[str, ...]:
    names = _given_names(feature) if kind == "vector" else []
    for fields in (JOINT_FIELDS, JOINT_FIELDS[:2]):
        joints = [name.removesuffix(".position") for name in names[: len(names) // len(fields)]]
        if joints and names == _of_joints(joints, fields):
            return tuple(joints)
    return tuple(names) if len(set(names)) == len(names) and all(names) else ()


def _of_joints(joints: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Names of what a JointState tells, in its order; of positions alone the joints'."""
    return list(joints) if len(fields) == 1 else [f"{joint}.{field}" for field in fields for joint in joints]


def _write_recording(source: _Dataset, episode: dict[str, Any], path: Path) -> None:
    rows = source.rows(episode)
    text = StreamSpec("text", "text", (12,), 0.0, 0.0, latched=True)
    topics = {spec.name: key.replace(".", "/") for key, spec in source.streams.items()} | {"text": "command_text"}
    names = {spec.name: _names(source.features[k]) for k, spec in source.streams.items() if spec.kind == "vector"}
    meta = {"robot": source.info.get("robot_type"), "lerobot": {"fps": source.fps, "names": names}}
    films = {k: source.pictures(k, episode, rows) for k, spec in source.streams.items() if spec.kind == "image"}
    store, task = typestore(), None
    with RecordingWriter(path, [*source.streams.values(), text], topics, meta) as recording:
        if not source.twist:
            recording.add_topic("action", TRAJECTORY, store)
        for row in rows:
            at_ns = T0_NS + round(row["frame_index"] * NS / source.fps)
            if row["task_index"] != task:
                task = row["task_index"]
                if preprocess.words_of(source.tasks[task]):  # an episode may have none
                    recording.write(Sample("text", at_ns, at_ns, source.tasks[task]))
            for key, spec in source.streams.items():
                data = next(films[key]) if key in films else np.atleast_1d(np.float32(row[key]))
                recording.write(Sample(spec.name, at_ns, at_ns, data))
            action = np.atleast_1d(np.float32(row["action"]))
            if source.twist:
                recording.command("cmd_vel", Action(source.action_names, action[None], 0.0), at_ns, at_ns)
            else:
                recording.message("action", _trajectory(store, source.action_names, action), at_ns)


def _trajectory(store: Any, names: Sequence[str], values: np.ndarray) -> bytes:
    """Of positions, or of speeds if the names say so."""
    msg = empty_message(store, TRAJECTORY)
    point = empty_message(store, "trajectory_msgs/msg/JointTrajectoryPoint")
    by_speed = all(name.endswith(VELOCITY) for name in names)
    joints = [name.removesuffix(VELOCITY) for name in names] if by_speed else names
    positions_to_ros(msg, point, 0, joints, values, 0.0)
    if by_speed:
        point.positions, point.velocities = point.velocities, point.positions
    return bytes(store.serialize_cdr(msg, TRAJECTORY))


def _decoded(picture: bytes | None, file: Path) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(picture or file.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _film(file: Path, from_s: float, fps: float, n: int) -> Iterator[np.ndarray]:
    """The n frames of a video from `from_s` on. Raises RecordingError if one is missing."""
    want = 0
    with _av().open(str(file)) as container:
        stream = container.streams.video[0]
        container.seek(round(max(0.0, from_s - 0.5 / fps) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            at = round((frame.time - from_s) * fps)
            if at < want:
                continue
            if at > want:
                break
            yield frame.to_ndarray(format="rgb24")
            want += 1
            if want == n:
                return
    raise RecordingError(f"{file}: expected {n} frames from {from_s:.3f} s on, got {want}")


# To a dataset ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """What becomes of the streams. Features of vectors are made of the streams that they list, one after another."""

    fps: int
    label: Label
    streams: tuple[StreamSpec, ...]
    cameras: dict[str, tuple[str, tuple[int, int]]]  # feature -> stream, (height, width)
    vectors: dict[str, list[str]]  # feature -> streams
    names: dict[str, list[str]]  # feature -> names of its dimensions, of the action, too

    @property
    def features(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, names in self.names.items():
            found[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
        for key, (_, (height, width)) in self.cameras.items():
            info = {
                "video.height": height, "video.width": width, "video.codec": "h264", "video.fps": self.fps,
                "video.pix_fmt": _pix_fmt(height, width), "video.is_depth_map": False, "video.channels": 3,
                "has_audio": False,
            }  # fmt: skip
            shape = {"shape": [height, width, 3], "names": ["height", "width", "channels"]}
            found[key] = {"dtype": "video", **shape, "info": info}
        return found | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in COLUMNS.items()}


def to_lerobot(recordings: Sequence[Recording], out: Path, label_topic: str = "", fps: int | None = None) -> int:
    """Write the dataset `out`; returns the number of its episodes. `fps`: by default the rate of the anchor, rounded.
    Says on stderr which recordings gave no episode.

    Raises RecordingError if `out` exists, a recording cannot be read, or there is nothing to write.
    """
    if out.exists():
        raise RecordingError(f"{out}: exists already; datasets are never overwritten")
    if errors := [recording.error for recording in recordings if recording.error]:
        raise RecordingError("; ".join(errors))
    layout = _layout(recordings, label_topic, fps)
    part = out.with_name(f"{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    writer = _Writer(part, layout)
    for recording in tqdm(recordings, "recordings", disable=not sys.stderr.isatty()):
        before = len(writer.episodes)
        for has_all, frames in groupby(_frames(recording, layout), lambda frame: frame is not None):
            if has_all:
                writer.episode(frames)
        if len(writer.episodes) == before:
            tqdm.write(f"{recording.path}: gives no frame: {_lacks(recording, layout)}", file=sys.stderr)
    if not writer.episodes:
        raise RecordingError(f"{out}: expected instants with all of {[s.name for s in layout.streams]} and a command")
    writer.finish(next((str(r) for r in map(_robot, recordings) if r), None))
    part.rename(out)
    return len(writer.episodes)


def _robot(recording: Recording) -> Any:
    return read_metadata(recording.path).get("robot")


def _lacks(recording: Recording, layout: _Layout) -> str:
    held = {name for name, topic in recording.topics.items() if len(topic.arrival_ns)}
    lacks = [spec.name for spec in layout.streams if spec.kind != "text" and spec.name not in held]
    lacks += [] if len(commands_of(recording, layout.label)[0]) else [f"commands of {list(layout.label.names)}"]
    return f"has no {', '.join(lacks)}" if lacks else "its streams and a command were never good at the same time"


def _layout(recordings: Sequence[Recording], label_topic: str, fps: int | None) -> _Layout:
    streams = streams_of(recordings)
    label = label_of(recordings, label_topic)
    vectors: dict[str, list[str]] = {}
    cameras, names = {}, {}
    for spec in streams:
        having = [r for r in recordings if spec.name in r.topics and len(r.topics[spec.name].arrival_ns)]
        topic = alike([r.topics[spec.name] for r in having])[0]
        recording = next(r for r in having if r.topics[spec.name] is topic)
        key = topic.topic[1:].replace("/", ".") if topic.topic.startswith("/observation/") else ""
        if spec.kind == "image":
            cameras[key or f"observation.images.{spec.name}"] = spec.name, tuple(map(int, topic.values[0]))
        elif spec.kind in ("imu", "vector"):
            vectors.setdefault(key := key or "observation.state", []).append(spec.name)
            size = topic.values.shape[1]
            said = read_metadata(recording.path).get("lerobot", {}).get("names", {}).get(spec.name)
            known = _of_joints(spec.joints, topic.gives.split(", ")) if spec.joints else said
            names.setdefault(key, []).extend(known or [f"{spec.name}_{i}" for i in range(size)])
    used = tuple(spec for spec in streams if spec.kind in HELD)
    fps = fps or max(1, round(1e3 / tick_of(used, math.inf).period_ms))
    by_speed = label.interface == "velocity" and not set(label.names) <= set(TWIST)
    actions = [f"{name}{VELOCITY}" if by_speed else name for name in label.names]
    return _Layout(fps, label, used, cameras, vectors, {**names, "action": actions})


def _frames(recording: Recording, layout: _Layout) -> Iterator[dict[str, Any] | None]:
    """What a robot would see `fps` times a second, the newest of each stream, and "action"; None where something is not
    known."""
    specs = {spec.name: spec for spec in layout.streams if spec.name in recording.topics}
    sensors = [spec for spec in layout.streams if spec.kind != "text"]
    if not specs:
        return
    command_after = commands_after(recording, layout.label)
    aligner, seen = Aligner(specs.values(), 1 / layout.fps), set[str]()
    start_ns, count = 0, 0

    def until(end_ns: int) -> Iterator[dict[str, Any] | None]:
        """The instants before `end_ns`."""
        nonlocal count
        while start_ns and (now_ns := start_ns + round(count * NS / layout.fps)) < end_ns:
            count += 1
            action, views = command_after(now_ns), aligner.window(now_ns).views
            whole = action is not None and all(views[spec.name].present for spec in sensors)
            held = {name: view.data for name, view in views.items() if view.data is not None}
            newest = {name: data[-1] if specs[name].kind == "imu" else data for name, data in held.items()}
            yield {**newest, "action": action} if whole else None

    records = read(recording.path, specs.values(), {name: recording.topics[name].topic for name in specs})
    for record in good(records, recording, specs.values()):
        if not isinstance(record, Sample):
            continue
        yield from until(record.arrival_ns)
        aligner.push(record)
        seen.add(record.stream)
        if not start_ns and seen.issuperset(spec.name for spec in sensors):
            start_ns = record.arrival_ns
    yield from until(recording.end_ns + 1)


class _Writer:
    def __init__(self, path: Path, layout: _Layout):
        self._path, self._layout = path, layout
        self._text = next((spec.name for spec in layout.streams if spec.kind == "text"), "")
        self._tasks: dict[str, int] = {}
        self._all: list[dict[str, np.ndarray]] = []  # of each episode: features and pixels, for the statistics
        self._frames = 0
        self.episodes: list[dict[str, Any]] = []

    def episode(self, frames: Iterable[dict[str, Any]]) -> None:
        layout, index = self._layout, len(self.episodes)
        where = {"chunk_index": index // FILES, "file_index": index % FILES}
        columns: dict[str, list[Any]] = {key: [] for key in (*layout.names, "task_index")}
        pixels: dict[str, list[np.ndarray]] = {key: [] for key in layout.cameras}
        films = {key: _Film(self._path / VIDEO.format(video_key=key, **where), layout, key) for key in layout.cameras}
        for i, frame in enumerate(frames):
            for key, film in films.items():
                picture = film.write(frame[layout.cameras[key][0]])
                if i % FRAMES == 0:
                    pixels[key].append(picture[::PIXELS, ::PIXELS].reshape(-1, 3))
            for key, streams in layout.vectors.items():
                columns[key].append(np.concatenate([frame[name] for name in streams]))
            columns["action"].append(frame["action"])
            columns["task_index"].append(self._tasks.setdefault(frame.get(self._text, ""), len(self._tasks)))
        for film in films.values():
            film.close()
        n = len(columns["action"])
        counted = np.arange(n)
        data = {key: np.array(columns[key], np.float32) for key in layout.names} | {
            "timestamp": np.float32(counted / layout.fps), "frame_index": counted,
            "episode_index": np.full(n, index), "index": self._frames + counted,
            "task_index": np.array(columns["task_index"]),
        }  # fmt: skip
        file = self._path / DATA.format(**where)
        file.parent.mkdir(parents=True, exist_ok=True)
        _pq().write_table(_table(data, layout), file)
        tasks = {number: text for text, number in self._tasks.items()}
        row = {"episode_index": index, "tasks": [tasks[k] for k in sorted({*columns["task_index"]})], "length": n}
        row |= {f"data/{k}": v for k, v in where.items()}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + n}
        for key in layout.cameras:
            row |= {f"videos/{key}/{k}": v for k, v in where.items()}
            row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": n / layout.fps}
        self._all.append({**data, **{key: np.concatenate(found) for key, found in pixels.items()}})
        stats = self._stats(self._all[-1:]).items()
        row |= {f"stats/{key}/{name}": value for key, found in stats for name, value in found.items()}
        self.episodes.append({**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._frames += n

    def _stats(self, episodes: Sequence[dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
        """Of each feature over the frames of `episodes`; of pictures, a number a channel in [0, 1]."""
        stats: dict[str, dict[str, Any]] = {}
        for key in episodes[0]:
            values = np.concatenate([episode[key] for episode in episodes]).astype(np.float64)
            picture = key in self._layout.cameras
            shape = (3, 1, 1) if picture else (values[0].size,)
            values = values.reshape(len(values), -1) / (255 if picture else 1)
            found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
            found |= {f"q{q:02d}": np.percentile(values, q, axis=0) for q in (1, 10, 50, 90, 99)}
            frames = sum(len(episode["index"]) for episode in episodes)
            stats[key] = {k: v.reshape(shape).tolist() for k, v in found.items()} | {"count": [frames]}
        return stats

    def finish(self, robot: str | None) -> None:
        import pyarrow as pa

        meta = self._path / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        episodes = pa.Table.from_pylist(self.episodes)
        _pq().write_table(episodes, meta / "episodes" / "chunk-000" / "file-000.parquet")
        _pq().write_table(_tasks(list(self._tasks)), meta / "tasks.parquet")
        (meta / "stats.json").write_text(json.dumps(self._stats(self._all), indent=4))
        info = {
            "codebase_version": "v3.0", "robot_type": robot, "total_episodes": len(self.episodes),
            "total_frames": self._frames, "total_tasks": len(self._tasks), "chunks_size": FILES,
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": self._layout.fps,
            "splits": {"train": f"0:{len(self.episodes)}"}, "data_path": DATA,
            "video_path": VIDEO if self._layout.cameras else None, "features": self._layout.features,
        }  # fmt: skip
        (meta / "info.json").write_text(json.dumps(info, indent=4))


class _Film:
    """One episode of one camera as a video."""

    def __init__(self, path: Path, layout: _Layout, key: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._size = height, width = layout.cameras[key][1]
        self._container = _av().open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=layout.fps, options=H264)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, _pix_fmt(height, width)

    def write(self, image: np.ndarray) -> np.ndarray:
        """The picture in the size of the film."""
        image = np.ascontiguousarray(preprocess.resize(image, *self._size))
        self._container.mux(self._stream.encode(_av().VideoFrame.from_ndarray(image, format="rgb24")))
        return image

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


def _pix_fmt(height: int, width: int) -> str:
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


def _table(data: dict[str, np.ndarray], layout: _Layout) -> Any:
    """A dimension of one is a number, more are a list of fixed length."""
    import pyarrow as pa

    columns = {}
    for key, values in data.items():
        kind = pa.from_numpy_dtype(COLUMNS.get(key, "float32"))
        if values.ndim == 1 or values.shape[1] == 1:
            columns[key] = pa.array(values.reshape(-1), kind)
        else:
            columns[key] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), values.shape[1])
    return pa.table(columns)


def _tasks(texts: list[str]) -> Any:
    """With the note by which pandas takes the texts for the index, as LeRobot looks them up."""
    import pyarrow as pa

    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}
        for name, (kind, numpy_type) in kinds.items()
    ]
    note = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(range(len(texts)), pa.int64()), "task": pa.array(texts, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


def _pq() -> Any:
    with needs("reading and writing datasets", "pyarrow", "lerobot"):
        import pyarrow.parquet
    return pyarrow.parquet


def _av() -> Any:
    with needs("the videos of datasets", "av", "lerobot"):
        import av
    return av


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of = commands.add_parser("from", help="a dataset to recordings")
    to = commands.add_parser("to", help="recordings to a dataset")
    of.add_argument("source", type=Path, metavar="DATASET")
    to.add_argument("source", type=Path, metavar="FOLDER", help="of recordings")
    to.add_argument("--label", default="", metavar="TOPIC", help="the commands (default: cmd_vel, or joints)")
    to.add_argument("--fps", type=at_least(1), help="frames a second (default: as the first camera)")
    for command in (of, to):
        command.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    try:
        if args.command == "from":
            done = f"{len(from_lerobot(args.source, args.out))} recordings"
            left_out = _Dataset(args.source).left_out
        else:
            done = f"{to_lerobot(recordings := find(args.source), args.out, args.label, args.fps)} episodes"
            sensors = {name for r in recordings for name, topic in r.topics.items() if topic.kind != "command"}
            left_out = sorted(sensors - {spec.name for spec in streams_of(recordings) if spec.kind in HELD})
        print(f"{args.out}: {done}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    except (EdgeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
