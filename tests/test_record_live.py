"""`mm-edge record` as a user runs it, on real topics: what it keeps, also when it is killed or the disk is full."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ros  # skips this file where there is no ROS 2

pytest.importorskip("rosbags", reason="rosbags is not installed")

from nav_msgs.msg import Odometry
from rclpy.qos import QoSDurabilityPolicy as Durability
from rclpy.qos import QoSProfile
from rclpy.service_introspection import ServiceIntrospectionState
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import SetBool
from test_ros import LATCHED, Robot
from toy_bundle import STREAMS, write_toy_bundle

from mm_edge.bundle import Bundle
from mm_edge.errors import RecordingError
from mm_edge.pipeline import Pipeline
from mm_edge.recording import Command, Tick, partial, read, read_metadata
from mm_edge.replay import events, replay
from mm_edge.types import Sample

pytestmark = pytest.mark.real_time


@pytest.fixture
def graph(tmp_path):
    with ros.ros_graph(tmp_path / "logs") as graph:
        yield graph


@pytest.fixture
def record(graph, tmp_path):
    """Starts `mm-edge record`, in the graph's domain."""
    started = []

    def start(out, *arguments):
        command = [sys.executable, "-m", "mm_edge.cli", "record", str(out), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=graph.nodes.env, cwd=Path(__file__).parents[1], **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def written(out):
    """Bytes of the recording that is being written to `out`."""
    file = partial(out) / out.name / f"{out.name}.mcap"
    return file.stat().st_size if file.exists() else 0


def messages(path):
    """Topic -> messages, whatever they are."""
    found = {}
    with AnyReader([path]) as bag:
        for connection, time_ns, raw in bag.messages():
            found.setdefault(connection.topic, []).append((time_ns, bag.deserialize(raw, connection.msgtype)))
    return found


class Camera:
    """Numbered frames of 0.9 MB that no zstd makes smaller, while the graph waits."""

    def __init__(self, graph, rate_hz=20):
        self._noise = np.random.default_rng(0)
        self._image = Image(height=480, width=640, step=1920, encoding="rgb8")
        self._publisher = graph.node.create_publisher(Image, "image", QoSProfile(depth=5))
        self.sent, self.took_s = 0, []
        graph.node.create_timer(1 / rate_hz, self._send)

    def _send(self):
        self._image.header.stamp.sec, self._image.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
        self._image.header.frame_id, self._image.data = str(self.sent), self._noise.bytes(480 * 1920)
        begin_s = time.perf_counter()
        self._publisher.publish(self._image)
        self.took_s.append(time.perf_counter() - begin_s)
        self.sent += 1


def test_replay_of_a_live_recording_sees_at_each_tick_what_the_robot_saw(graph, record, tmp_path):
    write_toy_bundle(toy := tmp_path / "toy")
    graph.nodes.start("edge_node", {"bundle": toy})
    graph.nodes.start("watchdog_node")
    robot = Robot(graph)
    graph.wait(robot.acts, "action")
    robot.outputs.clear()
    recorder = record(tmp_path / "run", "--bundle", toy)
    graph.wait(lambda: written(tmp_path / "run"), "recording")
    until = len(robot.outputs) + 60
    graph.wait(lambda: len(robot.outputs) > until, "60 outputs more")
    recorder.send_signal(signal.SIGINT)
    said, errors = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, errors
    live = {output["stamp_ns"]: output for output in (json.loads(msg.data) for msg in robot.outputs)}

    records = list(read(tmp_path / "run", STREAMS))
    ticks = [record.now_ns for record in records if isinstance(record, Tick)]
    stamps = sorted(live)
    first = stamps.index(ticks[0])
    assert ticks == stamps[first : first + len(ticks)] and len(ticks) >= 50  # each tick, at its time
    samples = [record for record in records if isinstance(record, Sample)]
    assert {sample.stream for sample in samples} == {"camera", "imu", "text"}
    assert all(0 <= s.arrival_ns - s.stamp_ns < 500_000_000 for s in samples)
    assert {record.topic for record in records if isinstance(record, Command)} == {"cmd_vel", "cmd_vel_raw"}
    assert read_metadata(tmp_path / "run")["bundle"] == Bundle.read(toy).id
    assert re.search(rf"^ +{len([s for s in samples if s.stream == 'imu'])} /imu$", said, re.MULTILINE)

    bundle = Bundle.read(toy)
    replayed = list(replay(Pipeline(bundle, "cpu"), events(tmp_path / "run", bundle.streams, bundle.tick)))
    assert [output.stamp_ns for output in replayed] == ticks
    recorded = {(sample.stream, sample.stamp_ns) for sample in samples}
    both = [output for output in replayed if {"camera", "imu"} <= output.sources.keys()][3:]
    saw = [(name, live[o.stamp_ns]["sources"][name], o.sources[name]) for o in both for name in ("camera", "imu")]
    known = [(robots, ours) for name, robots, ours in saw if (name, robots) in recorded]
    assert len(known) > max(90, 0.95 * len(saw))  # sensors are best effort: one may be lost on the way here
    assert [robots for robots, _ in known] == [ours for _, ours in known]
    assert replayed[-1].action.values[0][0] == pytest.approx(live[ticks[-1]]["action"]["values"][0][0], abs=0.02)
    command = [sys.executable, "-m", "mm_edge.cli", "replay", str(toy), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(ticks), done.stderr


def test_topics_are_recorded_by_name_whatever_their_types_and_their_qos(graph, record, tmp_path):
    """Odometry that comes again and again, and a word that was said once, before."""
    graph.node.create_publisher(String, "said", LATCHED).publish(String(data="go"))
    odometry, sent = graph.node.create_publisher(Odometry, "odom", 10), Odometry()

    def move():
        sent.pose.pose.position.x += 1.0
        odometry.publish(sent)

    graph.node.create_timer(0.05, move)
    before_ns = time.time_ns()
    recorder = record(tmp_path / "run", "--topics", "/said", "/odom", "/never")
    graph.wait(lambda: written(tmp_path / "run") > 10_000, "recording")
    recorder.send_signal(signal.SIGTERM)
    said, errors = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, errors
    found = messages(tmp_path / "run")
    assert [msg.data for _, msg in found["/said"]] == ["go"]
    xs = [msg.pose.pose.position.x for _, msg in found["/odom"]]
    assert xs == sorted({*xs}) and xs[0] == int(xs[0]) and len(xs) > 5
    times = [time_ns for time_ns, _ in found["/odom"]]
    assert times == sorted(times) and before_ns < times[0] < times[-1] < time.time_ns()
    assert "       0 /never\n" in said
    with pytest.raises(RecordingError, match=r"run: knows no streams, only topics: say which of \['/mm_edge/meta'"):
        list(read(tmp_path / "run", STREAMS))


def test_a_type_that_is_not_installed_is_named_and_the_rest_is_recorded(graph, record, tmp_path):
    service = graph.node.create_service(SetBool, "switch", lambda request, response: response)
    service.configure_introspection(graph.node.get_clock(), QoSProfile(depth=1), ServiceIntrospectionState.METADATA)
    publisher = graph.node.create_publisher(String, "said", 10)
    graph.node.create_timer(0.05, lambda: publisher.publish(String(data="go")))
    recorder = record(tmp_path / "run", "--topics", "/said", "/switch/_service_event")
    graph.wait(lambda: written(tmp_path / "run") > 3_000, "recording")
    recorder.send_signal(signal.SIGINT)
    errors = recorder.communicate(timeout=30)[1]
    assert recorder.returncode == 1 and "Traceback" not in errors
    assert "/switch/_service_event is not recorded: it is a std_srvs/srv/SetBool_Event" in errors.splitlines()[-1]
    assert {msg.data for _, msg in messages(tmp_path / "run")["/said"]} == {"go"}


def test_what_a_user_gets_wrong_is_told_in_a_line(record, tmp_path):
    (tmp_path / "file").touch()
    wrong = {
        "file/run: cannot be written: FileExistsError": record(tmp_path / "file" / "run"),
        "expected the name of a topic, got 'foo bar'": record(tmp_path / "a", "--topics", "foo bar"),
        "expected topics of the robot, got ['/mm_edge/tick']": record(tmp_path / "b", "--topics", "/mm_edge/tick"),
    }
    for expected, recorder in wrong.items():
        errors = recorder.communicate(timeout=60)[1]
        assert expected in errors and "Traceback" not in errors
        assert recorder.returncode in (
            1,
            -signal.SIGALRM,
        )  # if its middleware hung on the way out, one time in hundreds


def test_an_output_that_nobody_understands_costs_its_tick_and_no_more(graph, record, tmp_path):
    write_toy_bundle(toy := tmp_path / "toy")
    outputs, sources = graph.node.create_publisher(String, "edge/output", 10), {"imu": "soon"}
    odd = [[], {"stamp_ns": 1, "sources": []}, {"stamp_ns": 1, "sources": sources}, {"stamp_ns": 1e30, "sources": {}}]

    def say():
        for output in [*odd, {"stamp_ns": time.time_ns(), "sources": {}}]:
            outputs.publish(String(data=json.dumps(output)))

    graph.node.create_timer(0.1, say)
    recorder = record(tmp_path / "run", "--bundle", toy)
    graph.wait(lambda: written(tmp_path / "run") > 10_000 or recorder.poll() is not None, "recording")
    recorder.send_signal(signal.SIGINT)
    errors = recorder.communicate(timeout=30)[1]
    assert recorder.returncode == 0 and "no output of an edge_node" in errors
    found = messages(tmp_path / "run")
    assert len(found["/edge/output"]) > 4 * len(found["/mm_edge/tick"]) > 4


def test_what_publishers_keep_is_not_asked_for_again_once_it_was_heard(graph, monkeypatch):
    """DDS would deliver it again, and it would be recorded as new: a publisher that keeps nothing came and went."""
    monkeypatch.syspath_prepend(ros.ROS.env["PYTHONPATH"].split(os.pathsep)[0])
    from mm_edge_ros.record_node import Source

    heard = []
    source = Source(graph.node, "/said", lambda topic, data: heard.append(data))
    graph.node.create_publisher(String, "said", LATCHED).publish(String(data="go"))
    graph.wait(lambda: source.follow() or heard, "word")
    assert source._subscription.qos_profile.durability == Durability.TRANSIENT_LOCAL
    other = graph.node.create_publisher(String, "said", 10)
    graph.wait(
        lambda: source.follow() or source._subscription.qos_profile.durability == Durability.VOLATILE, "other publisher"
    )
    graph.node.destroy_publisher(other)
    graph.wait(lambda: graph.node.count_publishers("/said") == 1, "end of it")
    source.follow()
    assert source._subscription.qos_profile.durability == Durability.VOLATILE


def test_of_a_recorder_that_is_killed_all_is_kept_but_the_last_second(graph, record, tmp_path):
    out, camera = tmp_path / "run", Camera(graph, rate_hz=10)
    recorder = record(out, "--topics", "/image")
    graph.wait(lambda: written(out) > 20_000_000, "20 MB", seconds=60)
    recorder.kill()
    killed_ns = time.time_ns()
    recorder.wait()
    repairer = record(out)
    said, errors = repairer.communicate(timeout=60)
    assert repairer.returncode == 0, errors
    assert re.match(rf"{out}: \d+ messages of \d+\.\d s are whole; (lost|nothing)", said)
    frames = messages(out)["/image"]
    numbers = [int(msg.header.frame_id) for _, msg in frames]
    assert numbers == sorted({*numbers}) and len(numbers) > max(20, 0.8 * (numbers[-1] - numbers[0]))
    assert all(msg.data.size == 921_600 for _, msg in frames)
    assert (killed_ns - frames[-1][0]) / 1e9 < 2.0 and camera.sent > numbers[-1]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a disk of 80 MB is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_up_ends_the_recording_while_there_is_room(graph, record, small_disk):
    Camera(graph)
    recorder = record(small_disk / "run", "--topics", "/image", "--min-free-mb", 50)
    graph.wait(lambda: recorder.poll() is not None, "end", seconds=60)
    errors = recorder.communicate()[1]
    assert recorder.returncode == 1
    assert re.search(r"run: its disk has \d+ MB left, expected at least 50: recording ends before it is full", errors)
    assert len(messages(small_disk / "run")["/image"]) > 10 and shutil.disk_usage(small_disk).free > 10_000_000
    refused = record(small_disk / "next", "--topics", "/image", "--min-free-mb", 100)
    errors = refused.communicate(timeout=30)[1]
    assert "next: its disk has" in errors and "Traceback" not in errors and refused.returncode == 1
    assert [path.name for path in small_disk.iterdir()] == ["run"]


def test_a_disk_that_is_full_all_the_same_costs_what_has_no_room_on_it(graph, record, small_disk):
    Camera(graph)
    recorder = record(small_disk / "run", "--topics", "/image", "--min-free-mb", 0)
    graph.wait(lambda: recorder.poll() is not None, "end", seconds=60)
    errors = recorder.communicate()[1]
    assert recorder.returncode == 1 and "No space left on device" in errors and "Traceback" not in errors
    frames = messages(small_disk / "run")["/image"]
    assert 50 < len(frames) <= (80 << 20) // 921_600 and all(msg.data.size == 921_600 for _, msg in frames)


def test_a_disk_that_is_full_from_the_first_frame_on_leaves_nothing_to_save_and_it_says_so(graph, record, small_disk):
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 400_000))
    Camera(graph)
    recorder = record(small_disk / "run", "--topics", "/image", "--min-free-mb", 0)
    graph.wait(lambda: recorder.poll() is not None, "end", seconds=60)
    errors = recorder.communicate()[1]
    assert recorder.returncode == 1 and "No space left on device" in errors and "Traceback" not in errors
    assert errors.endswith("nothing can be saved; remove it, or record under another name\n")


def test_a_recorder_that_stands_still_holds_nobody_up(graph, record, tmp_path):
    camera, frames = Camera(graph), graph.subscribe(Image, "image", QoSProfile(depth=5))
    recorder = record(tmp_path / "run", "--topics", "/image")
    graph.wait(lambda: written(tmp_path / "run"), "recording")
    os.kill(recorder.pid, signal.SIGSTOP)
    camera.took_s.clear()
    frames.clear()
    graph.wait(lambda: len(frames) >= 60, "60 frames more", seconds=60)
    assert np.median(camera.took_s) < 0.02  # who waits for a reader waits 0.1 s
    os.kill(recorder.pid, signal.SIGCONT)
    before = written(tmp_path / "run")
    graph.wait(lambda: written(tmp_path / "run") > before + 10_000_000, "10 MB more", seconds=60)
    recorder.send_signal(signal.SIGINT)
    said, errors = recorder.communicate(timeout=60)
    assert recorder.returncode == 0, errors
    numbers = [int(msg.header.frame_id) for _, msg in messages(tmp_path / "run")["/image"]]
    missed = numbers[-1] - numbers[0] + 1 - len(numbers)
    assert missed > 20 and f"{len(numbers):8} /image, {missed} lost on their way here\n" in said


def test_of_a_robot_that_says_nothing_there_is_no_recording(graph, record, tmp_path):
    recorder = record(tmp_path / "run")
    graph.wait(lambda: graph.node.count_subscribers("image"), "recorder")
    recorder.send_signal(signal.SIGINT)
    errors = recorder.communicate(timeout=30)[1]
    assert recorder.returncode == 1 and f"{tmp_path / 'run'}: nothing came, and nothing is kept" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]
