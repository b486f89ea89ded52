"""Messages as rclpy makes them and as rosbags reads them: every test below runs on both."""

import importlib
import json
import math
import zlib
from array import array
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_edge.errors import BundleError, SampleError
from mm_edge.messages import (
    AUDIO_CHUNK,
    MESSAGE_TYPES,
    TWIST,
    action_to_ros,
    audio_chunk_to_ros,
    from_ros,
    output_from_json,
    output_to_json,
    positions_from_ros,
    positions_to_ros,
    to_ros,
    twist_from_ros,
)
from mm_edge.types import Action, Attention, Audio, Caption, Event, Output, Scan, StreamSpec

STAMP_NS, ARRIVAL_NS = 1_700_000_000_123_456_789, 1_700_000_000_200_000_000
IMAGE, COMPRESSED, CLOUD = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/PointCloud2"
RGB = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
DATA = {
    "image": RGB,
    "audio": Audio(np.array([[1, -2], [3, 4], [-32768, 32767]], np.int16), 2**40 + 1, 16000),
    "scan": Scan(np.float32([1.5, np.inf, np.nan]), -0.5, 0.25, 0.125, 8.0),
    "points": np.float32([[1, 2, 3], [np.nan, 0, -1]]),
    "imu": np.float32([0.1, -0.2, 9.81, 0.01, 0.02, -0.03]),
    "vector": np.float32([0.1, 1e-20, 3]),
    "text": "drive to the red ball",
}


def spec(kind):
    return StreamSpec("s", kind, (3,), 10.0, 300.0, sample_rate_hz=16000, channels=2)


@pytest.fixture(params=["rosbags", "rclpy"])
def new(request):
    """new("sensor_msgs/msg/Image") is an empty message."""
    if request.param == "rosbags":
        stores = pytest.importorskip("rosbags.typesys", reason="rosbags is not installed")
        from mm_edge.recording import empty_message

        store = stores.get_typestore(stores.Stores.ROS2_JAZZY)

        def make(type_name, **fields):
            msg = empty_message(store, type_name)
            for name, value in fields.items():
                setattr(msg, name, value)
            return msg

        return make
    pytest.importorskip("sensor_msgs.msg", reason="no ROS messages here")

    def make(type_name, **fields):
        package, _, name = type_name.split("/")
        return getattr(importlib.import_module(f"{package}.msg"), name)(**fields)

    return make


def filled(new, kind, data=None, frame_id=""):
    msg = new(MESSAGE_TYPES[kind])
    data = DATA[kind] if data is None else data
    to_ros(kind, msg, STAMP_NS, data, frame_id, lambda **fields: new("sensor_msgs/msg/PointField", **fields))
    return msg


def read(kind, msg, type_name=None):
    return from_ros(spec(kind), type_name or MESSAGE_TYPES[kind], msg, ARRIVAL_NS)


def refusal(kind, msg, type_name=None):
    with pytest.raises(SampleError) as error:
        read(kind, msg, type_name)
    assert error.value.stream == "s"
    return str(error.value)


def assert_same(a, b):
    """The same bits in the same types; NaN equals NaN."""
    assert type(a) is type(b)
    if isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


@pytest.mark.parametrize("kind", DATA)
def test_what_goes_in_comes_out(new, kind):
    sample = read(kind, filled(new, kind))
    assert sample[:3] == ("s", ARRIVAL_NS if kind == "text" else STAMP_NS, ARRIVAL_NS)
    assert_same(sample.data, DATA[kind])


def test_a_message_can_be_filled_again_with_another_size(new):
    msg = filled(new, "image", frame_id="front")
    assert msg.header.frame_id == "front"
    for image in (RGB + 100, np.full((5, 3, 3), 7, np.uint8), RGB[:1]):
        to_ros("image", msg, STAMP_NS, image)
        assert_same(read("image", msg).data, image)


def test_sound_describes_itself(new):
    msg = filled(new, "audio")
    assert (msg.height, msg.width, msg.point_step) == (1, 1, 28)
    assert [(f.name, f.offset, f.datatype, f.count) for f in msg.fields] == [
        ("sample_rate_hz", 0, 6, 1), ("first_sample", 8, 8, 1), ("ch0", 16, 3, 3), ("ch1", 22, 3, 3),
    ]  # fmt: skip


# Images ------------------------------------------------------------------------------------------------------------


def image_message(new, encoding, pixels, step=None):
    """`pixels` uint8 (h, w, bytes), each row padded with 255 up to `step` bytes."""
    msg = filled(new, "image")
    rows = pixels.reshape(len(pixels), -1)
    step = step or rows.shape[1]
    padded = np.full((len(rows), step), 255, np.uint8)
    padded[:, : rows.shape[1]] = rows
    to_ros("image", msg, STAMP_NS, padded)  # for the bytes; the fields that describe them follow
    msg.height, msg.width, msg.step, msg.encoding = pixels.shape[0], pixels.shape[1], step, encoding
    return msg


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", RGB),
        ("bgr8", RGB[..., ::-1]),
        ("rgba8", np.dstack([RGB, RGB[..., :1]])),
        ("bgra8", np.dstack([RGB[..., ::-1], RGB[..., :1]])),
    ],
)
def test_colour_encodings_and_padded_rows(new, encoding, pixels, padding):
    msg = image_message(new, encoding, pixels, pixels.shape[1] * pixels.shape[2] + padding)
    assert_same(read("image", msg).data, RGB)


def test_grey_and_yuv_become_rgb(new):
    grey = read("image", image_message(new, "mono8", RGB[..., :1])).data
    assert_same(grey, np.repeat(RGB[..., :1], 3, axis=2))
    white = np.tile(np.uint8([235, 128]), (2, 4, 1))  # Y 235, U and V 128
    for encoding, pixels in (("yuv422_yuy2", white), ("uyvy", white[..., ::-1])):
        assert (read("image", image_message(new, encoding, pixels)).data == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_compressed_images(new, suffix):
    smooth = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    encoded = cv2.imencode(suffix, smooth[..., ::-1])[1].tobytes()

    def message(data):
        msg = new(COMPRESSED)
        msg.header.stamp.sec, msg.format = 1, suffix[1:]
        msg.data = np.frombuffer(data, np.uint8) if isinstance(msg.data, np.ndarray) else data
        return msg

    sample = read("image", message(encoded), COMPRESSED)
    assert sample.stamp_ns == 1_000_000_000
    assert np.abs(sample.data.astype(int) - smooth).max() <= (0 if suffix == ".png" else 2)
    assert_same(read("image", message(encoded + b"\0" * 9), COMPRESSED).data, sample.data)  # as some cameras pad
    for bad in (encoded[:-20], b"", b"\0" * 100, encoded[:4] + b"\x55" * 40 + encoded[-12:]):
        refusal("image", message(bad), COMPRESSED)


def compressed(new, data):
    msg = new(COMPRESSED)
    msg.header.stamp.sec = 1
    msg.data = np.frombuffer(bytes(data), np.uint8) if isinstance(msg.data, np.ndarray) else bytes(data)
    return msg


@pytest.mark.parametrize("side", [400, 6_000, 60_000])
def test_a_png_that_claims_many_more_pixels_than_it_holds(new, side):
    """cv2 would take seconds and gigabytes for them, or refuse them itself."""
    png = bytearray(cv2.imencode(".png", RGB)[1].tobytes())
    png[16:24] = side.to_bytes(4, "big") * 2  # width and height
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    assert refusal("image", compressed(new, png), COMPRESSED) == (
        f"s: expected at most 159744 pixels in a png of 78 bytes, got {side**2}"
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_black_frame_is_many_pixels_in_few_bytes(new, suffix):
    black = np.zeros((1080, 1920), np.uint8)
    data = cv2.imencode(suffix, black, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    assert_same(read("image", compressed(new, data), COMPRESSED).data, np.zeros((1080, 1920, 3), np.uint8))


def test_a_png_of_more_pixels_than_any_camera_has(new):
    data = cv2.imencode(".png", np.zeros((2**12, 2**13 + 1), np.uint8))[1].tobytes()
    got = f"s: expected at most 33554432 pixels in a png of {len(data)} bytes, got 33558528"
    assert refusal("image", compressed(new, data), COMPRESSED) == got


def test_ranges_below_the_sensors_least_are_no_measurement(new):
    """Many send 0 where nothing came back. -inf is how a sensor says that something is closer."""
    msg, scan = new("sensor_msgs/msg/LaserScan"), Scan(np.float32([0, -1, -np.inf, 0.125, 3]), -0.5, 0.25, 0.125, 8.0)
    to_ros("scan", msg, STAMP_NS, scan)
    assert_same(read("scan", msg).data.ranges, np.float32([np.nan, np.nan, -np.inf, 0.125, 3]))


def test_a_png_of_depth_is_no_picture(new):
    data = cv2.imencode(".png", np.full((4, 4), 1500, np.uint16))[1].tobytes()
    assert "expected a picture of 8 bits a channel" in refusal("image", compressed(new, data), COMPRESSED)


@pytest.mark.parametrize("chunk", [b"IDAT", b"IEND"])
def test_a_png_with_a_chunk_that_claims_half_a_gigabyte(new, chunk):
    """cv2 would take as much memory before it looks for the bytes."""
    png = bytearray(cv2.imencode(".png", RGB)[1].tobytes())
    at = png.index(chunk) - 4
    png[at : at + 4] = (2**29).to_bytes(4, "big")
    assert "expected a well-formed sensor_msgs/msg/CompressedImage" in refusal(
        "image", compressed(new, png), COMPRESSED
    )


def test_a_jpeg_that_claims_many_more_pixels_than_it_holds(new):
    jpeg = bytearray(cv2.imencode(".jpg", RGB)[1].tobytes())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2  # height and width
    for padding in (b"", b"\xff\xff"):  # which may lie between segments
        jpeg[frame:frame] = padding
        assert refusal("image", compressed(new, jpeg), COMPRESSED).endswith(" bytes, got 3600000000")
    # Where libjpeg goes on: after a marker that has no size, and at the next marker after bytes that are none. What
    # follows must not be taken for a size, or a frame, behind which the true one hides.
    for hidden in (b"\xff\xd0", b"\x00\xc0\x00\x0b\x08\x00\x01\x00\x01"):
        hides = jpeg[:frame] + hidden + jpeg[frame:]
        assert f"ValueError: no jpeg segment at byte {frame}" in refusal("image", compressed(new, hides), COMPRESSED)


def test_images_that_contradict_themselves(new):
    def with_field(name, value):
        msg = filled(new, "image")
        setattr(msg, name, value)
        return refusal("image", msg)

    assert with_field("encoding", "32FC1") == (
        "s: expected an encoding among rgb8, bgr8, rgba8, bgra8, mono8, yuyv, yuv422_yuy2, uyvy, yuv422, got '32FC1'"
    )
    assert with_field("height", 0) == "s: expected pixels, got an image of 4 x 0"
    assert with_field("height", 3) == "s: expected 3 rows of 12 bytes, 36 together, got 24 bytes"
    assert with_field("height", 1) == "s: expected 1 rows of 12 bytes, 12 together, got 24 bytes"
    assert with_field("width", 5) == "s: expected a step of at least 5 x 3 bytes (rgb8), got 12"


# Other messages ----------------------------------------------------------------------------------------------------


def test_a_message_of_the_wrong_type(new):
    assert refusal("scan", filled(new, "image"), IMAGE) == (
        "s: expected a message with scan: sensor_msgs/msg/LaserScan, got sensor_msgs/msg/Image"
    )


@pytest.mark.parametrize(
    ("sec", "nanosec", "got"),
    [
        (0, 0, "0: its driver leaves header.stamp empty"),
        (-1, 5, "-1 s, 5 ns"),
        (1, 10**9, "1 s, 1000000000 ns"),
        (2**31, 5, "2147483648 s, 5 ns"),
        (2**70, 5, "1180591620717411303424 s, 5 ns"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "scan", "imu"])
def test_stamps_that_are_none(new, kind, sec, nanosec, got):
    msg = filled(new, kind)
    msg.header.stamp.sec, msg.header.stamp.nanosec = sec, nanosec
    assert refusal(kind, msg).endswith(f"got {got}")


def test_what_a_message_holds_is_told_in_part_if_it_is_long(new):
    msg = filled(new, "image")
    msg.encoding = "x" * 100_000
    assert refusal("image", msg).endswith(f", got '{'x' * 299}... (100002 characters)")


def test_an_imu_that_says_it_measured_nothing(new):
    msg = filled(new, "imu")
    msg.angular_velocity_covariance[0] = -1.0
    assert refusal("imu", msg) == "s: expected a measured angular_velocity, got covariance[0] = -1: not measured"


def test_points_of_any_layout(new):
    """A cloud of 2 x 2 points of 20 bytes, big-endian, z first, with padding after each row."""
    record = np.dtype({"names": "zyx", "formats": [">f4"] * 3, "offsets": [0, 4, 12], "itemsize": 20})
    points = np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    rows = np.zeros((2, 2), record)
    for i, axis in enumerate("xyz"):
        rows[axis] = points[:, i].reshape(2, 2)
    data = np.concatenate([rows.view(np.uint8).reshape(2, 40), np.zeros((2, 6), np.uint8)], axis=1)
    msg = filled(new, "points")
    to_ros("image", image := new(IMAGE), STAMP_NS, data)
    msg.data, msg.height, msg.width, msg.point_step, msg.row_step, msg.is_bigendian = image.data, 2, 2, 20, 46, True
    for field, offset in zip(msg.fields, (12, 4, 0)):
        field.offset = offset
    assert_same(read("points", msg).data, points)
    msg.fields[0].datatype = 8
    assert "expected fields (name: datatype) {'x': 7, 'y': 7, 'z': 7}, got {'x': 8" in refusal("points", msg)
    msg.fields[0].datatype, msg.fields[0].offset = 7, 17
    assert "expected fields within a point of 20 bytes, got offsets [17, 4, 0]" in refusal("points", msg)


@pytest.mark.parametrize("kind", ["audio", "points"])
@pytest.mark.parametrize(("field", "value"), [("offset", 2**31 - 1), ("count", 2**30), ("count", 2**32 - 1)])
def test_a_point_with_a_field_that_ends_beyond_what_numpy_can_count(new, kind, field, value):
    """numpy reckons in 32 bits, takes it for one within the point, and reads where there is no memory."""
    msg = filled(new, kind)
    setattr(msg.fields[2], field, value)
    assert "expected fields within a point of " in refusal(kind, msg)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda m: setattr(m, "width", 0), "got a cloud of 0 x 1"),
        (lambda m: setattr(m, "row_step", 27), "expected a row_step of at least 1 x 28 bytes, got 27"),
        (lambda m: setattr(m.fields[3], "count", 2), "expected one point with as many samples in each channel"),
        (lambda m: setattr(m.fields[2], "name", "left"), "expected fields (name: datatype)"),
        (lambda m: setattr(m.fields[2], "datatype", 7), "expected fields (name: datatype)"),
        (lambda m: setattr(m, "fields", m.fields[:2]), "expected one point with as many samples in each channel"),
        (lambda m: setattr(m, "fields", []), "expected fields (name: datatype)"),
    ],
)
def test_sound_that_contradicts_itself(new, change, got):
    msg = filled(new, "audio")
    change(msg)
    assert got in refusal("audio", msg)


def test_sound_needs_a_rate_and_a_whole_sample_number(new):
    for audio in (Audio(DATA["audio"].samples, 0, 0), Audio(DATA["audio"].samples, 0.5, 16000)):
        assert "expected a sample rate and the number" in refusal("audio", filled(new, "audio", audio))


@pytest.fixture(params=["rosbags", "as rclpy has it"])
def chunk(request):
    """An empty mm_edge_msgs/AudioChunk, and what becomes of one on its way. It cannot be counted on that rclpy's was
    compiled here: an object with the same fields stands in for it."""
    path = Path(__file__).parents[1] / "ros2_ws/src/mm_edge_msgs/msg/AudioChunk.msg"
    if request.param == "rosbags":
        stores = pytest.importorskip("rosbags.typesys", reason="rosbags is not installed")
        from mm_edge.recording import empty_message

        store = stores.get_typestore(stores.Stores.ROS2_JAZZY)
        store.register(stores.get_types_from_msg(path.read_text(), AUDIO_CHUNK))
        return empty_message(store, AUDIO_CHUNK), lambda msg: store.deserialize_cdr(
            store.serialize_cdr(msg, AUDIO_CHUNK), AUDIO_CHUNK
        )
    fields = [line.split()[1] for line in path.read_text().splitlines() if line[0] != "#"]
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0), frame_id="")
    empty = {"header": header, "sample_rate_hz": 0, "channels": 0, "first_sample": 0, "samples": array("h")}
    assert fields == [*empty]
    return SimpleNamespace(**empty), deepcopy


def test_sound_as_a_message_of_its_own(chunk):
    msg, sent = chunk
    for audio in (DATA["audio"], Audio(np.int16([[7], [8]]), 0, 44_100)):
        audio_chunk_to_ros(msg, STAMP_NS, audio, "ears")
        sample = read("audio", sent(msg), AUDIO_CHUNK)
        assert sample[:3] == ("s", STAMP_NS, ARRIVAL_NS) and msg.header.frame_id == "ears"
        assert_same(sample.data, audio)


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("channels", 4, "expected as many samples in each channel, got 6 of 4 channels"),
        ("channels", 0, "expected as many samples in each channel, got 6 of 0 channels"),
        ("sample_rate_hz", 0, "expected a sample rate and the number of the first sample, got 0 Hz"),
        ("first_sample", 2**53 + 1, "expected a sample rate and the number of the first sample"),
    ],
)
def test_a_message_of_sound_that_contradicts_itself(chunk, field, value, got):
    msg, sent = chunk
    audio_chunk_to_ros(msg, STAMP_NS, DATA["audio"])
    setattr(msg, field, value)
    assert got in refusal("audio", sent(msg), AUDIO_CHUNK)


def test_vectors(new):
    twist = new("geometry_msgs/msg/TwistStamped")
    action_to_ros(twist, STAMP_NS, Action(("linear_x", "angular_z"), np.float32([[0.1, -2]]), 0.1))
    assert_same(read("vector", twist, "geometry_msgs/msg/TwistStamped").data, np.float32([0.1, 0, 0, 0, 0, -2]))
    assert read("vector", twist.twist, "geometry_msgs/msg/Twist").stamp_ns == ARRIVAL_NS  # it has no stamp

    odometry = new("nav_msgs/msg/Odometry")
    odometry.header.stamp.sec, odometry.pose.pose.position.y, odometry.pose.pose.orientation.w = 1, 2.0, 1.0
    odometry.twist.twist = twist.twist
    values = read("vector", odometry, "nav_msgs/msg/Odometry").data
    assert_same(values, np.float32([0, 2, 0, 0, 0, 0, 1, 0.1, 0, 0, 0, 0, -2]))


def test_joints_come_in_the_order_that_was_learned(new):
    msg = new("sensor_msgs/msg/JointState")
    msg.header.stamp.sec, msg.name = 1, ["finger", "elbow", "shoulder"]
    msg.position, msg.velocity = np.float64([0.5, 2, 1]), np.float64([0, 0.25, 0.125])
    assert_same(_arm(msg).data, np.float32([1, 2, 0.125, 0.25]))
    msg.name = ["finger", "wrist", "shoulder"]
    for names in (["finger", "wrist", "shoulder"], ["elbow", "shoulder", "elbow"]):
        msg.name = names
        with pytest.raises(
            SampleError, match=f"expected the joints shoulder, elbow, each once, got {', '.join(names)}"
        ):
            _arm(msg)
    msg.name = ["shoulder", "elbow"]
    with pytest.raises(SampleError, match=r"expected a number for each of 2 joints, got \[3, 3, 0\] numbers"):
        _arm(msg)
    to_ros("vector", msg, STAMP_NS, np.float32([3, 4, 5, 6]), joints=("shoulder", "elbow"))
    assert (list(msg.position), list(msg.velocity), _arm(msg).data.tolist()) == ([3, 4], [5, 6], [3, 4, 5, 6])


def _arm(msg):
    spec = StreamSpec("joints", "vector", (4,), 50, 100, joints=("shoulder", "elbow"))
    return from_ros(spec, "sensor_msgs/msg/JointState", msg, ARRIVAL_NS)


def test_positions_travel_as_a_trajectory_of_one_point(new):
    msg, point = new("trajectory_msgs/msg/JointTrajectory"), new("trajectory_msgs/msg/JointTrajectoryPoint")
    positions_to_ros(msg, point, STAMP_NS, ("shoulder", "elbow"), np.float32([0.5, -0.25]), 1.25, "arm")
    assert msg.header.frame_id == "arm" and msg.header.stamp.sec == STAMP_NS // 10**9
    assert (msg.points[0].time_from_start.sec, msg.points[0].time_from_start.nanosec) == (1, 250_000_000)
    assert positions_from_ros(msg, ("elbow", "shoulder")).tolist() == [-0.25, 0.5]
    for joints in (("shoulder",), ("shoulder", "elbow", "wrist"), ("shoulder", "shoulder")):
        with pytest.raises(SampleError, match=f"expected joints {', '.join(joints)}, got shoulder, elbow"):
            positions_from_ros(msg, joints)
    point.positions = point.positions[:1]
    with pytest.raises(SampleError, match="expected 2 positions, got 1"):
        positions_from_ros(msg, ("elbow", "shoulder"))
    msg.points = []
    with pytest.raises(SampleError, match="expected 2 positions, got 0"):
        positions_from_ros(msg, ("elbow", "shoulder"))


# Actions and outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["geometry_msgs/msg/Twist", "geometry_msgs/msg/TwistStamped"])
def test_actions_are_twists(new, type_name):
    msg = new(type_name)
    action_to_ros(msg, STAMP_NS, Action(TWIST, np.float32([[1, 2, 3, 4, 5, 6]]), 0.1))
    action_to_ros(msg, STAMP_NS, Action(("angular_z", "linear_x"), np.float32([[0.3, -0.2], [9, 9]]), 0.1), "base")
    assert_same(twist_from_ros(msg), np.float32([-0.2, 0, 0, 0, 0, 0.3]))  # its first row, and nothing left of before
    if hasattr(msg, "header"):
        assert msg.header.stamp.nanosec == 123_456_789 and msg.header.frame_id == "base"
    with pytest.raises(BundleError, match="this model also wants to move gripper"):
        action_to_ros(msg, STAMP_NS, Action(("gripper",), np.zeros((1, 1), np.float32), 0.1))


def test_an_output_is_one_line_of_json():
    weights = np.float32([[0.25, 0.75]])
    output = Output(
        stamp_ns=STAMP_NS,
        sources={"camera": STAMP_NS - 5},
        mask={"camera": True, "scan": False},
        ages_s={"camera": 5e-9, "scan": math.inf},
        notes=("scan never seen",),
        action=Action(("linear_x",), np.float32([[0.1]]), 0.1),
        attention=(Attention("camera", STAMP_NS - 5, weights),),
        gates={"camera": np.float32(0.5)},
        values={"go": 0.75},
    )
    line = output_to_json(output)
    assert "\n" not in line
    assert json.loads(line) == {
        "stamp_ns": STAMP_NS,
        "sources": {"camera": STAMP_NS - 5},
        "mask": {"camera": True, "scan": False},
        "ages_s": {"camera": 5e-9, "scan": None},
        "reasons": [],
        "notes": ["scan never seen"],
        "action": {"names": ["linear_x"], "values": [[float(np.float32(0.1))]], "dt_s": 0.1},
        "attention": [{"stream": "camera", "stamp_ns": STAMP_NS - 5, "weights": [[0.25, 0.75]]}],
        "caption": None,
        "events": [],
        "gates": {"camera": 0.5},
        "values": {"go": 0.75},
    }
    assert output_to_json(output_from_json(line)) == line
    assert output_from_json(line).ages_s == {"camera": 5e-9, "scan": math.inf}


def test_an_output_is_read_with_all_that_it_may_hold():
    said = Output(1, {}, {}, {}, caption=Caption("a red ball", 0.5), events=(Event("beep", 1.0, 2),))
    assert output_from_json(output_to_json(said)) == said
    for text in ("[]", "{}", "nothing", output_to_json(said).replace('"beep"', '"beep", "more": 1')):
        with pytest.raises(ValueError):
            output_from_json(text)


# Whatever comes ----------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(), st.booleans(), st.text(max_size=8), st.binary(max_size=40), st.floats(), st.integers(-(2**70), 2**70),
    st.lists(st.floats(), max_size=4), st.sampled_from([np.zeros((2, 2)), np.float32([1, 2]), {}, {"x": 1}, math.nan]),
)  # fmt: skip
FIELDS = {
    "image": "height width encoding step data is_bigendian header header.stamp header.stamp.sec header.stamp.nanosec",
    "audio": "height width fields point_step row_step data is_bigendian fields.0.count fields.0.offset fields.1.name "
    "fields.2.count fields.2.offset fields.2.datatype",
    "points": "height width fields point_step row_step data fields.0.count fields.1.offset fields.2.datatype",
    "scan": "ranges angle_min angle_increment range_min range_max header.stamp.sec",
    "imu": "linear_acceleration angular_velocity angular_velocity.x linear_acceleration_covariance",
    "vector": "position velocity effort header.stamp.nanosec",
    "text": "data",
}


@pytest.mark.parametrize("kind", FIELDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_whatever_the_fields_hold_the_sample_is_good_or_refused(kind, data):
    """Field by field, anything at all: rosbags' messages do not check what is put into them."""
    stores = pytest.importorskip("rosbags.typesys", reason="rosbags is not installed")
    from mm_edge.recording import empty_message

    store = stores.get_typestore(stores.Stores.ROS2_JAZZY)
    msg = empty_message(store, MESSAGE_TYPES[kind])
    to_ros(kind, msg, STAMP_NS, deepcopy(DATA[kind]), "", store.types["sensor_msgs/msg/PointField"])
    for path in data.draw(st.lists(st.sampled_from(FIELDS[kind].split()), min_size=1, max_size=3)):
        *parents, name = path.split(".")
        owner = msg
        for parent in parents:  # an earlier path may have replaced any of them
            indexable = isinstance(owner, list) and parent.isdigit() and int(parent) < len(owner)
            owner = owner[int(parent)] if indexable else getattr(owner, parent, None)
        if hasattr(owner, "__dataclass_fields__"):
            setattr(owner, name, data.draw(ODD))
    try:
        sample = read(kind, msg)
    except SampleError:
        return
    assert (sample.stream, sample.arrival_ns) == ("s", ARRIVAL_NS)
    assert type(sample.stamp_ns) is int and sample.stamp_ns > 0
    assert type(sample.data) is type(DATA[kind])
