"""Two cameras, a LiDAR, odometry, joint states and GPS in, joint trajectories out, as an arm on wheels records them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed")

from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer

from mm_edge.cli import main as mm_edge
from mm_edge.errors import RecordingError
from mm_edge.manifest import Tick
from mm_edge.messages import to_ros
from mm_edge.preprocess import Vocabulary
from mm_edge.recording import RecordingWriter, empty_message, typestore
from mm_edge.types import NS, Action, Audio, Sample, Scan, StreamSpec
from training.check import check, main
from training.recordings import find, label_of, streams_of, tables_of, tick_of, words_of

T0, MS = 1_700_000_000 * NS, 1_000_000
STORE = typestore()
RATES = {"/front/image_raw": 10, "/rear/image_raw": 10, "/lidar": 5, "/odom": 20, "/joint_states": 20, "/gps": 4}
ARM, BASE = "/arm/joint_trajectory", "/cmd_vel"


def message(topic, i, rate_hz):
    """The i-th message of a topic: its type, and what fills it. All that has a stamp is stamped 20 ms before."""
    stamp_ns = T0 + i * NS // rate_hz - 20 * MS

    def stamped(msg):
        msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(stamp_ns, NS)

    def image(msg):
        to_ros("image", msg, stamp_ns, np.full((24, 32, 3), i, np.uint8))

    def cloud(msg):
        to_ros(
            "points",
            msg,
            stamp_ns,
            np.float32([[1, 0, i / 1e6], [0, 2, 0]]),
            "",
            STORE.types["sensor_msgs/msg/PointField"],
        )

    def odometry(msg):
        stamped(msg)
        msg.pose.pose.position.x, msg.twist.twist.linear.x = i / 10, float(i % 2)

    def joints(msg):
        stamped(msg)
        msg.name = ["shoulder", "elbow"]
        msg.position, msg.velocity = np.float64([i, -i]) / 100, np.float64([0.5, 0.25])

    def fix(msg):
        stamped(msg)
        msg.latitude, msg.longitude, msg.altitude = 48.0 + i / 1024, 11.5, 500.0

    def trajectory(msg):
        point = empty_message(STORE, "trajectory_msgs/msg/JointTrajectoryPoint")
        msg.joint_names, msg.points, point.positions = ["shoulder", "elbow"], [point], np.float64([i / 100, -0.5])

    def twist(msg):
        msg.linear.x, msg.angular.z = 0.25 * (i % 2), 0.5 * (i % 2)  # every other stands

    return {
        "/front/image_raw": ("sensor_msgs/msg/Image", image), "/rear/image_raw": ("sensor_msgs/msg/Image", image),
        "/lidar": ("sensor_msgs/msg/PointCloud2", cloud), "/odom": ("nav_msgs/msg/Odometry", odometry),
        "/joint_states": ("sensor_msgs/msg/JointState", joints), "/gps": ("sensor_msgs/msg/NavSatFix", fix),
        ARM: ("trajectory_msgs/msg/JointTrajectory", trajectory), BASE: ("geometry_msgs/msg/Twist", twist),
    }[topic]  # fmt: skip


def record(path, command=ARM, seconds=3, rates=RATES, edit=lambda topic, at_s, msg: True):
    """A bag of `seconds`. `edit` changes a message, and drops it if it returns False."""
    found = []
    for topic, rate_hz in {**rates, command: 20}.items():
        for i in range(seconds * rate_hz):
            type_name, fill = message(topic, i, rate_hz)
            msg = empty_message(STORE, type_name)
            fill(msg)
            if edit(topic, i / rate_hz, msg) is not False:
                found.append((T0 + i * NS // rate_hz, topic, type_name, msg))
    path.parent.mkdir(parents=True, exist_ok=True)
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        types = {topic: type_name for _, topic, type_name, _ in found}
        connections = {topic: writer.add_connection(topic, name, typestore=STORE) for topic, name in types.items()}
        for at_ns, topic, type_name, msg in sorted(found, key=lambda m: m[0]):
            writer.write(connections[topic], at_ns, STORE.serialize_cdr(msg, type_name))
    return path


def checked(recordings):
    return check(recordings, streams_of(recordings), label_of(recordings))


def test_streams_are_proposed_from_types_and_measured_rates(tmp_path):
    record(tmp_path / "a")
    streams = {spec.name: spec for spec in streams_of(find(tmp_path))}
    assert {name: (s.kind, s.shape, s.rate_hz, s.max_age_ms) for name, s in streams.items()} == {
        "front_image_raw": ("image", (96, 128, 3), 10, 420), "rear_image_raw": ("image", (96, 128, 3), 10, 420),
        "lidar": ("points", (256, 4), 5, 820), "gps": ("vector", (3,), 4, 1020),
        "joint_states": ("vector", (4,), 20, 220), "odom": ("vector", (13,), 20, 220),
    }  # fmt: skip
    assert list(streams) == ["front_image_raw", "rear_image_raw", "lidar", "gps", "joint_states", "odom"]
    assert streams["lidar"].range_max_m == pytest.approx(1.95)  # the 95th percentile
    assert streams["joint_states"].mean == pytest.approx((0.295, -0.295, 0.5, 0.25))
    assert streams["joint_states"].std[:2] == pytest.approx([np.std(np.arange(60) / 100)] * 2)
    assert streams["joint_states"].std[2:] == (1.0, 1.0)  # it never changes
    assert streams["gps"].mean == pytest.approx((48 + 5.5 / 1024, 11.5, 500))
    assert tick_of(list(streams.values())) == Tick("front_image_raw", 100.0, 120.0)
    assert tick_of([streams["gps"]]) == Tick("gps", 120.0, 120.0)  # or the watchdog would stop the robot after 150 ms


def test_imu_scan_sound_and_text_of_our_own_recordings_keep_their_names(tmp_path):
    specs = [
        StreamSpec("ears", "audio", (), 50, 0), StreamSpec("gyro", "imu", (), 200, 0),
        StreamSpec("laser", "scan", (), 10, 0), StreamSpec("order", "text", (), 0, 0),
    ]  # fmt: skip
    with RecordingWriter(tmp_path / "a", specs, {"order": "told", "ears": "mic"}) as recording:
        recording.write(Sample("order", T0, T0, "Go, to the door!"))
        for i in range(400):
            at_ns = T0 + i * 5 * MS
            recording.write(Sample("gyro", at_ns, at_ns, np.float32([0, 0, 9.75, 0, 0, i % 2])))
            if i % 4 == 0:
                recording.write(Sample("ears", at_ns, at_ns, Audio(np.zeros((160, 1), np.int16), i * 40, 8000)))
            if i % 20 == 0:
                recording.write(Sample("laser", at_ns, at_ns, Scan(np.ones(8, np.float32), 0.0, 0.5, 0.125, 12.0)))
                recording.command("cmd_vel", Action(("linear_x",), np.float32([[0.5]]), 0.0), at_ns, at_ns)
    recordings = find(tmp_path)
    laser, ears, gyro, order = sorted(
        streams_of(recordings), key=lambda s: ["laser", "ears", "gyro", "order"].index(s.name)
    )
    assert (laser.kind, laser.shape, laser.rate_hz, laser.range_max_m) == ("scan", (2, 120), 10, 12)
    assert (ears.kind, ears.shape, ears.sample_rate_hz, ears.channels) == ("audio", (2, 24, 7), 8000, 1)
    assert ears.window_ms == 1e3 * (6 * 160 + 512) / 8000
    assert (gyro.kind, gyro.shape, gyro.window_ms, gyro.mean[2], gyro.std[5]) == ("imu", (20, 7), 100, 9.75, 0.5)
    assert (order.kind, order.latched, order.required) == ("text", True, True)
    assert words_of(recordings) == ("door", "go", "the", "to")
    tables = tables_of(recordings[0], streams_of(recordings), label_of(recordings), Tick("laser", 100, 150),
                       Vocabulary(words_of(recordings)))  # fmt: skip
    assert tables.steps["order"].x[0, :5].tolist() == [2, 4, 3, 1, 0]
    assert tables.labels["action"][:, 0].tolist() == [0.5] * len(tables)


def test_links_are_followed_and_no_folder_is_found_twice(tmp_path):
    record(tmp_path / "disk" / "monday")
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (data / "linked").symlink_to(tmp_path / "disk" / "monday")
    (data / "a" / "link").symlink_to(record(data / "tuesday"))  # which is found by its own name
    (data / "again").symlink_to(data)  # a circle
    assert [found.path for found in find(data)] == [data / "linked", data / "tuesday"]


def test_what_most_recordings_command_is_learned(tmp_path):
    for name, command in (("a", ARM), ("b", ARM), ("c", ARM), ("d", BASE)):
        record(tmp_path / name, command, rates={"/odom": 20})
    assert label_of(find(tmp_path)).topic == "arm/joint_trajectory"
    for name in ("e", "f"):
        record(tmp_path / name, BASE, rates={"/odom": 20})
    assert label_of(find(tmp_path)).topic == "cmd_vel"  # where as many hold it


def test_labels_are_measured(tmp_path):
    record(tmp_path / "a")
    label = label_of(find(tmp_path))
    assert (label.topic, label.names, label.units) == ("arm/joint_trajectory", ("shoulder", "elbow"), ("", ""))
    assert label.interface == "position" and label.min == (0.0, -0.5) and label.max == pytest.approx((0.59, -0.5))
    assert label.max_rate == pytest.approx((0.01 / 0.05, 1.0), rel=1e-4)  # 1.0 where nothing was measured
    record(tmp_path / "b", BASE)
    base = label_of(find(tmp_path), "/cmd_vel")
    assert base.units == ("m/s", "rad/s") and base.interface == "velocity"  # whose limits hold 0
    assert (base.names, base.min, base.max, base.max_rate) == (
        ("linear_x", "angular_z"), (0.0, 0.0), (0.25, 0.5), pytest.approx((5, 10)),
    )  # fmt: skip
    assert label_of(find(tmp_path)) == base  # a twist comes before joints
    record(tmp_path / "b2", BASE, edit=infinite)
    assert label_of(find(tmp_path)) == base  # what is not finite is no limit
    with pytest.raises(RecordingError, match=r"expected commands on wheels to learn from .*, got \['arm/joint_traj"):
        label_of(find(tmp_path), "wheels")


def test_a_topic_that_two_published_is_one_stream(tmp_path):
    """As arm and gripper do on /joint_states; the later of the two never said anything."""
    type_name, fill = message("/odom", 0, 20)
    with Writer(tmp_path / "a", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        one = writer.add_connection("/odom", type_name, typestore=STORE)
        other = Qos(
            QosHistory.KEEP_LAST, 1, QosReliability.BEST_EFFORT, QosDurability.VOLATILE, QosTime(0, 0), QosTime(0, 0),
            QosLiveliness.AUTOMATIC, QosTime(0, 0), False,
        )  # fmt: skip
        writer.add_connection("/odom", type_name, typestore=STORE, offered_qos_profiles=[other])
        fill(msg := empty_message(STORE, type_name))
        writer.write(one, T0, STORE.serialize_cdr(msg, type_name))
    (recording,) = find(tmp_path)
    assert recording.error == "" and recording.topics["odom"].arrival_ns.tolist() == [T0]


def the_other_way(topic, at_s, msg):
    if topic == ARM:
        msg.points[0].positions[0] = 0.59 - msg.points[0].positions[0]


def test_good_recordings_pass_and_the_table_can_be_read(tmp_path, capsys):
    record(tmp_path / "a")
    record(tmp_path / "b", edit=the_other_way)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 recordings, 5.9 s"
    assert lines[1].split() == ["stream", "topic", "files", "messages", "Hz", "gap", "s", "late", "ms", "jitter", "ms"]
    assert lines[2].split() == ["front_image_raw", "/front/image_raw", "2", "60", "10.0", "0.10", "20.0", "0.0"]
    assert "commands on arm/joint_trajectory: 120 positions, standing 0%" in lines
    assert "errors: 0, warnings: 0" in lines
    assert main([str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["balance"]["histogram"] == {"shoulder": [12] * 10, "elbow": [0] * 5 + [120] + [0] * 4}
    assert [stream["name"] for stream in said["streams"]][:2] == ["front_image_raw", "rear_image_raw"]


def test_a_copy_is_told_whatever_its_name(tmp_path):
    for name in ("a", "monday", "other"):
        record(tmp_path / name, rates={"/lidar": 5}, edit=the_other_way if name == "other" else lambda *_: True)
    (found,) = [finding for finding in checked(find(tmp_path)).findings if finding.topic == ARM[1:]]
    assert found.path == tmp_path / "monday" and found.severity == "warning"
    assert found.what.startswith(f"the same commands at the same times as {tmp_path / 'a'}: a copy counts twice")


def halted(topic, at_s, msg):
    """Told to stand for five seconds; a camera that gives each picture twice, and a LiDAR without noise."""
    if topic == BASE:
        msg.linear.x, msg.angular.z = 0.0 if 1 <= at_s < 6 else 0.25, 0.0
    if topic == "/front/image_raw":
        msg.data[:] = round(at_s * 10) // 2
    if topic == "/lidar":
        msg.data[8:12] = 0  # z of the first point


def test_when_a_robot_calls_a_sensor_frozen_skewed_or_jittering_is_said(tmp_path, capsys):
    record(tmp_path / "a", BASE, 7, edit=halted)
    (recording,) = find(tmp_path)
    assert recording.topics["front_image_raw"].repeats.tolist() == [False, True] * 35
    assert recording.topics["lidar"].repeats.tolist() == [False] + [True] * 34
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    # Three periods, and twice the tenth of a second for which a picture is the same. The LiDAR's never changes.
    link = "skewed beyond 50 ms, jittering beyond 50 ms"
    assert f"front_image_raw, on a robot, is called frozen beyond 500 ms, {link}" in said
    assert f"lidar, on a robot, is called {link}" in said
    assert (
        "lidar is never called frozen: it was not seen to change while Twists said to stand for 3 s or longer" in said
    )
    assert any(line.endswith("/lidar: the same data for 6.80 s, bit for bit: was it frozen?") for line in said)


def drop(topic, begin_s=0.0, end_s=math.inf):
    return lambda t, at_s, msg: not (t == topic and begin_s <= at_s < end_s)


def nan_command(topic, at_s, msg):
    if topic == ARM and 1.0 <= at_s < 1.1:
        msg.points[0].positions[1] = math.nan


def slip(topic, at_s, msg):
    if topic == ARM and at_s == 2:
        msg.points[0].positions[0] = 50.0


def infinite(topic, at_s, msg):
    if topic == BASE and at_s == 1.0:
        msg.linear.x = math.inf


def nan_odometry(topic, at_s, msg):
    if topic == "/odom" and at_s == 2.0:
        msg.twist.twist.linear.x = math.nan


def lossy(topic, at_s, msg):
    return not (topic == "/front/image_raw" and round(10 * at_s) % 5 in (3, 4))


def slower(topic, at_s, msg):
    return not (topic == "/rear/image_raw" and at_s > 2 and round(10 * at_s) % 2)


def clock_set(topic, at_s, msg):
    if topic == "/odom" and at_s >= 1.5:
        msg.header.stamp.sec -= 3600


def behind(seconds):
    def edit(topic, at_s, msg):
        if topic == "/front/image_raw":
            stamp_ns = msg.header.stamp.sec * NS + msg.header.stamp.nanosec - round(seconds * NS)
            msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(stamp_ns, NS)

    return edit


def ahead(topic, at_s, msg):
    if topic == "/lidar":
        msg.header.stamp.sec += 1


def no_fix(topic, at_s, msg):
    if topic == "/gps" and at_s >= 2:
        msg.status.status = -1


def empty(topic, at_s, msg):
    return at_s < 0.5


def short(topic, at_s, msg):
    if topic == "/joint_states":
        msg.velocity = np.zeros(0)


def in_another_order(topic, at_s, msg):
    if topic == "/joint_states" and at_s >= 1:
        msg.name = msg.name[::-1]
        msg.position, msg.velocity = msg.position[::-1].copy(), msg.velocity[::-1].copy()


def of_the_gripper(topic, at_s, msg):
    if topic == "/joint_states" and at_s >= 1.5:
        msg.name = ["finger", "elbow"]


def to_zero(topic, at_s, msg):
    if topic == ARM and at_s == 2:
        msg.points[0].positions[1] = 0.0


def only_shoulder(topic, at_s, msg):
    if topic == ARM:
        msg.joint_names, msg.points[0].positions = ["shoulder"], msg.points[0].positions[:1].copy()


def and_wrist(topic, at_s, msg):
    if topic == ARM:
        msg.joint_names, msg.points[0].positions = [*msg.joint_names, "wrist"], np.float64([0.0, -0.5, 0.25])


def frozen(topic, at_s, msg):
    if topic == "/front/image_raw" and at_s >= 1:
        msg.data[:] = 7


def degrees(topic, at_s, msg):
    if topic == ARM:
        msg.points[0].positions[0] *= 64


def plans(topic, at_s, msg):
    if topic == ARM and at_s >= 1:
        msg.points = msg.points * 3


def velocities(topic, at_s, msg):
    if topic == ARM:
        msg.points[0].velocities, msg.points[0].positions = msg.points[0].positions, np.zeros(0)


def unstamped(topic, at_s, msg):
    if topic == "/lidar":
        msg.header.stamp.sec = msg.header.stamp.nanosec = 0


SLOW = {**RATES, "/rear/image_raw": 5}
BAD = {
    "missing topic": (
        {"edit": drop("/rear/image_raw")},
        "warning: {bad} at 0.00 s: rear_image_raw: missing, though other recordings have it",
    ),
    "missing commands": (
        {"edit": drop(ARM)},
        "error: {bad} at 0.00 s: arm/joint_trajectory: missing: no commands to learn from (leaves out the recording)",
    ),
    "unlabelled stretch": (
        {"edit": drop(ARM, 1.0, 2.5)},
        "error: {bad} at 0.95 s: /arm/joint_trajectory: unlabelled for 1.55 s: no command, though sensors went on "
        "(leaves out the ticks)",
    ),
    "unlabelled stretches": (
        {"edit": lambda topic, at_s, msg: topic != ARM or at_s % 3 < 1, "seconds": 6},
        "error: {bad} at 0.95 s: /arm/joint_trajectory: unlabelled for 2.05 s: no command, though sensors went on; "
        "1 more, 4.05 s in all (leaves out the ticks)",
    ),
    "goals alone": (
        {"edit": lambda topic, at_s, msg: topic != ARM or at_s in (0, 2)},
        "error: {bad} at 0.00 s: /arm/joint_trajectory: labelled for 0.00 s: expected finite commands, at least one "
        "every 1.0 s (leaves out the recording)",
    ),
    "mixed rates": (
        {"rates": SLOW},
        "error: {bad} at 0.00 s: /rear/image_raw: mixed rates: 5.0 Hz, elsewhere 10.0 Hz (leaves out the recording)",
    ),
    "a slip": (
        {"edit": slip},
        "warning: {bad} at 2.00 s: arm/joint_trajectory: shoulder of 50, but within 9.94 of 0.295 in 179 of 180 "
        "commands: it sets the limits",
    ),
    "a joint once elsewhere": (
        {"edit": to_zero},
        "warning: {bad} at 2.00 s: arm/joint_trajectory: elbow of 0, but within 0.1 of -0.5 in 179 of 180 commands: it "
        "sets the limits",
    ),
    "empty episode": (
        {"edit": empty},
        "error: {bad} at 0.00 s: all topics: an empty episode: sensors sent for 0.45 s (leaves out the recording)",
    ),
    "nan actions": (
        {"edit": lambda topic, at_s, msg: nan_command(topic, at_s % 2, msg), "seconds": 4},
        "error: {bad} at 1.00 s: /arm/joint_trajectory: 2 commands in a row are not finite in elbow; 1 more, 4 in all "
        "(leaves out the ticks)",
    ),
    "nan action": (
        {"edit": nan_command},
        "error: {bad} at 1.00 s: /arm/joint_trajectory: 2 commands in a row are not finite in elbow "
        "(leaves out the ticks)",
    ),
    "other length": (
        {"edit": short},
        "error: {bad} at 0.00 s: /joint_states: expected 4 numbers (position, velocity of ['elbow', 'shoulder']) as in "
        "other recordings, got 2 numbers (position of ['elbow', 'shoulder']) (leaves out the recording)",
    ),
    "other joints": (
        {"edit": of_the_gripper},
        "warning: {bad} at 1.50 s: /joint_states: 30 messages of no use; the first: expected the joints shoulder, "
        "elbow, each once, got finger, elbow",
    ),
    "fewer joints": (
        {"edit": only_shoulder},
        "error: {bad} at 0.00 s: /arm/joint_trajectory: expected ('shoulder', 'elbow'), got none for ['elbow'] "
        "(leaves out the recording)",
    ),
    "more joints": (
        {"edit": and_wrist},
        "warning: {bad} at 0.00 s: /arm/joint_trajectory: not learned, as other recordings lack it: wrist",
    ),
    "a frozen camera": (
        {"edit": frozen},
        "warning: {bad} at 0.00 s: /front/image_raw: the same data for 1.90 s, bit for bit: was it frozen?",
    ),
    "another unit": (
        {"edit": degrees},
        "warning: {bad} at 0.00 s: arm/joint_trajectory: shoulder as far as 37.3 from 0.44, in other recordings 0.44: "
        "in another unit? It sets the limits",
    ),
    "plans": (
        {"edit": plans},
        "warning: {bad} at 0.00 s: /arm/joint_trajectory: trajectories of up to 3 points: the first of each is "
        "learned, as if it were due at once",
    ),
    "velocities": (
        {"edit": velocities},
        "error: {bad} at 0.00 s: /arm/joint_trajectory: expected positions as in other recordings, got velocities "
        "(leaves out the recording)",
    ),
    "nan in a sensor": (
        {"edit": nan_odometry},
        "warning: {bad} at 2.00 s: /odom: 1 messages of no use; the first: expected finite values, got [nan]",
    ),
    "no stamps": (
        {"edit": unstamped},
        "warning: {bad} at 0.00 s: /lidar: 15 messages of no use; the first: expected a stamp, got 0: its driver "
        "leaves header.stamp empty; none is left",
    ),
    "no fix": (
        {"edit": no_fix},
        "warning: {bad} at 2.00 s: /gps: 4 messages of no use; the first: expected a fix, got status -1: no satellites",
    ),
    "gap": ({"edit": drop("/odom", 1.0, 2.5)}, "warning: {bad} at 0.95 s: /odom: silent for 1.55 s"),
    "lost frames": (
        {"edit": lossy},
        "warning: {bad} at 0.00 s: /front/image_raw: 6.3 messages a second at 10.0 Hz: some are lost, or its rate "
        "changes",
    ),
    "changing rate": (
        {"edit": slower, "seconds": 4},
        "warning: {bad} at 0.00 s: /rear/image_raw: 7.6 messages a second at 10.0 Hz: some are lost, or its rate "
        "changes",
    ),
    "clock behind": (
        {"edit": behind(0.9)},
        "error: {bad} at 0.00 s: /front/image_raw: skew: stamped 0.92 s before the recording had it, of use for 420 "
        "ms: set its clock, or record with --use-sim-time if it has the simulator's (leaves out the recording)",
    ),
    "future": (
        {"edit": ahead},
        "warning: {bad} at 0.00 s: /lidar: 15 messages from the future, by up to 0.98 s: they are refused",
    ),
    "clock jump": (
        {"edit": clock_set},
        "warning: {bad} at 1.50 s: /odom: its clock jumps by -3600.00 s against the robot's",
    ),
}


@pytest.mark.parametrize("where", ["a", "c"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_with_file_and_time(tmp_path, what, where):
    """Be it the first recording or the last."""
    good = [name for name in ("a", "b", "c") if name != where]
    for name in good:
        record(tmp_path / name)
    changes, said = BAD[what]
    bad = record(tmp_path / where, **changes)
    report = checked(recordings := find(tmp_path))
    assert said.format(bad=bad) in map(str, report.findings)
    assert {finding.path for finding in report.errors} == ({bad} if said.startswith("error") else set())
    left = [recording.path.name for recording in report.usable(recordings)]
    assert left == (good if "leaves out the recording" in said else ["a", "b", "c"])


def test_a_stream_that_is_always_late_is_of_use_if_it_is_the_robot_that_is_so(tmp_path):
    for name in ("a", "b"):
        record(tmp_path / name, edit=behind(0.9))
    said = [str(finding) for finding in checked(find(tmp_path)).findings if "a copy" not in finding.what]
    assert len(said) == 2 and all(
        "warning" in line and "skew: stamped 0.90 s before the other streams" in line for line in said
    )


def test_damaged_and_unfinished_recordings_are_errors_not_exceptions(tmp_path):
    record(tmp_path / "a")
    mcap = record(tmp_path / "b") / "b.mcap"
    mcap.write_bytes(mcap.read_bytes()[:-100])
    with pytest.raises(KeyboardInterrupt), RecordingWriter(tmp_path / "c", [StreamSpec("gps", "vector", (3,), 4, 0)]):
        raise KeyboardInterrupt
    errors = [str(error) for error in checked(find(tmp_path)).errors]
    assert main([str(tmp_path)]) == 1
    assert errors[0].startswith(f"error: {tmp_path}/b at 0.00 s: all topics: {tmp_path}/b: cannot be read: ")
    assert f"was cut short; `mm-edge record {tmp_path}/c` repairs it" in errors[1] and len(errors) == 2
    with pytest.raises(RecordingError, match=rf"^{tmp_path}/b: cannot be read: "):
        label_of(find(tmp_path / "b"))
    with pytest.raises(RecordingError, match=r"nothing: expected recordings \(folders with a metadata.yaml"):
        find(tmp_path / "nothing")
    assert main([str(tmp_path / "nothing")]) == 2
    assert [recording.error for recording in find(tmp_path / "a" / "a.mcap")] == [""]


def test_sound_of_another_rate_is_an_error(tmp_path):
    specs = [StreamSpec("ears", "audio", (), 50, 0)]
    for name, sample_rate_hz in (("a", 16000), ("b", 8000)):
        with RecordingWriter(tmp_path / name, specs) as recording:
            for i in range(100):
                at_ns = T0 + i * 20 * MS
                audio = Audio(np.zeros((320, 2), np.int16), i * 320, sample_rate_hz)
                recording.write(Sample("ears", at_ns, at_ns, audio))
                recording.command("cmd_vel", Action(("linear_x",), np.float32([[0.5]]), 0.0), at_ns, at_ns)
    (error,) = checked(find(tmp_path)).errors
    assert str(error) == (
        f"error: {tmp_path}/b at 0.00 s: /ears: expected 16000 Hz, 2 channels as in other recordings, got 8000 Hz, "
        "2 channels (leaves out the recording)"
    )


def test_a_lopsided_driver_is_told_of(tmp_path):
    record(tmp_path / "a", BASE)
    report = checked(find(tmp_path))
    balance = report.balance
    assert (balance.commands, balance.standing, balance.left, balance.right) == (60, 0.5, 0.5, 0.0)
    assert balance.histogram == {"linear_x": [30] + [0] * 8 + [30], "angular_z": [30] + [0] * 8 + [30]}
    assert [f.what for f in report.findings] == ["label balance: turns left in 50%, right in 0% of the commands"]


def test_a_tick_is_labelled_with_the_first_command_after_it(tmp_path):
    """Ticks come with the front camera, every 100 ms; commands every 50 ms, one of them at the same time."""
    record(tmp_path / "a")
    (recording,) = recordings = find(tmp_path)
    streams, label = streams_of(recordings), label_of(recordings)
    for latency_ms, behind in ((0, 0), (1, 1), (50, 1), (60, 2)):
        tables = tables_of(recording, streams, label, tick_of(streams), latency_ms=latency_ms)
        wanted = 2 * np.arange(30) + behind
        known = wanted < 60
        assert ((tables.now_ns - T0) // MS).tolist() == list(range(0, 3000, 100))
        assert tables.labels["weight"].tolist() == known.tolist()
        assert np.array_equal(tables.labels["action"][known, 0], np.float32(wanted[known] / 100))
    assert len(tables.steps["front_image_raw"].x) == 30 and len(tables.steps["lidar"].x) == 15
    assert tables.steps["front_image_raw"].x[7, 0, 0].tolist() == [7, 7, 7]
    assert set(tables.steps) == {spec.name for spec in streams} and tables.mask.all(axis=0).any()


@pytest.mark.parametrize(
    ("edit", "unknown_ms"),
    [(drop(ARM, 1.0, 2.5), range(1000, 2600, 100)), (nan_command, [1000])],
)
def test_a_tick_that_nobody_labelled_weighs_nothing(tmp_path, edit, unknown_ms):
    record(tmp_path / "a", edit=edit)
    (recording,) = recordings = find(tmp_path)
    streams = streams_of(recordings)
    tables = tables_of(recording, streams, label_of(recordings), tick_of(streams))
    assert [(t - T0) // MS for t, w in zip(tables.now_ns, tables.labels["weight"]) if not w] == list(unknown_ms)
    assert np.isfinite(tables.labels["action"]).all()


@pytest.mark.parametrize(("topic", "name"), [("/gps", "gps"), ("/front/image_raw", "front_image_raw")])
def test_a_sensor_that_a_recording_lacks_is_masked(tmp_path, topic, name):
    """Be it the one that ticks come with."""
    record(tmp_path / "a")
    record(tmp_path / "b", edit=drop(topic))
    recordings = checked(find(tmp_path)).usable(find(tmp_path))
    streams = streams_of(recordings)
    tables = tables_of(recordings[1], streams, label_of(recordings), tick_of(streams))
    masked = [spec.name for spec in streams].index(name)
    assert not tables.mask[:, masked].any() and len(tables.steps[name].x) == 0
    assert tables.mask.any() and tables.labels["weight"].sum() >= 19


def test_a_sensor_that_most_recordings_lack_is_not_used(tmp_path):
    for name in ("a", "b"):
        record(tmp_path / name, edit=drop("/gps"))
    path = record(tmp_path / "c")
    report = checked(recordings := find(tmp_path))
    assert "gps" not in [spec.name for spec in streams_of(recordings)] and report.unused == ("/gps",)
    assert f"warning: {path} at 0.00 s: /gps: not used, as most recordings lack it" in map(str, report.findings)
    assert report.usable(recordings) == recordings


def test_words_are_no_sensors_and_signs_no_words(tmp_path):
    specs = [StreamSpec("laser", "scan", (), 10, 0), StreamSpec("order", "text", (), 0, 0)]
    for name, text in (("a", "go"), ("b", "!")):
        with RecordingWriter(tmp_path / name, specs) as recording:
            for at_ns in (T0, T0 + 100 * MS):
                scan = Scan(np.ones(8, np.float32), 0.0, 0.5, 0.125, 12.0)
                recording.write(Sample("laser", at_ns, at_ns, scan))
                recording.command("cmd_vel", Action(("linear_x",), np.float32([[0.5]]), 0.0), at_ns, at_ns)
            recording.write(Sample("order", T0 + 5 * NS, T0 + 5 * NS, text))
    a, b = recordings = find(tmp_path)
    assert [str(error) for error in checked(recordings).errors] == [
        f"error: {recording.path} at 0.00 s: all topics: an empty episode: sensors sent for 0.10 s "
        "(leaves out the recording)" for recording in (a, b)
    ]  # fmt: skip
    assert [spec.name for spec in streams_of([a])] == ["laser", "order"] and words_of([a]) == ("go",)
    assert [spec.name for spec in streams_of([b])] == ["laser"]
    assert b.topics["order"].refused == [(T0 + 5 * NS, "expected words, got '!'")]


def test_a_camera_is_no_twin_of_what_is_empty_or_no_picture(tmp_path):
    topics = {
        "/cam/image_raw": ("sensor_msgs/msg/Image", 0),
        "/cam/image_raw/compressed": ("sensor_msgs/msg/CompressedImage", 1),
        "/front": ("sensor_msgs/msg/PointCloud2", 1), "/front/image_raw": ("sensor_msgs/msg/Image", 1),
        "/front/image_raw/compressed": ("sensor_msgs/msg/CompressedImage", 1),
    }  # fmt: skip
    with Writer(tmp_path / "a", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, (type_name, count) in topics.items():
            connection = writer.add_connection(topic, type_name, typestore=STORE)
            for _ in range(count):
                writer.write(connection, T0, STORE.serialize_cdr(empty_message(STORE, type_name), type_name))
    (recording,) = find(tmp_path)
    assert set(recording.topics) == {"cam_image_raw_compressed", "front", "front_image_raw"}
    assert recording.unused == ("/cam/image_raw", "/front/image_raw/compressed")


def test_joints_are_learned_by_name(tmp_path):
    def swapped(topic, at_s, msg):
        if topic == ARM:
            msg.joint_names, msg.points[0].positions = msg.joint_names[::-1], msg.points[0].positions[::-1].copy()

    record(tmp_path / "a")
    record(tmp_path / "b", edit=swapped)
    recordings = find(tmp_path)
    streams, label = streams_of(recordings), label_of(recordings)
    a, b = (tables_of(recording, streams, label, tick_of(streams)).labels["action"] for recording in recordings)
    assert np.array_equal(a, b) and a[1].tolist() == [np.float32(0.02), -0.5]


def test_joints_that_are_seen_may_come_in_any_order(tmp_path):
    """Of b in two, of which the second is more often; a message at its begin is another driver's, or has no names."""

    def edit(topic, at_s, msg):
        in_another_order(topic, at_s, msg)
        if topic == "/joint_states" and at_s < 0.1:
            msg.name = [] if at_s < 0.05 else ["finger", "thumb"]

    record(tmp_path / "a")
    record(tmp_path / "b", edit=edit)
    recordings = find(tmp_path)
    assert [r.topics["joint_states"].names for r in recordings] == [("shoulder", "elbow"), ("elbow", "shoulder")]
    streams, label = streams_of(recordings), label_of(recordings)
    (spec,) = [spec for spec in streams if spec.name == "joint_states"]
    assert spec.joints == ("shoulder", "elbow") and spec.mean[2:] == pytest.approx((0.5, 0.25))
    a, b = (tables_of(r, streams, label, tick_of(streams)).steps["joint_states"].x for r in recordings)
    assert len(b) > 25 and np.array_equal(a[-len(b) :], b)
    assert [why for _, why in recordings[1].topics["joint_states"].refused] == [
        "expected the joints elbow, shoulder, each once, got no names",
        "expected the joints elbow, shoulder, each once, got finger, thumb",
    ]


@pytest.mark.parametrize("change", [velocities, None])
def test_what_changes_its_meaning_within_a_recording_is_refused(tmp_path, change):
    """From 1.5 s on joints are others, commands are of joints in another order, or are velocities."""

    def edit(topic, at_s, msg):
        of_the_gripper(topic, at_s, msg)
        if topic == ARM and at_s >= 1.5:
            if change:
                change(topic, at_s, msg)
            else:
                msg.joint_names = msg.joint_names[::-1]

    record(tmp_path / "a", edit=edit)
    (recording,) = recordings = find(tmp_path)
    streams = streams_of(recordings)
    tables = tables_of(recording, streams, label_of(recordings), tick_of(streams))
    assert len(tables.steps["joint_states"].x) == 16  # the last was measured before 1.5 s
    assert len(recording.topics["arm/joint_trajectory"].refused) == 30
    assert tables.labels["weight"].tolist() == [1] * 15 + [0] * 15


def test_recordings_that_are_left_out_set_no_limits(tmp_path, capsys):
    pytest.importorskip("torch", reason="training needs torch")
    from training.recipe import make_recipe, read_yaml
    from training.robot import build_model, raw_recipe, supply, with_words
    from training.train import RECIPES

    def wild(topic, at_s, msg):
        if topic == ARM:
            msg.points[0].positions[0] = 50.0

    record(tmp_path / "a", rates=SLOW, edit=wild)
    paths = [str(record(tmp_path / name)) for name in ("b", "c")]
    raw = raw_recipe(read_yaml((RECIPES / "robot.yaml").read_text(), "robot"), tmp_path, "", go_on=True)
    assert list(raw["data"]["recordings"]) == paths and raw["action"]["max"] == pytest.approx([0.59, -0.5])
    record(tmp_path / "0", edit=only_shoulder)  # comes later, and changes nothing
    recipe = with_words(make_recipe(raw, [], ""))
    batch = supply(recipe, 0, tmp_path, workers=1).next()
    assert batch.labels["action"].shape[-1] == 2
    model = build_model(recipe)
    result, _ = model.scan(batch, model.zero_state(len(batch.start)))
    assert result.output is result.raw and result.output.shape[-1] == 2  # positions: nothing draws them to 0


def test_a_dimension_that_never_moves_costs_no_more_than_another():
    torch = pytest.importorskip("torch", reason="training needs torch")
    from training.robot import loss

    ones = torch.ones(1, 1)
    batch = SimpleNamespace(labels={"action": torch.zeros(1, 1, 2), "weight": ones}, valid=ones[..., None])
    out = SimpleNamespace(output=torch.full((1, 1, 2), 0.1), gates=ones, spikes={})
    recipe = SimpleNamespace(action={"min": [0.0, 0.0], "max": [1.0, 0.0]}, train=SimpleNamespace(weights={}))
    total, _ = loss(recipe, None, batch, out)
    assert total == pytest.approx(0.4 - 0.15 / 2)  # 0.1 of a quarter, less half of beta
    recipe.action = {"min": [0.0, 0.999], "max": [1.0, 1.0]}  # nor a joint that is held, with a little noise
    assert loss(recipe, None, batch, out)[0] == total


def test_recordings_of_the_simulator_can_be_learned_from(tmp_path, capsys):
    pytest.importorskip("mujoco", reason="the simulator is not installed")
    assert mm_edge(["record", str(tmp_path / "sim"), "--sim", "--episodes", "1"]) == 0
    assert main([str(tmp_path / "sim")]) == 0
    assert "commands on expert/cmd_vel: " in capsys.readouterr().out
    (recording,) = recordings = find(tmp_path / "sim")
    streams, label = streams_of(recordings), label_of(recordings)
    assert [spec.name for spec in streams] == ["camera", "audio", "scan", "imu", "text"]
    tables = tables_of(recording, streams, label, tick_of(streams), Vocabulary(words_of(recordings)))
    expert = recording.topics["expert/cmd_vel"]
    assert tables.labels["weight"].all() and np.array_equal(tables.now_ns, expert.arrival_ns)
    assert np.array_equal(tables.labels["action"], expert.values[:, [0, 5]])  # what the expert did at that very tick


def test_topics_that_would_be_the_same_stream_are_refused(tmp_path):
    specs = [StreamSpec("a", "vector", (), 1, 0), StreamSpec("b", "vector", (), 1, 0)]
    with RecordingWriter(tmp_path / "a", specs, {"a": "left/arm", "b": "left_arm"}) as recording:
        recording.write(Sample("a", T0, T0, np.float32([1])))
        recording.write(Sample("b", T0, T0, np.float32([1])))
    assert find(tmp_path)[0].error == "" and set(find(tmp_path)[0].topics) == {"a", "b"}  # these have names
    types = {"/left/arm": "sensor_msgs/msg/JointState", "/left_arm": "sensor_msgs/msg/JointState"}
    with Writer(tmp_path / "c", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, type_name in types.items():
            connection = writer.add_connection(topic, type_name, typestore=STORE)
            writer.write(connection, T0, STORE.serialize_cdr(empty_message(STORE, type_name), type_name))
    assert find(tmp_path / "c")[0].error == (
        f"{tmp_path}/c: expected topics whose names differ by more than a sign, got /left/arm and /left_arm"
    )
