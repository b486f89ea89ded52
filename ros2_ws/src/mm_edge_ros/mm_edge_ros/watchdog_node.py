"""Forwards cmd_vel_raw to cmd_vel, or stops the wheels; with the parameter `joints` joint_trajectory_raw to
joint_trajectory, or nothing. A process of its own, so that it outlives the model's."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist, TwistStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from mm_edge.errors import EdgeError, SampleError
from mm_edge.messages import DRIVEN, TWIST, positions_from_ros, positions_to_ros, twist_from_ros
from mm_edge.safety import Limits
from mm_edge.types import NS
from mm_edge.watchdog import Watchdog
from mm_edge_ros.node import COMMAND_QOS, ERROR, OK, SENSOR_QOS, STEADY, WARN, declare, diagnostics, run, with_info

PRIORITY = 50  # real-time, as ros2_control's
# Deeper than its publisher's: of two sources, neither may hide the other's actions. Best effort, since who is reliable
# acknowledges: one in some 250 processes that are stopped or killed leaves its shared memory locked, Fast DDS would
# wait a second for that lock, and no timer of ours would ring meanwhile.
RAW_QOS = QoSProfile(depth=10, reliability=QoSReliabilityPolicy.BEST_EFFORT)


class WatchdogNode(Node):
    def __init__(self):
        super().__init__("watchdog_node")
        deadline_ms = declare(
            self, "deadline_ms", 150.0, "longest time between actions, and greatest age of one", 10.0, 5e3
        )
        joints = declare(self, "joints", [""], "to be moved by position, instead of wheels")
        joints = [name for name in joints if name]
        self._moved: Base | Arm = Arm(self, joints) if joints else Base(self)
        self._watchdog = Watchdog(self._moved.limits, deadline_ms)
        self._sources = Sources()
        self._reported: str | None = None

        self._commands = self.create_publisher(self._moved.type, self._moved.topic, COMMAND_QOS)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        raw_type, raw = self._moved.raw_type, f"{self._moved.topic}_raw"
        self.create_subscription(raw_type, raw, with_info(self._on_action), RAW_QOS)
        if joints:
            self.create_subscription(JointState, "joint_states", self._on_joint_state, SENSOR_QOS)
        # The model's commands, of whoever gives them, and as they are given: an old one has had its effect.
        self.create_subscription(String, "command_text", self._on_command, RAW_QOS)
        self.create_service(Trigger, "~/reset", self._on_reset)
        # Wound up anew by each action that passes: it rings at the deadline, and goes on ringing while nothing passes.
        self._deadline = self.create_timer(deadline_ms / 1e3, self._on_deadline, clock=STEADY)
        self.create_timer(1.0, self._report, clock=STEADY)

    def _on_action(self, msg: Any, info: dict[str, Any]) -> None:
        source = self._sources.sender(msg.header.frame_id, info.get("publication_sequence_number"))
        stamp_ns = msg.header.stamp.sec * NS + msg.header.stamp.nanosec
        now_ros_ns = self.get_clock().now().nanoseconds
        try:
            values = self._moved.values(msg)
            command = self._watchdog.on_action(source, stamp_ns, values, STEADY.now().nanoseconds, now_ros_ns)
        except SampleError as error:
            command = self._watchdog.fault(f"{error} from {source}")
        if command is not None:
            self._send(command)
            if self._watchdog.reason is None:
                self._deadline.reset()
        self._log()

    def _on_joint_state(self, msg: JointState) -> None:
        self._watchdog.at(dict(zip(msg.name, msg.position)), STEADY.now().nanoseconds)

    def _on_command(self, msg: String) -> None:
        if self._watchdog.told(msg.data):
            self._send(self._watchdog.stop)
        self._log()

    def _on_deadline(self) -> None:
        if self._watchdog.check(STEADY.now().nanoseconds):
            self._send(self._watchdog.stop)
        self._log()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = True, f"was: {self._watchdog.reason or 'forwarding'}"
        self._watchdog.reset()
        self._send(self._watchdog.stop)
        return response

    def destroy_node(self) -> None:
        """Whoever forwards commands leaves the robot standing."""
        self._send(self._watchdog.stop)
        self._commands.wait_for_all_acked(Duration(seconds=0.5))
        super().destroy_node()

    def _send(self, command: np.ndarray | None) -> None:
        if command is not None:
            self._commands.publish(self._moved.message(command, self._watchdog.within_s))

    def _log(self) -> None:
        """Say once when it begins to stop, and why, and once when it lets go."""
        dog = self._watchdog
        state = "latched" if dog.latched else "stopped" if dog.reason else "forwarding"
        if state != self._reported:
            self._reported = state
            if dog.reason:
                hint = "; call ~/reset" if dog.latched else ""
                self.get_logger().warning(f"{self._moved.name} stopped: {dog.reason}{hint}")
            else:
                self.get_logger().info("forwarding actions")

    def _report(self) -> None:
        dog = self._watchdog
        deaf = self._nobody_listens()
        level = ERROR if dog.latched else WARN if dog.reason or deaf else OK
        values = {"latched": dog.latched, "forwarded": dog.counts["forwarded"], "refused": dog.counts["refused"]}
        values["limited"] = "" if dog.reason else "; ".join(dog.limited)
        status = (level, self._moved.name, "; ".join(filter(None, [dog.reason or "forwarding", deaf])), values)
        self._diagnostics.publish(diagnostics(self, [status]))

    def _nobody_listens(self) -> str | None:
        """Why what is sent moves nothing, if so."""
        topic = self.resolve_topic_name(self._moved.topic)
        ours = f"{self._moved.type.__module__.split('.')[0]}/msg/{self._moved.type.__name__}"
        types = {info.topic_type for info in self.get_subscriptions_info_by_topic(topic)}
        if ours in types:
            return None
        hint = ": see the parameter stamped" if isinstance(self._moved, Base) else ""
        wanted = f", which is listened to as {', '.join(sorted(types))}{hint}" if types else ""
        return f"nobody listens to {topic} as {ours}{wanted}"


class Base:
    """Wheels, moved by twists."""

    name, topic, raw_type = "wheels", "cmd_vel", TwistStamped

    def __init__(self, node: Node):
        linear_min = declare(node, "linear_min", -0.2, "m/s; the robot's limit", -20.0, 0.0)
        linear_max = declare(node, "linear_max", 0.6, "m/s; the robot's limit", 0.0, 20.0)
        angular_max = declare(node, "angular_max", 1.8, "rad/s; the robot's limit, both ways", 0.0, 50.0)
        linear_rate = declare(
            node, "linear_rate_max", 2.5, "m/s^2; the robot's limit; braking is never slowed", 0.1, 100.0
        )
        angular_rate = declare(node, "angular_rate_max", 10.0, "rad/s^2; the robot's limit", 0.1, 1e3)
        stamped = declare(node, "stamped", True, "cmd_vel is a TwistStamped; false: a Twist")
        self._node, self._frame_id = node, declare(node, "frame_id", "base_link", "header.frame_id of cmd_vel")
        self.type = TwistStamped if stamped else Twist
        self.limits = Limits(
            DRIVEN,
            min=(linear_min, -angular_max),
            max=(linear_max, angular_max),
            max_rate=(linear_rate, angular_rate),
        )

    def values(self, msg: TwistStamped) -> np.ndarray:
        return twist_from_ros(msg)[[TWIST.index(name) for name in DRIVEN]]

    def message(self, command: np.ndarray, within_s: float) -> Any:
        msg = TwistStamped()
        msg.twist.linear.x, msg.twist.angular.z = float(command[0]), float(command[1])
        msg.header.stamp, msg.header.frame_id = self._node.get_clock().now().to_msg(), self._frame_id
        return msg if self.type is TwistStamped else msg.twist


class Arm:
    """Joints, moved by positions: one point at a time, to a controller that takes trajectories, such as ros2_control's,
    and holds the last. Raises EdgeError unless each has its limits."""

    name, topic, raw_type, type = "joints", "joint_trajectory", JointTrajectory, JointTrajectory

    def __init__(self, node: Node, joints: list[str]):
        if len(set(joints)) < len(joints):
            raise EdgeError(f"joints: expected each once, got {joints}")
        limits = []
        for name, text in {"min": "least position", "max": "greatest position", "rate_max": "greatest speed"}.items():
            values = declare(
                node, f"joint_{name}", [math.nan], f"{text} of each of the joints, as they give it (rad, m)"
            )
            if len(values) != len(joints):
                raise EdgeError(f"joint_{name}: expected {len(joints)} numbers, one for each of joints, got {values}")
            limits.append(tuple(values))
        self.limits = Limits(tuple(joints), *limits, interface="position")

    def values(self, msg: JointTrajectory) -> np.ndarray:
        return positions_from_ros(msg, self.limits.names)

    def message(self, command: np.ndarray, within_s: float) -> JointTrajectory:
        msg = JointTrajectory()
        positions_to_ros(msg, JointTrajectoryPoint(), 0, self.limits.names, command, within_s)  # 0: at once
        return msg


class Sources:
    """Who sent a message. rclpy does not tell, but each publisher numbers its messages 1, 2, 3..., so one that does not
    grow is another's. Where middleware hides the numbers, ours also write name and process into frame_id."""

    def __init__(self) -> None:
        self._frame_id, self._number, self._count = "", 0, 0

    def sender(self, frame_id: str, number: int | None) -> str:
        """A name that stays the same as long as one publisher sends."""
        if frame_id != self._frame_id or (number is not None and number <= self._number):
            self._count += 1
        self._frame_id, self._number = frame_id, number or 0
        return f"{frame_id or 'unnamed'} (source {self._count})"


def main() -> None:
    # Where the system allows it (ulimit -r), no stop is late because others take every core.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    run(WatchdogNode)


if __name__ == "__main__":
    main()
