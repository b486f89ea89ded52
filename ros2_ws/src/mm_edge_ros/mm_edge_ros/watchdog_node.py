"""Forwards cmd_vel_raw to cmd_vel, or stops the wheels. A process of its own, so that it outlives the model's."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist, TwistStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from rclpy.subscription import Subscription
from std_msgs.msg import String
from std_srvs.srv import Trigger

from mm_edge.messages import DRIVEN, TWIST, twist_from_ros
from mm_edge.safety import Limits
from mm_edge.types import NS
from mm_edge.watchdog import STOP, Watchdog
from mm_edge_ros.node import COMMAND_QOS, ERROR, OK, STEADY, WARN, declare, diagnostics, run

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
        linear_min = declare(self, "linear_min", -0.2, "m/s; the robot's limit", -20.0, 0.0)
        linear_max = declare(self, "linear_max", 0.6, "m/s; the robot's limit", 0.0, 20.0)
        angular_max = declare(self, "angular_max", 1.8, "rad/s; the robot's limit, both ways", 0.0, 50.0)
        linear_rate = declare(
            self, "linear_rate_max", 2.5, "m/s^2; the robot's limit; braking is never slowed", 0.1, 100.0
        )
        angular_rate = declare(self, "angular_rate_max", 10.0, "rad/s^2; the robot's limit", 0.1, 1e3)
        self._stamped = declare(self, "stamped", True, "cmd_vel is a TwistStamped; false: a Twist")
        self._frame_id = declare(self, "frame_id", "base_link", "header.frame_id of cmd_vel")
        limits = Limits(
            DRIVEN,
            min=(linear_min, -angular_max),
            max=(linear_max, angular_max),
            max_rate=(linear_rate, angular_rate),
        )
        self._watchdog = Watchdog(limits, deadline_ms)
        self._sources = Sources()
        self._reported: str | None = None

        self._wheels = self.create_publisher(TwistStamped if self._stamped else Twist, "cmd_vel", COMMAND_QOS)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        if hasattr(Subscription, "CallbackType"):
            self.create_subscription(TwistStamped, "cmd_vel_raw", self._on_action, RAW_QOS)
        else:  # Humble
            self.create_subscription(TwistStamped, "cmd_vel_raw", lambda msg: self._on_action(msg, {}), RAW_QOS)
        # The model's commands, of whoever gives them, and as they are given: an old one has had its effect.
        self.create_subscription(String, "command_text", self._on_command, RAW_QOS)
        self.create_service(Trigger, "~/reset", self._on_reset)
        # Wound up anew by each action that passes: it rings at the deadline, and goes on ringing while nothing passes.
        self._deadline = self.create_timer(deadline_ms / 1e3, self._on_deadline, clock=STEADY)
        self.create_timer(1.0, self._report, clock=STEADY)

    def _on_action(self, msg: TwistStamped, info: dict[str, Any]) -> None:
        source = self._sources.sender(msg.header.frame_id, info.get("publication_sequence_number"))
        stamp_ns = msg.header.stamp.sec * NS + msg.header.stamp.nanosec
        values = twist_from_ros(msg)[[TWIST.index(name) for name in DRIVEN]]
        now_ros_ns = self.get_clock().now().nanoseconds
        command = self._watchdog.on_action(source, stamp_ns, values, STEADY.now().nanoseconds, now_ros_ns)
        if command is not None:
            self._send(command)
            if self._watchdog.reason is None:
                self._deadline.reset()
        self._log()

    def _on_command(self, msg: String) -> None:
        if self._watchdog.told(msg.data):
            self._send(STOP)
        self._log()

    def _on_deadline(self) -> None:
        if self._watchdog.check(STEADY.now().nanoseconds):
            self._send(STOP)
        self._log()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = True, f"was: {self._watchdog.reason or 'forwarding'}"
        self._watchdog.reset()
        self._send(STOP)
        return response

    def destroy_node(self) -> None:
        """Whoever forwards commands leaves the wheels standing."""
        self._send(STOP)
        self._wheels.wait_for_all_acked(Duration(seconds=0.5))
        super().destroy_node()

    def _send(self, command: Any) -> None:
        msg = TwistStamped()
        msg.twist.linear.x, msg.twist.angular.z = float(command[0]), float(command[1])
        msg.header.stamp, msg.header.frame_id = self.get_clock().now().to_msg(), self._frame_id
        self._wheels.publish(msg if self._stamped else msg.twist)

    def _log(self) -> None:
        """Say once when it begins to stop, and why, and once when it lets go."""
        dog = self._watchdog
        state = "latched" if dog.latched else "stopped" if dog.reason else "forwarding"
        if state != self._reported:
            self._reported = state
            if dog.reason:
                self.get_logger().warning(f"wheels stopped: {dog.reason}" + ("; call ~/reset" if dog.latched else ""))
            else:
                self.get_logger().info("forwarding actions")

    def _report(self) -> None:
        dog = self._watchdog
        deaf = self._nobody_listens()
        level = ERROR if dog.latched else WARN if dog.reason or deaf else OK
        values = {"latched": dog.latched, "forwarded": dog.counts["forwarded"], "refused": dog.counts["refused"]}
        status = (level, "wheels", "; ".join(filter(None, [dog.reason or "forwarding", deaf])), values)
        self._diagnostics.publish(diagnostics(self, [status]))

    def _nobody_listens(self) -> str | None:
        """Why what is sent moves no wheels, if so."""
        topic = self.resolve_topic_name("cmd_vel")
        ours = f"geometry_msgs/msg/{'TwistStamped' if self._stamped else 'Twist'}"
        types = {info.topic_type for info in self.get_subscriptions_info_by_topic(topic)}
        if ours in types:
            return None
        wanted = f", which is listened to as {', '.join(sorted(types))}: see the parameter stamped" if types else ""
        return f"nobody listens to {topic} as {ours}{wanted}"


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
