"""ROS messages <-> samples, by their fields alone: the same code serves rclpy's messages on a robot and rosbags' in a
recording, and imports neither.

    sample = from_ros(spec, "sensor_msgs/msg/Image", msg, arrival_ns)
    to_ros("image", msg, sample.stamp_ns, sample.data)

Sound travels as a sensor_msgs/PointCloud2, the standard message that describes its own fields, holding one point. A
point's fields may be arrays (`PointField.count`), so a chunk of n samples is the record

    sample_rate_hz UINT32, first_sample FLOAT64 (exact to 2**53), ch0 INT16[n], ch1 INT16[n], ...

with height = width = 1 and point_step = row_step = size of the record. Rate and sample number cost 16 bytes a chunk,
are read by name like the sound itself, and leave the header's stamp and frame_id their meaning. Where messages of one's
own can be compiled, mm_edge_msgs/AudioChunk holds the same in fields of its own, and is read and written as well.
"""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import index
from typing import Any

import numpy as np

from mm_edge.errors import BundleError, EdgeError, SampleError, needs
from mm_edge.types import NS, Action, Attention, Audio, Caption, Event, Output, Sample, Scan, StreamSpec

TWIST = ("linear_x", "linear_y", "linear_z", "angular_x", "angular_y", "angular_z")
DRIVEN = ("linear_x", "angular_z")  # of these, what moves a base
JOINT_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"

# The message that carries each kind of stream from us. `vector`: positions of a JointState, since that has a header.
MESSAGE_TYPES = {
    "image": "sensor_msgs/msg/Image",
    "audio": "sensor_msgs/msg/PointCloud2",
    "scan": "sensor_msgs/msg/LaserScan",
    "points": "sensor_msgs/msg/PointCloud2",
    "imu": "sensor_msgs/msg/Imu",
    "vector": "sensor_msgs/msg/JointState",
    "text": "std_msgs/msg/String",
}
AUDIO_CHUNK = "mm_edge_msgs/msg/AudioChunk"
# Its usual topic, relative so that robots live in namespaces. A vector has none.
TOPICS = {"audio": "audio", "image": "image", "imu": "imu", "points": "points", "scan": "scan", "text": "command_text"}
# Their arrival is their stamp: no header, or one that says when to begin, 0 being "at once".
UNSTAMPED = ("std_msgs/msg/String", "geometry_msgs/msg/Twist", JOINT_TRAJECTORY)

# encoding: bytes a pixel, and cv2's way to RGB. All are bytes, so `is_bigendian` has nothing to say.
_ENCODINGS = {
    "rgb8": (3, ""),
    "bgr8": (3, "COLOR_BGR2RGB"),
    "rgba8": (4, "COLOR_RGBA2RGB"),
    "bgra8": (4, "COLOR_BGRA2RGB"),
    "mono8": (1, "COLOR_GRAY2RGB"),
    "yuyv": (2, "COLOR_YUV2RGB_YUY2"),
    "yuv422_yuy2": (2, "COLOR_YUV2RGB_YUY2"),
    "uyvy": (2, "COLOR_YUV2RGB_UYVY"),
    "yuv422": (2, "COLOR_YUV2RGB_UYVY"),
}
_COMPRESSED = {b"\xff\xd8": ("jpeg", b"\xff\xd9"), b"\x89P": ("png", b"IEND\xaeB`\x82")}  # how they begin and end
_MAX_PIXELS, _MAX_PIXELS_A_BYTE = 2**25, 2048  # 8K, 100 MB when decoded; twice what a black frame comes to
_DATATYPES = ("", "i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")  # by PointField.datatype
_INT16, _UINT32, _FLOAT32, _FLOAT64 = 3, 6, 7, 8


def from_ros(spec: StreamSpec, type_name: str, msg: Any, arrival_ns: int) -> Sample:
    """The sample that `msg` of type `type_name` ("sensor_msgs/msg/Image") holds for the stream `spec`.

    Reads Image (rgb8, bgr8, rgba8, bgra8, mono8, yuyv, uyvy) and CompressedImage (jpeg, png) as image, PointCloud2 as
    audio (see above) or points, AudioChunk, LaserScan, Imu, String, and as vector: Twist and TwistStamped (6: linear,
    angular), Odometry (13: position, orientation x y z w, linear, angular), JointState (position, velocity, effort, as
    far as given), NavSatFix (3: latitude, longitude in degrees, to 0.8 m, altitude in m) and JointTrajectory (the first
    point's positions, or velocities if it has none). Joints come in the order of `spec.joints`, those that it does not
    name are left out; without it as the message has them. Arrays may share the message's memory.
    Whether the values make sense (NaN, a wrong sample rate) is for `preprocess.check`.

    Raises SampleError for a message of another type, without a stamp, or whose fields contradict each other.
    """
    read = _READERS.get((spec.kind, type_name))
    if read is None:
        raise SampleError(spec.name, f"a message with {spec.kind}: {', '.join(readable(spec.kind))}", type_name)
    try:
        stamp_ns = arrival_ns if type_name in UNSTAMPED else _stamp_ns(spec, msg.header.stamp)
        return Sample(spec.name, stamp_ns, arrival_ns, read(spec, msg))
    except EdgeError:
        raise
    except Exception as error:  # what a field may hold is without end, and cv2 has an error of its own
        raise SampleError(spec.name, f"a well-formed {type_name}", f"{type(error).__name__}: {error}") from error


def readable(kind: str) -> list[str]:
    """The types of messages from which `from_ros` makes a stream's samples."""
    return [type_name for of, type_name in _READERS if of == kind]


def to_ros(
    kind: str, msg: Any, stamp_ns: int, data: Any, frame_id: str = "", point_field: Callable[..., Any] | None = None,
    joints: Sequence[str] = (),
) -> None:  # fmt: skip
    """Fill `msg`, a message of the type `MESSAGE_TYPES[kind]`, with a sample's data. A message may be filled again and
    again: its buffers are kept. Audio and points need `point_field`, the PointField class that goes with `msg`. A
    vector is the positions of `joints`, then their velocities and efforts; without names all are positions."""
    if kind != "text":
        _set_header(msg, stamp_ns, frame_id)
    _WRITERS[kind](msg, data, joints if kind == "vector" else point_field)


def action_to_ros(msg: Any, stamp_ns: int, action: Action, frame_id: str = "") -> None:
    """Put the first row of `action` into a Twist or TwistStamped. Raises BundleError for an action that is no twist."""
    if unknown := [name for name in action.names if name not in TWIST]:
        raise BundleError(f"a Twist has {', '.join(TWIST)}; this model also wants to move {', '.join(unknown)}")
    values = dict(zip(action.names, action.values[0]))
    twist = getattr(msg, "twist", msg)
    for name in TWIST:
        part, axis = name.split("_")
        setattr(getattr(twist, part), axis, float(values.get(name, 0.0)))
    if twist is not msg:
        _set_header(msg, stamp_ns, frame_id)


def twist_from_ros(msg: Any) -> np.ndarray:
    """float32 (6,) in the order of `TWIST`, of a Twist or TwistStamped."""
    twist = getattr(msg, "twist", msg)
    return np.array([*_xyz(twist.linear), *_xyz(twist.angular)], np.float32)


def positions_to_ros(
    msg: Any, point: Any, stamp_ns: int, joints: Sequence[str], positions: np.ndarray, within_s: float,
    frame_id: str = "",
) -> None:  # fmt: skip
    """Fill `msg`, a JointTrajectory, with one `point`, a JointTrajectoryPoint: (n,) positions, to be reached `within_s`
    from `stamp_ns` on, 0 being "at once"."""
    _set_header(msg, stamp_ns, frame_id)
    _set_array(point, "positions", np.asarray(positions, np.float64))
    point.time_from_start.sec, point.time_from_start.nanosec = divmod(round(within_s * NS), NS)
    msg.joint_names, msg.points = list(joints), [point]


def positions_from_ros(msg: Any, joints: Sequence[str]) -> np.ndarray:
    """float64 (n,) in the order of `joints`: where the first point of a JointTrajectory wants them. Raises SampleError
    unless it tells a position of each of them, and of no others."""
    if sorted(msg.joint_names) != sorted(joints):
        raise SampleError("joint_trajectory", f"joints {', '.join(joints)}", ", ".join(msg.joint_names) or "none")
    positions = msg.points[0].positions if msg.points else ()
    if len(positions) != len(joints):
        raise SampleError("joint_trajectory", f"{len(joints)} positions", len(positions))
    told = dict(zip(msg.joint_names, positions))
    return np.array([told[name] for name in joints], np.float64)


def output_to_json(output: Output) -> str:
    """One line of JSON; the age of a stream never seen is null, attention is to four digits."""
    fields = asdict(output)
    fields["ages_s"] = {name: age_s if math.isfinite(age_s) else None for name, age_s in output.ages_s.items()}
    for attention in fields["attention"]:
        attention["weights"] = np.round(np.float64(attention["weights"]), 4)
    return json.dumps(fields, default=lambda numpy_value: numpy_value.tolist(), allow_nan=False)


def output_from_json(text: str) -> Output:
    """What `output_to_json` wrote. Raises ValueError for anything else."""
    try:
        fields = json.loads(text)
        fields["ages_s"] = {name: math.inf if age_s is None else age_s for name, age_s in fields["ages_s"].items()}
        for name in ("reasons", "notes"):
            fields[name] = tuple(fields[name])
        if action := fields["action"]:
            values = np.array(action["values"], np.float32).reshape(-1, len(action["names"]))
            fields["action"] = Action(tuple(action["names"]), values, action["dt_s"])
        weights = [np.array(attention.pop("weights"), np.float32) for attention in fields["attention"]]
        fields["attention"] = tuple(Attention(**rest, weights=w) for rest, w in zip(fields["attention"], weights))
        fields["caption"] = Caption(**fields["caption"]) if fields["caption"] else None
        fields["events"] = tuple(Event(**event) for event in fields["events"])
        return Output(**fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected an output as JSON, got {text[:60]!r} ({error!r})") from error


def _stamp_ns(spec: StreamSpec, stamp: Any) -> int:
    sec, nanosec = index(stamp.sec), index(stamp.nanosec)
    if (sec, nanosec) == (0, 0):
        raise SampleError(spec.name, "a stamp", "0: its driver leaves header.stamp empty")
    if not (0 <= sec < 2**31 and 0 <= nanosec < NS):
        raise SampleError(spec.name, "a stamp of whole seconds and nanoseconds", f"{sec} s, {nanosec} ns")
    return sec * NS + nanosec


def _image(spec: StreamSpec, msg: Any) -> np.ndarray:
    if msg.encoding not in _ENCODINGS:
        raise SampleError(spec.name, f"an encoding among {', '.join(_ENCODINGS)}", repr(msg.encoding))
    pixel, to_rgb = _ENCODINGS[msg.encoding]
    height, width, step = index(msg.height), index(msg.width), index(msg.step)
    if height <= 0 or width <= 0:
        raise SampleError(spec.name, "pixels", f"an image of {width} x {height}")
    if step < width * pixel:
        raise SampleError(spec.name, f"a step of at least {width} x {pixel} bytes ({msg.encoding})", step)
    pixels = _bytes(spec, msg.data, step * height, f"{height} rows of {step} bytes")
    pixels = pixels.reshape(height, step)[:, : width * pixel].reshape(height, width, pixel)
    return _cv2().cvtColor(pixels, getattr(_cv2(), to_rgb)) if to_rgb else pixels


def _compressed_image(spec: StreamSpec, msg: Any) -> np.ndarray:
    data = np.frombuffer(msg.data, np.uint8).tobytes()
    name, end = _COMPRESSED.get(data[:2], ("", b""))
    if not name:
        raise SampleError(spec.name, "jpeg or png", f"format {msg.format!r} beginning with {data[:4]!r}")
    if not data.rstrip(b"\0").endswith(end):  # cv2 would invent the part that is missing
        raise SampleError(spec.name, f"a whole {name}", f"{len(data)} bytes without its end")
    most = min(_MAX_PIXELS, _MAX_PIXELS_A_BYTE * len(data))
    if (pixels := _claimed_pixels(data)) > most:
        raise SampleError(spec.name, f"at most {most} pixels in a {name} of {len(data)} bytes", pixels)
    if name == "png" and data[24:26] == b"\x10\0":  # cv2 would keep the upper eight bits of each
        raise SampleError(spec.name, "a picture of 8 bits a channel", "a png of grey in 16: of depth, most likely")
    cv2 = _cv2()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise SampleError(spec.name, f"a {name} that can be decoded", f"{len(data)} bytes that cannot")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _claimed_pixels(data: bytes) -> int:
    """How many pixels a jpeg or png says it has: cv2 takes time and memory for all of them, and for all that a chunk
    of a png says it holds, however few bytes there are. Raises ValueError, struct.error or IndexError for one that is
    not made of whole segments."""
    if data[:2] == b"\x89P":
        at = 8
        while data[at : at + 8] != b"\0\0\0\0IEND":
            at += 12 + struct.unpack_from(">I", data, at)[0]
        return math.prod(struct.unpack_from(">II", data, 16))
    at = 2
    while data[at] == 0xFF and data[at + 1] >= 0xC0 and not 0xD0 <= data[at + 1] <= 0xD9:  # those have no size
        if data[at + 1] in b"\xc0\xc1\xc2\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf":  # start of frame
            return math.prod(struct.unpack_from(">HH", data, at + 5))
        at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ValueError(f"no jpeg segment at byte {at}")


def _cv2() -> Any:
    with needs("converting camera frames", "cv2", "camera"):
        import cv2
    return cv2


def _scan(spec: StreamSpec, msg: Any) -> Scan:
    ranges = np.asarray(msg.ranges, np.float32)
    if ranges.ndim != 1 or len(ranges) == 0:
        raise SampleError(spec.name, "ranges", f"shape {ranges.shape}")
    beams = (msg.angle_max - msg.angle_min) / msg.angle_increment + 1 if msg.angle_increment else math.nan
    if abs(len(ranges) - beams) > max(2, 0.02 * beams):  # drivers count differently, but not that much
        raise SampleError(spec.name, f"{beams:.0f} ranges from angle_min to angle_max", f"{len(ranges)}")
    if (below := np.isfinite(ranges) & (ranges < msg.range_min)).any():
        ranges = np.where(below, np.float32(np.nan), ranges)  # to be discarded, says the message: many send 0
    return Scan(ranges, *(float(getattr(msg, f)) for f in ("angle_min", "angle_increment", "range_min", "range_max")))


def _imu(spec: StreamSpec, msg: Any) -> np.ndarray:
    for name in ("linear_acceleration", "angular_velocity"):
        if getattr(msg, f"{name}_covariance")[0] == -1:  # how the message says that this was not measured
            raise SampleError(spec.name, f"a measured {name}", "covariance[0] = -1: not measured")
    return np.array([*_xyz(msg.linear_acceleration), *_xyz(msg.angular_velocity)], np.float32)


def _text(spec: StreamSpec, msg: Any) -> str:
    if not isinstance(msg.data, str):
        raise SampleError(spec.name, "str", type(msg.data).__name__)
    return msg.data


def _odometry(spec: StreamSpec, msg: Any) -> np.ndarray:
    pose, turn = msg.pose.pose, msg.pose.pose.orientation
    return np.array([*_xyz(pose.position), *_xyz(turn), turn.w, *twist_from_ros(msg.twist)], np.float32)


def _joint_state(spec: StreamSpec, msg: Any) -> np.ndarray:
    return _in_order(spec, msg.name, [msg.position, msg.velocity, msg.effort])


def _nav_sat_fix(spec: StreamSpec, msg: Any) -> np.ndarray:
    if msg.status.status < 0:
        raise SampleError(spec.name, "a fix", f"status {msg.status.status}: no satellites")
    return np.array([msg.latitude, msg.longitude, msg.altitude], np.float32)


def _joint_trajectory(spec: StreamSpec, msg: Any) -> np.ndarray:
    if not msg.points:
        raise SampleError(spec.name, "a point", "an empty trajectory")
    point = msg.points[0]
    return _in_order(spec, msg.joint_names, [point.positions if len(point.positions) else point.velocities])


def _in_order(spec: StreamSpec, names: Sequence[str], given: Sequence[Sequence[float]]) -> np.ndarray:
    """Joints have no order of their own: a driver that starts anew may have another."""
    if not spec.joints:
        return np.concatenate([(), *given], dtype=np.float32)  # with one axis: numbers in two are refused
    at = {name: i for i, name in enumerate(names)}
    if len(at) < len(names) or not at.keys() >= set(spec.joints):
        raise SampleError(spec.name, f"the joints {', '.join(spec.joints)}, each once", ", ".join(names) or "no names")
    counts = [len(values) for values in given]
    if any(n not in (0, len(names)) for n in counts):
        raise SampleError(spec.name, f"a number for each of {len(names)} joints", f"{counts} numbers")
    return np.array([values[at[name]] for values in given if len(values) for name in spec.joints], np.float32)


def _audio(spec: StreamSpec, msg: Any) -> Audio:
    channels = [f"ch{i}" for i in range(len(msg.fields) - 2)]
    cloud = _cloud(spec, msg, {"sample_rate_hz": _UINT32, "first_sample": _FLOAT64, **dict.fromkeys(channels, _INT16)})
    if cloud.shape != (1, 1) or not channels or len({cloud.dtype[name] for name in channels}) != 1:
        counts = {field.name: field.count for field in msg.fields}
        raise SampleError(spec.name, "one point with as many samples in each channel", f"{cloud.shape} points {counts}")
    record = cloud[0, 0]
    rate, first = record["sample_rate_hz"].item(), record["first_sample"].item()
    if rate == 0 or not (first.is_integer() and 0 <= first <= 2**53):
        raise SampleError(spec.name, "a sample rate and the number of the first sample", f"{rate} Hz, {first}")
    samples = np.stack([record[name] for name in channels], axis=1).astype(np.int16, copy=False)
    return Audio(samples, int(first), rate)


def _audio_chunk(spec: StreamSpec, msg: Any) -> Audio:
    rate, channels, first = index(msg.sample_rate_hz), index(msg.channels), index(msg.first_sample)
    if rate <= 0 or not 0 <= first <= 2**53:
        raise SampleError(spec.name, "a sample rate and the number of the first sample", f"{rate} Hz, {first}")
    samples = np.frombuffer(msg.samples, np.int16)
    if channels <= 0 or len(samples) % channels:
        raise SampleError(spec.name, "as many samples in each channel", f"{len(samples)} of {channels} channels")
    return Audio(samples.reshape(-1, channels), first, rate)


def _points(spec: StreamSpec, msg: Any) -> np.ndarray:
    cloud = _cloud(spec, msg, dict.fromkeys("xyz", _FLOAT32))
    return np.stack([cloud[axis].reshape(cloud.size) for axis in "xyz"], axis=1).astype(np.float32, copy=False)


def _cloud(spec: StreamSpec, msg: Any, wanted: dict[str, int]) -> np.ndarray:
    """A PointCloud2's points as a structured array (height, width) with the fields in `wanted`, name: datatype."""
    fields = {field.name: field for field in msg.fields}
    types = {name: fields[name].datatype if name in fields else None for name in wanted}
    if types != wanted:
        raise SampleError(spec.name, f"fields (name: datatype) {wanted}", {f.name: f.datatype for f in msg.fields})
    height, width, point_step, row_step = map(index, (msg.height, msg.width, msg.point_step, msg.row_step))
    if height <= 0 or width <= 0:
        raise SampleError(spec.name, "points", f"a cloud of {width} x {height}")
    if row_step < width * point_step:
        raise SampleError(spec.name, f"a row_step of at least {width} x {point_step} bytes", row_step)
    order = ">" if msg.is_bigendian else "<"
    formats = [(order + _DATATYPES[kind], (index(fields[name].count),)) for name, kind in wanted.items()]
    offsets = [index(fields[name].offset) for name in wanted]
    # numpy adds these up in 32 bits, and would read far outside the message.
    ends = [offset + int(kind[-1]) * count for offset, (kind, (count,)) in zip(offsets, formats)]
    if min(offsets) < 0 or min(shape[0] for _, shape in formats) < 1 or max(ends) > point_step:
        raise SampleError(
            spec.name, f"fields within a point of {point_step} bytes", f"offsets {offsets}, formats {formats}"
        )
    record = np.dtype({"names": [*wanted], "formats": formats, "offsets": offsets, "itemsize": point_step})
    data = _bytes(spec, msg.data, row_step * height, f"{height} rows of {row_step} bytes")
    return np.ndarray((height, width), record, data, strides=(row_step, point_step))


def _bytes(spec: StreamSpec, data: Any, size: int, what: str) -> np.ndarray:
    if len(data) != size:
        raise SampleError(spec.name, f"{what}, {size} together", f"{len(data)} bytes")
    return np.frombuffer(data, np.uint8, size)


def _xyz(vector: Any) -> tuple[float, float, float]:
    return float(vector.x), float(vector.y), float(vector.z)


_READERS: dict[tuple[str, str], Callable[[StreamSpec, Any], Any]] = {
    ("image", "sensor_msgs/msg/Image"): _image,
    ("image", "sensor_msgs/msg/CompressedImage"): _compressed_image,
    ("audio", "sensor_msgs/msg/PointCloud2"): _audio,
    ("audio", AUDIO_CHUNK): _audio_chunk,
    ("scan", "sensor_msgs/msg/LaserScan"): _scan,
    ("points", "sensor_msgs/msg/PointCloud2"): _points,
    ("imu", "sensor_msgs/msg/Imu"): _imu,
    ("text", "std_msgs/msg/String"): _text,
    ("vector", "geometry_msgs/msg/Twist"): lambda spec, msg: twist_from_ros(msg),
    ("vector", "geometry_msgs/msg/TwistStamped"): lambda spec, msg: twist_from_ros(msg),
    ("vector", "nav_msgs/msg/Odometry"): _odometry,
    ("vector", "sensor_msgs/msg/JointState"): _joint_state,
    ("vector", "sensor_msgs/msg/NavSatFix"): _nav_sat_fix,
    ("vector", JOINT_TRAJECTORY): _joint_trajectory,
}


def _set_header(msg: Any, stamp_ns: int, frame_id: str) -> None:
    msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(int(stamp_ns), NS)
    msg.header.frame_id = frame_id


def _set_array(msg: Any, field: str, values: np.ndarray) -> None:
    """rclpy keeps sequences in array.array. Refilling one in place takes 14 us for a VGA frame on every distribution;
    assigning a list or an ndarray takes 20 to 60 ms. rosbags keeps ndarrays."""
    values = np.ascontiguousarray(values).reshape(-1)
    held = getattr(msg, field)
    if isinstance(held, np.ndarray):
        setattr(msg, field, values)
        return
    if len(held) != len(values):
        setattr(msg, field, array(values.dtype.char, bytes(values.nbytes)))
        held = getattr(msg, field)  # some distributions keep a copy
    if len(values):
        np.frombuffer(held, values.dtype)[:] = values


def _write_image(msg: Any, rgb: np.ndarray, _: Any) -> None:
    msg.height, msg.width, msg.encoding = rgb.shape[0], rgb.shape[1], "rgb8"
    msg.step, msg.is_bigendian = 3 * rgb.shape[1], 0
    _set_array(msg, "data", rgb)


def _write_scan(msg: Any, scan: Scan, _: Any) -> None:
    msg.angle_min, msg.angle_increment = float(scan.angle_min), float(scan.angle_increment)
    msg.angle_max = float(np.float32(scan.angle_min + (len(scan.ranges) - 1) * scan.angle_increment))
    msg.range_min, msg.range_max = float(scan.range_min), float(scan.range_max)
    _set_array(msg, "ranges", scan.ranges)


def _write_imu(msg: Any, row: np.ndarray, _: Any) -> None:
    values = row.tolist()
    for vector, at in ((msg.linear_acceleration, 0), (msg.angular_velocity, 3)):
        vector.x, vector.y, vector.z = values[at : at + 3]
    msg.orientation_covariance[0] = -1.0  # not measured


def _write_vector(msg: Any, values: np.ndarray, joints: Sequence[str]) -> None:
    msg.name, n = list(joints), len(joints) or len(values)
    for i, field in enumerate(("position", "velocity", "effort")):
        _set_array(msg, field, values[i * n : (i + 1) * n].astype(np.float64))


def _write_audio(msg: Any, audio: Audio, point_field: Any) -> None:
    n, channels = audio.samples.shape
    fields = [("sample_rate_hz", 0, _UINT32, 1), ("first_sample", 8, _FLOAT64, 1)]
    fields += [(f"ch{i}", 16 + 2 * n * i, _INT16, n) for i in range(channels)]
    record = np.concatenate(
        [
            np.array([audio.sample_rate_hz, 0], "<u4").view(np.uint8),
            np.array([audio.first_sample], "<f8").view(np.uint8),
            np.ascontiguousarray(audio.samples.T, "<i2").reshape(-1).view(np.uint8),
        ]
    )
    _write_cloud(msg, record, len(record), fields, point_field)


def audio_chunk_to_ros(msg: Any, stamp_ns: int, audio: Audio, frame_id: str = "") -> None:
    """Fill an AudioChunk."""
    _set_header(msg, stamp_ns, frame_id)
    msg.sample_rate_hz, msg.channels = audio.sample_rate_hz, audio.samples.shape[1]
    msg.first_sample = audio.first_sample
    _set_array(msg, "samples", audio.samples)


def _write_points(msg: Any, points: np.ndarray, point_field: Any) -> None:
    fields = [(axis, 4 * i, _FLOAT32, 1) for i, axis in enumerate("xyz")]
    _write_cloud(msg, np.ascontiguousarray(points, "<f4").view(np.uint8), 12, fields, point_field)


def _write_cloud(msg: Any, data: np.ndarray, point_step: int, fields: list, point_field: Any) -> None:
    if [(f.name, f.offset, f.datatype, f.count) for f in msg.fields] != fields:
        msg.fields = [point_field(name=n, offset=o, datatype=d, count=c) for n, o, d, c in fields]
    msg.height, msg.width, msg.point_step, msg.row_step = 1, data.size // point_step, point_step, data.size
    msg.is_bigendian, msg.is_dense = False, True
    _set_array(msg, "data", data)


_WRITERS: dict[str, Callable[[Any, Any, Any], None]] = {
    "image": _write_image,
    "audio": _write_audio,
    "scan": _write_scan,
    "points": _write_points,
    "imu": _write_imu,
    "vector": _write_vector,
    "text": lambda msg, text, _: setattr(msg, "data", text),
}
