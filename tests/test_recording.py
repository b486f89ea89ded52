import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from mm_edge.cli import main
from mm_edge.errors import RecordingError, SampleError
from mm_edge.messages import to_ros
from mm_edge.recording import Command, RecordingWriter, Tick, _compress, empty_message, partial, read, read_metadata
from mm_edge.repair import _begin, repair
from mm_edge.types import Action, Audio, Sample, Scan, StreamSpec

SPECS = [
    StreamSpec("camera", "image", (96, 96, 3), 15, 300),
    StreamSpec("audio", "audio", (3, 24, 8), 50, 300, window_ms=172, sample_rate_hz=16000, channels=2),
    StreamSpec("scan", "scan", (2, 120), 10, 300, range_max_m=6, frame="lidar"),
    StreamSpec("points", "points", (64, 4), 10, 300, range_max_m=6),
    StreamSpec("imu", "imu", (20, 7), 200, 100, window_ms=100),
    StreamSpec("wheels", "vector", (4,), 50, 100),
    StreamSpec("text", "text", (12,), 0, 1000, latched=True),
]
T0 = 1_700_000_000_000_000_007
RNG = np.random.default_rng(0)
SAMPLES = [
    Sample("text", T0 + 1, T0 + 1, "drive to the röd ball"),
    Sample("camera", T0 - 40_000_001, T0 + 2, RNG.integers(0, 256, (48, 64, 3), np.uint8)),
    Sample("scan", T0 - 3, T0 + 3, Scan(np.float32([1.1, np.nan, np.inf]), -0.5, 0.25, 0.125, 12.0)),
    Sample("points", T0 - 2, T0 + 4, RNG.normal(size=(5, 3)).astype(np.float32)),
    Sample("imu", T0 + 4, T0 + 5, RNG.normal(size=6).astype(np.float32)),
    Sample("wheels", T0 + 5, T0 + 6, RNG.normal(size=4).astype(np.float32)),
    Sample("audio", T0 - 20, T0 + 7, Audio(RNG.integers(-32768, 32767, (320, 2), np.int16), 12345, 16000)),
]
ACTION = Action(("linear_x", "angular_z"), np.float32([[0.3, -1.1]]), 0.1)


def record(path, samples=SAMPLES, **kwargs):
    with RecordingWriter(path, SPECS, **kwargs) as recording:
        for sample in samples:
            recording.write(sample)
    return path


def bits(value):
    """Equal only if equal to the last bit and type."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return (type(value), *map(bits, value)) if isinstance(value, tuple) else (type(value), value)


def test_samples_come_back_bit_by_bit(tmp_path):
    got = list(read(record(tmp_path / "episode"), SPECS))
    assert [bits(sample) for sample in got] == [bits(sample) for sample in SAMPLES]


def test_order_is_that_of_arrival_whatever_the_order_of_writing(tmp_path):
    got = list(read(record(tmp_path / "episode", SAMPLES[::-1]), SPECS))
    assert [sample.arrival_ns for sample in got] == [T0 + i for i in range(1, 8)]


def test_at_the_same_time_the_order_is_that_of_writing_even_across_chunks(tmp_path):
    """Ticks and frames of one instant, 4 MB of them: a tick stays between the frames that it saw and did not see."""
    with RecordingWriter(tmp_path / "episode", SPECS) as recording:
        for i in range(8):
            frame = np.full((300, 600, 3), i, np.uint8)
            recording.write(Sample("camera", T0 - 10 + i, T0, frame))
            recording.tick(T0, {"i": i})
    got = [r.labels["i"] if isinstance(r, Tick) else r.data[0, 0, 0] for r in read(tmp_path / "episode", SPECS)]
    assert got == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_ticks_commands_and_what_else_is_known(tmp_path):
    with RecordingWriter(tmp_path / "e", SPECS, {"camera": "front/image"}, {"robot": "sim", "seed": 7}) as recording:
        recording.write(SAMPLES[0])
        recording.tick(T0 + 2, {"target": np.float32([1.5, -0.25]), "alarm": None})
        recording.command("expert/cmd_vel", ACTION, T0 + 2, T0 + 2)
        recording.command("cmd_vel", ACTION, T0 + 2, T0 + 9)
        recording.outcome = {"success": True}
    text, tick, expert, executed = read(tmp_path / "e", SPECS)
    assert (text, tick) == (SAMPLES[0], Tick(T0 + 2, {"target": [1.5, -0.25], "alarm": None}))
    assert (expert.topic, expert.arrival_ns, executed.topic) == ("expert/cmd_vel", T0 + 2, "cmd_vel")
    assert isinstance(executed, Command) and executed.arrival_ns == T0 + 9
    assert bits(executed.values) == bits(np.float32([0.3, 0, 0, 0, 0, -1.1]))
    metadata = read_metadata(tmp_path / "e")
    assert metadata["streams"]["camera"] == "/front/image" and metadata["streams"]["scan"] == "/scan"
    assert (metadata["robot"], metadata["seed"]) == ("sim", 7)
    assert (metadata["outcome"], metadata["ticks"]) == ({"success": True}, 1)


def test_only_streams_asked_for_are_read(tmp_path):
    assert [s.stream for s in read(record(tmp_path / "episode"), [SPECS[4], SPECS[0]])] == ["camera", "imu"]


def test_the_bag_is_one_that_ros2_bag_knows(tmp_path):
    """A folder with metadata.yaml and an MCAP file of its name, profile ros2, chunks in zstd, absolute topics."""
    yaml = pytest.importorskip("yaml")
    path = record(tmp_path / "episode")
    assert sorted(p.name for p in path.iterdir()) == ["episode.mcap", "metadata.yaml"]
    info = yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert (info["version"], info["storage_identifier"], info["relative_file_paths"]) == (8, "mcap", ["episode.mcap"])
    topics = {t["topic_metadata"]["name"]: t["topic_metadata"]["type"] for t in info["topics_with_message_count"]}
    assert topics["/camera"] == "sensor_msgs/msg/Image" and topics["/audio"] == "sensor_msgs/msg/PointCloud2"
    assert info["starting_time"]["nanoseconds_since_epoch"] == T0 + 1
    data = (path / "episode.mcap").read_bytes()
    assert data.startswith(b"\x89MCAP0\r\n") and b"ros2msg" in data and b"zstd" in data


def test_what_a_message_cannot_hold_exactly_is_refused(tmp_path):
    double = SAMPLES[2].data._replace(angle_min=-np.pi)
    with RecordingWriter(tmp_path / "episode", SPECS) as recording:
        for sample, expected in [
            (Sample("text", T0, T0 + 1, "go"), "text stamped as it arrives"),
            (Sample("scan", T0, T0, double), "angles and range limits that are float32"),
            (Sample("imu", 0, T0, SAMPLES[4].data), "a stamp after 0"),
        ]:
            with pytest.raises(SampleError, match=expected):
                recording.write(sample)
        recording.write(SAMPLES[0])
    assert list(read(tmp_path / "episode", SPECS)) == [SAMPLES[0]]


# What goes wrong ---------------------------------------------------------------------------------------------------


def test_an_existing_recording_is_never_overwritten(tmp_path):
    path = record(tmp_path / "episode")
    with pytest.raises(RecordingError, match="episode: exists already"):
        record(path)
    assert len(list(read(path, SPECS))) == len(SAMPLES)


def test_topics_must_differ(tmp_path):
    with pytest.raises(RecordingError, match="each stream needs a topic of its own"):
        RecordingWriter(tmp_path / "episode", SPECS, {"camera": "scan"})


def test_an_exception_leaves_nothing_that_looks_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), RecordingWriter(tmp_path / "episode", SPECS) as recording:
        recording.write(SAMPLES[0])
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["episode.partial"]
    for path in tmp_path.rglob("*"):
        with pytest.raises(RecordingError):
            list(read(path, SPECS))
    with pytest.raises(RecordingError, match=r"episode.partial: exists already; `mm-edge record .*` repairs it"):
        record(tmp_path / "episode")


def write_until_killed(path, started):
    with RecordingWriter(path, SPECS) as recording:
        for i in range(10**9):
            recording.write(Sample("camera", T0 + i, T0 + i, RNG.integers(0, 256, (200, 300, 3), np.uint8)))
            if i == 50:
                started.set()


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=write_until_killed, args=(tmp_path / "episode", started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert [p.name for p in tmp_path.iterdir()] == ["episode.partial"]
    for path in tmp_path.rglob("*"):
        with pytest.raises(RecordingError):
            list(read(path, SPECS))


def test_a_folder_of_recordings_is_no_recording_but_names_them(tmp_path):
    for name in ("0", "1"):
        record(tmp_path / "all" / name)
    with pytest.raises(
        RecordingError, match=r"all: expected a metadata.yaml, got none; the recordings 0, 1 lie inside"
    ):
        list(read(tmp_path / "all", SPECS))


def test_missing_and_foreign_files_are_named(tmp_path):
    for name in ("nothing", "nothing.mcap", "nothing.bag"):
        with pytest.raises(RecordingError, match=name):
            list(read(tmp_path / name, SPECS))
        (tmp_path / name).write_bytes(b"no recording")
        with pytest.raises(RecordingError, match=name):
            list(read(tmp_path / name, SPECS))
        with pytest.raises(RecordingError, match=name):
            read_metadata(tmp_path / name)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = record(tmp_path / "episode")
    mcap = path / "episode.mcap"
    whole = mcap.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        mcap.write_bytes(whole[:size])
        with pytest.raises(RecordingError, match="episode"):
            list(read(path, SPECS))
    mcap.unlink()
    with pytest.raises(RecordingError, match=r"episode\.mcap"):
        list(read(path, SPECS))


@settings(max_examples=150, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_a_damaged_file_is_refused_or_says_what_it_said(tmp_path_factory, share, flip, in_metadata):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        record(folder)
    file = folder / ("metadata.yaml" if in_metadata else "damaged.mcap")
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[int(share * len(whole))] ^= flip
    file.write_bytes(damaged)
    try:
        assert {bits(r) for r in read(folder, SPECS)} == {bits(s) for s in SAMPLES}
    except RecordingError as error:
        assert str(folder) in str(error)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(("topic", "text"), [("tick", "7"), ("tick", "[]"), ("meta", "[1]"), ("outcome", "null")])
def test_json_that_is_no_object_is_refused(tmp_path, topic, text):
    """A tick's labels would be joined with commands, far from here."""
    messages = [("/imu", "sensor_msgs/msg/Imu", T0, lambda m: to_ros("imu", m, T0, SAMPLES[4].data))]
    messages += [(f"/mm_edge/{topic}", "std_msgs/msg/String", T0 + 1, lambda m: setattr(m, "data", text))]
    path = foreign_bag(tmp_path / "bag", StoragePlugin.MCAP, messages)
    with pytest.raises(RecordingError, match="bag: cannot be read: ValueError: expected a JSON object, got "):
        read_metadata(path)
        list(read(path, SPECS, {"imu": "imu"}))


@pytest.mark.parametrize("streams", [7, ["imu"], {"imu": None}])
def test_streams_that_are_no_topics_are_refused(tmp_path, streams):
    with RecordingWriter(tmp_path / "bag", SPECS, metadata={"streams": streams}) as recording:
        recording.write(SAMPLES[4])
    with pytest.raises(RecordingError, match="bag: expected streams as a topic for each, got "):
        list(read(tmp_path / "bag", SPECS))


def test_a_damaged_index_that_loses_a_topic_is_noticed(tmp_path):
    path = record(tmp_path / "episode")
    whole = (path / "episode.mcap").read_bytes()
    at = whole.rindex(b"/imu")
    (path / "episode.mcap").write_bytes(whole[:at] + b"/amu" + whole[at + 4 :])
    with pytest.raises(RecordingError, match=r"episode: damaged: lacks messages of \['/imu'\]"):
        list(read(path, SPECS))


# What is left of a recording that was not ended ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The bytes of a recording whose writer was killed, and where in them each of its 7 chunks begins and ends. The
    i-th holds the i-th of SAMPLES and a tick."""
    path, sizes = tmp_path_factory.mktemp("left") / "episode", []
    with pytest.raises(KeyboardInterrupt), RecordingWriter(path, SPECS) as recording:
        for sample in SAMPLES:
            recording.write(sample)
            recording.tick(sample.arrival_ns)
            recording.flush()
            sizes.append((partial(path) / "episode" / "episode.mcap").stat().st_size)
        raise KeyboardInterrupt
    data = (partial(path) / "episode" / "episode.mcap").read_bytes()
    header = 17 + int.from_bytes(data[9:17], "little")
    begins = [header, *sizes[:-1]]
    return data, [(begin, begin + 9 + int.from_bytes(data[begin + 1 : begin + 9], "little")) for begin in begins]


def leave(path, data):
    folder = partial(path) / path.name
    folder.mkdir(parents=True)
    (folder / f"{path.name}.mcap").write_bytes(data)
    return path


def samples(path):
    """Though what says which topic is which stream may be lost."""
    topics = {spec.name: spec.name for spec in SPECS}
    return [bits(record) for record in read(path, SPECS, topics) if isinstance(record, Sample)]


def walk(file):
    """From record to record, as readers go that do not look at the index."""
    at = 8
    while at < len(file) - 8:
        at += 9 + int.from_bytes(file[at + 1 : at + 9], "little")
    assert at == len(file) - 8


def test_every_whole_chunk_is_kept_wherever_the_file_was_cut(tmp_path, left):
    data, chunks = left
    sizes = {0, *(at + by for begin, end in chunks for at in (begin, (begin + end) // 2, end) for by in (-1, 0, 1))}
    for size in sorted(sizes):
        path, whole = leave(tmp_path / str(size), data[:size]), sum(end <= size for _, end in chunks)
        if not whole:
            told = (
                "no chunk is whole .* remove it, or record under another name$" if size else "nothing had been written"
            )
            with pytest.raises(RecordingError, match=f"{size}.partial: {told}"):
                repair(path)
            assert partial(path).exists() == (size > 0)
            continue
        repaired = repair(path)
        assert samples(path) == [bits(sample) for sample in SAMPLES[:whole]]
        assert read_metadata(path)["ticks"] == whole and not partial(path).exists()
        assert (path / f"{size}.mcap").read_bytes().startswith(data[: chunks[whole - 1][1]])
        assert repaired.messages == 1 + 2 * whole  # one says which topic is which stream
        torn = whole < len(chunks) and size > chunks[whole][0]
        assert repaired.lost_bytes == (size - chunks[whole][0] if torn else 0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_bit_costs_no_other_chunk_than_its_own(tmp_path_factory, left, share, flip):
    data, chunks = left
    at, damaged = int(share * len(data)), bytearray(data)
    damaged[at] ^= flip
    path = leave(tmp_path_factory.mktemp("flipped") / "episode", damaged)
    repaired, got, every = repair(path), samples(path), [bits(sample) for sample in SAMPLES]
    others = [sample for sample, (begin, end) in zip(every, chunks) if not begin <= at < end]
    assert got == others or (got == every and not repaired.lost)  # what a chunk's head says can be told from the rest
    file = path.joinpath("episode.mcap").read_bytes()
    walk(file)
    assert len(file) - 8 > len(data)


def test_what_was_lost_is_told(tmp_path):
    """Four chunks of 0.1 s: of the second a bit is flipped, the last is cut where two of its four frames are whole."""
    path, sizes = tmp_path / "episode", []
    with pytest.raises(KeyboardInterrupt), RecordingWriter(path, SPECS) as recording:
        for i in range(16):
            recording.write(Sample("camera", T0, T0 + i * 25_000_000, RNG.integers(0, 256, (100, 300, 3), np.uint8)))
            if i % 4 == 3:
                recording.flush()
                sizes.append((partial(path) / "episode" / "episode.mcap").stat().st_size)
        raise KeyboardInterrupt
    file = partial(path) / "episode" / "episode.mcap"
    damaged = bytearray(file.read_bytes()[: sizes[2] + 270_000])
    damaged[sizes[0] + 200_000] ^= 1
    file.write_bytes(damaged)
    repaired = repair(path)
    assert repaired.lost == {"/camera": 4 + 2} and repaired.lost_bytes == sizes[1] - sizes[0] + 270_000
    assert repaired.lost_s == pytest.approx(0.125 + 0.05)  # from 0.075 to 0.2 s, and from 0.275 to 0.325 s
    assert str(repaired).startswith(f"{path}: 9 messages of 0.3 s are whole; lost {repaired.lost_bytes} bytes, 0.2 s, ")
    assert [r.arrival_ns - T0 for r in read(path, SPECS)] == [i * 25_000_000 for i in (0, 1, 2, 3, 8, 9, 10, 11)]


@pytest.mark.parametrize("lacks", ["only its name", "metadata.yaml", "the end of its index"])
def test_of_a_recording_killed_as_it_ended_nothing_is_lost(tmp_path, lacks):
    path = record(tmp_path / "episode")
    whole = path.joinpath("episode.mcap").read_bytes()
    if lacks == "metadata.yaml":
        path.joinpath("metadata.yaml").unlink()
    if lacks == "the end of its index":
        path.joinpath("episode.mcap").write_bytes(whole[:-100])
    partial(path).mkdir()
    path.rename(partial(path) / "episode")
    assert str(repair(path)).split("; ")[1].startswith("nothing that was written is lost")
    assert path.joinpath("episode.mcap").read_bytes() == whole
    assert [bits(sample) for sample in read(path, SPECS)] == [bits(sample) for sample in SAMPLES]


def test_a_chunk_is_lost_alone_where_bytes_before_it_are_missing_or_too_many(tmp_path, left):
    """Taken out of the index before it, or put between that and it."""
    data, chunks = left
    (_, end), (begin, _) = chunks[2], chunks[3]
    expected = [bits(sample) for sample in (*SAMPLES[:3], *SAMPLES[4:])]
    for changed in (
        data[: end + 5] + data[end + 9 :],
        data[: begin - 40] + data[begin:],
        data[:begin] + bytes(5) + data[begin:],
    ):
        path = leave(tmp_path / str(len(changed)), changed)
        assert repair(path).lost_bytes > 0 and samples(path) == expected
        walk((path / f"{path.name}.mcap").read_bytes())


def test_an_index_of_topics_that_nothing_defines_is_lost_without_a_name(tmp_path, left):
    data, chunks = left
    damaged, (begin, end) = bytearray(data), chunks[3]
    damaged[begin + 60] ^= 1
    damaged[end + 9 : end + 11] = b"\xff\xff"  # number of a channel
    repaired = repair(leave(tmp_path / "episode", damaged))
    assert repaired.lost_bytes == chunks[4][0] - begin and set(repaired.lost) <= {"/points", "/mm_edge/tick"}


def test_a_torn_chunk_of_a_large_message_is_looked_at_in_no_time():
    torn = _compress(RNG.bytes(25_000_000))[:-1000]
    started_s = time.process_time()
    assert len(_begin(torn)) > 24_000_000
    assert time.process_time() - started_s < 2  # in linear time 0.05


def test_what_is_still_being_recorded_is_not_repaired(tmp_path):
    path = tmp_path / "episode"
    with RecordingWriter(path, SPECS) as recording:
        for sample in SAMPLES:
            with pytest.raises(RecordingError, match=r"episode.partial: is being recorded by another process"):
                repair(path)
            recording.write(sample)
            recording.flush()
    assert samples(path) == [bits(sample) for sample in SAMPLES]


def test_a_repair_leaves_what_is_not_its_own(tmp_path, left):
    """As after `mv episode.partial other.partial`."""
    partial(leave(tmp_path / "episode", left[0])).rename(tmp_path / "other.partial")
    with pytest.raises(
        RecordingError, match=r"expected a recording in other/other.mcap, got \['episode', .*left as it"
    ):
        repair(tmp_path / "other")
    assert (tmp_path / "other.partial/episode/episode.mcap").read_bytes() == left[0]


def test_what_else_lies_beside_a_recording_stays_there(tmp_path):
    with RecordingWriter(tmp_path / "episode", SPECS) as recording:
        recording.write(SAMPLES[0])
        (partial(tmp_path / "episode") / "notes").write_text("windy")
    assert samples(tmp_path / "episode") == [bits(SAMPLES[0])]
    assert (tmp_path / "episode.partial/notes").read_text() == "windy"


def test_a_repair_never_overwrites_a_recording(tmp_path, left):
    path = leave(record(tmp_path / "episode"), left[0])
    with pytest.raises(RecordingError, match=r"episode: exists already; .*episode.partial is left as it is"):
        repair(path)
    assert samples(path) == [bits(sample) for sample in SAMPLES] and partial(path).exists()


def test_record_repairs_what_it_finds_and_ends(tmp_path, left, capsys):
    path = leave(tmp_path / "episode", left[0])
    assert main(["record", str(path)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{path}: 15 messages of 0.0 s are whole; nothing that was written is lost"
    )
    assert samples(path) == [bits(sample) for sample in SAMPLES]


def test_a_folder_without_a_name_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path.parent / f"{tmp_path.name}.partial").mkdir()
    assert main(["record", "."]) == 1
    assert (
        capsys.readouterr().err == f"mm-edge record: {tmp_path}: exists already; {tmp_path}.partial is left as it is\n"
    )


def test_the_simulator_leaves_what_is_left_of_another_recording(tmp_path, left, capsys):
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    path = leave(tmp_path / "3", left[0])
    assert main(["record", str(tmp_path), "--sim", "--seed", "3"]) == 1
    assert f"{path}.partial: exists already" in capsys.readouterr().err
    repair(path)
    assert samples(path) == [bits(sample) for sample in SAMPLES]


def test_an_episode_of_the_simulator_that_is_cut_short_is_not_kept(tmp_path):
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    command = [sys.executable, "-m", "mm_edge.cli", "record", str(tmp_path), "--sim", "--seed", "3"]
    command += ["--episodes", "50"]  # so that it is not done before this process comes to it
    simulator = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    end = time.monotonic() + 60
    while not [*tmp_path.glob("3.partial/3/3.mcap")]:
        assert time.monotonic() < end and simulator.poll() is None
        time.sleep(0.01)
    simulator.send_signal(signal.SIGINT)
    said = simulator.communicate(timeout=60)[1]
    assert simulator.returncode in (130, -signal.SIGINT) and "Traceback" not in said
    assert "cut short, and not kept" in said and not [*tmp_path.glob("*.partial")]


# Bags of others ----------------------------------------------------------------------------------------------------


def foreign_bag(path, plugin, messages):
    store = get_typestore(Stores.ROS2_HUMBLE)
    with Writer(path, version=8, storage_plugin=plugin) as writer:
        connections = {}
        for topic, type_name, time_ns, fill in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, type_name, typestore=store)
            msg = empty_message(store, type_name)
            fill(msg)
            writer.write(connections[topic], time_ns, store.serialize_cdr(msg, type_name))
    return path


@pytest.mark.parametrize("plugin", [StoragePlugin.SQLITE3, StoragePlugin.MCAP])
def test_bags_of_others_need_to_be_told_the_topics_unless_streams_are_called_so(tmp_path, plugin):
    """One frame that is good, one without a stamp, and a Twist that someone drove with."""
    frame = SAMPLES[1].data
    path = foreign_bag(
        tmp_path / "humble",
        plugin,
        [
            ("/front/image_raw", "sensor_msgs/msg/Image", T0, lambda m: to_ros("image", m, T0 - 5, frame)),
            ("/front/image_raw", "sensor_msgs/msg/Image", T0 + 1, lambda m: to_ros("image", m, 0, frame)),
            ("/cmd_vel", "geometry_msgs/msg/Twist", T0 + 2, lambda m: setattr(m.linear, "x", 0.5)),
            ("/rear/image_raw", "sensor_msgs/msg/Image", T0 + 3, lambda m: to_ros("image", m, T0, frame)),
        ],
    )
    good, bad, command = read(path, SPECS, {"camera": "front/image_raw"})
    assert bits(good) == bits(Sample("camera", T0 - 5, T0, frame))
    assert str(bad) == "camera: expected a stamp, got 0: its driver leaves header.stamp empty"
    assert (command.topic, command.values[0]) == ("cmd_vel", 0.5)
    assert read_metadata(path) == {"ticks": 0}
    with pytest.raises(RecordingError, match=r"humble: knows no streams, only topics: .*, as in --topic camera=/front"):
        list(read(path, SPECS))
    with pytest.raises(RecordingError, match=r"humble: has no topic \['/image'\]; it has \['/cmd_vel', '/front/im"):
        list(read(path, SPECS, {"camera": "image"}))
    front, rear, other = (replace(SPECS[0], name=name) for name in ("front_image_raw", "rear_image_raw", "camera"))
    found = [r.stream for r in read(path, [front, rear, SPECS[2]]) if isinstance(r, (Sample, SampleError))]
    assert found == ["front_image_raw", "front_image_raw", "rear_image_raw"]  # and no scan
    vector = replace(SPECS[5], name="joint_states")  # nobody takes a command for one
    assert [r.stream for r in read(path, [front, rear, vector]) if isinstance(r, (Sample, SampleError))] == found
    with pytest.raises(RecordingError, match=r"of the streams \['front_image_raw', 'camera'\], as in --topic front"):
        list(read(path, [front, other]))  # the rear one might be the other, or not
    told = read(path, [front, other], {"camera": "/rear/image_raw"})
    assert {r.stream for r in told if isinstance(r, (Sample, SampleError))} == {"front_image_raw", "camera"}


def test_ros1_bags_of_a_real_robot(tmp_path):
    """A Jackal's IMU, 61 s at 50 Hz."""
    import zipfile

    archive = Path(__file__).parents[1].parent / "shared" / "data" / "imu_odom_ros1_bags.zip"
    if not archive.exists():
        pytest.skip(f"{archive} is not here")
    bag = Path(zipfile.ZipFile(archive).extract("test/test2.bag", tmp_path))
    odometry = StreamSpec("odometry", "vector", (13,), 50, 200)
    topics = {"imu": "/imu/data", "odometry": "/jackal_velocity_controller/odom"}
    records = list(read(bag, [SPECS[4], odometry], topics))
    imu = [r for r in records if r.stream == "imu"]
    assert (len(imu), len(records)) == (3061, 3061 + 3060)
    assert imu[0].stamp_ns == 47_580_000_000
    assert 9.5 < np.mean([s.data[2] for s in imu]) < 10.1  # gravity
    assert all(a.arrival_ns <= b.arrival_ns for a, b in pairwise(records))
