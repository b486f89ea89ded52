"""The events node as a process, over real DDS: what it tells of a sound, and that a spoken "stop" stops the wheels."""

import json
import time

import numpy as np
import pytest
import ros  # skips this file where there is no ROS 2
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import String
from test_ros import LATCHED
from toy_bundle import write_toy_bundle
from toy_ear import GO_HZ, RATE_HZ, STOP_HZ, tone, write_toy_ear

from mm_edge.events import SOUND_MPS
from mm_edge.messages import to_ros
from mm_edge.types import Audio

pytestmark = pytest.mark.real_time

CHUNK, EARS_M = 320, 0.16
KEPT = QoSProfile(depth=20, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture
def graph(tmp_path):
    with ros.ros_graph(tmp_path / "logs") as graph:
        yield graph


class Microphones:
    """Two of them, in real time while this process waits: silence, or what is played, as long as it lasts."""

    def __init__(self, graph):
        self.graph, self.first, self.waiting = graph, 0, np.zeros((0, 2), np.int16)
        self.publisher = graph.node.create_publisher(PointCloud2, "audio", QoSProfile(depth=50))
        self.events, self.outputs = graph.subscribe(String, "events", KEPT), graph.subscribe(String, "events/output")
        self.commands = graph.subscribe(String, "command_text")
        self.diagnostics = graph.subscribe(DiagnosticArray, "/diagnostics")
        graph.node.create_timer(CHUNK / RATE_HZ, self.hear)

    def hear(self):
        played, self.waiting = self.waiting[:CHUNK], self.waiting[CHUNK:]
        samples = np.zeros((CHUNK, 2), np.int16)
        samples[: len(played)] = played
        stamp_ns = time.time_ns() - CHUNK * 1_000_000_000 // RATE_HZ
        msg = PointCloud2()
        to_ros("audio", msg, stamp_ns, Audio(samples, self.first, RATE_HZ), "ears", PointField)
        self.first += CHUNK
        self.publisher.publish(msg)

    def play(self, left, right=None):
        self.waiting = np.stack([left, left if right is None else right], 1)

    def start(self, bundle, **parameters):
        self.graph.nodes.start("events_node", {"bundle": bundle, **parameters})
        self.graph.wait(lambda: len(self.outputs) > 2, "output")

    def told(self, n):
        """The first n events."""
        self.graph.wait(lambda: len(self.events) >= n, f"{n} events, got {[e.data for e in self.events]}")
        return [json.loads(msg.data) for msg in self.events]

    def silence(self):
        self.graph.wait(lambda: not len(self.waiting), "end of what is played")
        self.outputs.clear()
        self.graph.wait(lambda: len(self.outputs) > 6, "silence")


def test_each_event_is_told_once_with_its_start(graph, tmp_path):
    write_toy_ear(tmp_path / "ear")
    ears = Microphones(graph)
    ears.start(tmp_path / "ear")
    since_ns = time.time_ns()
    ears.play(tone(GO_HZ, 1.0))
    (event,) = ears.told(1)
    assert event["label"] == "go" and 0.8 <= event["score"] <= 1 and event["bearing_rad"] is None
    assert since_ns < event["start_ns"] <= event["stamp_ns"] < time.time_ns()
    ears.silence()
    ears.play(tone(STOP_HZ, 0.5))
    assert [event["label"] for event in ears.told(2)] == ["go", "stop"]
    ears.silence()
    assert len(ears.events) == 2 and not ears.commands  # without the parameter nothing is commanded


@pytest.mark.parametrize("late", [-4, 0, 4])
def test_two_microphones_tell_where_a_sound_comes_from(graph, tmp_path, late):
    write_toy_ear(tmp_path / "ear")
    ears = Microphones(graph)
    ears.start(tmp_path / "ear", ear_distance_m=EARS_M)
    noise = np.int16(8000 * np.random.default_rng(0).normal(size=RATE_HZ).clip(-3, 3))
    ears.play(noise[8:-8], noise[8 - late : len(noise) - 8 - late])  # the right one `late` samples later
    (event, *_) = ears.told(1)
    assert event["bearing_rad"] == pytest.approx(np.arcsin(late / RATE_HZ * SOUND_MPS / EARS_M), abs=0.06)


@pytest.mark.parametrize("offers", [LATCHED, QoSProfile(depth=1)], ids=["kept", "said once"])
def test_words_become_commands_and_go_goes_on_with_the_last(graph, tmp_path, offers):
    write_toy_ear(tmp_path / "ear")
    ears = Microphones(graph)
    person = graph.node.create_publisher(String, "command_text", offers)
    ears.start(tmp_path / "ear", commands=["stop=stop", "go="])
    graph.wait(lambda: person.get_subscription_count() == 2, "the node's subscription beside ours")
    person.publish(String(data="drive to the red ball"))
    graph.wait(lambda: ears.commands, "command")
    for hz, said in ((STOP_HZ, "stop"), (GO_HZ, "drive to the red ball")):
        ears.play(tone(hz, 0.5))
        graph.wait(lambda said=said: ears.commands[-1].data == said, said)
        ears.silence()
    assert [msg.data for msg in ears.commands] == ["drive to the red ball", "stop", "drive to the red ball"]


def test_a_spoken_stop_stops_the_wheels_though_the_model_drives_on(graph, tmp_path):
    """And another command lets it drive."""
    write_toy_ear(tmp_path / "ear")
    ears, wheels = Microphones(graph), ros.Wheels(graph)
    raw = graph.node.create_publisher(TwistStamped, "cmd_vel_raw", QoSProfile(depth=1))

    def drive():
        msg = TwistStamped()
        msg.header.stamp = graph.node.get_clock().now().to_msg()
        msg.twist.linear.x = 0.3
        raw.publish(msg)

    graph.nodes.start("watchdog_node")
    graph.node.create_timer(0.05, drive)
    ears.start(tmp_path / "ear", commands=["stop=stop"])
    wheels.wait_until_driving()
    wheels.stop_delay(lambda: ears.play(tone(STOP_HZ, 0.5)))
    ears.silence()
    assert not any(command.moves for command in wheels.heard[-3:])
    graph.node.create_publisher(String, "command_text", LATCHED).publish(String(data="drive to the red ball"))
    wheels.wait_until_driving()


def test_what_cannot_tell_events_is_refused(graph, tmp_path):
    write_toy_bundle(tmp_path / "toy")
    write_toy_ear(tmp_path / "ear")
    for parameters, why in (
        ({"bundle": tmp_path / "toy"}, "expected a bundle that tells events (outputs.values.events), got none"),
        ({"bundle": tmp_path / "ear", "commands": ["jump=up"]}, "got ['jump']"),
        ({"bundle": tmp_path / "ear", "commands": ["stop"]}, "commands: expected label=text, got 'stop'"),
    ):
        graph.nodes.start("events_node", parameters)
        node = graph.nodes._children.pop("events_node")
        assert node.wait(20) == 1
        assert why in graph.nodes.log("events_node").read_text()


def test_the_simulated_robot_stands_soon_after_somebody_said_stop(graph, tmp_path):
    """A short run of tests/benchmarks/spoken_stop.py, with a tone for a voice."""
    pytest.importorskip("mujoco", reason="the robot is simulated")
    pytest.importorskip("torch", reason="the benchmark looks into training")
    from tests.benchmarks.spoken_stop import Room

    write_toy_ear(tmp_path / "ear")
    room = Room(graph)
    for node in ("edge_node", "watchdog_node"):
        graph.nodes.start(node)
    graph.nodes.start("events_node", {"bundle": tmp_path / "ear", "commands": ["stop=stop"]})
    graph.nodes.start("sim_node", {"seed": 900_000})
    room.wait_until_it_drives()
    # By its begin; a tone is told as it sounds, so that the robot may stand before its end.
    delay_ms = next(ms for ms in (room.say(tone(STOP_HZ, 0.5, loud=0.8)) for _ in range(5)) if ms is None or ms == ms)
    assert delay_ms is not None and -500 < delay_ms < 700  # a tone is told while it sounds
