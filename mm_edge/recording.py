"""Episodes as ROS 2 bags: MCAP files with ROS 2 schemas, written and read without ROS, for `ros2 bag` and Foxglove too.

    with RecordingWriter("episodes/0", specs, {"camera": "image"}, {"robot": "sim"}) as recording:
        recording.write(sample)
        recording.command("expert/cmd_vel", action, stamp_ns, arrival_ns)
        recording.tick(now_ns, {"target": [1.5, -0.2]})
        recording.outcome = {"success": True}

    for record in read("episodes/0", specs):  # Sample | SampleError | Command | Tick
        ...

One bag is one episode. A message's log time is when the robot had it, its header stamp when it was measured:

    a topic a stream          MESSAGE_TYPES[kind]    log time arrival_ns, stamp stamp_ns (text: arrival is its stamp)
    a topic a command         TwistStamped           cmd_vel (executed), cmd_vel_raw, expert/cmd_vel
    mm_edge/tick              String, JSON           log time now_ns; labels: what else was known at that tick
    mm_edge/meta, .../outcome String, JSON           topics, robot, versions; how it ended

These are messages and no fields of metadata.yaml, because every tool that copies, cuts or converts bags keeps messages.
Each chunk holds the definitions of all topics, so that it can be read whatever becomes of the others: see repair.py.
Frames are raw, and zstd compresses chunks of 1 MB: 17 % off 96x96 frames of a real camera, at 0.15 ms a frame. PNG
takes 40 % off, but 0.7 ms a frame to write and 0.3 ms to read, where zstd reads in 0.03 ms.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mm_edge
from mm_edge.errors import EdgeError, RecordingError, SampleError, needs
from mm_edge.messages import MESSAGE_TYPES, NS, action_to_ros, from_ros, readable, to_ros, twist_from_ros
from mm_edge.types import Action, Sample, StreamSpec

TICK, META, OUTCOME = "/mm_edge/tick", "/mm_edge/meta", "/mm_edge/outcome"
STRING, TWIST, TWIST_STAMPED = "std_msgs/msg/String", "geometry_msgs/msg/Twist", "geometry_msgs/msg/TwistStamped"
COMMANDS = (TWIST, TWIST_STAMPED, "trajectory_msgs/msg/JointTrajectory")
FORMAT = 1


class Tick(NamedTuple):
    """The pipeline ticked at `now_ns`. `labels`: what was recorded about that instant, by name."""

    now_ns: int
    labels: dict[str, Any]


class Command(NamedTuple):
    """A Twist on `topic` (without a leading slash): float32 (6,) in the order of `messages.TWIST`."""

    topic: str
    arrival_ns: int
    values: np.ndarray


class RecordingWriter:
    """Writes one episode to the folder `path`, which must not exist. A context manager, for one thread at a time.

    The folder appears, whole, when the context ends well. Until then, and if it ends badly, what was written lies in
    `<path>.partial`, which no reader takes for a recording, and of which `repair.repair` makes one.

    Args:
        specs: the streams that will be written as samples.
        topics: stream -> topic; a stream's name by default.
        metadata: whatever JSON holds: robot, versions, seed.

    Raises RecordingError if the folder or `<path>.partial` exists, or it cannot be written, SampleError for a sample
    that its message cannot hold exactly.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Iterable[StreamSpec],
        topics: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        self.path = Path(path)
        refuse_existing(self.path)
        self.outcome: dict[str, Any] = {}
        self._store = typestore()
        self._writer: Any = None
        self._partial = partial(self.path)
        self._specs = {spec.name: spec for spec in specs}
        self._topics = {name: _absolute((topics or {}).get(name, name)) for name in self._specs}
        self._meta = {"format": FORMAT, "mm_edge": mm_edge.__version__, "streams": self._topics, **(metadata or {})}
        self._channels: dict[str, tuple[Any, Any]] = {}  # topic -> (rosbags connection, message to fill or None)
        self._end_ns = 0
        if len({*self._topics.values(), TICK, META, OUTCOME}) != len(self._topics) + 3:
            raise RecordingError(f"{self.path}: each stream needs a topic of its own, got {self._topics}")

    def __enter__(self) -> RecordingWriter:
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

        with named(self.path, "cannot be written"):
            # Version 8 of metadata.yaml is read by Humble, too. The file inside is named after the folder.
            self._writer = Writer(self._partial / self.path.name, version=8, storage_plugin=StoragePlugin.MCAP)
            self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
            self._writer.open()
            lock(self._writer.storage.bio, self._partial)
            self._writer.storage.compressor = _compress
            for name, topic in self._topics.items():
                self._add(topic, MESSAGE_TYPES[self._specs[name].kind])
            for topic in (META, TICK, OUTCOME):
                self._add(topic, STRING)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                self._put_json(OUTCOME, self._end_ns, self.outcome)
                with named(self.path, "cannot be written"):
                    self._writer.close()
                    publish(self.path)
        finally:
            with suppress(OSError):  # what cannot be written now was told of when it first could not
                self._writer.abort()

    def write(self, sample: Sample) -> None:
        """Samples may come in any order. Raises KeyError for a stream without a spec."""
        spec, topic = self._specs[sample.stream], self._topics[sample.stream]
        _refuse_inexact(spec.kind, sample)
        msg = self._channels[topic][1]
        point_field = self._store.types["sensor_msgs/msg/PointField"]
        to_ros(spec.kind, msg, sample.stamp_ns, sample.data, spec.frame, point_field, spec.joints)
        self._put(topic, sample.arrival_ns, msg)

    def command(self, topic: str, action: Action, stamp_ns: int, arrival_ns: int) -> None:
        """The first row of `action` on a topic of commands: "cmd_vel" (executed), "cmd_vel_raw", "expert/cmd_vel"."""
        topic = _absolute(topic)
        if topic not in self._channels:
            self._add(topic, TWIST_STAMPED)
        msg = self._channels[topic][1]
        action_to_ros(msg, stamp_ns, action)
        self._put(topic, arrival_ns, msg)

    def tick(self, now_ns: int, labels: Mapping[str, Any] | None = None) -> None:
        """A tick, after the samples it could see. `labels`: whatever JSON holds, and arrays, which become lists."""
        self._put_json(TICK, now_ns, dict(labels or {}))

    def add_topic(self, topic: str, type_name: str, store: Any) -> None:
        """A topic of any type, for `message`. `store`: a rosbags typestore that holds the type."""
        topic = _absolute(topic)
        with named(self.path, f"{topic}, a {type_name}, cannot be written"):
            self._channels[topic] = self._writer.add_connection(topic, type_name, typestore=store), None

    def message(self, topic: str, data: bytes, arrival_ns: int) -> None:
        """A message as it came, in CDR. Raises KeyError for a topic that was not added."""
        connection = self._channels[_absolute(topic)][0]
        if self._meta:  # with the time of the first message, so that the bag does not begin in 1970
            meta, self._meta = self._meta, {}
            self._put_json(META, arrival_ns, meta)
        storage = self._writer.storage
        with named(self.path, "cannot be written"):
            if not storage.chunk.msgs:
                self._define()
            self._writer.write(connection, arrival_ns, data)
            if not storage.chunk.msgs:  # it was full, and rosbags has written it
                storage.bio.flush()
        self._end_ns = max(self._end_ns, arrival_ns)

    def flush(self) -> None:
        """End the chunk and wait until it is on the disk, where no power cut reaches it."""
        storage = self._writer.storage
        with named(self.path, "cannot be written"):
            if storage.chunk.msgs:
                storage.close_chunk()
            storage.bio.flush()
            os.fsync(storage.bio.fileno())

    def _define(self) -> None:
        """Begin a chunk with the definitions of all topics."""
        from rosbags.rosbag2.storage_mcap import write_channel, write_schema

        storage = self._writer.storage
        storage.chunk.bio = BytesIO()
        for schema in storage.schemas:
            write_schema(storage.chunk.bio, schema)
        for channel in storage.channels:
            write_channel(storage.chunk.bio, channel, storage.schemas)

    def _add(self, topic: str, type_name: str) -> None:
        self.add_topic(topic, type_name, self._store)
        self._channels[topic] = self._channels[topic][0], empty_message(self._store, type_name)

    def _put_json(self, topic: str, time_ns: int, value: Any) -> None:
        msg = self._channels[topic][1]
        msg.data = json.dumps(value, default=lambda numpy_value: numpy_value.tolist())
        self._put(topic, time_ns, msg)

    def _put(self, topic: str, time_ns: int, msg: Any) -> None:
        self.message(topic, self._store.serialize_cdr(msg, self._channels[topic][0].msgtype), time_ns)


def partial(path: str | Path) -> Path:
    """The folder in which a recording lies, under its own name, that is being written or was not ended well."""
    path = Path(path)
    return path.parent / f"{path.name}.partial"


def refuse_existing(path: Path) -> None:
    """Raises RecordingError if `path` exists or something was left of it."""
    for there, advice in (
        (path, "recordings are never overwritten"),
        (partial(path), f"`mm-edge record {path}` repairs it; or remove it"),
    ):
        if there.exists():
            raise RecordingError(f"{there}: exists already; {advice}")


def lock(file: Any, path: Path) -> None:
    """For this process alone, until `file` is closed. Raises RecordingError, naming `path`, if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecordingError(f"{path}: is being recorded by another process; end that first") from None


def publish(path: Path) -> None:
    """Give a recording that is whole its name, once no power cut can take any of it away."""
    folder = partial(path) / path.name
    for part in (*folder.iterdir(), folder):
        descriptor = os.open(part, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    folder.rename(path)
    with suppress(OSError):  # something else lies in it, and stays
        folder.parent.rmdir()


def read(
    path: str | Path,
    specs: Iterable[StreamSpec],
    topics: Mapping[str, str] | None = None,
    log_time_ns: int | None = None,
) -> Iterator[Sample | SampleError | Command | Tick]:
    """What a recording holds of the streams `specs`, in the order of log time, read as it is asked for.

    Reads what `RecordingWriter` wrote, and with `topics` (stream -> topic) any ROS 2 bag (MCAP, sqlite3; folder or
    file) or ROS 1 bag; where a recording knows its streams, they replace those that they name. Where it knows none, the
    other streams are the topics that are called like them, see `stream_name`. A message that is no sample of its stream
    is yielded as the SampleError that says why. Twists on other topics are yielded as commands. Streams that were not
    recorded are absent. `log_time_ns`: only what came in that instant, found without reading all.

    Raises RecordingError, naming the file, if it is missing, damaged or no recording, or one of `topics` is not in it.
    """
    path, stop_ns = Path(path), None if log_time_ns is None else log_time_ns + 1
    with reading(path), _open(path) as bag:
        known = {_absolute(connection.topic) for connection in bag.connections}
        told = _read_json(bag, META).get("streams") or {}
        if not isinstance(told, Mapping) or not all(isinstance(topic, str) for topic in told.values()):
            raise RecordingError(f"{path}: expected streams as a topic for each, got {str(told)[:60]}")
        specs = tuple(specs)
        streams = {**(told or _by_name(bag, specs, topics or {})), **(topics or {})}
        if not streams:
            names = [spec.name for spec in specs]
            raise RecordingError(
                f"{path}: knows no streams, only topics: say which of {sorted(known)} is which of the streams {names}, "
                f"as in --topic {names[0] if names else 'camera'}=/front/image_raw"
            )
        by_topic = {_absolute(streams[spec.name]): spec for spec in specs if spec.name in streams}
        given = {_absolute(topic) for topic in (topics or {}).values()}
        if missing := sorted(given & by_topic.keys() - known):
            raise RecordingError(f"{path}: has no topic {missing}; it has {sorted(known)}")
        if lost := _lost_topics(bag):
            raise RecordingError(f"{path}: damaged: lacks messages of {lost}")
        wanted = [
            c for c in bag.connections if _absolute(c.topic) in {TICK, *by_topic} or c.msgtype in (TWIST, TWIST_STAMPED)
        ]
        left = {c.id: c.msgcount for c in wanted}
        for connection, time_ns, raw in bag.messages(wanted, log_time_ns, stop_ns) if wanted else ():
            left[connection.id] -= 1
            topic, msg = _absolute(connection.topic), bag.deserialize(raw, connection.msgtype)
            if topic in by_topic:
                yield _sample(by_topic[topic], connection.msgtype, msg, time_ns)
            elif topic == TICK:
                yield Tick(time_ns, _object(msg.data))
            else:
                yield Command(topic[1:], time_ns, twist_from_ros(msg))
        if log_time_ns is None and any(left.values()):
            raise RecordingError(f"{path}: damaged: lacks messages of {[c.topic for c in wanted if left[c.id]]}")


def stream_name(topic: str) -> str:
    """What a stream is called after its topic: /front/image_raw becomes front_image_raw."""
    return re.sub(r"\W", "_", topic.lstrip("/"))


def _by_name(bag: Any, specs: Sequence[StreamSpec], topics: Mapping[str, str]) -> dict[str, str]:
    """Of the streams that `topics` does not name. Empty if one of them has no topic of its name, but another could be
    it: who guesses one in two guesses wrong."""
    types = {c.topic: c.msgtype for c in bag.connections if c.msgtype not in COMMANDS}
    for topic in map(_absolute, topics.values()):
        types.pop(topic, None)
    names = {(stream_name(topic), type_name): topic for topic, type_name in types.items()}
    asked = [s for s in specs if s.name not in topics]
    found = {s.name: names[s.name, kind] for s in asked for kind in readable(s.kind) if (s.name, kind) in names}
    left = {type_name for topic, type_name in types.items() if topic not in found.values()}
    return {} if any(s.name not in found and left & {*readable(s.kind)} for s in asked) else found


def _lost_topics(bag: Any) -> list[str]:
    """Topics of which metadata.yaml counts messages, but that no file has. rosbags passes over them without a word."""
    files = getattr(getattr(bag.readers[0], "storage", None), "storages", ())
    there = {connection.topic for file in files for connection in file.connections}
    return sorted(c.topic for c in bag.connections if files and c.msgcount and c.topic not in there)


def _sample(spec: StreamSpec, type_name: str, msg: Any, time_ns: int) -> Sample | SampleError:
    try:
        return from_ros(spec, type_name, msg, time_ns)
    except SampleError as error:
        return error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata it was written with, and `streams` (stream -> topic), `outcome`, `ticks` (their number). Of a bag
    that mm_edge did not write only `ticks`, 0. Raises RecordingError."""
    with reading(path), _open(Path(path)) as bag:
        ticks = sum(c.msgcount for c in bag.connections if c.topic == TICK)
        outcome = {"outcome": _read_json(bag, OUTCOME)} if any(c.topic == OUTCOME for c in bag.connections) else {}
        return {**_read_json(bag, META), **outcome, "ticks": ticks}


def first_messages(path: str | Path) -> dict[str, tuple[str, int, Any]]:
    """Of each topic in any bag that `read` reads: its type, the number of its messages and the first of them, as
    rosbags gives it; None if there is none, or its type is unknown. Raises RecordingError."""
    found: dict[str, tuple[str, int, Any]] = {}
    with reading(path), _open(Path(path)) as bag:
        for c in bag.connections:  # a topic has several where several published
            first = next(bag.messages([c]), None) if c.msgcount and c.msgtype in bag.typestore.types else None
            msg = bag.deserialize(first[2], c.msgtype) if first else None
            _, count, before = found.get(_absolute(c.topic), ("", 0, None))
            found[_absolute(c.topic)] = c.msgtype, count + c.msgcount, before or msg
    return found


def _read_json(bag: Any, topic: str) -> dict[str, Any]:
    connections = [c for c in bag.connections if c.topic == topic and c.msgtype == STRING]
    for connection, _, raw in bag.messages(connections) if connections else ():
        return _object(bag.deserialize(raw, connection.msgtype).data)
    return {}


def _object(text: str) -> dict[str, Any]:
    if not isinstance(value := json.loads(text), dict):
        raise ValueError(f"expected a JSON object, got {text[:60]}")
    return value


def _open(path: Path) -> Any:
    store = typestore()
    from rosbags.highlevel import AnyReader

    if not path.exists():
        raise RecordingError(f"{path}: no such file or folder")
    if path.is_dir() and not (path / "metadata.yaml").exists():
        inside = sorted(str(found.parent.relative_to(path)) for found in path.glob("*/metadata.yaml"))
        hint = f"; the recordings {', '.join(inside)} lie inside" if inside else ""
        raise RecordingError(f"{path}: expected a metadata.yaml, got none{hint}")
    return AnyReader([path], default_typestore=store)  # the types of bags from before they described their own


def typestore(name: str = "ROS2_JAZZY") -> Any:
    """The types of a ROS, as rosbags knows them; "EMPTY": none yet. Raises MissingDependency."""
    with needs("reading and writing recordings", "rosbags", "record"):
        from rosbags.typesys import Stores, get_typestore
    return get_typestore(Stores[name])


def typestore_of(type_name: str, definition: Callable[[str], str]) -> Any:
    """A typestore with a type and all that it is made of. `definition`: the text of a type's .msg file."""
    store = typestore("EMPTY")
    from rosbags.interfaces import Nodetype
    from rosbags.typesys import get_types_from_msg

    types: dict[str, Any] = {}
    wanted = [type_name]
    while wanted:
        if (name := wanted.pop()) in types:
            continue
        types.update(get_types_from_msg(definition(name), name))
        for _, (node, detail) in types[name][1]:
            if node in (Nodetype.ARRAY, Nodetype.SEQUENCE):
                node, detail = detail[0]
            if node == Nodetype.NAME:
                wanted.append(detail)
    store.register(types)
    return store


@contextmanager
def named(path: str | Path, what: str) -> Iterator[None]:
    """On damaged bytes rosbags raises whatever the bytes lead it to; here all of it becomes one error with the name."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as error:
        raise RecordingError(f"{path}: {what}: {type(error).__name__}: {error}") from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """As `named`: what is no fault of the disk is one of the file."""
    hint = "it is cut short or damaged: copy it again, or save what is whole of an .mcap with `mcap recover`"
    with named(path, "cannot be read"):
        try:
            yield
        except (EdgeError, OSError):
            raise
        except Exception as error:
            raise RecordingError(f"{path}: cannot be read: {type(error).__name__}: {error}; {hint}") from error


def _compress(chunk: bytes) -> bytes:
    """As rosbags does, but with a checksum, which every reader of zstd verifies: without it most flipped bits of an
    image would go unseen."""
    try:
        from compression import zstd
    except ImportError:  # before Python 3.14
        from backports import zstd
    return zstd.compress(chunk, options={zstd.CompressionParameter.checksum_flag: 1})


def _absolute(topic: str) -> str:
    return "/" + topic.lstrip("/")


def _refuse_inexact(kind: str, sample: Sample) -> None:
    if not 0 < sample.stamp_ns < 2**31 * NS:
        raise SampleError(sample.stream, "a stamp after 0 that a message can hold", f"{sample.stamp_ns} ns")
    if kind == "text" and sample.stamp_ns != sample.arrival_ns:
        raise SampleError(sample.stream, "text stamped as it arrives (its message has no header)", sample.stamp_ns)
    if kind == "scan" and any(float(np.float32(value)) != value for value in sample.data[1:]):
        what = "angles and range limits that are float32, as in LaserScan: float(np.float32(value))"
        raise SampleError(sample.stream, what, sample.data[1:])


def empty_message(store: Any, type_name: str) -> Any:
    """A message of a rosbags typestore with empty fields, as rclpy's constructors make it."""
    from rosbags.interfaces import Nodetype

    def empty(node: Any, detail: Any) -> Any:
        if node == Nodetype.NAME:
            return empty_message(store, detail)
        if node == Nodetype.BASE:
            return {"string": "", "bool": False, "float32": 0.0, "float64": 0.0}.get(detail[0], 0)
        (inner, element), size = detail
        is_array = inner == Nodetype.BASE and element[0] != "string"
        return np.zeros(size, element[0]) if is_array else [empty(inner, element) for _ in range(size)]

    return store.types[type_name](**{name: empty(*kind) for name, kind in store.fielddefs[type_name][1]})
