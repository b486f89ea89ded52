"""Messages on their way to the disk: whoever brings them never waits for it.

    tape = Tape("runs/monday", {"robot": "r2"}, min_free_bytes=200_000_000)
    tape.put(topic, data, arrival_ns)
    tape.tick(now_ns, {"/image": stamp_ns})
    tape.close()

What came in a turn of TURN_S is written in the next, as one chunk, and waited for until it is on the disk: a power cut
takes two turns at most.
"""

from __future__ import annotations

import shutil
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mm_edge.errors import RecordingError
from mm_edge.recording import TICK, RecordingWriter, named, partial
from mm_edge.types import NS

TURN_S = 0.4
MEMORY_BYTES = 128 << 20  # of messages that wait for the disk
OVERHEAD_BYTES = 200  # of memory, that each takes besides its data
BACK_S = 0.1  # about a tick; a clock that goes back by more mixes up what was before and what after
MB = 1_000_000


class Topic(NamedTuple):
    """`store`: a rosbags typestore that holds its type."""

    name: str
    type_name: str
    store: Any


@dataclass
class _Message:
    topic: Topic | None  # None: a tick
    data: bytes
    arrival_ns: int

    @property
    def memory_bytes(self) -> int:
        return len(self.data) + OVERHEAD_BYTES

    @property
    def stamp_ns(self) -> int:
        """Of a message that begins with a Header, in CDR of little-endian machines; 0 of one that is too short."""
        sec, nanosec = struct.unpack_from("<iI", self.data, 4) if len(self.data) >= 12 else (0, 0)
        return sec * NS + nanosec

    def place(self, seen_ns: int, now_ns: int) -> None:
        """Before or after the tick at `now_ns`, whose newest message of this topic was stamped `seen_ns`. What came
        more than a turn before or after it stays: no message is on its way for so long."""
        if abs(self.arrival_ns - now_ns) > TURN_S * NS:
            return
        seen = self.stamp_ns <= seen_ns
        self.arrival_ns = min(self.arrival_ns, now_ns - 1) if seen else max(self.arrival_ns, now_ns + 1)


class Tape:
    """Writes the recording `path`, in a thread of its own.

    Args:
        metadata: see RecordingWriter.
        min_free_bytes: with less than that left on its disk, the recording is ended well.

    Attributes:
        trouble: why it has ended by itself, if it has.
        counts: topic -> messages written.
        dropped: topic -> messages for which there was no room, since the disk is too slow.

    Raises RecordingError if `path` or what was left of it exists, it cannot be written, or too little is free from the
    beginning.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], min_free_bytes: int):
        self.trouble = ""
        self.counts, self.dropped = Counter[str](), Counter[str]()
        self._path, self._min_free_bytes = path, min_free_bytes
        self._new, self._old = list[_Message](), list[_Message]()  # of this turn and of the one before
        self._bytes = 0  # of these, and of what is being written
        self._last_ns = 0  # when a message came
        self._came: dict[str, list[int]] = {}  # topic -> the last two stamps that came, also if they are written
        self._seen: dict[str, tuple[int, int]] = {}  # topic -> the stamp that the last tick saw, and when that was
        self._lock, self._ended = threading.Lock(), threading.Event()
        with named(path, "cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if full := self._full():
                raise RecordingError(full)
        self._open = ExitStack()
        self._recording = self._open.enter_context(RecordingWriter(path, (), metadata=metadata))
        self._thread = threading.Thread(target=self._run, name="tape", daemon=True)
        self._thread.start()

    def put(self, topic: Topic, data: bytes, arrival_ns: int) -> None:
        """A message in CDR. One that comes after the recording has ended is not in it, and a clock that goes back ends
        it: replay takes messages by the time they came at."""
        message = _Message(topic, data, arrival_ns)
        with self._lock:
            back_s, self._last_ns = (self._last_ns - arrival_ns) / NS, arrival_ns
            if back_s > BACK_S and not self.trouble:
                self.trouble = f"{self._path}: the clock went back by {back_s:.1f} s: recording ends before that"
            if topic.name in self._seen:
                message.place(*self._seen[topic.name])
            self._keep(topic.name, message)

    def tick(self, now_ns: int, seen: Mapping[str, int]) -> None:
        """The model ticked at `now_ns`, and had of each topic in `seen` the message with this header stamp.

        Its process and this one take in the same message at times that differ by a millisecond or more, and by ours a
        frame may come after the tick that it caused. Replay would not see it: what waits and what is still to come is
        set right. Where the model has found a sensor's clock to be wrong, `seen` names no stamp that ever came, and
        nothing is touched.
        """
        with self._lock:
            waiting: dict[str, list[_Message]] = {name: [] for name in seen}
            for message in (*self._old, *self._new):
                if message.topic and message.topic.name in waiting:
                    waiting[message.topic.name].append(message)
            for name, stamp_ns in seen.items():
                before_ns = self._seen.pop(name, (0, 0))[0]
                came = dict.fromkeys((*self._came.get(name, ()), *(message.stamp_ns for message in waiting[name])))
                self._came[name] = [*came][-2:]
                if {stamp_ns, before_ns} & came.keys():
                    self._seen[name] = stamp_ns, now_ns
                    for message in waiting[name]:
                        message.place(stamp_ns, now_ns)
            self._keep(TICK, _Message(None, b"", now_ns))

    def close(self) -> None:
        """End the recording well, unless it already has ended."""
        self._ended.set()
        self._thread.join()

    def _keep(self, name: str, message: _Message) -> None:
        if self.trouble:
            return
        if self._bytes + message.memory_bytes > MEMORY_BYTES:
            self.dropped[name] += 1
            return
        self._new.append(message)
        self._bytes += message.memory_bytes

    def _run(self) -> None:
        try:
            with self._open:
                while not (self.trouble or self._ended.wait(TURN_S)):
                    self._turn()
                    if full := self._full():
                        self.trouble = full
                self._turn()
                self._turn()
                if not self.counts:
                    raise RecordingError(f"{self._path}: nothing came, and nothing is kept")
                why = {"ended": self.trouble} if self.trouble else {}
                self._recording.outcome = {"dropped": dict(self.dropped), **why}
        except Exception as error:  # a thread that dies would be silence
            self.trouble = str(error) if isinstance(error, RecordingError) else f"{type(error).__name__}: {error}"
            if not self.counts:
                shutil.rmtree(partial(self._path), ignore_errors=True)

    def _turn(self) -> None:
        with self._lock:
            batch, self._old, self._new = self._old, self._new, []
        for message in batch:
            topic = message.topic
            if topic is None:
                self._recording.tick(message.arrival_ns)
                continue
            if topic.name not in self.counts:
                self._recording.add_topic(*topic)
            self._recording.message(topic.name, message.data, message.arrival_ns)
            self.counts[topic.name] += 1
        if batch:
            self._recording.flush()
        with self._lock:
            self._bytes -= sum(message.memory_bytes for message in batch)

    def _full(self) -> str:
        left_bytes = shutil.disk_usage(self._path.parent).free - self._bytes
        if left_bytes >= self._min_free_bytes:
            return ""
        return (
            f"{self._path}: its disk has {left_bytes // MB} MB left, expected at least {self._min_free_bytes // MB}: "
            "recording ends before it is full"
        )
