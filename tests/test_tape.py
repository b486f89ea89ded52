import threading
import time
import tracemalloc
from collections import namedtuple

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed")

from mm_edge import tape as tapes
from mm_edge.errors import RecordingError
from mm_edge.messages import MESSAGE_TYPES, to_ros
from mm_edge.recording import RecordingWriter, Tick, empty_message, partial, read, read_metadata, typestore
from mm_edge.repair import repair
from mm_edge.tape import MB, Tape, Topic
from mm_edge.types import StreamSpec

STORE = typestore()
IMU = StreamSpec("imu", "imu", (20, 7), 200, 100, window_ms=100)
TOPIC = Topic("/imu", MESSAGE_TYPES["imu"], STORE)
SCAN = StreamSpec("scan", "scan", (2, 120), 10, 300, range_max_m=6)  # of which nothing ever comes
META = {"robot": "test", "streams": {"imu": "/imu", "scan": "/scan"}}
T0 = 1_700_000_000_000_000_000
MS = 1_000_000
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def tape(tmp_path):
    tape = Tape(tmp_path / "run", META, 0)
    yield tape
    tape.close()


def put(tape, arrival_ns, stamp_ns=None):
    msg = empty_message(STORE, TOPIC.type_name)
    to_ros("imu", msg, T0 + (arrival_ns if stamp_ns is None else stamp_ns), np.ones(6, np.float32))
    tape.put(TOPIC, bytes(STORE.serialize_cdr(msg, TOPIC.type_name)), T0 + arrival_ns)


def wait(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def story(path):
    """(what, arrival, stamp) in the order in which replay gets it."""
    return [
        ("tick", r.now_ns - T0) if isinstance(r, Tick) else ("imu", r.arrival_ns - T0, r.stamp_ns - T0)
        for r in read(path, [IMU, SCAN])
    ]


def test_what_came_is_written_with_the_time_it_came_at(tape, tmp_path):
    for arrival_ns in (100, 200, 300):
        put(tape, arrival_ns, stamp_ns=arrival_ns - 7)
    tape.close()
    assert story(tmp_path / "run") == [("imu", t, t - 7) for t in (100, 200, 300)]
    assert tape.counts == {"/imu": 3} and not tape.trouble and not tape.dropped
    assert read_metadata(tmp_path / "run")["robot"] == "test"


def test_a_tick_comes_after_what_it_saw_and_before_what_it_did_not(tape, tmp_path):
    """The tick at 1000 saw the sample stamped 900, which came here at 1003, and not the one stamped 950, which came
    here at 999. That at 2000 saw the one stamped 1990, which came here after all that the tick gave."""
    put(tape, 500)
    put(tape, 1003, stamp_ns=900)
    put(tape, 999, stamp_ns=950)
    tape.tick(T0 + 1000, {"/imu": T0 + 900})
    put(tape, 1500)
    tape.tick(T0 + 2000, {"/imu": T0 + 1990})
    put(tape, 2010, stamp_ns=1990)
    put(tape, 2020)
    tape.close()
    before = [("imu", 500, 500), ("imu", 999, 900), ("tick", 1000), ("imu", 1001, 950)]
    assert story(tmp_path / "run") == [
        *before,
        ("imu", 1500, 1500),
        ("imu", 1999, 1990),
        ("tick", 2000),
        ("imu", 2020, 2020),
    ]


def test_stamps_by_a_clock_that_the_model_has_set_right_move_nothing(tape, tmp_path):
    """Its samples are stamped 500 less than they were; of a stream that nobody records it tells, too."""
    for now_ns in (1000, 2000, 3000):
        put(tape, now_ns - 1, stamp_ns=now_ns - 10)
        tape.tick(T0 + now_ns, {"/imu": T0 + now_ns - 510, "/scan": T0 + 5})
    put(tape, 3001, stamp_ns=2400)
    tape.close()
    expected = [
        ("imu", t - 1, t - 10) if kind == "imu" else (kind, t) for t in (1000, 2000, 3000) for kind in ("imu", "tick")
    ]
    assert story(tmp_path / "run") == [*expected, ("imu", 3001, 2400)]


def test_a_tick_is_set_right_also_where_what_it_saw_before_is_long_on_the_disk(tape, tmp_path):
    """Samples come every two seconds; that of 2000 ms comes here 5 ns after the tick that saw it, at 2001 ms."""
    put(tape, 0)
    tape.tick(T0 + MS, {"/imu": T0})
    wait(lambda: tape.counts)
    for now_ms in (900, 1800):
        tape.tick(T0 + now_ms * MS, {"/imu": T0})
    tape.tick(T0 + 2001 * MS, {"/imu": T0 + 2000 * MS})
    put(tape, 2001 * MS + 5, stamp_ns=2000 * MS)
    tape.close()
    assert story(tmp_path / "run")[-2:] == [("imu", 2001 * MS - 1, 2000 * MS), ("tick", 2001 * MS)]


def test_what_comes_long_after_the_last_tick_stays_where_it_came(tape, tmp_path):
    """The model has ended, and then the sensor's clock falls back."""
    put(tape, 1000 * MS)
    tape.tick(T0 + 1001 * MS, {"/imu": T0 + 1000 * MS})
    for arrival_ms in (1500, 3000):
        put(tape, arrival_ms * MS, stamp_ns=(arrival_ms - 1000) * MS)
    tape.close()
    arrivals = [arrival_ns // MS for what, arrival_ns, *_ in story(tmp_path / "run") if what == "imu"]
    assert arrivals == [1000, 1500, 3000]


def test_a_clock_that_goes_back_ends_the_recording_well_and_it_says_so(tape, tmp_path):
    for arrival_ms in (5000, 4950, 2000, 2010, 5100):
        put(tape, arrival_ms * MS)
    tape._thread.join(30)
    assert tape.trouble == f"{tmp_path}/run: the clock went back by 3.0 s: recording ends before that"
    assert [arrival_ns // MS for _, arrival_ns, _ in story(tmp_path / "run")] == [4950, 5000]
    assert read_metadata(tmp_path / "run")["outcome"] == {"dropped": {}, "ended": tape.trouble}


def test_a_message_without_a_header_is_kept_as_it_came(tape, tmp_path):
    put(tape, 100)
    tape.tick(T0 + 200, {"/imu": T0 + 100})
    tape.put(TOPIC, b"\0\1\0\0", T0 + 300)
    tape.tick(T0 + 400, {"/imu": T0 + 100})
    tape.close()
    assert not tape.trouble and tape.counts == {"/imu": 2}


def test_a_topic_that_cannot_be_added_is_named(tape, tmp_path):
    tape.put(Topic("/mm_edge/tick", "std_msgs/msg/String", STORE), b"\0\1\0\0", T0)
    tape._thread.join(30)
    what = (
        "run: /mm_edge/tick, a std_msgs/msg/String, cannot be written: WriterError: Connection can only be added once"
    )
    assert what in tape.trouble


def test_a_slow_disk_costs_samples_that_are_counted_and_nobody_waits_for_it(tmp_path, monkeypatch):
    """The disk stands still until 100 messages have come, and memory holds ten of them."""
    disk = threading.Event()
    flush = RecordingWriter.flush
    monkeypatch.setattr(RecordingWriter, "flush", lambda self: disk.wait(30) and flush(self))
    tape = Tape(tmp_path / "run", META, 0)
    put(tape, 0)
    size = tape._bytes
    monkeypatch.setattr(tapes, "MEMORY_BYTES", 10 * size)
    for arrival_ns in range(1, 100):
        put(tape, arrival_ns)
    disk.set()
    tape.close()
    assert story(tmp_path / "run") == [("imu", t, t) for t in range(10)]
    assert tape.dropped == {"/imu": 90}
    assert read_metadata(tmp_path / "run")["outcome"] == {"dropped": {"/imu": 90}}


def test_what_waits_takes_no_more_memory_than_it_may_however_small_it_is(tape, monkeypatch):
    """Measured: 10000 messages of 5 bytes and as many ticks."""
    monkeypatch.setattr(tapes, "MEMORY_BYTES", 1_000_000)
    monkeypatch.setattr(tapes, "TURN_S", 60)
    tracemalloc.start()
    for i in range(10_000):
        tape.put(TOPIC, bytes([*b"\0\1\0\0", i % 256]), T0 + i)
        tape.tick(T0 + i, {})
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 1_200_000 and tape.dropped["/imu"] > 0 and tape.dropped["/mm_edge/tick"] > 0


def test_a_disk_that_fills_up_ends_the_recording_well(tmp_path, monkeypatch):
    free = iter([300 * MB, 250 * MB])
    monkeypatch.setattr(tapes.shutil, "disk_usage", lambda path: Usage(0, 0, next(free, 150_500_000)))
    tape = Tape(tmp_path / "run", META, 200 * MB)
    put(tape, 1)
    tape._thread.join(30)
    assert tape.trouble == (
        f"{tmp_path}/run: its disk has 150 MB left, expected at least 200: recording ends before it is full"
    )
    tape.tick(T0 + 2, {})
    assert not tape._new
    assert story(tmp_path / "run") == [("imu", 1, 1)]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RecordingError, match=r"run: its disk has \d+ MB left, expected at least 1000000000"):
        Tape(tmp_path / "run", META, 10**15)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_to_leaves_what_can_be_repaired(tmp_path, monkeypatch):
    """The second chunk fails half-way."""
    tape = Tape(tmp_path / "run", META, 0)
    put(tape, 1)
    wait(lambda: tape.counts)
    write = tape._recording.message

    def fail(*args):
        write(*args)
        tape._recording._writer.storage.bio.write(b"half a chunk")
        raise RecordingError(f"{tmp_path}/run: cannot be written: No space left on device")

    monkeypatch.setattr(tape._recording, "message", fail)
    put(tape, 2)
    tape._thread.join(30)
    assert tape.trouble == f"{tmp_path}/run: cannot be written: No space left on device"
    assert repair(tmp_path / "run").lost_bytes == len(b"half a chunk")
    assert story(tmp_path / "run") == [("imu", 1, 1)]


def test_of_nothing_nothing_is_kept(tape, tmp_path):
    tape.close()
    assert tape.trouble == f"{tmp_path}/run: nothing came, and nothing is kept"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="file/run: cannot be written: FileExistsError"):
        Tape(tmp_path / "file" / "run", META, 0)


@pytest.mark.parametrize("there", [lambda path: path, partial])
def test_what_is_there_is_never_overwritten(tmp_path, there):
    there(tmp_path / "run").mkdir()
    with pytest.raises(RecordingError, match=r"run(.partial)?: exists already"):
        Tape(tmp_path / "run", META, 0)
