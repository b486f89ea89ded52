"""Makes a recording of what a power cut, a full disk or a killed process left of one in `<path>.partial`.

    print(repair("episodes/0"))  # 1201 messages of 61.2 s are whole; lost 40312 bytes, 0.3 s, with 61 of /imu

What was written lies in chunks, each with a checksum and with the definitions of its topics. Each chunk whose checksum
is right stays where it is, since a full disk has no room for a copy. Damaged bytes between two of them become a record
of a kind that readers of MCAP skip; behind the last of them the file is cut off, and the index is written anew. A
repair that was interrupted may be called again.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mm_edge.errors import RecordingError
from mm_edge.recording import lock, named, partial, publish, typestore
from mm_edge.types import NS

_MAGIC = b"\x89MCAP0\r\n"
_HEADER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK, _INDEX, _METADATA = 1, 3, 4, 5, 6, 7, 12  # opcodes
_PRIVATE = 0x80  # the first opcode that MCAP leaves to its users, and that readers skip
_RECORD = struct.Struct("<BQ")  # opcode, length of what follows
_CHUNK_HEAD = struct.Struct("<BQQQQI8sQ")  # the same, first and last time, size, CRC, compression, compressed size
_ZSTD = b"\4\0\0\0zstd"  # the compression, 37 bytes into a chunk
_ROS2 = b"\4\0\0\0ros2"  # the profile, with which a header begins

Topics = dict[int, tuple[str, str, str]]  # number of a channel -> topic, type, the type's definition
Messages = dict[int, list[tuple[int, int]]]  # number of a channel -> time and place of each of its messages


class Repair(NamedTuple):
    """What a repair kept and what it could not. Times are of arrival."""

    path: Path
    messages: int
    seconds: float
    lost_bytes: int
    lost_s: float  # between messages that were kept, and from the last of them to the last that is known of
    lost: dict[str, int]  # topic -> messages, as far as is known

    def __str__(self) -> str:
        known = ", ".join(f"{n} of {topic}" for topic, n in sorted(self.lost.items()))
        lost = f"lost {self.lost_bytes} bytes, {self.lost_s:.1f} s" + (f", with {known}" if known else "")
        return (
            f"{self.path}: {self.messages} messages of {self.seconds:.1f} s are whole; "
            f"{lost if self.lost_bytes else 'nothing that was written is lost'}. What came in the last second may not "
            "have been written"
        )


def repair(path: str | Path) -> Repair:
    """Make `<path>.partial` the recording `path`.

    Raises RecordingError if `path` exists, `<path>.partial` is being recorded or is none of ours, no chunk is whole, or
    the disk has no room for the index; `<path>.partial` stays, unless nothing was written.
    """
    path = Path(path)
    left, store = partial(path), typestore("EMPTY")
    file = left / path.name / f"{path.name}.mcap"
    if path.exists():
        raise RecordingError(f"{path}: exists already; {left} is left as it is")
    with named(left, "cannot be repaired"):
        if not file.is_file():
            _remove_empty(left, file)
        with file.open("rb") as opened:
            lock(opened, left)
            if not os.fstat(opened.fileno()).st_size:
                _remove_empty(left, file)
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if next(_chunks(data), None) is None:
                    raise RecordingError(
                        f"{left}: no chunk is whole among its {len(data)} bytes: nothing can be saved; remove it, or "
                        "record under another name"
                    )
                kept, lost = _Kept(file, store), _Lost()
                try:
                    _sort(data, kept, lost)
                    kept.close()
                finally:
                    with suppress(OSError):
                        kept.writer.abort()
            publish(path)
    writer, topics = kept.writer, lost.topics | {c.id: c.topic for c in kept.writer.connections}
    seconds, messages = (writer.max_timestamp - writer.min_timestamp) / NS, sum(writer.counts.values())
    by_topic = {topics[number]: n for number, n in lost.messages.items() if number in topics}
    return Repair(path, messages, seconds, lost.bytes, lost.ns / NS, by_topic)


def _remove_empty(left: Path, file: Path) -> NoReturn:
    if others := sorted(str(p.relative_to(left)) for p in left.rglob("*") if p not in (file.parent, file)):
        raise RecordingError(
            f"{left}: expected a recording in {file.relative_to(left)}, got {others[:5]}; it is left as it is"
        )
    file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        file.parent.rmdir()
    left.rmdir()
    raise RecordingError(f"{left}: nothing had been written, and it is gone now")


def _sort(data: mmap.mmap, kept: _Kept, lost: _Lost) -> None:
    end, last_ns = kept.begin(data), 0
    for at, compressed, plain in _chunks(data):
        if at < end or 0 < at - end < _RECORD.size:
            continue  # bytes were taken out or put in: the index before it, or the gap as a record, would run into it
        before_ns, gap = last_ns, data[end:at]
        if gap:
            kept.skip(end, at)
        first_ns, last_ns = kept.keep(at, compressed, plain)
        if gap:
            lost.see(gap, before_ns, first_ns)
        end = kept.end()
    if data[end : end + 1] not in (b"", bytes([_METADATA])):  # which comes before an index: then nothing is lost
        lost.see(data[end:], last_ns, 0)


class _Kept:
    """The writer of rosbags, made to go on in a file that is there, and told of the chunks in it."""

    def __init__(self, file: Path, store: Any):
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
        from rosbags.rosbag2.storage_mcap import McapWriter

        self.writer: Any
        self._storage: Any
        new: Any = _Nowhere()
        self.writer = Writer(file.parent / "new", version=8, storage_plugin=StoragePlugin.MCAP)
        self.writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self.writer.metapath = file.with_name("metadata.yaml")
        self._storage = self.writer.storage = McapWriter(new, CompressionMode.STORAGE)
        self._storage.bio, self._storage.path = _InPlace(io.FileIO(file, "r+")), file
        self._types = store

    def begin(self, data: mmap.mmap) -> int:
        """Where the file's header ends. One that is damaged is written anew, without the name of the library."""
        if data[:9] == _MAGIC + bytes([_HEADER]) and data[17:25] == _ROS2:
            length = 12 + int.from_bytes(data[25:29], "little")
            if data[8:17] == _RECORD.pack(_HEADER, length):
                return 17 + length
        self._storage.bio.write(_MAGIC + _RECORD.pack(_HEADER, 12) + _ROS2 + bytes(4))
        return self.end()

    def skip(self, start: int, end: int) -> None:
        self._storage.bio.seek(start)
        self._storage.bio.write(_RECORD.pack(_PRIVATE, end - start - _RECORD.size))

    def keep(self, at: int, compressed: bytes, plain: bytes) -> tuple[int, int]:
        """A chunk that begins at `at`: its head and what indexes it are written if they are not there. The times of its
        first and its last message."""
        from rosbags.rosbag2.storage_mcap import PendingChunk
        from rosbags.typesys import get_types_from_msg

        writer, storage = self.writer, self._storage
        topics, messages = _contents(plain)
        for topic, type_name, definition in list(topics.values())[len(writer.connections) :]:
            self._types.register(get_types_from_msg(definition, type_name))
            writer.add_connection(topic, type_name, typestore=self._types)
        for number, of_channel in messages.items():
            writer.counts[number] += len(of_channel)
            storage.channel_stats[number] += len(of_channel)
        first_ns, last_ns = _span(messages)
        writer.min_timestamp = storage.message_start_time = min(writer.min_timestamp, first_ns)
        writer.max_timestamp = storage.message_end_time = max(writer.max_timestamp, last_ns)
        storage.chunk = PendingChunk(first_ns, last_ns, io.BytesIO(), messages)
        storage.chunk.bio.write(plain)
        storage.compressor = lambda _: compressed
        storage.bio.seek(at)
        storage.close_chunk()
        return first_ns, last_ns

    def end(self) -> int:
        return self._storage.bio.tell()

    def close(self) -> None:
        """Cut the file off here; write its index and metadata.yaml."""
        self._storage.bio.truncate()
        self.writer.close()


class _Nowhere:
    """The folder of a file that takes no room: rosbags begins a new one, but the disk may be full."""

    name = ""

    def __truediv__(self, name: str) -> _Nowhere:
        return self

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO()


class _InPlace(io.BufferedRandom):
    """Writes only what is not there already: a recording is long, and a card is slow and worn by writing."""

    def write(self, data: Any) -> int:
        at = self.tell()
        if self.read(len(data)) != bytes(data):
            self.seek(at)
            super().write(data)
        return len(data)


class _Lost:
    """What is known of bytes that cannot be kept."""

    def __init__(self) -> None:
        self.bytes = self.ns = 0
        self.topics: dict[int, str] = {}
        self.messages: Counter[int] = Counter()  # of each channel

    def see(self, data: bytes, since_ns: int, until_ns: int) -> None:
        """`since_ns`, `until_ns`: the times of the messages kept before and after; 0 where there are none."""
        self.bytes += len(data)
        at, found = 0, list[Messages]()  # in each chunk
        while at + _RECORD.size <= len(data):
            opcode, length = _RECORD.unpack_from(data, at)
            record = data[at : at + _RECORD.size + length]
            with suppress(Exception):  # whatever damaged bytes lead to
                if opcode == _CHUNK:
                    found.append({})
                    topics, found[-1] = _contents(_begin(record[_CHUNK_HEAD.size :]))
                    self.topics.update({number: topic for number, (topic, _, _) in topics.items()})
                elif opcode == _INDEX:  # of the chunk before it, whole where that may not be
                    number, size = struct.unpack_from("<HI", record, _RECORD.size)
                    found[-1][number] = list(struct.iter_unpack("<QQ", record[-size:]))
            at += len(record)
        for messages in found:
            self.messages.update({number: len(of_channel) for number, of_channel in messages.items()})
        times = [time_ns for messages in found if messages for time_ns in _span(messages)]
        since_ns, until_ns = since_ns or min(times, default=until_ns), until_ns or max(times, default=since_ns)
        self.ns += max(0, until_ns - since_ns)


def _chunks(data: mmap.mmap) -> Iterator[tuple[int, bytes, bytes]]:
    """Of each whole chunk: where it begins, its compressed and its plain bytes."""
    from rosbags.rosbag2.storage_mcap import zstd

    at = 0
    while (mark := data.find(_ZSTD, at)) >= 0:
        at, start = mark + 1, mark - 37
        if start < 0 or start + _CHUNK_HEAD.size > len(data):
            continue
        _, length, *_, size = _CHUNK_HEAD.unpack_from(data, start)
        end = start + _CHUNK_HEAD.size + size
        if end != start + _RECORD.size + length or end > len(data):
            continue
        compressed = data[start + _CHUNK_HEAD.size : end]
        with suppress(zstd.ZstdError):
            yield start, compressed, zstd.decompress(compressed)
            at = end


def _begin(compressed: bytes) -> bytes:
    """The plain bytes of a chunk that is torn or damaged, as far as they can be had."""
    from rosbags.rosbag2.storage_mcap import zstd

    decoder, plain = zstd.ZstdDecompressor(), list[bytes]()
    with suppress(zstd.ZstdError):
        for at in range(0, len(compressed), 4096):
            plain.append(decoder.decompress(compressed[at : at + 4096]))
    return b"".join(plain)


def _contents(plain: bytes) -> tuple[Topics, Messages]:
    """Of the records in a chunk that are whole."""
    from rosbags.rosbag2.storage_mcap import read_string

    types: dict[int, tuple[str, str]] = {}
    topics: Topics = {}
    messages: Messages = {}
    at = 0
    while at + _RECORD.size <= len(plain):
        opcode, length = _RECORD.unpack_from(plain, at)
        content = io.BytesIO(plain[at + _RECORD.size : at + _RECORD.size + length])
        if len(content.getbuffer()) < length:
            break
        number = int.from_bytes(content.read(2), "little")
        if opcode == _SCHEMA:
            name, _, definition = read_string(content), read_string(content), read_string(content)
            types[number] = name, definition
        elif opcode == _CHANNEL:
            name, definition = types[int.from_bytes(content.read(2), "little")]
            topics[number] = read_string(content), name, definition
        elif opcode == _MESSAGE:
            _, time_ns = struct.unpack("<IQ", content.read(12))
            messages.setdefault(number, []).append((time_ns, at))
        at += _RECORD.size + length
    return topics, messages


def _span(messages: Messages) -> tuple[int, int]:
    times = [time_ns for of_channel in messages.values() for time_ns, _ in of_channel]
    return min(times), max(times)
