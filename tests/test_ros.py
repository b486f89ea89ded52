"""The nodes as processes, over real DDS: sensors in, actions out, and what happens when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import rclpy
import ros  # skips this file where there is no ROS 2
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist, TwistStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import Parameter, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, Imu, JointState, LaserScan
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from toy_bundle import GRAPHS, files, manifest, onnx_bytes, write_toy_bundle
from trajectory_msgs.msg import JointTrajectory

from mm_edge.bundle import write_bundle
from mm_edge.engine import golden
from mm_edge.engine.part import ModelInputs
from mm_edge.errors import SampleError
from mm_edge.messages import to_ros
from mm_edge.types import Scan, StreamSpec

pytestmark = pytest.mark.real_time

LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
GREY = 102  # brightness 0.4
WARN, ERROR = b"\x01", b"\x02"


@pytest.fixture
def graph(tmp_path):
    with ros.ros_graph(tmp_path / "logs") as graph:
        yield graph


@pytest.fixture
def toy(tmp_path):
    write_toy_bundle(tmp_path / "toy")
    return tmp_path / "toy"


class Robot:
    """The toy bundle's senses, published at 20 Hz while this process waits, and what comes of them."""

    def __init__(
        self, graph, namespace="", grey=GREY, compressed=False, text_qos=LATCHED, imu="", image="", clock=time.time_ns
    ):
        self.clock, self.compressed = clock, compressed
        self.image = Image()
        to_ros("image", self.image, 0, np.full((48, 64, 3), grey, np.uint8))
        kind, topic = (CompressedImage, "image/compressed") if compressed else (Image, "image")
        self.camera = graph.node.create_publisher(kind, image or f"{namespace}/{topic}", BEST_EFFORT)
        self.imu = graph.node.create_publisher(Imu, imu or f"{namespace}/imu", BEST_EFFORT)
        self.text = graph.node.create_publisher(String, f"{namespace}/command_text", text_qos)
        self.text.publish(String(data="go"))
        self.outputs = graph.subscribe(String, f"{namespace}/edge/output")
        self.wheels = graph.subscribe(TwistStamped, f"{namespace}/cmd_vel")
        self.diagnostics = graph.subscribe(DiagnosticArray, "/diagnostics")
        self.timer = graph.node.create_timer(0.05, self.feed)

    def feed(self):
        imu = Imu()
        to_ros("imu", imu, self.clock(), np.zeros(6, np.float32))
        self.imu.publish(imu)
        self.image.header.stamp = imu.header.stamp
        if self.compressed:
            image = CompressedImage(header=self.image.header, format="png")
            image.data = cv2.imencode(".png", np.asarray(self.image.data).reshape(48, 64, 3))[1].tobytes()
            self.camera.publish(image)
        else:
            self.camera.publish(self.image)

    def output(self):
        return SimpleNamespace(**json.loads(self.outputs[-1].data)) if self.outputs else None

    def acts(self, about=None):
        """Has it acted since it was last asked, and if given, with a first value near `about`?"""
        actions = [json.loads(msg.data)["action"] for msg in self.outputs]
        self.outputs.clear()
        values = [action["values"][0][0] for action in actions if action]
        return values if about is None else [v for v in values if abs(v - about) < 0.02]

    def says(self, name, words):
        """The latest diagnostic status of `name` that holds `words`, if there was one."""
        for msg in reversed(self.diagnostics):
            for status in msg.status:
                if status.name.endswith(name) and words in status.message:
                    return SimpleNamespace(level=status.level, **{pair.key: pair.value for pair in status.values})
        return None


def moving(robot):
    return [msg for msg in robot.wheels if msg.twist.linear.x > 0]


def test_samples_become_actions_and_the_node_ends_cleanly(graph, toy):
    edge, dog = graph.nodes.start("edge_node", {"bundle": toy}), graph.nodes.start("watchdog_node")
    robot = Robot(graph)
    # The toy settles at text 1 + brightness 0.4 x text 1; the watchdog knows the robot's limit of 0.6 m/s.
    graph.wait(lambda: robot.acts(about=1.4), "action")
    graph.wait(lambda: any(msg.twist.linear.x >= 0.6 for msg in robot.wheels), "cmd_vel")  # after speeding up
    assert max(msg.twist.linear.x for msg in robot.wheels) == pytest.approx(0.6)
    output = graph.wait(robot.output, "output")
    assert output.mask == {"camera": True, "imu": True, "text": True}
    assert 0 <= output.ages_s["camera"] <= 0.3  # as old as the toy lets it be
    model = graph.wait(lambda: robot.says("edge_node: model", "acting"), "diagnostics")
    assert "onnxruntime" in model.engine and float(model.latency_p50_ms) > 0
    for child, sign in ((edge, signal.SIGINT), (dog, signal.SIGTERM)):
        child.send_signal(sign)
        assert child.wait(15) == 0


def test_bad_messages_are_refused_by_name_and_the_node_goes_on(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy})
    robot = Robot(graph)
    graph.wait(robot.acts, "action")

    def stamped(seconds=0.0, **fields):
        msg = Image(height=2, width=2, step=6, encoding="rgb8", data=bytes(12))
        msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(time.time_ns() + int(seconds * 1e9), 10**9)
        for name, value in fields.items():
            setattr(msg, name, value)
        return msg

    unstamped = stamped()
    unstamped.header.stamp.sec = unstamped.header.stamp.nanosec = 0
    nan = Imu()
    to_ros("imu", nan, time.time_ns(), np.full(6, np.nan, np.float32))
    camera, text = robot.camera, robot.text
    for refused in [  # at once what does not share a stream, since a report tells the last reason of each
        [
            (camera, "camera", stamped(encoding="bayer_rggb8"), "'bayer_rggb8'"),
            (robot.imu, "imu", nan, "imu: expected finite values"),
            (text, "text", String(data="make tea"), "unknown ['make', 'tea']"),
        ],
        [(camera, "camera", stamped(height=0, width=0, data=b""), "image of 0 x 0")],
        [(camera, "camera", stamped(data=bytes(5)), "12 together, got 5 bytes")],
        [(camera, "camera", unstamped, "expected a stamp, got 0")],
    ]:
        # Best effort, so that one may be lost: again and again.
        again = graph.node.create_timer(0.1, lambda r=refused: [publisher.publish(msg) for publisher, _, msg, _ in r])
        for _, stream, _, reason in refused:
            status = graph.wait(lambda s=stream, r=reason: robot.says(f"edge_node: {s}", r), f"refusal: {reason}")
            assert int(status.refused) > 0 and status.level in (WARN, ERROR)
        again.destroy()
    graph.wait(lambda: "command refused" in robot.output().reasons[0], "robot that stands, told what it knows not")
    again = graph.node.create_timer(0.1, lambda: robot.camera.publish(stamped(seconds=60.0)))
    graph.wait(lambda: [s for m in robot.diagnostics for s in m.status for p in s.values if p.key == "future"], "count")
    again.destroy()
    text.publish(String(data="go"))
    robot.outputs.clear()
    graph.wait(lambda: robot.acts(about=1.4), "action after all that")


def test_one_message_never_ends_the_node_whatever_it_raises(graph, monkeypatch):
    monkeypatch.syspath_prepend(ros.ROS.env["PYTHONPATH"].split(os.pathsep)[0])
    from mm_edge_ros.streams import StreamSubscription

    spec, refused = StreamSpec("text", "text", (3,), 0, 1000), list[SampleError]()
    StreamSubscription(graph.node, spec, "words", False, lambda sample: {}[sample.data], refused.append)
    publisher = graph.node.create_publisher(String, "words", LATCHED)
    publisher.publish(String(data="go"))
    graph.wait(lambda: refused, "refusal")
    assert str(refused[0]) == "text: expected a usable std_msgs/msg/String, got one that raises KeyError: 'go'"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_watchdog_that_is_ended_stops_the_wheels(graph, sign):
    dog = graph.nodes.start("watchdog_node", {"deadline_ms": 5000.0})
    wheels, raw = graph.subscribe(TwistStamped, "cmd_vel"), graph.node.create_publisher(TwistStamped, "cmd_vel_raw", 1)

    def send():
        msg = TwistStamped()
        msg.header.stamp = graph.node.get_clock().now().to_msg()
        msg.twist.linear.x = 0.25
        raw.publish(msg)

    graph.node.create_timer(0.05, send)
    graph.wait(lambda: wheels and wheels[-1].twist.linear.x == 0.25, "cmd_vel")
    dog.send_signal(sign)
    while dog.poll() is None:
        graph.spin()
    graph.nodes.stop("watchdog_node")
    assert dog.returncode == 0
    graph.wait(lambda: wheels[-1].twist.linear.x == 0, "stop as the last command", seconds=5)


def test_the_watchdog_stops_the_wheels_when_the_model_is_killed_and_drives_on_with_the_next(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy})
    graph.nodes.start("watchdog_node", {"deadline_ms": 150.0})
    robot = Robot(graph)
    graph.wait(lambda: len(moving(robot)) > 5, "cmd_vel")
    graph.nodes.stop("edge_node", sign=signal.SIGKILL)
    graph.wait(lambda: not robot.wheels[-1].twist.linear.x, "stop")
    stamps = [msg.header.stamp.sec + msg.header.stamp.nanosec * 1e-9 for msg in robot.wheels]
    last = robot.wheels.index(moving(robot)[-1])
    assert stamps[last + 1] - stamps[last] > 0.145  # at the deadline, not before
    del robot.wheels[:]
    graph.nodes.start("edge_node", {"bundle": toy})
    graph.wait(lambda: moving(robot), "cmd_vel from the new process, without a reset")


def test_simulated_time_that_stands_still_stops_the_wheels_and_is_reported(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy, "use_sim_time": True})
    graph.nodes.start("watchdog_node", {"use_sim_time": True})
    start_ns, clock = time.monotonic_ns() - 1000 * 10**9, graph.node.create_publisher(Clock, "/clock", 1)

    def now_ns():
        return time.monotonic_ns() - start_ns

    def tell():
        msg = Clock()
        msg.clock.sec, msg.clock.nanosec = divmod(now_ns(), 10**9)
        clock.publish(msg)

    timer, robot = graph.node.create_timer(0.01, tell), Robot(graph, clock=now_ns)
    graph.wait(lambda: moving(robot), "cmd_vel")
    assert 1000 < robot.wheels[-1].header.stamp.sec < 1100
    timer.destroy()
    graph.wait(lambda: not robot.wheels[-1].twist.linear.x, "stop")
    assert graph.wait(lambda: robot.says("edge_node: model", "no tick for"), "diagnostics").level == ERROR


def test_a_simulated_clock_of_few_steps_drives(graph, toy):
    """At 10 Hz, with two frames and a command in a step."""
    for node in ("edge_node", "watchdog_node"):
        graph.nodes.start(
            node, {"bundle": toy, "use_sim_time": True} if node == "edge_node" else {"use_sim_time": True}
        )
    clock = graph.node.create_publisher(Clock, "/clock", 1)

    def now_ns():
        return time.monotonic_ns() // 10**8 * 10**8

    def tell():
        msg = Clock()
        msg.clock.sec, msg.clock.nanosec = divmod(now_ns(), 10**9)
        clock.publish(msg)

    graph.node.create_timer(0.1, tell)
    robot = Robot(graph, clock=now_ns)
    raw = graph.subscribe(TwistStamped, "cmd_vel_raw")
    graph.wait(lambda: len(moving(robot)) > 10 and len(raw) > 10, "cmd_vel")
    steps = {(msg.header.stamp.sec, msg.header.stamp.nanosec) for msg in raw}
    assert len(steps) > 0.8 * len(raw)  # one action a step, unless a step comes between a tick and its stamp


def test_parameters_that_make_no_sense_are_told_in_a_line(graph, toy):
    wrong = {"deadline_ms": 1.0}, {"linear_max": -1.0}
    for i, parameters in enumerate(wrong):
        assert graph.nodes.start("watchdog_node", parameters, name=f"dog{i}").wait(30) == 1
        (said,) = [line for line in graph.nodes.log(f"dog{i}").read_text().splitlines() if line.strip()]
        assert next(iter(parameters)) in said
    for name in ("seed", "episodes"):
        assert graph.nodes.start("sim_node", {name: -1}, name=name).wait(30) == 1
        assert f"{name}: expected 0 or more, got -1" in graph.nodes.log(name).read_text()
    edge = graph.nodes.start("edge_node", {"bundle": toy, "limits.min": [], "limits.max": [], "limits.max_rate": []})
    assert edge.wait(30) == 1
    assert "limits: expected a min, max and max_rate for each of" in graph.nodes.log("edge_node").read_text()


def test_what_would_have_no_effect_cannot_be_set(graph):
    graph.nodes.start("watchdog_node")
    slow = Parameter(name="linear_max", value=ParameterValue(type=3, double_value=0.1))
    (result,) = graph.call(SetParameters, "watchdog_node/set_parameters", parameters=[slow]).results
    assert not result.successful and "read-only" in result.reason


def edge(graph, toy, code):
    """An edge_node as a process of its own that runs `code` first."""
    code = f"{code}\nfrom mm_edge_ros.edge_node import main\nmain()"
    command = [sys.executable, "-c", code, "--ros-args", "-p", f"bundle:={toy}"]
    return subprocess.Popen(command, env=graph.nodes.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_tick_that_fails_is_reported_until_ticks_go_well_again(graph, toy, tmp_path):
    code = f"""if True:
        from pathlib import Path
        from mm_edge.pipeline import Pipeline
        tick = Pipeline.tick
        def spoiled(self, now_ns):
            assert not Path({str(tmp_path / "spoil")!r}).exists()
            return tick(self, now_ns)
        Pipeline.tick = spoiled"""
    process, robot = edge(graph, toy, code), Robot(graph)
    try:
        graph.wait(lambda: robot.says("edge_node: model", "acting"), "diagnostics that all is well")
        (tmp_path / "spoil").touch()
        assert graph.wait(lambda: robot.says("edge_node: model", "AssertionError"), "diagnostics").level == ERROR
        (tmp_path / "spoil").unlink()
        robot.diagnostics.clear()
        graph.wait(lambda: robot.says("edge_node: model", "acting"), "diagnostics that all is well")
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_what_cannot_be_activated_ends_with_why(graph, toy):
    code = """if True:
        from mm_edge_ros import bundle_node
        def subscription(*_):
            raise RuntimeError("no room for a topic")
        bundle_node.StreamSubscription = subscription"""
    process = edge(graph, toy, code)
    assert "RuntimeError: no room for a topic" in process.communicate(timeout=30)[1]
    assert process.returncode == 1


def test_a_base_that_listens_to_another_type_is_reported(graph):
    graph.nodes.start("watchdog_node")
    diagnostics = graph.subscribe(DiagnosticArray, "/diagnostics")

    def says(words):
        return [s for msg in diagnostics for s in msg.status if words in s.message and s.level != b"\x00"]

    graph.wait(lambda: says("nobody listens to /cmd_vel as geometry_msgs/msg/TwistStamped"), "diagnostics")
    graph.subscribe(Twist, "cmd_vel")
    graph.wait(lambda: says("listened to as geometry_msgs/msg/Twist: see the parameter stamped"), "diagnostics")


def test_two_sources_at_once_stop_the_wheels_until_reset(graph):
    graph.nodes.start("watchdog_node")
    wheels, publishers = graph.subscribe(TwistStamped, "cmd_vel"), []

    def send():
        for publisher in publishers:
            msg = TwistStamped()
            msg.header.stamp = graph.node.get_clock().now().to_msg()
            msg.twist.linear.x = 0.25
            publisher.publish(msg)

    graph.node.create_timer(0.05, send)
    publishers.append(graph.node.create_publisher(TwistStamped, "cmd_vel_raw", 1))
    graph.wait(lambda: wheels and wheels[-1].twist.linear.x == 0.25, "cmd_vel")
    publishers.append(graph.node.create_publisher(TwistStamped, "cmd_vel_raw", 1))
    graph.wait(lambda: not wheels[-1].twist.linear.x, "stop")
    publishers.pop()
    del wheels[:]
    graph.wait(lambda: len(wheels) > 20, "cmd_vel")
    assert not any(msg.twist.linear.x for msg in wheels), "it drove on without a reset"
    answer = graph.call(Trigger, "watchdog_node/reset")
    assert answer.success and "two sources at the same time" in answer.message
    graph.wait(lambda: wheels[-1].twist.linear.x == 0.25, "cmd_vel after the reset")


def test_a_publisher_that_offers_less_is_followed_and_reported(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy})
    robot = Robot(graph, text_qos=BEST_EFFORT)
    status = graph.wait(lambda: robot.says("edge_node: text", "QoS mismatch"), "diagnostics")
    assert status.level in (WARN, ERROR)
    # Said again and again: what is said before the publisher has discovered the new subscription, nobody keeps.
    graph.node.create_timer(0.5, lambda: robot.text.publish(String(data="go")))
    graph.wait(lambda: robot.acts(about=1.4), "action: the text must have arrived")


def test_a_command_that_was_countermanded_does_not_come_back(graph, toy):
    """A latched command, then "halt" from a publisher that keeps nothing: the first must not be given again when the
    second publisher has left."""
    graph.nodes.start("edge_node", {"bundle": toy})
    robot = Robot(graph)
    graph.wait(robot.acts, "action")
    once = graph.node.create_publisher(String, "command_text", BEST_EFFORT)
    graph.wait(lambda: robot.says("edge_node: text", "QoS mismatch"), "diagnostics")
    says = graph.node.create_timer(0.2, lambda: once.publish(String(data="halt")))
    graph.wait(lambda: robot.outputs and "command refused" in str(robot.output().reasons), "the stop")
    says.cancel()
    graph.node.destroy_publisher(once)
    robot.diagnostics.clear()
    graph.wait(lambda: len(robot.diagnostics) > 6, "diagnostics after the publisher has left")
    robot.outputs.clear()
    graph.wait(lambda: len(robot.outputs) > 5, "output")
    assert not robot.acts()


def test_of_two_commands_that_were_kept_the_newer_counts_also_if_it_comes_first(graph, monkeypatch):
    """And what either says from then on. The older one is kept by a process that is stopped meanwhile."""
    monkeypatch.syspath_prepend(ros.ROS.env["PYTHONPATH"].split(os.pathsep)[0])
    from mm_edge_ros.streams import StreamSubscription

    code = """if True:
        import rclpy
        from rclpy.qos import DurabilityPolicy, QoSProfile
        from std_msgs.msg import String
        rclpy.init()
        kept = QoSProfile(depth=2, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        person = rclpy.create_node("person").create_publisher(String, "command_text", kept)
        for text in ("drive", "drive on"):
            person.publish(String(data=text))
            print(text, flush=True)
            input()"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code], env=graph.nodes.env, **pipes)
    try:
        assert other.stdout.readline() == "drive\n"
        other.send_signal(signal.SIGSTOP)
        graph.node.create_publisher(String, "command_text", LATCHED).publish(String(data="stop"))
        spec, heard = StreamSpec("text", "text", (1,), 0, 0, latched=True), []
        StreamSubscription(graph.node, spec, "command_text", False, lambda sample: heard.append(sample.data), print)
        graph.wait(lambda: heard, "command")
        other.send_signal(signal.SIGCONT)
        other.stdin.write("\n")
        other.stdin.flush()
        graph.wait(lambda: heard[-1] == "drive on", "command of the other")
    finally:
        other.kill()
        other.communicate(timeout=30)
    assert heard == ["stop", "drive on"]


def test_a_vector_is_taken_from_whatever_message_is_published(graph, monkeypatch):
    monkeypatch.syspath_prepend(ros.ROS.env["PYTHONPATH"].split(os.pathsep)[0])
    from mm_edge_ros.streams import StreamSubscription

    spec, samples, refused = StreamSpec("odom", "vector", (13,), 20, 300), [], []
    subscription = StreamSubscription(graph.node, spec, "odom", False, samples.append, refused.append)
    robot = rclpy.Context()  # another participant: one has one type a topic
    rclpy.init(context=robot, domain_id=graph.node.context.get_domain_id())
    try:
        driver, odometry = rclpy.create_node("driver", context=robot), Odometry()
        odometry.header.stamp.sec, odometry.twist.twist.linear.x = 1, 0.5
        publisher = driver.create_publisher(Odometry, "odom", 10)

        def taken():
            troubles = subscription.follow()
            publisher.publish(odometry)
            return samples and not troubles

        graph.wait(taken, "odometry")
    finally:
        rclpy.shutdown(context=robot)
    assert (samples[0].stamp_ns, samples[0].data[7], refused) == (10**9, 0.5, [])


def test_disabled_it_says_so_and_moves_nothing(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy})
    robot, raw = Robot(graph), graph.subscribe(TwistStamped, "cmd_vel_raw")
    graph.wait(lambda: raw, "action")
    graph.call(SetBool, "edge_node/enable", data=False)
    robot.outputs.clear()
    del raw[:]
    graph.wait(lambda: len(robot.outputs) > 5, "output")
    assert not raw and robot.output().reasons == ["disabled by ~/enable"]
    graph.call(SetBool, "edge_node/enable", data=True)
    # Enabled, it remembers nothing: the text must be said again.
    graph.wait(lambda: "text never seen" in robot.output().reasons, "reason")
    robot.text.publish(String(data="go"))
    graph.wait(lambda: raw, "action")
    # What is said as soon as the service has answered is heard.
    for enabled in (False, True):
        graph.call(SetBool, "edge_node/enable", data=enabled)
    robot.text.publish(String(data="go"))
    robot.acts()
    graph.wait(robot.acts, "action")


def test_between_episodes_of_a_demo_the_command_is_forgotten(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy})
    graph.nodes.start("demo_node", {"episodes": 1000})
    robot, episode = Robot(graph), graph.node.create_publisher(String, "episode", LATCHED)
    graph.wait(robot.acts, "action")
    ends = graph.node.create_timer(0.2, lambda: episode.publish(String(data='{"event": "end"}')))
    graph.wait(lambda: robot.outputs and "text never seen" in robot.output().reasons, "reason")
    ends.destroy()
    graph.node.create_timer(0.2, lambda: robot.text.publish(String(data="go")))
    robot.outputs.clear()
    graph.wait(robot.acts, "action in the next episode")


def test_a_lidar_may_be_mounted_at_any_angle(graph, tmp_path):
    """The toy with a LiDAR in the IMU's place, whose token is (closeness of what is to the left + 1) / 2."""
    turned, three = manifest(), np.zeros(3, np.float32)
    turned["streams"][1] |= {"name": "scan", "kind": "scan", "shape": [2, 4], "window_ms": 0, "range_max_m": 4.0}
    turned["parts"][2]["stream"] = "scan"
    onnx = onnx_bytes("imu", GRAPHS["imu"].replace("[1,4,7]", "[1,2,4]").replace("first = {0}", "first = {1}"))
    shapes = {"action": (1, 1, 2), "attention": (1, 2, 2), "gates": (1, 3)}
    tick = ModelInputs({}, three, three, 0.1, False), {k: np.zeros(n, np.float32) for k, n in shapes.items()}
    trace = golden.pack([StreamSpec(**stream) for stream in turned["streams"]], [tick])
    write_bundle(tmp_path / "turned", turned, {**files(), "imu.onnx": onnx, "golden.npz": trace})
    graph.nodes.start("edge_node", {"bundle": tmp_path / "turned", "scan_yaw_deg": 90.0})
    robot, lidar, scan = Robot(graph), graph.node.create_publisher(LaserScan, "scan", BEST_EFFORT), LaserScan()

    def sense():
        to_ros("scan", scan, time.time_ns(), Scan(np.float32([1, np.inf, np.inf, np.inf]), 0.0, np.pi / 2, 0.1, 4.0))
        lidar.publish(scan)

    graph.node.create_timer(0.05, sense)
    # What is 1 m before the LiDAR, closeness 0.75, is 1 m to the left of the base.
    graph.wait(lambda: robot.outputs and abs(robot.output().gates["scan"] - 0.875) < 0.01, "scan as the base sees it")


def test_opencv_takes_one_thread_as_in_the_benchmark(tmp_path):
    code = """if True:
        import cv2
        cv2.setNumThreads(4)
        from mm_edge_ros.edge_node import main
        try:
            main()
        except SystemExit:
            print(cv2.getNumThreads())"""
    command = [sys.executable, "-c", code, "--ros-args", "-p", f"bundle:={tmp_path}/nowhere"]
    assert subprocess.run(command, env=ros.ROS.env, capture_output=True, text=True).stdout == "1\n"


def test_a_bundle_is_swapped_by_cleanup_and_configure(graph, toy, tmp_path):
    slow = manifest()
    slow["outputs"]["action"]["max"] = [0.25, 2]
    write_bundle(tmp_path / "slow", slow, files())
    (tmp_path / "broken").mkdir()
    graph.nodes.start("edge_node", {"bundle": toy})
    robot = Robot(graph)

    def change(transition):
        return graph.call(ChangeState, "edge_node/change_state", transition=Transition(id=transition)).success

    def choose(bundle):
        value = Parameter(name="bundle", value=ParameterValue(type=4, string_value=str(bundle)))
        assert graph.call(SetParameters, "edge_node/set_parameters", parameters=[value]).results[0].successful

    graph.wait(lambda: robot.acts(about=1.4), "action")
    choose(tmp_path / "broken")
    assert change(Transition.TRANSITION_DEACTIVATE) and change(Transition.TRANSITION_CLEANUP)
    assert not change(Transition.TRANSITION_CONFIGURE)
    assert graph.wait(lambda: robot.says("edge_node: model", "broken/manifest.json"), "diagnostics").level == ERROR
    choose(tmp_path / "slow")
    assert change(Transition.TRANSITION_CONFIGURE) and change(Transition.TRANSITION_ACTIVATE)
    graph.wait(lambda: robot.acts(about=0.25), "action of the other bundle")


def test_a_damaged_bundle_ends_the_node_by_its_files_name(graph, toy):
    (toy / "camera.onnx").write_bytes(b"not what it was")
    edge = graph.nodes.start("edge_node", {"bundle": toy})
    assert edge.wait(30) == 1
    assert "toy/camera.onnx" in graph.nodes.log("edge_node").read_text()


def test_a_model_that_moves_what_no_base_has_is_refused(graph, tmp_path):
    sideways = manifest()
    sideways["outputs"]["action"]["names"] = ["linear_x", "linear_y"]
    write_bundle(tmp_path / "sideways", sideways, files())
    assert graph.nodes.start("edge_node", {"bundle": tmp_path / "sideways"}).wait(30) == 1
    assert "this model also by linear_y (joints move by position alone)" in graph.nodes.log("edge_node").read_text()


ARM = {"joints": ["elbow", "shoulder"], "joint_min": [-1.0, 0.2], "joint_max": [1.0, 1.2], "joint_rate_max": [1.0, 0.8]}


class Arm:
    """Says at 50 Hz where it is, which is where it was told to go."""

    def __init__(self, graph):
        self.at, self.told, self.speeds = {"shoulder": 0.5, "elbow": 0.0, "wheel": 9.0}, [], []
        self.states = graph.node.create_publisher(JointState, "joint_states", 10)
        self.timer = graph.node.create_timer(0.02, self.say)
        graph.node.create_subscription(JointTrajectory, "joint_trajectory", self.move, 10)

    def say(self):
        self.states.publish(JointState(name=[*self.at], position=[*self.at.values()]))

    def move(self, msg):
        (point,) = msg.points
        within_s = point.time_from_start.sec + point.time_from_start.nanosec / 1e9
        goal = dict(zip(msg.joint_names, point.positions))
        self.speeds.append(max(abs(goal[name] - self.at[name]) / within_s for name in goal))
        self.told.append(goal)
        self.at |= goal
        assert not (msg.header.stamp.sec or msg.header.stamp.nanosec)  # at once


def test_a_model_of_joints_moves_an_arm_from_where_it_is(graph, tmp_path):
    joints = manifest()
    joints["outputs"]["action"] |= {"names": ["shoulder", "elbow"], "units": ["rad"] * 2, "interface": "position"}
    write_bundle(tmp_path / "arm", joints, files())
    graph.nodes.start("edge_node", {"bundle": tmp_path / "arm"})
    graph.nodes.start("watchdog_node", ARM)
    robot, arm = Robot(graph), Arm(graph)
    graph.wait(lambda: robot.acts(about=1.4), "action")
    graph.wait(lambda: arm.at["shoulder"] == pytest.approx(1.2), "arm at its limit")
    assert 0.5 < arm.told[0]["shoulder"] < 0.63  # from where it was, by what it may move in a deadline
    assert max(arm.speeds) <= 1.0 + 1e-6 and arm.at["elbow"] == pytest.approx(0.05, abs=0.1)
    graph.wait(lambda: robot.says("watchdog_node: joints", "forwarding"), "diagnostics")

    arm.timer.cancel()
    why = "joint_states is silent, or contradicts itself, about elbow, shoulder"
    assert graph.wait(lambda: robot.says("watchdog_node: joints", why), "diagnostics").level == WARN
    arm.timer.reset()
    count = len(arm.told)
    graph.wait(lambda: len(arm.told) > count, "arm that is moved again")
    graph.nodes.stop("edge_node", sign=signal.SIGKILL)
    graph.wait(lambda: robot.says("watchdog_node: joints", "no valid action for"), "diagnostics")
    count = len(arm.told)
    graph.call(Trigger, "/watchdog_node/reset")
    assert len(arm.told) == count  # it is not told to stand: it holds its last position


def test_joints_that_the_watchdog_does_not_know_are_not_moved(graph, tmp_path):
    joints = manifest()
    joints["outputs"]["action"] |= {"names": ["shoulder", "wrist"], "interface": "position"}
    write_bundle(tmp_path / "arm", joints, files())
    graph.nodes.start("edge_node", {"bundle": tmp_path / "arm"})
    robot, arm = Robot(graph), Arm(graph)
    deaf = "nobody listens to /joint_trajectory_raw: has watchdog_node its parameter joints?"
    graph.wait(lambda: robot.says("edge_node: model", deaf), "diagnostics")
    graph.nodes.start("watchdog_node", ARM)
    why = "joint_trajectory: expected joints elbow, shoulder, got shoulder, wrist from /edge_node"
    assert graph.wait(lambda: robot.says("watchdog_node: joints", why), "diagnostics").latched == "True"
    assert not arm.told


def test_joints_without_limits_are_refused(graph):
    assert graph.nodes.start("watchdog_node", {**ARM, "joint_min": [0.0]}).wait(30) == 1
    why = "joint_min: expected 2 numbers, one for each of joints, got"
    assert why in graph.nodes.log("watchdog_node").read_text()
    assert graph.nodes.start("watchdog_node", {**ARM, "joint_max": [1, 2]}, name="whole").wait(30) == 1
    assert "in YAML a whole number is 1.0" in graph.nodes.log("whole").read_text()


def test_a_robot_can_begin_disabled(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy, "enabled_at_start": False})
    robot = Robot(graph)
    assert graph.wait(robot.output, "output").reasons[-1] == "disabled by ~/enable"
    graph.call(SetBool, "/edge_node/enable", data=True)
    robot.text.publish(String(data="go"))
    graph.wait(robot.acts, "action")


def test_a_node_whose_inference_hangs_can_be_ended(graph, toy):
    code = """if True:
        import threading
        from mm_edge.pipeline import Pipeline
        def tick(self, now_ns):
            print("hangs", flush=True)
            threading.Event().wait()
        Pipeline.tick = tick"""
    process = edge(graph, toy, code)
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGTERM)
    assert "inference hangs" in process.communicate(timeout=30)[1]
    assert process.returncode == 1


def test_two_robots_in_namespaces_one_of_them_with_compressed_images(graph, toy):
    one, two = {"bundle": toy}, {"bundle": toy, "image_transport": "compressed"}
    graph.nodes.start("edge_node", one, {"__ns": "/one"}, name="one")
    graph.nodes.start("edge_node", two, {"__ns": "/two", "image": "/two/front"}, name="two")
    first, second = Robot(graph, "/one", grey=51), Robot(graph, "/two", grey=204, compressed=True)
    second.camera = graph.node.create_publisher(CompressedImage, "/two/front/compressed", BEST_EFFORT)
    graph.wait(lambda: first.acts(about=1.2), "action of the first")
    graph.wait(lambda: second.acts(about=1.8), "action of the second")


def test_vga_frames_at_30_hz_arrive(graph, toy):
    graph.nodes.start("edge_node", {"bundle": toy})
    robot = Robot(graph)
    to_ros("image", robot.image, 0, np.full((480, 640, 3), GREY, np.uint8))
    graph.wait(robot.acts, "action")
    robot.timer.destroy()

    def admitted():
        status = robot.says("edge_node: camera", "")
        return int(getattr(status, "admitted", 0))

    silent_s = time.monotonic() + 1.2  # a report later, nothing is on its way
    graph.wait(lambda: time.monotonic() > silent_s and admitted(), "count of the frames so far")
    before, sent = admitted(), []
    robot.timer = graph.node.create_timer(1 / 30, lambda: len(sent) < 90 and sent.append(robot.feed()))
    # By Fast DDS's own settings a quarter to a half would arrive.
    graph.wait(lambda: admitted() - before >= 0.8 * 90, "report of 80 % of 90 frames")


def test_all_senses_of_the_simulator_reach_the_shipped_model_and_it_drives(graph):
    for node in ("edge_node", "watchdog_node"):
        graph.nodes.start(node)
    graph.nodes.start("sim_node", {"seed": 3})
    events = graph.subscribe(String, "episode")
    outputs, overlay = graph.subscribe(String, "edge/output"), graph.subscribe(Image, "edge/overlay", BEST_EFFORT)

    def complete():
        output = json.loads(outputs[-1].data) if outputs else {}
        return output.get("action") and all(output["mask"].values()) and output

    output = graph.wait(complete, "output of all senses")
    assert set(output["mask"]) == {"camera", "scan", "imu", "audio", "text"}
    graph.wait(lambda: any(json.loads(e.data).get("speed_mps", 0) > 0.05 for e in events), "motion")
    assert graph.wait(lambda: overlay, "overlay")[-1].width == 640


@pytest.mark.parametrize("which", ["Refused", "Spoilt"])
def test_a_node_ends_whatever_its_middleware_waits_for(graph, which):
    """It has been seen to hang on its way out, after a node's last word."""
    script = f"""if True:
        import os, rclpy, signal, sys, threading
        from mm_edge.errors import EdgeError
        from mm_edge_ros import node
        node.LEAVE_S = 1
        rclpy.try_shutdown = lambda: threading.Event().wait()
        class Refused(node.Node):
            def __init__(self):
                raise EdgeError("no bundle")
        class Spoilt(node.Node):
            def __init__(self):
                super().__init__("spoilt")
            def destroy_node(self):
                super().destroy_node()
                print("no disk", file=sys.stderr)
                sys.exit(1)
        node.run({which}, lambda *_: os.kill(os.getpid(), signal.SIGTERM))"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=graph.nodes.env, capture_output=True, text=True, timeout=30
    )
    said = {"Refused": "no bundle", "Spoilt": "no disk"}[which]
    assert done.returncode == -signal.SIGALRM and said in done.stderr


def test_nodes_die_with_whoever_started_them(tmp_path):
    code = """if True:
        import sys, time
        from pathlib import Path
        from mm_edge.commands.ros import Nodes, find_ros, free_domain
        with free_domain() as domain:
            nodes = Nodes(find_ros(), domain, Path(sys.argv[1]))
            print(nodes.start("watchdog_node").pid, flush=True)
            time.sleep(60)"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while _alive(child):
        assert time.monotonic() < end, "the node outlived its parent"


def _alive(pid):
    try:  # an orphan that ended may wait, as a zombie, for a reaper that this machine lacks
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
