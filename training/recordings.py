"""A folder of a robot's own recordings (ROS 2 bags, MCAP, ROS 1 bags): what they hold, whether it can be learned from,
and the tables to learn from.

    recordings = find("my_robot")                       # each is read once
    streams, label = streams_of(recordings), label_of(recordings)
    for recording in check(recordings, streams, label).usable(recordings):      # check.py
        tables = tables_of(recording, streams, label, tick_of(streams), Vocabulary(words_of(recordings)))

Streams are proposed from the types of topics and from what was measured. What a tick is labelled with is the first
command at or after it, never the one before: a model that sees what the robot did last learns to go on with it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low, mode
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_edge import preprocess
from mm_edge.align import same
from mm_edge.errors import RecordingError, SampleError
from mm_edge.manifest import Tick
from mm_edge.messages import DRIVEN, TWIST
from mm_edge.preprocess import AUDIO_FRAME, AUDIO_HOP_S, Vocabulary
from mm_edge.recording import (
    STRING,
    TWIST_STAMPED,
    first_messages,
    read,
    read_metadata,
    reading,
    stream_name,
    typestore,
)
from mm_edge.recording import TWIST as TWIST_TYPE
from mm_edge.replay import events
from mm_edge.types import KINDS, NS, Sample, StreamSpec
from training.tables import Tables, build_tables

TRAJECTORY, JOINTS = "trajectory_msgs/msg/JointTrajectory", "sensor_msgs/msg/JointState"
SENSORS = {  # message type -> kind of stream
    "sensor_msgs/msg/Image": "image", "sensor_msgs/msg/CompressedImage": "image", "sensor_msgs/msg/LaserScan": "scan",
    "sensor_msgs/msg/PointCloud2": "points", "sensor_msgs/msg/Imu": "imu", "nav_msgs/msg/Odometry": "vector",
    JOINTS: "vector", "sensor_msgs/msg/NavSatFix": "vector", STRING: "text",
}  # fmt: skip
MOST_TICK_MS = 120.0
INSTRUCTION = re.compile("text|instruction|prompt|task|language")  # in the name of a String that tells what to do
IMAGE, BEAMS, POINTS, BANDS, HOPS, TOKENS = (96, 128, 3), 120, 256, 24, 7, 12
STILL = 0.05  # a command below that share of the greatest is none
UNLABELLED_S = 1.0  # without a command for longer, nobody knows what was wanted


@dataclass
class Topic:
    """What a recording holds of one topic: n messages that are good, and why the others are not.

    `values` (n, ...): of commands, imu and vector float32 (n, dims); of scan and points (n, 1), the metres it sees;
    of audio (n, 2), sample rate and channels; of image (n, 2), height and width; of text str.
    """

    topic: str
    type_name: str
    kind: str  # of the stream; "command"
    names: tuple[str, ...] = ()  # of a command's dimensions, or of the joints
    gives: str = ""  # what messages about joints tell of them: "positions", or "position, velocity"
    points: int = 1  # of the longest trajectory, the first of which is the command
    arrival_ns: Any = field(default_factory=list)  # int64 (n,)
    stamp_ns: Any = field(default_factory=list)  # int64 (n,)
    repeats: Any = field(default_factory=list)  # bool (n,): the same data, bit for bit, as the one before
    values: Any = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)  # when (ns, log time) and why

    @property
    def rate_hz(self) -> float:
        """By the median of the time between two stamps, which no pause and no burst changes; 0 if unknown."""
        steps = np.diff(np.sort(self.stamp_ns))
        return round(NS / float(np.median(steps[steps > 0])), 2) if (steps > 0).any() else 0.0

    @property
    def latency_s(self) -> np.ndarray:
        return (self.arrival_ns - self.stamp_ns) / NS

    @property
    def form(self) -> str:
        """What must be the same in all recordings, in words. Joints may come in any order."""
        if self.kind == "command":
            return self.gives
        if self.kind == "audio":
            return "{:.0f} Hz, {:.0f} channels".format(*self.values[0])
        if self.kind == "vector":
            return f"{self.values.shape[1]} numbers" + (
                f" ({self.gives} of {sorted(self.names)})" if self.gives else ""
            )
        return self.kind


@dataclass
class Recording:
    """`topics` by the name of the stream, or of commands by their topic without its slash ("cmd_vel")."""

    path: Path
    topics: dict[str, Topic] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # topics of other types
    error: str = ""  # why it cannot be read
    start_ns: int = 0  # the first and the last message that a sensor sent
    end_ns: int = 0


@dataclass(frozen=True)
class Label:
    """The commands to be learned. The limits hold all that was measured, and of velocities 0."""

    topic: str  # key of Recording.topics
    names: tuple[str, ...]
    units: tuple[str, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    max_rate: tuple[float, ...]  # units per second
    interface: str = "velocity"  # or "position", as in the manifest


def find(folder: str | Path) -> list[Recording]:
    """All recordings in a folder, or in a file, read from begin to end. One that cannot be read says why in `error`.

    Raises RecordingError if there are none, MissingDependency without rosbags.
    """
    folder = Path(folder)
    there = list(_files(folder))
    bags = {path.parent for path in there if path.name == "metadata.yaml"}
    files = {p for p in there if p.suffix in (".mcap", ".db3", ".bag") and p.parent not in bags}
    if not (paths := [folder] if folder.is_file() else sorted(bags | files)):
        is_dataset = (folder / "meta" / "info.json").is_file()
        got = f"a LeRobotDataset: python -m training.lerobot from {folder} OUT" if is_dataset else "none"
        raise RecordingError(f"{folder}: expected recordings (folders with a metadata.yaml, .mcap, .bag), got {got}")
    return [survey(path) for path in tqdm(paths, "read", disable=not sys.stderr.isatty())]


def _files(folder: Path) -> Iterator[Path]:
    """All in it, links followed, each folder once: by its own name if that is in it, too."""
    seen, begins = set(), [folder]
    for begin in begins:  # links to folders last
        for here, folders, names in os.walk(begin):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            begins += sorted(path for name in folders if (path := Path(here, name)).is_symlink())
            yield from (Path(here, name) for name in names)


def survey(path: Path) -> Recording:
    """One of them."""
    recording = Recording(path)
    if cut := [parent for parent in (path, *path.parents) if parent.suffix == ".partial"]:
        recording.error = f"{path}: was cut short; `mm-edge record {cut[0].with_suffix('')}` repairs it"
        return recording
    try:
        found = first_messages(path)
        streams = {"/" + topic.lstrip("/"): name for name, topic in read_metadata(path).get("streams", {}).items()}
        by_topic = {}
        for topic, (type_name, count, first) in found.items():
            if count and (kind := _kind(topic, type_name, first, streams, found)):
                by_topic[topic] = Topic(topic, type_name, kind, TWIST if "Twist" in type_name else ())
                name = topic[1:] if kind == "command" else streams.get(topic) or stream_name(topic)
                if name in recording.topics:
                    both = f"{recording.topics[name].topic} and {topic}"
                    raise RecordingError(f"{path}: expected topics whose names differ by more than a sign, got {both}")
                recording.topics[name] = by_topic[topic]
        recording.unused = tuple(t for t in sorted(found.keys() - by_topic.keys()) if not t.startswith("/mm_edge/"))
        _fill(path, by_topic)
    except RecordingError as error:
        return Recording(path, error=str(error))
    times = [t.arrival_ns for t in recording.topics.values() if t.kind not in ("command", "text") and len(t.arrival_ns)]
    if times:
        recording.start_ns, recording.end_ns = min(int(t[0]) for t in times), max(int(t[-1]) for t in times)
    return recording


def _kind(topic: str, type_name: str, first: Any, streams: dict[str, str], found: dict[str, Any]) -> str:
    """Empty if it is of no use: another type, the compressed twin of a picture, a text that tells nothing to do."""
    if type_name in (TWIST_TYPE, TWIST_STAMPED, TRAJECTORY):
        return "command"
    kind = SENSORS.get(type_name, "")
    if kind == "points" and any(f.name == "sample_rate_hz" for f in getattr(first, "fields", ())):
        return "audio"
    parent, _, last = topic.rpartition("/")
    raw_type, raw_count, _ = found.get(parent, ("", 0, None))
    twin = kind == "image" and raw_type == "sensor_msgs/msg/Image" and raw_count > 0
    useless = twin or (kind == "text" and not INSTRUCTION.search(last))
    return "" if useless and topic not in streams else kind


def _fill(path: Path, topics: dict[str, Topic]) -> None:
    kinds = {t.topic: "vector" if t.kind == "command" else t.kind for t in topics.values()}
    specs: dict[str, StreamSpec] = {}  # what the first sample was like, all others must be
    joints = _joints(path)
    last: dict[str, Any] = {}  # data of each
    now_ns = 0  # a SampleError has no time: it goes with what arrived before it
    sensors = {topic.topic for topic in topics.values() if topic.kind != "command"}
    usual = {name: mode([one for one in said if one[0]] or said) for name, said in joints.items() if name in sensors}
    asked = [StreamSpec(name, kind, (), 0, 0, joints=usual.get(name, ((), "", 1))[0]) for name, kind in kinds.items()]
    told = {name: iter(said) for name, said in joints.items()}
    for record in read(path, asked, {topic: topic for topic in kinds}) if asked else ():
        if not isinstance(record, (Sample, SampleError)):
            continue
        topic = topics[record.stream]
        names, gives, points = next(told[topic.topic]) if topic.topic in told else (topic.names, "", 1)
        try:
            if isinstance(record, SampleError):
                raise record
            now_ns, data = record.arrival_ns, record.data
            if topic.topic in usual:  # in whatever order they came, they are in the usual one by now
                wanted, names = usual[topic.topic][:2], usual[topic.topic][0]
            else:
                wanted = (topic.names, topic.gives) if topic.values else (names, gives)
            if (names, gives) != wanted:
                raise SampleError(topic.topic, *(f"{what} of {list(who)}" for who, what in (wanted, (names, gives))))
            if topic.kind == "text" and not preprocess.words_of(data):
                raise SampleError(topic.topic, "words", repr(data))
            if topic.kind != "command":
                preprocess.check(specs.setdefault(topic.topic, _first_spec(topic.topic, topic.kind, data)), data)
            elif data.shape != (len(names),):  # NaN is found later
                raise SampleError(topic.topic, f"a number for each of {names}", f"{len(data)} numbers")
        except SampleError as error:
            topic.refused.append((now_ns, f"expected {error.expected}, got {error.got}"))
            continue
        topic.names, topic.gives, topic.points = names, gives, max(topic.points, points)
        topic.arrival_ns.append(now_ns)
        topic.stamp_ns.append(record.stamp_ns)
        topic.values.append(_value(topic.kind, data))
        topic.repeats.append(topic.topic in last and same(data, last[topic.topic]))
        last[topic.topic] = data
    for topic in topics.values():
        topic.arrival_ns, topic.stamp_ns = np.array(topic.arrival_ns, np.int64), np.array(topic.stamp_ns, np.int64)
        topic.repeats = np.array(topic.repeats, bool)
        values = topic.values or np.zeros((0, len(topic.names)))
        topic.values = np.array(values, object if topic.kind == "text" else np.float32)


def _joints(path: Path) -> dict[str, list[tuple[tuple[str, ...], str, int]]]:
    """By topic `names`, `gives` and how many points each message about joints has, in the order of `read`: samples do
    not hold them."""
    from rosbags.highlevel import AnyReader

    found: dict[str, list[tuple[tuple[str, ...], str, int]]] = {}
    with reading(path), AnyReader([path], default_typestore=typestore()) as bag:
        wanted = [c for c in bag.connections if c.msgtype in (JOINTS, TRAJECTORY)]
        for connection, _, raw in bag.messages(wanted) if wanted else ():
            msg = bag.deserialize(raw, connection.msgtype)
            if connection.msgtype == TRAJECTORY:
                has_positions = bool(msg.points) and len(msg.points[0].positions) > 0
                said = tuple(msg.joint_names), "positions" if has_positions else "velocities", len(msg.points)
            else:
                given = [field for field in ("position", "velocity", "effort") if len(getattr(msg, field))]
                said = tuple(msg.name), ", ".join(given), 1
            before = found.setdefault("/" + connection.topic.lstrip("/"), [])
            before.append(before[-1] if before and before[-1] == said else said)  # one object for most of them
    return found


def _first_spec(name: str, kind: str, data: Any) -> StreamSpec:
    if kind == "audio":
        rate, channels = data.sample_rate_hz, data.samples.shape[1]
        return StreamSpec(name, kind, (), 0, 0, sample_rate_hz=rate, channels=channels)
    return StreamSpec(name, kind, data.shape if kind == "vector" else (), 0, 0)


def _value(kind: str, data: Any) -> Any:
    if kind == "scan":
        return (data.range_max,)
    if kind == "points":
        distance = np.linalg.norm(data, axis=1)
        return (np.percentile(distance[np.isfinite(distance)], 95) if np.isfinite(distance).any() else np.nan,)
    if kind == "audio":
        return data.sample_rate_hz, data.samples.shape[1]
    return data.shape[:2] if kind == "image" else data


def streams_of(recordings: Sequence[Recording]) -> tuple[StreamSpec, ...]:
    """Streams for the sensors that at least half of the recordings have, by kind and name; in the others they are
    masked. A text that every recording has is required."""
    topics: dict[str, list[Topic]] = {}
    recordings = [recording for recording in recordings if recording.end_ns]  # what holds no sensor is none
    for recording in recordings:
        for name, topic in recording.topics.items():
            if topic.kind != "command" and len(topic.arrival_ns):
                topics.setdefault(name, []).append(topic)
    n = len(recordings)
    specs = [_spec(name, found, len(found) == n) for name, found in topics.items() if 2 * len(found) >= n]
    return tuple(sorted(specs, key=lambda spec: (KINDS.index(spec.kind), spec.name)))


def alike(topics: Sequence[Topic]) -> list[Topic]:
    """Those of the form that most of them have. All must hold messages."""
    usual = mode([t.form for t in topics] or [""])
    return [t for t in topics if t.form == usual]


def _spec(name: str, topics: list[Topic], everywhere: bool) -> StreamSpec:
    topics = alike(topics)
    kind = topics[0].kind
    if kind == "text":
        tokens = max(TOKENS, *(len(preprocess.words_of(text)) for t in topics for text in t.values))
        return StreamSpec(name, kind, (tokens,), 0.0, 0.0, latched=True, required=everywhere)
    rate_hz = median_low([t.rate_hz for t in topics])
    late_s = min(max(float(np.median(np.concatenate([t.latency_s for t in topics]))), 0.0), 1.0)
    max_age_ms = 10.0 * math.ceil(max(20.0, (4 / rate_hz if rate_hz else 0.0) * 100 + late_s * 100))
    joints = mode([t.names for t in topics])
    values = np.concatenate([_columns(t, joints) if joints else t.values for t in topics])
    more: dict[str, Any] = {}
    if kind == "image":
        shape: tuple[int, ...] = IMAGE
    elif kind == "audio":
        sample_rate_hz, channels = map(int, values[0])
        n = (HOPS - 1) * round(AUDIO_HOP_S * sample_rate_hz) + AUDIO_FRAME
        shape = (channels + 1, BANDS, HOPS)
        more = {"window_ms": 1e3 * n / sample_rate_hz, "sample_rate_hz": sample_rate_hz, "channels": channels}
        more |= {"mean": (-1.5,), "std": (1.5,)}
    elif kind in ("scan", "points"):
        shape = (2, BEAMS) if kind == "scan" else (POINTS, 4)
        far = values[np.isfinite(values)].max(initial=0.0)
        more = {"range_max_m": round(float(far), 2) or 10.0}
    else:
        std = values.std(axis=0, dtype=np.float64)
        more["mean"] = tuple(float(np.float32(x)) for x in values.mean(axis=0, dtype=np.float64))
        more["std"] = tuple(float(np.float32(x)) if x > 1e-6 else 1.0 for x in std)
        shape = values.shape[1:]
        more["joints"] = joints
        if kind == "imu":
            more["window_ms"] = max(100.0, 4e3 / rate_hz) if rate_hz else 100.0
            shape = (max(4, round(rate_hz * more["window_ms"] / 1e3)), 7)
    return StreamSpec(name, kind, shape, rate_hz, max_age_ms, **more)


def words_of(recordings: Iterable[Recording]) -> tuple[str, ...]:
    """The words of all texts, for a `Vocabulary`."""
    texts = [text for r in recordings for t in r.topics.values() if t.kind == "text" for text in t.values]
    return tuple(sorted({word for text in texts for word in preprocess.words_of(text)}))


def label_of(recordings: Sequence[Recording], topic: str = "") -> Label:
    """The commands to be learned: `topic`, or else, of those that at least half as many recordings hold as any,
    expert/cmd_vel, cmd_vel, another Twist or joint trajectories; of these the joints that most recordings command. What
    a joint's numbers are (rad, m, degrees) no message tells.

    Raises RecordingError if there are none.
    """
    counts, holders = Counter[str](), Counter[str]()  # messages, recordings
    for recording in recordings:
        found_here = {name: len(t.values) for name, t in recording.topics.items() if t.kind == "command"}
        counts.update(found_here)
        holders.update([name for name, n in found_here.items() if n])
    topic = topic.strip("/")
    errors = [recording.error for recording in recordings if recording.error]
    if len(errors) == len(recordings):
        raise RecordingError("; ".join(errors))
    if not counts or (topic and topic not in counts):
        raise RecordingError(
            f"{recordings[0].path.parent}: expected commands{f' on {topic}' if topic else ''} to learn from "
            f"(Twist, TwistStamped or JointTrajectory), got {sorted(counts) or 'none'}"
            + "".join(f"; {error}" for error in errors)
        )

    def preference(name: str) -> tuple[bool, bool, bool, bool, bool, int]:  # what is raw, a watchdog may have stopped
        last, wheels = name.split("/")[-1], "cmd_vel" in name
        usual = 2 * holders[name] >= max(holders.values(), default=0)
        expert = name.endswith("expert/cmd_vel")
        return usual, expert, last == "cmd_vel", wheels, not last.endswith("_raw"), counts[name]

    topic = topic or max(sorted(counts), key=preference)
    found = alike([r.topics[topic] for r in recordings if topic in r.topics and len(r.topics[topic].values)])
    usual = mode([frozenset(t.names) for t in found] or [frozenset()])
    names = next((t.names for t in found if set(t.names) == usual), ())
    found = [t for t in found if usual <= set(t.names)]
    values = np.concatenate([_columns(t, names) for t in found] or [np.zeros((0, 0))])
    if names == TWIST:
        keep = [i for i, n in enumerate(names) if n in DRIVEN or np.nan_to_num(values[:, i]).any()]
        names, values = tuple(names[i] for i in keep), values[:, keep]
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values) or not names:
        raise RecordingError(f"{recordings[0].path.parent}: {topic}: expected commands, got no finite one")
    by_position = found[0].gives == "positions"
    low, high = values.min(axis=0), values.max(axis=0)
    if not by_position:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    rates = np.max([_greatest_rate(t, names) for t in found], axis=0)
    units = tuple(("m/s" if n.startswith("linear") else "rad/s") if n in TWIST else "" for n in names)
    plain = [tuple(float(x) for x in limits) for limits in (low, high, np.where(rates > 0, rates, 1.0))]
    return Label(topic, names, units, *plain, interface="position" if by_position else "velocity")


def _columns(topic: Topic, names: Sequence[str]) -> np.ndarray:
    """Those dimensions of commands, or joints, in this order; of joints all that is told of them."""
    at = [topic.names.index(name) for name in names]
    return topic.values[:, [first + i for first in range(0, topic.values.shape[1], len(topic.names)) for i in at]]


def _greatest_rate(topic: Topic, names: Sequence[str]) -> np.ndarray:
    steps_s = np.diff(topic.arrival_ns) / NS
    with np.errstate(invalid="ignore"):  # of what is not finite
        change = np.abs(np.diff(_columns(topic, names), axis=0))
    near = (steps_s < UNLABELLED_S) & np.isfinite(change).all(axis=1)
    if not near.any():
        return np.zeros(len(names))
    return (change[near] / np.maximum(steps_s[near], np.median(steps_s[near]))[:, None]).max(axis=0)


def tick_of(streams: Sequence[StreamSpec], most_ms: float = MOST_TICK_MS) -> Tick:
    """Ticks come with the first camera, or else with the fastest sensor of at most 50 Hz, or else with the slowest; and
    after `most_ms` without it: of a robot before the watchdog, which waits 150 ms, would stop it."""
    sensors = [spec for spec in streams if not spec.latched and spec.rate_hz]
    if not sensors:
        raise RecordingError(f"expected a sensor, got the streams {[spec.name for spec in streams]}")
    cameras = [spec for spec in sensors if spec.kind == "image"]
    slow = [spec for spec in sensors if spec.rate_hz <= 50]
    anchor = (
        cameras[0] if cameras else max(slow, key=lambda s: s.rate_hz, default=min(sensors, key=lambda s: s.rate_hz))
    )
    period_ms = 1e3 / anchor.rate_hz
    return Tick(anchor.name, round(min(period_ms, most_ms), 3), round(min(1.5 * period_ms, most_ms), 3))


def tables_of(
    recording: Recording,
    streams: Sequence[StreamSpec],
    label: Label,
    tick: Tick,
    vocabulary: Vocabulary | None = None,
    latency_ms: float = 0.0,
    max_gap_ms: float = 2000.0,
) -> Tables:
    """One recording as tables, at the ticks it was recorded with or else those of `tick`.

    Labels: `action` float32 (T, dims), the first command that came `latency_ms` or more after the tick; `weight`
    float32 (T,), 0 where that is not known (an unlabelled stretch, NaN), else 1. Raises RecordingError.
    """
    if recording.error:
        raise RecordingError(recording.error)
    command_after = commands_after(recording, label)
    held = [s.name for s in streams if s.name in recording.topics and len(recording.topics[s.name].arrival_ns)]

    def labels(now: Any) -> dict[str, np.ndarray]:
        action = command_after(now.now_ns + round(latency_ms * 1e6))
        known = action is not None
        return {"action": action if known else np.zeros(len(label.names), np.float32), "weight": np.float32(known)}

    if not held:
        raise RecordingError(f"{recording.path}: expected one of the streams {[s.name for s in streams]}, got none")
    topics = {name: recording.topics[name].topic for name in held}
    timeline = events(recording.path, [spec for spec in streams if spec.name in topics], tick, topics)
    timeline = good(timeline, recording, streams, vocabulary)
    return build_tables(timeline, streams, tick.period_ms / 1e3, max_gap_ms, vocabulary, labels)


def commands_of(recording: Recording, label: Label) -> tuple[np.ndarray, np.ndarray]:
    """When (ns, log time) and what (n, dims) was commanded; n = 0 if that is not known."""
    topic = recording.topics.get(label.topic)
    if topic is None or not len(topic.values) or not set(label.names) <= set(topic.names):
        return np.zeros(0, np.int64), np.zeros((0, len(label.names)), np.float32)
    return topic.arrival_ns, _columns(topic, label.names)


def identity(recording: Recording, label: Label) -> str:
    """By which a recording is known whatever its name: what was commanded, and when."""
    return hashlib.sha256(b"".join(array.tobytes() for array in commands_of(recording, label))).hexdigest()[:16]


def commands_after(recording: Recording, label: Label) -> Callable[[int], np.ndarray | None]:
    """Says for an instant (ns) the first command at or after it, float32 (dims,); None if it is not finite, or came
    after an unlabelled stretch: nobody knows what was wanted there."""
    at_ns, values = commands_of(recording, label)
    since_ns = np.concatenate([[recording.start_ns], at_ns[:-1]]) if len(at_ns) else at_ns
    good = np.isfinite(values).all(axis=1) & (at_ns - since_ns <= UNLABELLED_S * NS)

    def command_after(now_ns: int) -> np.ndarray | None:
        i = int(np.searchsorted(at_ns, now_ns))
        return values[i] if i < len(at_ns) and good[i] else None

    return command_after


def good(
    timeline: Iterable[Any], recording: Recording, streams: Iterable[StreamSpec], vocabulary: Vocabulary | None = None
) -> Iterator[Any]:
    """Without the samples that the robot would refuse, or that `find` did."""
    specs = {spec.name: spec for spec in streams}
    arrivals = {name: set(topic.arrival_ns.tolist()) for name, topic in recording.topics.items()}
    for event in timeline:
        if isinstance(event, Sample):
            if event.arrival_ns not in arrivals[event.stream]:
                continue
            try:
                preprocess.check(specs[event.stream], event.data, vocabulary)
            except SampleError:
                continue
        yield event
