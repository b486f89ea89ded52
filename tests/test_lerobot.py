"""Datasets in the LeRobotDataset v3 layout: there and back."""

import json
import math
import sys

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
av = pytest.importorskip("av", reason="av is not installed")
cv2 = pytest.importorskip("cv2", reason="no cv2 is installed")

import pyarrow as pa

from mm_edge.errors import MissingDependency, RecordingError
from mm_edge.recording import Command, RecordingWriter, read, read_metadata
from mm_edge.types import NS, Action, Sample, Scan, StreamSpec
from training.lerobot import T0_NS, from_lerobot, main, to_lerobot
from training.recordings import find, label_of, streams_of, tables_of, tick_of

FPS, LENGTHS, JOINTS = 10, (12, 7), ["shoulder.pos", "elbow.pos", "grip.pos"]
RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(sum(LENGTHS), 3)).astype(np.float32)
ACTIONS = RNG.normal(size=(sum(LENGTHS), 3)).astype(np.float32)
TASKS = ["pick up the cube", "öffne die Tür"]
CODEC = 12  # how far H.264 may move a value of a smooth picture


def picture(i, height=64, width=96):
    """Smooth, and another for each frame of the dataset."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows + 5 * i, columns + 3 * i, np.full((height, width), 8 * i)], -1).astype(np.uint8)


def write_dataset(path, dtype="video"):
    """As LeRobot writes one: all episodes in one file of data and one of video."""
    (path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (path / "data" / "chunk-000").mkdir(parents=True)
    n, episode = sum(LENGTHS), np.repeat(range(len(LENGTHS)), LENGTHS)
    frame = np.concatenate([np.arange(length) for length in LENGTHS])
    columns = {
        "observation.state": STATES.tolist(), "observation.force": STATES[:, 0].tolist(), "action": ACTIONS.tolist(),
        "timestamp": np.float32(frame / FPS), "frame_index": frame, "episode_index": episode, "index": np.arange(n),
        "task_index": np.where(np.arange(n) < 9, 0, 1),
    }  # fmt: skip
    rows = [{"episode_index": i, "length": length, "tasks": TASKS} for i, length in enumerate(LENGTHS)]
    key, begin = "observation.images.wrist", 0
    if dtype == "image":
        png = [cv2.imencode(".png", picture(i)[..., ::-1])[1].tobytes() for i in range(n)]
        columns[key] = [{"bytes": data, "path": None} for data in png]
    else:
        file = path / "videos" / key / "chunk-000" / "file-000.mp4"
        file.parent.mkdir(parents=True)
        with av.open(str(file), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "g": "2"})
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for i in range(n):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
            container.mux(stream.encode())
    for row in rows:
        end = begin + row["length"]
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": begin, "dataset_to_index": end}
        row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
        row |= {f"videos/{key}/from_timestamp": begin / FPS, f"videos/{key}/to_timestamp": end / FPS}
        begin = end
    pq.write_table(pa.table(columns), path / "data" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.table({"task_index": [0, 1], "task": TASKS}), path / "meta" / "tasks.parquet")
    info = {
        "codebase_version": "v3.0", "robot_type": "so100", "fps": FPS, "total_episodes": 2, "total_frames": n,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            key: {"dtype": dtype, "shape": [64, 96, 3], "names": ["height", "width", "channels"]},
            "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": JOINTS}},
            "observation.force": {"dtype": "float32", "shape": [1], "names": None},
            "action": {"dtype": "float32", "shape": [3], "names": JOINTS},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        },
    }  # fmt: skip
    (path / "meta" / "info.json").write_text(json.dumps(info))
    return path


def rows_of(dataset):
    tables = [pq.read_table(file) for file in sorted((dataset / "data").glob("*/*.parquet"))]
    return pa.concat_tables(tables)


def numbers(table, column):
    return np.array(table[column].to_pylist(), np.float32)


def pictures(recording):
    (camera,) = (spec for spec in streams_of([recording]) if spec.kind == "image")
    return [sample for sample in read(recording.path, [camera]) if isinstance(sample, Sample)]


@pytest.mark.parametrize(("dtype", "off"), [("video", CODEC), ("image", 0)])
def test_an_episode_becomes_a_recording(tmp_path, dtype, off):
    paths = from_lerobot(write_dataset(tmp_path / "dataset", dtype), tmp_path / "recordings")
    assert [path.name for path in paths] == ["0", "1"]
    recordings, first = find(tmp_path / "recordings"), 0
    for recording, length in zip(recordings, LENGTHS, strict=True):
        its, topics = slice(first, first + length), recording.topics
        stamps = [T0_NS + i * NS // FPS for i in range(length)]
        assert set(topics) == {"wrist", "state", "force", "text", "action"}
        for name in ("wrist", "state", "force", "action"):
            assert topics[name].stamp_ns.tolist() == topics[name].arrival_ns.tolist() == stamps
        assert np.array_equal(topics["state"].values, STATES[its])
        assert np.array_equal(topics["force"].values[:, 0], STATES[its, 0])
        assert np.array_equal(topics["action"].values, ACTIONS[its]) and topics["action"].names == tuple(JOINTS)
        frames = pictures(recording)
        assert [frame.stamp_ns for frame in frames] == stamps
        for i, frame in enumerate(frames, first):
            assert np.abs(frame.data.astype(int) - picture(i)).max() <= off
        first += length
    assert [recording.topics["text"].values.tolist() for recording in recordings] == [TASKS, [TASKS[1]]]
    joints = {spec.name: spec.joints for spec in streams_of(recordings) if spec.kind == "vector"}
    assert joints == {"state": tuple(JOINTS), "force": ()}  # as the robot's JointState has them
    assert read_metadata(paths[0])["robot"] == "so100"
    with pytest.raises(RecordingError, match="0: exists already"):
        from_lerobot(tmp_path / "dataset", tmp_path / "recordings")


def test_the_label_of_a_frame_is_its_action(tmp_path):
    from_lerobot(write_dataset(tmp_path / "dataset"), tmp_path / "recordings")
    recordings = find(tmp_path / "recordings")
    streams = [spec for spec in streams_of(recordings) if spec.kind != "text"]
    tables = tables_of(recordings[0], streams, label_of(recordings), tick_of(streams))
    assert tables.labels["weight"].all() and np.array_equal(tables.labels["action"], ACTIONS[:12])


def test_there_and_back_nothing_but_the_pictures_changes(tmp_path):
    from_lerobot(write_dataset(tmp_path / "dataset"), tmp_path / "recordings")
    assert to_lerobot(find(tmp_path / "recordings"), tmp_path / "again") == 2
    before, after = rows_of(tmp_path / "dataset"), rows_of(tmp_path / "again")
    for column in ("observation.state", "observation.force", "action", "timestamp"):
        assert np.array_equal(numbers(before, column), numbers(after, column))
    for column in ("frame_index", "episode_index", "index", "task_index"):
        assert before[column].to_pylist() == after[column].to_pylist()
    features = json.loads((tmp_path / "again" / "meta" / "info.json").read_text())["features"]
    assert features["action"] == {"dtype": "float32", "shape": [3], "names": JOINTS}
    assert features["observation.state"]["names"] == JOINTS
    from_lerobot(tmp_path / "again", tmp_path / "once more")
    frames = [frame.data for recording in find(tmp_path / "once more") for frame in pictures(recording)]
    assert len(frames) == sum(LENGTHS)
    for i, frame in enumerate(frames):
        assert np.abs(frame.astype(int) - picture(i)).max() <= 2 * CODEC


def test_the_layout_is_that_of_version_3(tmp_path):
    from_lerobot(write_dataset(tmp_path / "dataset"), tmp_path / "recordings")
    to_lerobot(find(tmp_path / "recordings"), dataset := tmp_path / "again")
    assert sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*.*") if path.is_file()) == [
        "data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet",
        "meta/episodes/chunk-000/file-000.parquet", "meta/info.json", "meta/stats.json", "meta/tasks.parquet",
        "videos/observation.images.wrist/chunk-000/file-000.mp4",
        "videos/observation.images.wrist/chunk-000/file-001.mp4",
    ]  # fmt: skip
    info = json.loads((dataset / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", FPS, "so100")
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (2, 19, 2)
    assert info["features"]["observation.images.wrist"]["shape"] == [64, 96, 3]
    schema = pq.read_schema(dataset / "data/chunk-000/file-000.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "observation.state": "fixed_size_list<element: float>[3]", "observation.force": "float",
        "action": "fixed_size_list<element: float>[3]", "timestamp": "float", "frame_index": "int64",
        "episode_index": "int64", "index": "int64", "task_index": "int64",
    }  # fmt: skip
    second = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[1]
    assert (second["length"], second["tasks"], second["data/file_index"]) == (7, [TASKS[1]], 1)
    assert (second["dataset_from_index"], second["dataset_to_index"]) == (12, 19)
    assert second["videos/observation.images.wrist/to_timestamp"] == 0.7
    assert json.loads(pq.read_schema(dataset / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"] == ["task"]
    stats = json.loads((dataset / "meta" / "stats.json").read_text())
    assert stats["action"]["mean"] == pytest.approx(ACTIONS.mean(0).tolist(), abs=1e-6)
    assert stats["action"]["count"] == [19]
    assert np.shape(stats["observation.images.wrist"]["mean"]) == (3, 1, 1)
    assert (
        0 <= np.min(stats["observation.images.wrist"]["min"]) <= np.max(stats["observation.images.wrist"]["max"]) <= 1
    )


def drive(path, commands_s=(0.0, 9.0), camera_s=(0.0, 9.0), more=(), gravity=9.75):
    """Nine seconds of a base: a camera of odd size at 10 Hz, an IMU at 20 Hz and twists at 20 Hz, 10 ms after it."""
    specs = [
        StreamSpec("camera", "image", (), 10, 0),
        StreamSpec("imu", "imu", (), 20, 0),
        StreamSpec("scan", "scan", (), 1, 0),
    ]
    with RecordingWriter(path, specs) as recording:
        for sample in more:
            recording.write(sample)
        for i in range(180):
            at_ns = T0_NS + i * NS // 20
            if i % 2 == 0 and camera_s[0] <= i / 20 < camera_s[1]:
                recording.write(Sample("camera", at_ns, at_ns, picture(i // 2, 33, 47)))
            recording.write(Sample("imu", at_ns, at_ns, np.float32([i, 0, gravity, 0, 0, 0])))
            if not commands_s[0] <= i / 20 < commands_s[1]:
                continue
            action = Action(("linear_x", "angular_z"), np.float32([[i / 100, -0.5]]), 0.0)
            recording.command("cmd_vel", action, at_ns, at_ns + NS // 100)
    return path


def test_a_frame_is_what_was_newest_and_the_command_that_follows(tmp_path):
    drive(tmp_path / "in" / "a")
    assert main(["to", str(tmp_path / "in"), str(tmp_path / "out"), "--fps", "5"]) == 0
    rows = rows_of(tmp_path / "out")
    assert numbers(rows, "observation.state")[:, 0].tolist() == [*range(0, 180, 4)]
    assert np.array_equal(numbers(rows, "action")[:, 0], np.float32(np.arange(0, 180, 4) / 100))
    assert numbers(rows, "timestamp").tolist() == np.float32(np.arange(45) / 5).tolist()
    features = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())["features"]
    assert features["observation.images.camera"]["info"]["video.pix_fmt"] == "yuv444p"
    assert features["action"]["names"] == ["linear_x", "angular_z"]
    assert main(["from", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    (recording,) = find(tmp_path / "back")
    assert [frame.data.shape for frame in pictures(recording)] == [(33, 47, 3)] * 45
    commands = [r for r in read(recording.path, []) if isinstance(r, Command)]  # a twist again
    assert {command.topic for command in commands} == {"cmd_vel"} and commands[1].values[5] == -0.5


@pytest.mark.parametrize(
    ("lacks", "lengths"),
    [
        ({"commands_s": (2.0, 7.0)}, [49]),  # from 2.1 to 6.9 s: who commands first after a while may have waited
        ({"camera_s": (0.0, 5.0)}, [54]),  # the last frame is good for max_age_ms = 400
    ],
)
def test_an_episode_ends_where_something_is_not_known(tmp_path, lacks, lengths):
    drive(tmp_path / "in" / "a", **lacks)
    to_lerobot(find(tmp_path / "in"), tmp_path / "out")
    episodes = pq.read_table(tmp_path / "out" / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [episode["length"] for episode in episodes] == lengths


def test_a_recording_that_gives_nothing_is_named(tmp_path, capsys):
    """And does not say what others look like."""
    a = drive(tmp_path / "in" / "a", gravity=math.nan)  # its IMU sends, but nothing good
    b = drive(tmp_path / "in" / "b", commands_s=(9.0, 9.0))
    c = drive(tmp_path / "in" / "c", commands_s=(0.0, 2.0), camera_s=(3.0, 9.0))
    drive(tmp_path / "in" / "d")
    assert main(["to", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/out: 1 episodes\n" and said.err.splitlines() == [
        f"{a}: gives no frame: has no imu",
        f"{b}: gives no frame: has no commands of ['linear_x', 'angular_z']",
        f"{c}: gives no frame: its streams and a command were never good at the same time",
    ]
    features = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())["features"]
    assert features["observation.state"]["shape"] == [6]
    assert numbers(rows_of(tmp_path / "out"), "observation.state").shape == (90, 6)


def test_what_cannot_be_converted_is_refused_by_name(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "dataset")
    assert main(["from", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert "nothing: is no dataset in the LeRobotDataset v3 layout: FileNotFoundError" in capsys.readouterr().err
    info = dataset / "meta" / "info.json"
    good = info.read_text()
    info.write_text(good.replace("v3.0", "v2.1"))
    with pytest.raises(RecordingError, match=r"dataset: expected version v3\.x, got v2\.1"):
        from_lerobot(dataset, tmp_path / "out")
    info.write_text(good)
    video = dataset / "videos" / "observation.images.wrist" / "chunk-000" / "file-000.mp4"
    with av.open(str(video), "w") as container:  # of 14 frames where there should be 19
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(14):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(RecordingError, match=r"file-000\.mp4: expected 7 frames from 1\.200 s on, got 2"):
        from_lerobot(dataset, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*[0-9]")] == ["0"]  # whole or not at all
    with pytest.raises(RecordingError, match="out: exists already; datasets are never overwritten"):
        to_lerobot(find(tmp_path / "out" / "0"), tmp_path / "out")
    drive(tmp_path / "in" / "a")
    (drive(tmp_path / "in" / "b") / "b.mcap").write_bytes(b"")
    with pytest.raises(RecordingError, match=r"in/b: cannot be read"):
        to_lerobot(find(tmp_path / "in"), tmp_path / "again")
    assert not (tmp_path / "again.partial").exists()  # before hours of work
    with pytest.raises(SystemExit):
        main(["to", str(tmp_path / "in"), str(tmp_path / "again"), "--fps", "-1"])
    assert "argument --fps: expected a whole number, at least 1, got -1" in capsys.readouterr().err


def test_what_is_left_out_is_told(tmp_path, capsys):
    assert main(["from", str(write_dataset(tmp_path / "dataset")), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 2 recordings; left out: next.reward\n"
    scan = Sample("scan", T0_NS, T0_NS, Scan(np.ones(8, np.float32), 0.0, 0.5, 0.125, 12.0))
    drive(tmp_path / "in" / "a", more=[scan])
    assert main(["to", str(tmp_path / "in"), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/again: 1 episodes; left out: scan\n"


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "dataset")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"the videos of datasets needs av: .*lerobot"):
        from_lerobot(dataset, tmp_path / "out")


def test_joints_keep_their_names_and_their_velocities(tmp_path):
    from test_recordings import ARM, record

    record(tmp_path / "bags" / "0", rates={"/front/image_raw": 10, "/joint_states": 50})
    assert to_lerobot(find(tmp_path / "bags"), tmp_path / "dataset") == 1
    features = json.loads((tmp_path / "dataset" / "meta" / "info.json").read_text())["features"]
    fields = ["shoulder.position", "elbow.position", "shoulder.velocity", "elbow.velocity"]
    assert features["observation.state"]["names"] == fields and features["action"]["names"] == ["shoulder", "elbow"]
    from_lerobot(tmp_path / "dataset", tmp_path / "again")
    (recording,) = again = find(tmp_path / "again")
    (state,) = (spec for spec in streams_of(again) if spec.kind == "vector")
    assert state.joints == ("shoulder", "elbow") and recording.topics["state"].gives == "position, velocity"
    assert label_of(again).topic == "action" and label_of(find(tmp_path / "bags")).topic == ARM[1:]
    assert label_of(again).interface == "position" and "text" not in recording.topics  # there was no task


def test_speeds_of_joints_stay_speeds(tmp_path):
    from test_recordings import record, velocities

    record(tmp_path / "bags" / "0", rates={"/front/image_raw": 10}, edit=velocities)
    to_lerobot(before := find(tmp_path / "bags"), tmp_path / "dataset")
    features = json.loads((tmp_path / "dataset" / "meta" / "info.json").read_text())["features"]
    assert features["action"]["names"] == ["shoulder.velocity", "elbow.velocity"]
    from_lerobot(tmp_path / "dataset", tmp_path / "again")
    one, other = label_of(before), label_of(find(tmp_path / "again"))
    assert (other.interface, other.names, other.min) == ("velocity", ("shoulder", "elbow"), one.min)


def test_what_was_overtaken_is_not_in_the_dataset(tmp_path):
    from test_recordings import record

    def overtaken(topic, at_s, msg):
        if topic == "/joint_states" and round(at_s * 20) % 5 == 0:  # 0.3 s late, with what it saw then
            stamp_ns = msg.header.stamp.sec * NS + msg.header.stamp.nanosec - 3 * NS // 10
            msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(stamp_ns, NS)
            msg.position = msg.position - [0.06, -0.06]

    record(tmp_path / "bags" / "0", rates={"/front/image_raw": 10, "/joint_states": 20}, edit=overtaken)
    to_lerobot(find(tmp_path / "bags"), tmp_path / "dataset", fps=20)
    positions = numbers(rows_of(tmp_path / "dataset"), "observation.state")[:, 0]
    assert len(positions) > 50 and (np.diff(positions) >= 0).all()
