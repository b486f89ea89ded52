"""camera_node and microphone_node as processes, over real DDS: what they publish, and what they say of devices."""

import importlib.util
import json
from itertools import pairwise

import numpy as np
import pytest
import ros  # skips this file where there is no ROS 2
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import CompressedImage, Image, PointCloud2
from std_msgs.msg import String
from test_ros import BEST_EFFORT, LATCHED
from test_sources import BLUE, CHUNK, MS, RATE_HZ, RED, hears, noise, sound_server, write_video
from toy_bundle import write_toy_bundle

from mm_edge.messages import AUDIO_CHUNK, MESSAGE_TYPES, from_ros
from mm_edge.types import StreamSpec

pytestmark = pytest.mark.real_time

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")

OK, ERROR = b"\x00", b"\x02"
CAMERA = StreamSpec("camera", "image", (1, 1, 3), 0, 0)
AUDIO = StreamSpec("audio", "audio", (1, 1, 1), 0, 0)


@pytest.fixture
def graph(tmp_path):
    with ros.ros_graph(tmp_path / "logs") as graph:
        yield graph


def samples(spec, msgs, type_name=None):
    return [from_ros(spec, type_name or MESSAGE_TYPES[spec.kind], msg, 0) for msg in msgs]


def said(graph, node):
    """A function that gives all that the node's diagnostics have said: (level, message)."""
    heard = graph.subscribe(DiagnosticArray, "/diagnostics")
    return lambda: [(s.level, s.message) for msg in heard for s in msg.status if s.name.startswith(f"{node}: ")]


def ends(graph, name):
    """The status with which a node ends by itself, and the end of its log."""
    node = graph.nodes._children[name]
    status = node.wait(20)
    del graph.nodes._children[name]
    return status, graph.nodes.log(name).read_text()


def test_a_camera_node_publishes_what_a_video_shows_in_real_time(graph, tmp_path):
    images = graph.subscribe(Image, "image", BEST_EFFORT)
    jpegs = graph.subscribe(CompressedImage, "image/compressed", BEST_EFFORT)
    video = write_video(tmp_path / "video.avi", frames=100)
    graph.nodes.start("camera_node", {"camera": video, "rate_hz": 10.0, "compressed": True, "frame_id": "front"})
    graph.wait(lambda: len(images) >= 20 and len(jpegs) >= 20, "20 frames")
    seen, packed = samples(CAMERA, images), samples(CAMERA, jpegs, "sensor_msgs/msg/CompressedImage")
    assert {msg.header.frame_id for msg in images} == {"front"}
    stamps_ns = [sample.stamp_ns for sample in seen]
    assert {b - a for a, b in pairwise(stamps_ns)} == {100 * MS}  # every second of 20 a second
    now_ns = graph.node.get_clock().now().nanoseconds
    assert abs(now_ns - stamps_ns[-1]) < 1000 * MS
    both = {s.stamp_ns: s.data for s in seen}
    assert sum(np.abs(both[s.stamp_ns].astype(int) - s.data).max() < 6 for s in packed if s.stamp_ns in both) > 10
    assert all(min(np.abs(s.data[24, 32].astype(int) - c).max() for c in (RED, BLUE)) < 6 for s in seen)


def test_a_picture_that_stands_still_is_named(graph, tmp_path):
    told = said(graph, "camera_node")
    graph.nodes.start("camera_node", {"camera": write_video(tmp_path / "still.avi", frames=200)})
    graph.wait(lambda: any(text.startswith("camera frozen: the same data for") for _, text in told()), "diagnostics")


def test_a_file_that_ends_ends_its_node_and_a_camera_that_is_not_there_is_told(graph, tmp_path):
    graph.nodes.start("camera_node", {"camera": write_video(tmp_path / "short.avi", frames=10)})
    status, log = ends(graph, "camera_node")
    assert status == 0 and "short.avi is at its end" in log
    graph.nodes.start("camera_node", {"camera": 97})  # a number, as one would give it
    status, log = ends(graph, "camera_node")
    assert status == 1 and "camera_node: camera: '97' cannot be opened: expected a camera, a URL or a file" in log


def test_a_microphone_node_publishes_every_sample_once_and_in_its_place(graph, tmp_path):
    chunks, told = graph.subscribe(PointCloud2, "audio"), said(graph, "microphone_node")
    recorded = noise(6)
    soundfile.write(tmp_path / "sound.wav", recorded, RATE_HZ)
    graph.nodes.start("microphone_node", {"microphone": tmp_path / "sound.wav"})
    graph.wait(lambda: len(chunks) > 150 and any(level == OK for level, _ in told()), "3 s of sound")
    heard = samples(AUDIO, chunks)
    firsts = [sample.data.first_sample for sample in heard]
    assert firsts == [*range(firsts[0], firsts[-1] + 1, CHUNK)]
    assert all(np.array_equal(s.data.samples, recorded[s.data.first_sample :][:CHUNK]) for s in heard)
    assert {b.stamp_ns - a.stamp_ns for a, b in pairwise(heard)} == {20 * MS}
    assert {text for level, text in told() if level == OK} == {"ok"}


@pytest.mark.parametrize(
    ("what", "expected"),
    [("muted", "audio muted: nothing but zeros for"), ("clipped", "audio clipped: 33% of its samples at full scale")],
)
def test_sound_that_says_nothing_is_named(graph, tmp_path, what, expected):
    told, sound = said(graph, "microphone_node"), noise(8) * np.int16(0)
    if what == "clipped":
        sound = np.tile(np.int16([[32767, 100], [-3, -32768], [5, 6]]), (8 * RATE_HZ // 3, 1))
        sound[::3, 1] = np.arange(len(sound[::3])) % 1000  # so that no two chunks are the same
    soundfile.write(tmp_path / "sound.wav", sound, RATE_HZ)
    graph.nodes.start("microphone_node", {"microphone": tmp_path / "sound.wav"})
    graph.wait(lambda: any(expected in text for _, text in told()), expected)


def test_a_sound_of_another_rate_and_a_microphone_that_is_not_there_are_told(graph, tmp_path):
    soundfile.write(tmp_path / "other.wav", noise(1), 44_100)
    graph.nodes.start("microphone_node", {"microphone": tmp_path / "other.wav"})
    status, log = ends(graph, "microphone_node")
    assert status == 1 and "expected 16000 Hz and 2 channels, got 44100 Hz and 2: ffmpeg" in log
    graph.nodes.start("microphone_node", {"microphone": "no such microphone"})
    status, log = ends(graph, "microphone_node")
    assert status == 1 and ("microphones here: " in log or "libportaudio2" in log or "needs sounddevice" in log)


def test_a_message_that_was_not_built_is_told(graph):
    if importlib.util.find_spec("mm_edge_msgs"):
        pytest.skip("mm_edge_msgs is built here")
    graph.nodes.start("microphone_node", {"audio_chunk": True})
    status, log = ends(graph, "microphone_node")
    assert status == 1 and "audio_chunk: mm_edge_msgs/msg/AudioChunk is not built" in log


def test_sound_as_a_message_of_its_own_is_heard_where_it_was_built(graph, tmp_path):
    reason = "mm_edge_msgs is not built: colcon build in ros2_ws, and source it"
    messages = pytest.importorskip("mm_edge_msgs.msg", reason=reason)
    recorded = noise(30)
    soundfile.write(tmp_path / "sound.wav", recorded, RATE_HZ)
    chunks, outputs = graph.subscribe(messages.AudioChunk, "audio"), graph.subscribe(String, "edge/output")
    graph.nodes.start("edge_node")  # its model has ears
    graph.nodes.start("microphone_node", {"microphone": tmp_path / "sound.wav", "audio_chunk": True})
    graph.wait(lambda: len(chunks) > 50, "1 s of sound")
    for sample in samples(AUDIO, chunks, AUDIO_CHUNK):
        assert np.array_equal(sample.data.samples, recorded[sample.data.first_sample :][:CHUNK])
    graph.wait(lambda: outputs and json.loads(outputs[-1].data)["mask"]["audio"], "model that hears it")


def test_a_microphone_is_heard_and_told_when_it_dies(tmp_path):
    """PulseAudio's monitor of a sink that plays a tone, until PulseAudio is killed."""
    with sound_server(tmp_path) as (server, env):
        hears(env)
        with ros.ros_graph(tmp_path / "logs") as graph:
            graph.nodes.env.update({name: env[name] for name in ("HOME", "PULSE_SERVER", "PULSE_SOURCE")})
            chunks, told = graph.subscribe(PointCloud2, "audio"), said(graph, "microphone_node")
            graph.nodes.start("microphone_node", {"channels": 1})
            graph.wait(lambda: len(chunks) > 150, "3 s of sound")
            heard = samples(AUDIO, chunks[100:150])
            spectrum = np.abs(np.fft.rfft(np.concatenate([sample.data.samples for sample in heard])[:, 0]))
            assert spectrum.argmax() == 443 and {len(sample.data.samples) for sample in heard} == {CHUNK}
            assert {b.data.first_sample - a.data.first_sample for a, b in pairwise(heard)} == {CHUNK}
            late_ns = graph.node.get_clock().now().nanoseconds - samples(AUDIO, chunks[-1:])[0].stamp_ns
            assert 20 * MS < late_ns < 500 * MS
            server.kill()
            status, log = ends(graph, "microphone_node")
            assert status == 1 and "audio: microphone default is dead: nothing came for 2 s" in log
            graph.wait(
                lambda: any(level == ERROR and "audio dead: silent for" in text for level, text in told()),
                "diagnostics",
            )


def test_a_robot_drives_by_the_camera_of_its_camera_node(graph, tmp_path):
    write_toy_bundle(tmp_path / "toy")
    outputs = graph.subscribe(String, "edge/output")
    graph.nodes.start("edge_node", {"bundle": tmp_path / "toy"})
    graph.nodes.start("camera_node", {"camera": write_video(tmp_path / "video.avi", frames=300), "rate_hz": 10.0})
    publisher = graph.node.create_publisher(String, "command_text", LATCHED)
    publisher.publish(String(data="go"))
    graph.wait(lambda: sum(json.loads(msg.data)["action"] is not None for msg in outputs) > 5, "actions")
    last = json.loads(outputs[-1].data)
    assert last["mask"] == {"camera": True, "imu": False, "text": True} and last["ages_s"]["camera"] < 0.3
