"""The simulated robot in real time: its senses as topics, its wheels driven by cmd_vel, with a time-out of their own.

Each episode is a room with a task. The first begins as soon as somebody listens and somebody may drive; `episode`
(std_msgs/String, JSON) tells when one starts, how it goes and how it ended. What comes as sound on `voice` somebody in
the room says: `episode` tells when it began to sound and when the robot stood after that.
"""

from __future__ import annotations

import json
import time
from typing import Any

from geometry_msgs.msg import Twist, TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import PointField
from std_msgs.msg import String

from mm_edge.errors import EdgeError, SampleError
from mm_edge.faults import Faults, is_truncated, parse_faults
from mm_edge.messages import MESSAGE_TYPES, TOPICS, from_ros, to_ros
from mm_edge.preprocess import check
from mm_edge.sim.episode import Episode
from mm_edge.sim.sensors import CHUNK, KINDS, SAMPLE_RATE_HZ
from mm_edge.sim.world import STEP_S
from mm_edge.types import NS, Sample, StreamSpec
from mm_edge_ros.node import COMMAND_QOS, EVENTS_QOS, LATCHED_QOS, SENSOR_QOS, declare, run
from mm_edge_ros.streams import message_class

# stream -> QoS, frame
STREAMS = {
    "camera": (SENSOR_QOS, "camera"),
    "scan": (SENSOR_QOS, "lidar"),
    "imu": (QoSProfile(depth=50, reliability=SENSOR_QOS.reliability), "imu"),
    "audio": (QoSProfile(depth=50), "ears"),
    "text": (LATCHED_QOS, ""),
}
VOICE = StreamSpec("voice", "audio", (2, 1, 1), 0, 0, sample_rate_hz=SAMPLE_RATE_HZ, channels=1)
STOOD_MPS, STOOD_RADPS, STOOD_S = 0.05, 0.2, 0.3  # slower for so long, it stands
LAG_S = 0.1  # behind by more than this, simulated time slows down


class SimNode(Node):
    def __init__(self):
        super().__init__("sim_node")
        self._seed = declare(self, "seed", 0, "of the first episode's world; each next one adds 1")
        self._episodes = declare(self, "episodes", 0, "how many; 0: without end")
        for name, value in (("seed", self._seed), ("episodes", self._episodes)):
            if value < 0:
                raise EdgeError(f"{name}: expected 0 or more, got {value}")
        self._pause_s = declare(self, "pause_s", 2.5, "silence between episodes", 0.0, 60.0)
        stamped = declare(self, "stamped", True, "cmd_vel is a TwistStamped; false: a Twist")
        self._faults = parse_faults(
            declare(self, "faults", "", "what goes wrong, as in mm-edge demo --fault; by spaces")
        )
        Faults(self._faults, KINDS)  # one that makes no sense is told of now
        self._publishers_of, self._messages = {}, {}
        self._whole: dict[str, Any] = {}  # the last data of each stream that no fault cut short
        for name, (qos, _) in STREAMS.items():
            type_ = message_class(MESSAGE_TYPES[KINDS[name]])
            publisher = self.create_publisher(type_, TOPICS[KINDS[name]], qos)
            self._publishers_of[name], self._messages[name] = publisher, type_()
        self._reports = self.create_publisher(String, "episode", EVENTS_QOS)
        self._wheels = self.create_subscription(
            TwistStamped if stamped else Twist, "cmd_vel", self._on_cmd_vel, COMMAND_QOS
        )
        voice = message_class(MESSAGE_TYPES["audio"])
        self.create_subscription(voice, "voice", self._on_voice, QoSProfile(depth=10))
        self._told = False  # something, after which the robot did not stand yet
        self._standing_ns: int | None = None  # since when it may stand
        self._episode: Episode | None = None
        self._done = 0
        self._not_before_s = self._start_s = self._slept_s = self._reported_s = 0.0
        self._offset_ns = 0  # from the world's clock to the ROS clock

    def spin(self, executor: SingleThreadedExecutor) -> None:
        """Bring the world up to now, then take callbacks until its next step is due."""
        now_s = time.monotonic()
        if self._episode is None:
            if self._ready(now_s):
                self._begin(now_s)
            executor.spin_once(timeout_sec=0.05)
            return
        behind_s = now_s - self._start_s - self._episode.world.t_s
        if behind_s > LAG_S:
            self._start_s += behind_s
            self._slept_s += behind_s
            self._set_clock()
        elif behind_s >= STEP_S:
            self._step()
            executor.spin_once(timeout_sec=0)
            return
        executor.spin_once(timeout_sec=max(0.0, STEP_S - behind_s))

    def _ready(self, now_s: float) -> bool:
        more = not self._episodes or self._done < self._episodes
        heard = (
            self._publishers_of["camera"].get_subscription_count()
            and self._publishers_of["text"].get_subscription_count()
        )
        return bool(more and now_s >= self._not_before_s and heard and self.count_publishers(self._wheels.topic_name))

    def _begin(self, now_s: float) -> None:
        self._episode = Episode(self._seed + self._done, self._faults)
        self._start_s, self._slept_s, self._reported_s = time.monotonic(), 0.0, 0.0
        self._told = False
        self._set_clock()
        self._report(
            "start", seed=self._seed + self._done, text=self._episode.world.room.text, start_ns=self._start_ns()
        )

    def _step(self) -> None:
        for sample in self._episode.step():
            self._publish(sample)
        world = self._episode.world
        if self._told:
            self._look_if_it_stands()
        if (status := world.status()) is not None:
            outcome = self._episode.outcome(status).as_dict()
            self._report("end", **outcome, slowed_s=round(self._slept_s, 3))
            self._episode = None
            self._done += 1
            self._not_before_s = time.monotonic() + self._pause_s
        elif world.t_s - self._reported_s >= 0.5:
            self._reported_s = world.t_s
            self._report(
                "progress",
                t_s=round(world.t_s, 2),
                speed_mps=round(world.speed(), 3),
                collisions=world.collisions,
                start_ns=self._start_ns(),
            )

    def _look_if_it_stands(self) -> None:
        world = self._episode.world
        if world.speed() >= STOOD_MPS or abs(world.turning()) >= STOOD_RADPS:
            self._standing_ns = None
            return
        self._standing_ns = world.now_ns if self._standing_ns is None else self._standing_ns
        if world.now_ns - self._standing_ns >= STOOD_S * NS:
            self._told = False
            self._report("stood", stamp_ns=self._standing_ns + self._offset_ns)

    def _start_ns(self) -> int:
        """When the episode began, on the ROS clock; later where simulated time had to slow down."""
        return self._episode.start_ns + self._offset_ns

    def _set_clock(self) -> None:
        self._offset_ns = self.get_clock().now().nanoseconds - self._episode.world.now_ns

    def _publish(self, sample: Sample) -> None:
        kind, (_, frame_id) = KINDS[sample.stream], STREAMS[sample.stream]
        msg = self._messages[sample.stream]
        truncated = is_truncated(kind, sample.data)
        if not truncated:
            self._whole[sample.stream] = sample.data
        elif sample.stream not in self._whole:
            return
        data = self._whole[sample.stream]
        to_ros(kind, msg, sample.stamp_ns + self._offset_ns, data, frame_id, PointField)
        if truncated and not _cut(msg):
            return
        self._publishers_of[sample.stream].publish(msg)

    def _on_cmd_vel(self, msg: Twist | TwistStamped) -> None:
        twist = getattr(msg, "twist", msg)
        if self._episode is not None:
            self._episode.world.drive(twist.linear.x, twist.angular.z)

    def _on_voice(self, msg: Any) -> None:
        """It begins to sound with the next chunk."""
        try:
            said = from_ros(VOICE, MESSAGE_TYPES["audio"], msg, 0).data
            check(VOICE, said)
        except SampleError as error:
            self.get_logger().error(str(error))
            return
        if self._episode is None:
            return
        sensors = self._episode.sensors
        sensors.voice = said.samples.mean(1) / 32768
        began_ns = sensors.next_ns["audio"] - CHUNK * NS // SAMPLE_RATE_HZ + self._offset_ns
        self._told, self._standing_ns = True, None
        self._report("voice", start_ns=began_ns)

    def _report(self, event: str, **values: object) -> None:
        self._reports.publish(String(data=json.dumps({"event": event, **values})))


def _cut(msg: Any) -> bool:
    """Leave half of its array. False if it has none: such a message, cut short, no middleware lets through."""
    array = next((name for name in ("data", "ranges") if hasattr(msg, name)), None)
    if array is not None:
        values = getattr(msg, array)
        setattr(msg, array, values[: len(values) // 2])
    return array is not None


def main() -> None:
    run(SimNode, SimNode.spin)


if __name__ == "__main__":
    main()
