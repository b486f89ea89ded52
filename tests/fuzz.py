"""Hostile input by the hundred thousand, through the entry points that a robot has: messages into a pipeline, bundles
into an engine, recordings into a replay. Each must end as an EdgeError or a clean result.

    python -m tests.fuzz --messages 200000 --bundles 10000 --recordings 10000 --seed 1 --json

A finding is any other exception, a result that is not what its docstring says, a case that takes longer than a second
(of its processor: the machine may be busy), a jump in memory, or the end of the process. So the cases are tried in
worker processes, which are killed and replaced; jobs name their cases by seed alone:

    fuzzer = Messages(folder)
    for label, what, attempt in fuzzer.cases(Random("1 messages 17")):     # the seed that a finding names
        attempt()
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from hashlib import sha256
from io import BytesIO
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import cv2
import numpy as np
import onnx
from rosbags.rosbag2 import StoragePlugin, Writer
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

import mm_edge
from mm_edge import recording
from mm_edge.bundle import Bundle, write_bundle
from mm_edge.engine import golden
from mm_edge.errors import EdgeError, RecordingError, SampleError
from mm_edge.language import Language, caption_of
from mm_edge.messages import MESSAGE_TYPES, action_to_ros, from_ros, output_to_json, to_ros, twist_from_ros
from mm_edge.overlay import draw
from mm_edge.pipeline import Pipeline
from mm_edge.repair import repair
from mm_edge.replay import events, replay
from mm_edge.safety import Limits
from mm_edge.types import NS, Action, Audio, Output, Sample, Scan, StreamSpec
from mm_edge.watchdog import Watchdog
from tests import toy_bundle, toy_language

SLOW_S, STUCK_S = 1.0, 30.0  # of the processor; of the clock: what takes so long on any machine waits for something
JUMP_MB = 256  # a frame of 8K takes 100, and twice that while its colours are turned round
LEAK_MB = 128  # over a whole run
ROOM_MB = 8192  # more than that a worker cannot have. What is asked for and never touched is no jump.
WARM_UP_JOBS = 100  # of a worker, or half of what it gets: what is loaded and kept once is no leak
BLOCK = 100  # messages that one pipeline takes before it begins anew

Case = tuple[str, str, Callable[[], bool]]  # what is tried, in a word; how it was made; try it: False if refused
Json = Any

# The toy bundle with a stream of every kind. No part reads the others, but all are checked, aligned and prepared.
STREAMS = (
    *toy_bundle.STREAMS,
    StreamSpec("audio", "audio", (3, 8, 4), 50, 300, window_ms=100, sample_rate_hz=16000, channels=2),
    StreamSpec("scan", "scan", (2, 24), 10, 300, range_max_m=8),
    StreamSpec("points", "points", (16, 4), 10, 300, range_max_m=8),
    StreamSpec("twist", "vector", (6,), 50, 300),
    StreamSpec("odometry", "vector", (13,), 50, 300),
    StreamSpec("joints", "vector", (4,), 50, 300),
)
UNSTAMPED = ("text", "twist")  # or not always
SPECS = {spec.name: spec for spec in STREAMS}
GOOD = {
    "camera": np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3),
    "imu": np.float32([0.1, -0.2, 9.81, 0.01, 0.02, -0.03]),
    "text": "go",
    "audio": Audio(np.arange(640, dtype=np.int16).reshape(320, 2), 48_000, 16000),
    "scan": Scan(np.float32([1.5, np.inf, np.nan, *[4.0] * 21]), -0.5, 0.25, 0.125, 8.0),
    "points": np.arange(30, dtype=np.float32).reshape(10, 3),
    "twist": np.float32([0.3, 0, 0, 0, 0, -1.1]),
    "odometry": np.arange(13, dtype=np.float32),
    "joints": np.float32([0.1, 0.2, 0.3, 0.4]),
}
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
TWIST, TWIST_STAMPED = recording.TWIST, recording.TWIST_STAMPED
ODOMETRY, JOINTS = "nav_msgs/msg/Odometry", MESSAGE_TYPES["vector"]
T0 = 1_700_000_000 * NS
MS = 1_000_000


def write_toy(folder: Path) -> Bundle:
    """The toy bundle with all of STREAMS."""
    manifest, files, more = toy_bundle.manifest(), toy_bundle.files(), len(STREAMS) - len(toy_bundle.STREAMS)
    manifest["streams"] = [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(s).items()} for s in STREAMS]
    del manifest["outputs"]["gates"]  # one for each stream; these parts have three
    graph = toy_bundle.GRAPHS["fusion"].replace("float[1,3] mask, float[1,3] age", "float[1,9] mask, float[1,9] age")
    graph = graph.replace("int64[1] axis = {1},", "int64[1] axis = {1}, int64[3] three = {0, 1, 2},")
    graph = graph.replace("gates = Mul (tokens, mask)", "of = Gather <axis = 1> (mask, three) gates = Mul (tokens, of)")
    files["fusion.onnx"] = toy_bundle.onnx_bytes("fusion", graph)
    ticks = []
    for inputs, outputs in toy_bundle.golden_ticks():
        del outputs["gates"]
        mask, age = (np.append(values, np.zeros(more, np.float32)) for values in (inputs.mask, inputs.age))
        ticks.append((inputs._replace(mask=mask, age=age), outputs))
    files["golden.npz"] = golden.pack(STREAMS, ticks)
    return write_bundle(folder, manifest, files)


def check_output(bundle: Bundle, output: Any) -> None:
    """An output says what it used and why it does not act, and acts within limits; a node can publish it."""
    assert isinstance(output, Output), f"expected an Output, got {output!r}"
    json.loads(output_to_json(output))
    foreign = [reason for reason in output.reasons if re.match(r"\w*([Ee]rror|Exception): ", reason)]
    assert not foreign, f"a tick failed: {foreign}"
    assert output.mask.keys() == output.ages_s.keys() == {spec.name for spec in bundle.streams}
    assert not any(math.isnan(age_s) for age_s in output.ages_s.values()), output.ages_s
    assert output.reasons or output.action is not None or bundle.outputs.action is None, "no action, and no reason"
    if output.action is not None:
        spec = bundle.outputs.action
        for row in output.action.values.tolist():  # float32 of limits that are not
            assert all(low - 1e-3 <= v <= high + 1e-3 for v, low, high in zip(row, spec.min, spec.max)), row


def check_sample(spec: StreamSpec, sample: Sample) -> None:
    """A sample is what `types.Sample` says."""
    data, kind = sample.data, spec.kind
    assert sample.stream == spec.name
    assert type(sample.stamp_ns) is int and type(sample.arrival_ns) is int, sample[1:3]
    if spec.name not in UNSTAMPED:
        assert 0 < sample.stamp_ns < 2**31 * NS, sample.stamp_ns  # what a message can hold
    if kind == "audio":
        assert type(data) is Audio and type(data.first_sample) is type(data.sample_rate_hz) is int
        data = data.samples
    elif kind == "scan":
        assert type(data) is Scan and all(type(value) is float for value in data[1:])
        data = data.ranges
    if kind == "text":
        assert type(data) is str
        return
    dtype, dims = {"image": ("uint8", 3), "audio": ("int16", 2), "points": ("float32", 2)}.get(kind, ("float32", 1))
    assert isinstance(data, np.ndarray) and (data.dtype, data.ndim) == (dtype, dims), f"{data.dtype} {data.shape}"


# Mutations ----------------------------------------------------------------------------------------------------------

INTS = (0, 1, -1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, -(2**31), 2**53 + 1, 2**63, 2**64 - 1, 2**70)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e-320, 1e-45, 1e-9, 1e9, 1e30, 1e39, -1e39, 1e308)
STRINGS = (
    "", "a", "go", "stop", "go go go", "go " * 500, "crash", "rgb8", "bgr8", "rgba8", "mono8", "yuyv", "uyvy", "16UC1",
    "32FC1", "bayer_rggb8", "x", "y", "ch0", "rot", "röd", "\0", "a\nb", "..", "/etc/passwd", "\ud800", "🤖" * 9,
    "a" * 100_000, "{}", "null", "nan", "9" * 5000,
)  # fmt: skip
JUNK = (
    None, True, -1, 10**400, 1.5, math.nan, 1e308, "", "röd", b"", b"\xff" * 7, [], [None], {}, {"x": 1}, [1.0, 2.0],
    np.zeros((2, 2)), np.float32([1, math.nan]), np.array(3), array("d", [1.0, 2.0]), "9" * 400,
)  # fmt: skip
JSON_JUNK = (None, True, False, 0, -1, 1, 10**400, 2**63, 1.5, -0.0, 1e30, 1e308, "", "x", [], [[]], {}, {"x": 1}, [1])


def odd_bytes(random: Random, data: bytes, head: int = 0) -> tuple[str, bytes]:
    """`data`, damaged; half of the time within the first `head` bytes, where there are some."""
    n = min(head, len(data)) if head and random.random() < 0.5 else len(data)
    at = random.randrange(max(n, 1))
    size = 1 << random.randrange(13)
    way = random.choice(("flip", "flip", "flip", "word", "word", "cut", "grow", "drop", "double"))
    out = bytearray(data)
    if way == "flip" and data:
        for _ in range(random.choice((1, 1, 2, 8, 30))):
            out[random.randrange(max(n, 1))] ^= 1 << random.randrange(8)
    elif way == "word":
        value = random.choice(INTS) & 2**64 - 1
        number = struct.pack("<d", random.choice(FLOATS))
        word = random.choice((struct.pack("<Q", value), struct.pack("<Q", value)[:4], number, b"\xff", b"\0", b"\x80"))
        out[at : at + len(word)] = word
    elif way == "cut":
        del out[at:]
    elif way == "grow":
        out += random.choice((bytes(size), random.randbytes(size)))
    elif way == "drop":
        del out[at : at + size]
    else:
        out[at:at] = out[at : at + size]
    return f"{way} at {at} of {len(data)}", bytes(out)


def odd(random: Random, value: Any) -> Any:
    """Something else in the place of a message's `value`, most often of its type."""
    if random.random() < 0.1:
        return deepcopy(random.choice(JUNK))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value + 1, value - 1, 2 * value, -value, value ^ 1 << random.randrange(33), np.uint32(7), 7.0)
        return random.choice((*INTS, *near))
    if isinstance(value, float):
        return random.choice((*FLOATS, -value, value * 10.0 ** random.randint(-40, 40), np.float32(value), 3))
    if isinstance(value, str):
        return random.choice((*STRINGS, value + "\0", value[:-1], value.upper(), value.encode("utf8", "replace")))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "biuf":
        return _odd_array(random, value)
    if isinstance(value, list):
        return random.choice(([], value[:-1], value[1:], value * 2, value[:1] * 1000, value[::-1], [*value, None], [3]))
    return deepcopy(random.choice(JUNK))  # in the place of a message within a message


def _odd_array(random: Random, value: np.ndarray) -> Any:
    way, n = random.choice(("bits", "bits", "bits", "value", "cut", "grow", "type", "form")), len(value)
    if way == "bits":
        raw = odd_bytes(random, value.tobytes(), 64)[1]
        return np.frombuffer(raw[: len(raw) // value.itemsize * value.itemsize], value.dtype)
    if way == "value" and n:
        changed = value.copy()
        changed[random.randrange(n)] = np.array(random.choice(FLOATS) if value.dtype.kind == "f" else 255, value.dtype)
        return changed
    if way == "cut":
        return value[: random.randrange(n + 1)]
    if way == "grow":
        return np.resize(value, n + random.choice((1, 2, 3, n, 1000)))
    if way == "type":
        return value.astype(random.choice(("u1", "i2", ">f4", "f8", "f4", "i8", "?", "c16", "O", "U3")))
    forms = (value.tolist(), value.tobytes(), value[::2], value[None], value[:, None], value[::-1], memoryview(value))
    return random.choice(forms)


def odd_json(random: Random, value: Json) -> tuple[str, Json]:
    """A copy of a JSON value with one to three changes anywhere in it, and what they are."""
    value, said = deepcopy(value), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        parent, old, key, path = None, value, None, []
        while isinstance(old, (dict, list)) and old and (parent is None or random.random() < 0.85):
            parent = old
            key = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
            old = parent[key]
            path.append(f"{key:.20}" if isinstance(key, str) else str(key))
        if parent is None or random.random() < 0.03:
            return "junk", _json_junk(random)
        way = random.choice(("junk", "odd", "odd", "odd", "drop", "add", "copy"))
        said.append(f"{way} {'.'.join(path)}")
        if way == "drop":
            del parent[key]
        elif way in ("junk", "odd"):
            new = odd(random, old) if way == "odd" else None
            parent[key] = new if isinstance(new, (int, float, str)) else _json_junk(random)
        elif isinstance(parent, list):
            parent.insert(key, _json_junk(random) if way == "add" else deepcopy(random.choice(parent)))
        else:
            new_key = random.choice(STRINGS if way == "add" else list(parent))
            parent[new_key] = _json_junk(random) if way == "add" else deepcopy(old)
    return ", ".join(said), value


def _json_junk(random: Random) -> Json:
    return deepcopy(random.choice(JSON_JUNK))


# What is fuzzed -----------------------------------------------------------------------------------------------------


class Messages:
    """Every field of every message type, and their raw bytes, into one pipeline, which always gives an Output."""

    def __init__(self, folder: Path):
        self.bundle = write_toy(folder / "bundle")
        self.pipeline = Pipeline(self.bundle, "cpu")
        self._watchdog = Watchdog(Limits(("linear_x", "angular_z"), (-0.2, -1.8), (0.6, 1.8), (2.5, 10.0)))
        self._store = recording.typestore()
        messages = [(name, MESSAGE_TYPES[SPECS[name].kind], data) for name, data in GOOD.items()]
        encoded = [cv2.imencode(suffix, GOOD["camera"])[1].reshape(-1) for suffix in (".png", ".jpg")]
        messages += [("camera", COMPRESSED, data) for data in encoded]
        messages += [("twist", type_name, GOOD["twist"]) for type_name in (TWIST, TWIST_STAMPED)]
        messages += [("odometry", ODOMETRY, GOOD["odometry"])]
        messages = [m for m in messages if m[:2] not in (("twist", JOINTS), ("odometry", JOINTS))]
        self._good = [(name, type_name, self._message(name, type_name, data)) for name, type_name, data in messages]
        self._raw = [self._store.serialize_cdr(msg, type_name).tobytes() for _, type_name, msg in self._good]
        self._places = [list(places(msg)) for _, _, msg in self._good]
        self._topics = [f"/{i}" for i in range(len(self._good))]
        path = folder / "bag"
        write_bag(path, self._store, [(t, g[1], T0, raw) for t, g, raw in zip(self._topics, self._good, self._raw)])
        self._bag = recording._open(path)
        self._bag.open()
        self._frame = GOOD["camera"]
        for i in range(len(self._good)):
            assert self._fields(i, T0, tick=True) and self._cdr(i, self._raw[i], T0, tick=True)

    def cases(self, random: Random) -> Iterator[Case]:
        self.pipeline.reset()
        self._watchdog.reset()
        self._frame = GOOD["camera"]
        now_ns = T0 + random.randrange(NS)
        for _ in range(BLOCK):
            now_ns += random.randrange(1, 60 * MS)
            tick = random.random() < 0.15
            i = random.randrange(len(self._good))
            name, type_name, msg = self._good[i]
            if random.random() < 0.6:
                paths = random.choices(self._places[i], k=random.choice((1, 1, 2, 3)))
                self._stamp(msg, now_ns - random.randrange(80 * MS))
                changes = [change for p in paths if (change := self._change(random, msg, p))]
                what = "; ".join(f"{'.'.join(map(str, p))} = {_brief(new)}" for p, _, _, _, new in changes)
                yield f"{name} {type_name} fields", what, partial(self._fields, i, now_ns, tick)
                for _, owner, key, old, _ in reversed(changes):
                    _put(owner, key, old)
                continue
            raw = self._raw[i]
            if hasattr(msg, "header"):
                stamp = struct.pack("<iI", *divmod(now_ns - random.randrange(80 * MS), NS))
                raw = raw[:4] + stamp + raw[12:]
            what, raw = odd_bytes(random, raw, 96)
            yield f"{name} {type_name} CDR", what, partial(self._cdr, i, raw, now_ns, tick)

    def _fields(self, i: int, now_ns: int, tick: bool) -> bool:
        name, type_name, msg = self._good[i]
        return self._push(lambda: [from_ros(SPECS[name], type_name, msg, now_ns)], name, now_ns, tick)

    def _cdr(self, i: int, raw: bytes, now_ns: int, tick: bool) -> bool:
        """As `recording.read` has it, from a bag with these bytes in the place of what was written."""
        name, type_name, _ = self._good[i]
        if type_name == TWIST_STAMPED:
            self._watch(raw, now_ns)

        def messages(connections: Any, *span: Any) -> Iterator[tuple[Any, int, bytes]]:
            for connection in connections:
                j = self._topics.index(connection.topic)
                yield connection, now_ns, raw if j == i else self._raw[j]

        def read() -> list[Any]:
            with mock.patch.object(recording, "_open", lambda path: nullcontext(self._bag)):
                self._bag.messages = messages
                return list(recording.read("bag", [SPECS[name]], {name: self._topics[i]}))

        return self._push(read, name, now_ns, tick)

    def _push(self, read: Callable[[], list[Any]], name: str, now_ns: int, tick: bool) -> bool:
        try:
            taken = False
            for record in read():
                if isinstance(record, SampleError):
                    raise record
                if isinstance(record, Sample):
                    check_sample(SPECS[name], record)
                    taken = self.pipeline.push(record)
                    if taken and name == "camera":
                        self._frame = record.data
            return taken
        except SampleError as error:
            self.pipeline.refuse(error)
            raise
        finally:
            if tick:
                for spec in STREAMS[:3]:  # so that there are actions, too
                    self.pipeline.push(Sample(spec.name, now_ns, now_ns, GOOD[spec.name]))
                output = self.pipeline.tick(now_ns)
                check_output(self.bundle, output)
                self.pipeline.health(now_ns)
                if name == "camera":
                    picture = draw(self._frame, output, "go")
                    assert picture.nbytes < 2e7 + 2 * self._frame.nbytes, picture.shape

    def _watch(self, raw: bytes, now_ns: int) -> None:
        """What moves the wheels meets such a message, too, if the middleware takes it for one."""
        try:
            msg = self._store.deserialize_cdr(raw, TWIST_STAMPED)
        except Exception:
            return
        stamp_ns = msg.header.stamp.sec * NS + msg.header.stamp.nanosec
        values = twist_from_ros(msg)[[0, 5]]
        command = self._watchdog.on_action(msg.header.frame_id, stamp_ns, values, now_ns, now_ns)
        assert command is None or ((command >= (-0.2, -1.8)) & (command <= (0.6, 1.8))).all(), command
        if self._watchdog.latched:
            self._watchdog.reset()  # and meet the next one, too

    def _message(self, name: str, type_name: str, data: Any) -> Any:
        msg = recording.empty_message(self._store, type_name)
        self._stamp(msg, T0)
        if type_name == COMPRESSED:
            msg.data, msg.format = data, "jpeg"
        elif type_name in (TWIST, TWIST_STAMPED):
            action_to_ros(msg, T0, Action(("linear_x", "angular_z"), data[None, [0, 5]], 0.1))
        elif type_name == ODOMETRY:
            msg.pose.pose.position.x, msg.twist.twist.linear.x = 1.5, 0.3
        else:
            to_ros(SPECS[name].kind, msg, T0, deepcopy(data), "", self._store.types["sensor_msgs/msg/PointField"])
        return msg

    def _stamp(self, msg: Any, stamp_ns: int) -> None:
        if hasattr(msg, "header"):
            msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(stamp_ns, NS)

    def _change(self, random: Random, msg: Any, path: tuple) -> tuple | None:
        """Change what is at `path`, unless a change before has taken it away: the path, its owner, key, old, new."""
        owner = msg
        for key in path[:-1]:
            owner = _get(owner, key)
        old = _get(owner, path[-1])
        if old is None:
            return None
        new = self._odd(random, msg, path, old)
        _put(owner, path[-1], new)
        return path, owner, path[-1], old, new

    def _odd(self, random: Random, msg: Any, path: tuple, old: Any) -> Any:
        if path == ("data",) and hasattr(msg, "format") and isinstance(old, np.ndarray) and random.random() < 0.3:
            return claim_size(random, old)
        return odd(random, old)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """All fields of a message, and those of the messages in it."""
    if is_dataclass(value):
        for name in (f.name for f in fields(value) if re.match("[a-z]", f.name)):  # no constants
            yield (*path, name)
            yield from places(getattr(value, name), (*path, name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield (*path, i)
            yield from places(item, (*path, i))


def _get(owner: Any, key: Any) -> Any:
    if isinstance(key, int):
        return owner[key] if isinstance(owner, list) and key < len(owner) else None
    return getattr(owner, key, None) if is_dataclass(owner) else None


def _put(owner: Any, key: Any, value: Any) -> None:
    if isinstance(key, int):
        owner[key] = value
    else:
        setattr(owner, key, value)


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"{value[:20]!r} ({len(value)})" if isinstance(value, (str, bytes, list)) else f"{value!r:.40}"


def claim_size(random: Random, data: np.ndarray) -> np.ndarray:
    """A png or jpeg that says it is of another size."""
    height, width = (random.choice((0, 1, 8, 100, 4000, 8000, 16000, 30000, 60000, 65535)) for _ in range(2))
    out = bytearray(data.tobytes())
    if out[1:4] == b"PNG":
        out[16:24] = struct.pack(">II", width, height)
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    else:
        at = out.find(b"\xff\xc0") + 5  # start of frame, if no change before has spoilt it
        out[at : at + 4] = struct.pack(">HH", height, width)
    return np.frombuffer(bytes(out), np.uint8)


class Bundles:
    """A bundle with anything wrong with it, most often by whoever made it: with hashes that are right. What is accepted
    is opened by an engine, ticks, and if it has a language, reads and speaks."""

    def __init__(self, folder: Path):
        self._folder, self._outside, self._bomb = folder / "bundle", folder / "outside", _bomb()
        self._good = []
        for write in (write_toy, toy_language.write_toy_language, write_pieces):
            bundle = write(folder / "good")
            manifest = json.loads((bundle.path / "manifest.json").read_text())
            self._good.append((dict(bundle.contents), manifest))
            self._outside.write_bytes(bundle.contents["camera.onnx"])
            _remove(self._folder)
            bundle.path.rename(self._folder)
            assert self._attempt()

    def cases(self, random: Random) -> Iterator[Case]:
        good, manifest = random.choice(self._good)
        files, manifest, text = dict(good), deepcopy(manifest), None
        kind = random.choice([*["manifest"] * 3, "onnx", "onnx", "golden", "golden", "words", "folder"])
        spoil = None
        if kind == "manifest" and random.random() < 0.8:
            what, manifest = odd_json(random, manifest)
        elif kind == "manifest":
            what, text = odd_bytes(random, json.dumps(manifest).encode())
        elif kind == "onnx":
            name = random.choice([name for name in files if name.endswith(".onnx")])
            spoilt = odd_bytes(random, files[name], 200) if random.random() < 0.5 else odd_graph(random, files[name])
            what, files[name] = spoilt
            what = f"{name}: {what}"
        elif kind == "golden":
            what, files["golden.npz"] = self._odd_golden(random, files["golden.npz"])
        elif kind == "words":
            name = "vocabulary.json" if "vocabulary.json" in files else "tokenizer.json"
            what, words = odd_json(random, json.loads(files[name]))
            files[name] = json.dumps(words).encode()
            if random.random() < 0.3:
                what, files[name] = odd_bytes(random, files[name])
        else:
            what, spoil = self._odd_folder(random, files)
        if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and random.random() < 0.9:
            manifest["files"] |= {n: sha256(d).hexdigest() for n, d in files.items() if n in manifest["files"]}
        _remove(self._folder)
        self._folder.mkdir()
        for name, data in files.items():
            (self._folder / name).write_bytes(data)
        (self._folder / "manifest.json").write_bytes(json.dumps(manifest).encode() if text is None else text)
        if spoil:
            spoil()
        yield kind, what, self._attempt

    def _attempt(self) -> bool:
        bundle = Bundle.read(self._folder)
        pipeline = Pipeline(bundle, "cpu")
        for spec in bundle.streams:
            pipeline.push(Sample(spec.name, T0, T0, plain(spec, bundle)))
        check_output(bundle, pipeline.tick(T0))
        check_output(bundle, pipeline.tick(T0 + 50 * MS))
        if bundle.language:
            converse(Language(bundle, model=pipeline.model))
        return True

    def _odd_golden(self, random: Random, data: bytes) -> tuple[str, bytes]:
        way = random.choice(("bytes", "bytes", "bomb", *["arrays"] * 6))
        if way == "bytes":
            return odd_bytes(random, data)
        if way == "bomb":
            return "a bomb", self._bomb
        with np.load(BytesIO(data)) as loaded:
            arrays = dict(loaded)
        ways: tuple[Callable[[np.ndarray], Any], ...] = (
            lambda a: a.astype(random.choice(("u1", "f4", "f8", ">f8", "O", "U3", "?", "i8", "c8"))),
            lambda a: a[: random.randrange(len(a))],
            lambda a: np.concatenate([a, a]),
            lambda a: np.float64(0.5),
            lambda a: a[..., None],
            lambda a: a.reshape(-1),
            lambda a: np.full_like(a, np.array(random.choice(FLOATS)).astype(a.dtype)),
            lambda a: np.zeros(3, [("x", "f4"), ("y", "i2")]),
            lambda a: np.zeros((0, *a.shape[1:]), a.dtype),
        )
        names = random.sample(sorted(arrays), random.choice((1, 1, 2)))
        for name in names:
            old = arrays.pop(name)
            if random.random() < 0.9:
                arrays[random.choice((name, name, name, name + "x"))] = random.choice(ways)(old)
        file = BytesIO()
        np.savez(file, **arrays)
        return f"arrays {names}", file.getvalue()

    def _odd_folder(self, random: Random, files: dict[str, bytes]) -> tuple[str, Callable[[], object]]:
        name = random.choice([*files, "manifest.json"])
        path = self._folder / name

        def instead(make: Callable[[], object]) -> None:
            path.unlink()
            make()

        ways: dict[str, Callable[[], object]] = {
            "no": path.unlink,
            "a folder as": lambda: instead(path.mkdir),
            "a link out as": lambda: instead(lambda: path.symlink_to(self._outside)),
            "a link to nothing as": lambda: instead(lambda: path.symlink_to("nothing")),
            "a link to itself as": lambda: instead(lambda: path.symlink_to(name)),
            "a link to another as": lambda: instead(lambda: path.symlink_to(random.choice(list(files)))),
            "a pipe as": lambda: instead(lambda: os.mkfifo(path)),
            "a device as": lambda: instead(lambda: path.symlink_to("/dev/zero")),
            "an empty": lambda: os.truncate(path, 0),
            "a sparse terabyte as": lambda: os.truncate(path, 2**40),
            "no folder, but": lambda: (shutil.rmtree(self._folder), self._folder.write_bytes(b"no folder")),
        }
        way = random.choice(list(ways))
        return f"{way} {name}", ways[way]


def write_pieces(folder: Path) -> Bundle:
    """The toy with a language, with a tokenizer.json in the place of its words."""
    words = toy_language.write_toy_language(folder)
    tokenizer = Tokenizer(
        models.WordPiece({"": 0} | {w: i + 1 for i, w in enumerate(toy_language.WORDS)}, unk_token="")
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    manifest = json.loads((words.path / "manifest.json").read_text())
    del manifest["format"], manifest["files"]
    files = {name: data for name, data in words.contents.items() if name != "vocabulary.json"}
    return write_bundle(folder, manifest, {**files, "tokenizer.json": tokenizer.to_str().encode()})


def converse(language: Language) -> None:
    """All that it can do, about a picture."""
    language.look(plain(language.stream, language.bundle))
    for prompt in language.spec.decoder.prompts if language.spec.decoder else ():
        question = "is it red" if prompt.endswith("question") else None
        said = caption_of(language.say(language.prompt(prompt, question), most=6))
        assert isinstance(said.text, str) and 0 <= said.score <= 1.0001, said
    if language.spec.text and language.bundle.outputs.embedding:
        assert math.isfinite(language.embed("a red ball") @ language.seen())


def odd_graph(random: Random, data: bytes) -> tuple[str, bytes]:
    """An ONNX model with one to three changes to its nodes."""
    model = onnx.load_from_string(data)
    nodes, said = model.graph.node, []
    for _ in range(random.choice((1, 1, 2, 3))):
        node, other, way = (
            random.choice(nodes),
            random.choice(nodes),
            random.choice(("op", "input", "attribute", "drop")),
        )
        said.append(f"{way} of {node.op_type}")
        if way == "op":
            node.op_type = random.choice(
                (other.op_type, "Tile", "Expand", "NonZero", "Loop", "Resize", "LSTM", "Nothing")
            )
        elif way == "input" and node.input:
            node.input[random.randrange(len(node.input))] = random.choice([*other.input, *other.output])
        elif way == "attribute" and node.attribute:
            random.choice(node.attribute).i = random.choice([i for i in INTS if -(2**63) <= i < 2**63])
        elif way == "drop" and len(nodes) > 1:
            nodes.remove(node)
    return ", ".join(said), model.SerializeToString()


def plain(spec: StreamSpec, bundle: Bundle) -> Any:
    """A sample's data, as a stream like this may carry."""
    return {
        "image": lambda: np.full((4, 4, 3), 100, np.uint8),
        "audio": lambda: Audio(np.zeros((160, spec.channels), np.int16), 0, spec.sample_rate_hz),
        "scan": lambda: Scan(np.ones(8, np.float32), 0.0, 0.7, 0.1, 8.0),
        "points": lambda: np.ones((4, 3), np.float32),
        "imu": lambda: np.ones(6, np.float32),
        "vector": lambda: np.ones(spec.shape[0], np.float32),
        "text": lambda: bundle.vocabulary.words[0] if bundle.vocabulary and bundle.vocabulary.words else "go",
    }[spec.kind]()


def _bomb() -> bytes:
    """A golden.npz of half a megabyte with an array of half a gigabyte."""
    file, n = BytesIO(), 2**29
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("dt.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (n,)})
        for _ in range(n >> 20):
            member.write(bytes(1 << 20))
    return file.getvalue()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Recordings:
    """A recording of every kind of stream with anything wrong with it, read and replayed."""

    def __init__(self, folder: Path):
        self._bundle = write_toy(folder / "bundle")
        self._pipeline = Pipeline(self._bundle, "cpu")
        self._folder, self._good = folder / "recording", folder / "good"
        self._steps = [T0 + 100 * MS * i for i in range(3)]  # each has a chunk of its own
        ends = []
        with recording.RecordingWriter(self._good, STREAMS, metadata={"robot": "toy"}) as writer:
            for now_ns in self._steps:
                for j, (name, data) in enumerate(GOOD.items()):
                    stamp_ns = now_ns if name == "text" else now_ns - 20 * MS + j
                    writer.write(Sample(name, stamp_ns, now_ns, data))
                writer.tick(now_ns, {"target": [1.5, -0.2], "alarm": None})
                writer.command("expert/cmd_vel", Action(("linear_x",), np.float32([[0.3]]), 0.1), now_ns, now_ns + 1)
                writer.flush()
                ends.append((recording.partial(self._good) / "good" / "good.mcap").stat().st_size)
        self._good_mcap = (self._good / "good.mcap").read_bytes()
        begins = [17 + int.from_bytes(self._good_mcap[9:17], "little"), *ends]  # a header comes first
        sizes = [9 + int.from_bytes(self._good_mcap[begin + 1 : begin + 9], "little") for begin in begins]
        self._chunks = [self._good_mcap[begin : begin + size] for begin, size in zip(begins, sizes)]
        self._store = recording.typestore()
        with recording._open(self._good) as bag:
            self._all = [(c.topic, c.msgtype, t, bytes(raw)) for c, t, raw in bag.messages()]
        self._plain = folder / "plain"  # the same, neither compressed nor with checksums: what is changed is read
        write_bag(self._plain, self._store, self._all)
        self._yaml = YAML(typ="safe").load((self._good / "metadata.yaml").read_text())
        assert self._attempt(self._good) and self._attempt(self._plain)

    def cases(self, random: Random) -> Iterator[Case]:
        kind = random.choice([*["mcap", "messages"] * 3, "metadata", "metadata", "left"])
        left = recording.partial(self._folder) / self._folder.name
        for folder in (self._folder, left.parent):
            _remove(folder)
        if kind == "messages":
            what = self._odd_messages(random)
        elif kind == "left":  # by a power cut, and a disk that did not keep all
            left.mkdir(parents=True)
            what, mcap = odd_bytes(random, self._good_mcap)
            (left / f"{left.name}.mcap").write_bytes(mcap)
            whole = [now_ns for now_ns, chunk in zip(self._steps, self._chunks) if chunk in mcap]
            yield kind, what, partial(self._repair, whole, what.startswith(("drop", "double")))
            return
        else:
            self._folder.mkdir()
            good = random.choice((self._good, self._plain))
            mcap, metadata = ((good / name).read_bytes() for name in (f"{good.name}.mcap", "metadata.yaml"))
            if kind == "mcap":
                what, mcap = odd_bytes(random, mcap)
                what = f"{good.name}: {what}"
            elif random.random() < 0.4:
                what, metadata = odd_bytes(random, metadata)
            else:
                what, changed = odd_json(random, self._yaml)
                metadata = json.dumps(changed).encode()
            (self._folder / f"{good.name}.mcap").write_bytes(mcap)
            (self._folder / "metadata.yaml").write_bytes(metadata)
        path = self._folder
        if kind != "metadata" and random.random() < 0.5:
            path = next(self._folder.glob("*.mcap"))
            what += ", without metadata.yaml"
        yield kind, what, partial(self._attempt, path)

    def _repair(self, whole: list[int], moved: bool) -> bool:
        """Kept are the steps whose chunks are `whole`, but for one where bytes before it are missing or too many."""
        try:
            repair(self._folder)
        except EdgeError:
            assert len(whole) <= moved, f"{len(whole)} whole chunks, and none is kept"
            raise
        with recording._open(self._folder) as bag:
            kept = {(c.topic, t, bytes(raw)) for c, t, raw in bag.messages()}
        lost = {t for topic, _, t, raw in self._all if (topic, t, raw) not in kept}
        assert len(lost & {*whole}) <= moved, f"lost {len(lost & {*whole})} of {len(whole)} whole chunks"
        return self._attempt(self._folder)

    def _attempt(self, path: Path) -> bool:
        self._pipeline.reset()
        for output in replay(self._pipeline, self._checked(events(path, STREAMS, self._bundle.tick))):
            check_output(self._bundle, output)
        return True

    def _checked(self, found: Iterator[Any]) -> Iterator[Any]:
        for event in found:
            if isinstance(event, Sample):
                check_sample(SPECS[event.stream], event)
            yield event

    def _odd_messages(self, random: Random) -> str:
        """A bag that is whole, but for what its messages hold, their times, and which there are."""
        messages, said = list(self._all), []
        if random.random() < 0.3:  # then there is a rule for when to tick
            messages, said = [m for m in messages if m[0] != recording.TICK], ["no ticks"]
        for _ in range(random.choice((1, 1, 2, 3))):
            i = random.randrange(len(messages))
            topic, type_name, time_ns, raw = messages[i]
            way = random.choice(("bytes", "bytes", "json", "json", "json", "time", "time", "topic", "type"))
            if way == "bytes":
                raw = odd_bytes(random, raw, 96)[1]
            elif way == "json":
                i = random.choice([i for i, m in enumerate(messages) if m[0].startswith("/mm_edge/")] or [i])
                topic, type_name, time_ns, raw = messages[i]
                with suppress(Exception):  # a change before this one may have left no text
                    msg = self._store.deserialize_cdr(raw, recording.STRING)
                    msg.data = json.dumps(odd_json(random, json.loads(msg.data))[1])
                    raw = self._store.serialize_cdr(msg, recording.STRING).tobytes()
            elif way == "time":
                later_ns = min(time_ns + random.choice((NS, 3600 * NS)), 2**64 - 1)
                time_ns = random.choice((0, 1, later_ns, later_ns, 2**62, 2**63 - 1, 2**63, 2**64 - 1))
            elif way == "topic":
                topic = random.choice(("/camera", "/cmd_vel", "/mm_edge/tick", "", "camera", "/röd", "/a" * 300))
            else:
                type_name = random.choice((TWIST_STAMPED, IMAGE, recording.STRING, ODOMETRY))
            messages[i] = topic, type_name, time_ns, raw
            said.append(f"{way} of {topic[:30]}")
        write_bag(self._folder, self._store, messages)
        return ", ".join(said)


def write_bag(path: Path, store: Any, messages: list[tuple[str, str, int, bytes]]) -> None:
    """An MCAP of messages (topic, type, time, bytes), not compressed."""
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[tuple[str, str], Any] = {}
        for topic, type_name, time_ns, raw in messages:
            if (topic, type_name) not in connections:
                connections[topic, type_name] = writer.add_connection(topic, type_name, typestore=store)
            writer.write(connections[topic, type_name], time_ns, raw)


KINDS: dict[str, Any] = {"messages": Messages, "bundles": Bundles, "recordings": Recordings}


# Workers ------------------------------------------------------------------------------------------------------------

Job = tuple[str, str]  # kind, and the seed of its cases


@dataclass
class Report:
    """What a job, or all of them, came to."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)  # (label, "accepted" | "refused" | "finding")
    findings: list[dict[str, str]] = field(default_factory=list)
    slowest_ms: float = 0.0  # of the processor
    slowest: str = ""
    memory_mb: float = 0.0  # resident at the end of a job; of all jobs, by how much it grew

    def add(self, other: Report) -> None:
        self.tried.update(other.tried)
        self.findings += other.findings
        self.memory_mb = max(self.memory_mb, other.memory_mb)
        if other.slowest_ms > self.slowest_ms:
            self.slowest_ms, self.slowest = other.slowest_ms, other.slowest


def try_job(fuzzer: Any, job: Job, begin: Callable[[str], None] = lambda what: None) -> Report:
    """All cases of a job. `begin` hears of each before it is tried."""
    report, (kind, seed) = Report(), job
    for label, what, attempt in fuzzer.cases(Random(seed)):
        name = f"{kind}: {label}: {what}"
        begin(name)
        peak_mb, started_s, end, trouble = _peak_mb(), time.process_time(), "refused", ""
        try:
            end = "accepted" if attempt() else "refused"
        except EdgeError as error:
            if _is_bug(error):
                trouble = _told(error.__cause__)
        except Exception as error:
            trouble = _told(error)
        took_ms = (time.process_time() - started_s) * 1e3
        if not trouble and (jump_mb := _peak_mb() - peak_mb) > JUMP_MB:
            trouble = f"memory jumped by {jump_mb:.0f} MB"
        report.tried[f"{kind}: {label}", "finding" if trouble else end] += 1
        if trouble:
            report.findings.append({"what": name, "seed": seed, "exception": trouble})
        if took_ms > report.slowest_ms:
            report.slowest_ms, report.slowest = took_ms, name
    report.memory_mb = _resident_mb()
    return report


def _is_bug(error: EdgeError) -> bool:
    """Whether `recording.named` hides what our own code raised, and not by `raise`: damaged bytes may lead rosbags to
    anything, but us only to a field that a damaged definition does not have."""
    if not isinstance(error, RecordingError) or not isinstance(cause := error.__cause__, Exception):
        return False
    if isinstance(cause, AttributeError) and is_dataclass(cause.obj):
        return False
    last = traceback.extract_tb(cause.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(mm_edge.__file__).parent)
    return ours and not isinstance(cause, OSError) and not (last.line or "").startswith("raise ")


def _told(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"


def _peak_mb() -> float:
    # Not getrusage's ru_maxrss: a process inherits that from the one that started it, which may have been larger.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _work(pipe: Any, began_s: Any, case: Any, kinds: Mapping[str, Any], folder: Path) -> None:
    """A worker: jobs in, reports out, until there are no more. The first report, of no job, says that it is ready."""

    def begin(what: str) -> None:
        case.value = what.encode("ascii", "backslashreplace")[:250]
        began_s[:] = time.monotonic(), time.process_time()

    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where ONNX Runtime complains
    try:
        fuzzers = {}
        for kind, make in kinds.items():
            (folder / kind).mkdir()
            fuzzers[kind] = make(folder / kind)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_MB * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pipe.send(Report())
        while True:
            job = pipe.recv()
            report = try_job(fuzzers[job[0]], job, begin)
            began_s[0] = 0.0
            pipe.send(report)
    except EOFError:
        pass
    except Exception:
        pipe.send(f"the fuzzer itself: {traceback.format_exc()}")


class Worker:
    """A process that tries jobs, one at a time, and may end, or have to be ended, in any of them."""

    def __init__(self, kinds: Mapping[str, Any], folder: Path, warm_up_jobs: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._began_s, self._case = RawArray("d", 2), RawArray("c", 256)
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        args = (theirs, self._began_s, self._case, kinds, self.folder)
        self.process = context.Process(target=_work, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self._jobs, self._warm_up_jobs, self._first_mb = 0, warm_up_jobs, 0.0

    @property
    def case(self) -> str:
        """What it is trying, or was when it ended."""
        return self._case.value.decode()

    def begin(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def outcome(self) -> Report | str | None:
        """What its job came to, or what was wrong; None while it is at it."""
        if self.pipe.poll():
            try:
                report = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                report = f"the process ended with {self.process.exitcode}"
            if isinstance(report, str):
                if self.job is None:
                    raise RuntimeError(f"a worker cannot even start: {report}")
                return report
            self._jobs += 1
            if self._jobs <= self._warm_up_jobs:
                self._first_mb = report.memory_mb
            report.memory_mb -= self._first_mb
            return report
        began_s, began_cpu_s = self._began_s
        elapsed_s = time.monotonic() - began_s if began_s else 0.0
        if elapsed_s > STUCK_S:
            return f"stuck for {STUCK_S:g} s"
        slow = elapsed_s > SLOW_S and self._cpu_s() - began_cpu_s > SLOW_S
        return f"took longer than {SLOW_S:g} s" if slow else None

    def _cpu_s(self) -> float:
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def fuzz(jobs: list[Job], kinds: Mapping[str, Any] = KINDS, done: Callable[[int], object] = lambda n: None) -> Report:
    """Try all jobs, on all cores. `done` hears how many more cases were tried."""
    report, queue = Report(), deque(jobs)
    shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="mm_edge_fuzz", dir=shared_memory) as temporary:
        folder = Path(temporary)
        n = min(len(os.sched_getaffinity(0)), len(jobs))
        make = partial(Worker, kinds, folder, min(WARM_UP_JOBS, len(jobs) // (2 * n)))
        workers = [make() for _ in range(n)]
        try:
            while workers:
                wait([worker.pipe for worker in workers], 0.05)
                for i, worker in reversed(list(enumerate(workers))):
                    outcome = worker.outcome()
                    if isinstance(outcome, Report):
                        report.add(outcome)
                        done(sum(outcome.tried.values()))
                        if queue:
                            worker.begin(queue.popleft())
                        else:
                            workers.pop(i).end()
                    elif outcome:
                        report.findings.append({"what": worker.case, "seed": worker.job[1], "exception": outcome})
                        worker.end()
                        workers[i] = make()
        finally:
            for worker in workers:
                worker.end()
    if report.memory_mb > LEAK_MB:
        trouble = f"resident memory grew by {report.memory_mb:.0f} MB"
        report.findings.append({"what": "the whole run", "seed": "", "exception": trouble})
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--messages", type=int, default=200_000, help="how many (%(default)s)")
    parser.add_argument("--bundles", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--recordings", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is tried (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    jobs = [("messages", f"{args.seed} messages {i}") for i in range(math.ceil(args.messages / BLOCK))]
    for kind in ("bundles", "recordings"):
        jobs += [(kind, f"{args.seed} {kind} {i}") for i in range(getattr(args, kind))]
    Random(args.seed).shuffle(jobs)
    started_s = time.monotonic()
    with tqdm(total=args.messages + args.bundles + args.recordings, unit="case", disable=None) as bar:
        report = fuzz(jobs, done=bar.update)
    ends: dict[str, Counter[str]] = {}
    for (label, end), count in sorted(report.tried.items()):
        ends.setdefault(label, Counter())[end] += count
    result = {
        "seed": args.seed,
        **{kind: sum(n for (label, _), n in report.tried.items() if label.startswith(kind)) for kind in KINDS},
        "ends": ends,
        "findings": report.findings,
        "slowest_ms": round(report.slowest_ms, 1),
        "slowest": report.slowest,
        "memory_growth_mb": round(report.memory_mb, 1),
        "seconds": round(time.monotonic() - started_s),
    }
    if args.json:
        print(json.dumps(result))
        return 1 if report.findings else 0
    for label, counts in ends.items():
        print(f"{label:<60}" + "".join(f"{count:>8} {end}" for end, count in counts.items()))
    for finding in report.findings:
        print(f"FINDING {finding['what']}\n  Random({finding['seed']!r})\n  {finding['exception']}")
    print(f"slowest {result['slowest_ms']} ms ({report.slowest}), memory grew by {result['memory_growth_mb']} MB")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
