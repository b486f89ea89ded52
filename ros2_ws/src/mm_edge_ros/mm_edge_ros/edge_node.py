"""Runs a bundle on a robot: sensor topics in, cmd_vel_raw out (joint_trajectory_raw if it moves joints), and on every
tick what it did or why it did nothing."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from typing import Any

import numpy as np
from geometry_msgs.msg import TwistStamped
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import SetBool
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.errors import BundleError
from mm_edge.health import Health
from mm_edge.messages import DRIVEN, action_to_ros, output_to_json, positions_to_ros, to_ros
from mm_edge.overlay import draw
from mm_edge.pipeline import Pipeline
from mm_edge.safety import Limits
from mm_edge.types import Action, Output, Sample, Scan
from mm_edge_ros.bundle_node import BundleNode, take_one_thread
from mm_edge_ros.node import COMMAND_QOS, ERROR, OK, SENSOR_QOS, WARN, declare, run


class EdgeNode(BundleNode):
    """Active, it drives."""

    def __init__(self):
        super().__init__("edge_node", SHIPPED)
        yaw = "where the LiDAR's x axis points: 0 ahead, 90 left"
        declare(self, "scan_yaw_deg", 0.0, yaw, -360.0, 360.0, fixed=False)
        declare(self, "publish_overlay", True, "publish edge/overlay while somebody subscribes to it", fixed=False)
        for name, what in (("min", "least"), ("max", "greatest"), ("max_rate", "greatest change a second")):
            what = f"the robot's {what} of each action value; a single 0: the bundle's"
            declare(self, f"limits.{name}", [0.0], what, fixed=False)
        self._enabled = declare(self, "enabled_at_start", True, "move at once; false: not before ~/enable says so")
        self._text = ""
        self._latency_ms: deque[float] = deque(maxlen=10_000)
        self._anchor_ns = self._actions = 0
        self._scan_yaw = 0.0
        self._sender = f"{self.get_fully_qualified_name()}@{os.getpid()}"  # see watchdog_node.Sources

        self._twists = self.create_publisher(TwistStamped, "cmd_vel_raw", COMMAND_QOS)
        self._positions = self.create_publisher(JointTrajectory, "joint_trajectory_raw", COMMAND_QOS)
        self._raw = self._twists  # which of the two the bundle takes
        self._outputs = self.create_publisher(String, "edge/output", 10)
        self._overlay = self.create_publisher(Image, "edge/overlay", SENSOR_QOS)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self._start()

    def _open(self, bundle: Bundle, engine: str) -> Pipeline:
        pipeline, outputs = Pipeline(bundle, engine, self._limits(bundle)), bundle.outputs
        by_position = outputs.action is not None and outputs.action.interface == "position"
        if outputs.action and not by_position and (unknown := set(outputs.action.names) - set(DRIVEN)):
            # The watchdog would drop it without a word.
            names = ", ".join(sorted(unknown))
            raise BundleError(
                f"{bundle.path}: a base moves by {' and '.join(DRIVEN)}, this model also by {names} (joints move by "
                "position alone)"
            )
        self._raw = self._positions if by_position else self._twists
        images = {spec.name for spec in bundle.streams if spec.kind == "image"}
        self._shown = {outputs.attention.stream} if outputs.attention else images
        self._scan_yaw = math.radians(self.get_parameter("scan_yaw_deg").value)
        self._latency_ms.clear()
        return pipeline

    def _limits(self, bundle: Bundle) -> Limits | None:
        """The robot's, if its parameters say so."""
        given = [tuple(self.get_parameter_or(f"limits.{name}").value or ()) for name in ("min", "max", "max_rate")]
        if all(values == (0.0,) for values in given) or bundle.outputs.action is None:
            return None
        return Limits(bundle.outputs.action.names, *given, bundle.outputs.action.interface)

    def _begin(self) -> None:
        self._text = ""
        super()._begin()

    # ---- executor's thread

    def _push(self, sample: Sample) -> bool:
        if isinstance(sample.data, Scan):  # as the base sees it, for which 0 is ahead
            scan = sample.data
            sample = sample._replace(data=scan._replace(angle_min=scan.angle_min + self._scan_yaw))
        pushed = super()._push(sample)
        if pushed and isinstance(sample.data, str):
            self._text = sample.data
        return pushed

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        """Disabled, the model runs on but moves nothing. Enabled, it starts with nothing remembered: a command must be
        given anew, and one that comes after this answer is heard."""
        if request.data and not self._enabled and self._worker is not None:
            self._end()
            self._begin()
        self._enabled = request.data
        response.success, response.message = True, "enabled" if request.data else "disabled"
        return response

    # ---- inference thread

    def _ticked(self, output: Output, frame: Sample | None) -> None:
        if not self._enabled:
            output = dataclasses.replace(output, action=None, reasons=(*output.reasons, "disabled by ~/enable"))
        if output.action is not None:
            now_ns = self.get_clock().now().nanoseconds
            self._act(output.action, now_ns)
            self._actions += 1
            anchor_ns = output.sources.get(self._pipeline.bundle.tick.anchor, 0)
            if anchor_ns != self._anchor_ns:  # each frame once, so that a dead camera's age is not taken for latency
                self._anchor_ns = anchor_ns
                self._latency_ms.append((now_ns - anchor_ns) / 1e6)
        self._outputs.publish(String(data=output_to_json(output)))
        if frame and self.get_parameter("publish_overlay").value and self._overlay.get_subscription_count():
            msg = Image()
            to_ros("image", msg, output.stamp_ns, draw(frame.data, output, self._text), frame.stream)
            self._overlay.publish(msg)

    def _act(self, action: Action, now_ns: int) -> None:
        if self._raw is self._positions:
            msg, point = JointTrajectory(), JointTrajectoryPoint()
            positions_to_ros(msg, point, now_ns, action.names, action.values[0], action.dt_s, self._sender)
        else:
            msg = TwistStamped()
            action_to_ros(msg, now_ns, action, self._sender)
        self._raw.publish(msg)

    # ---- diagnostics

    def _model_status(self, health: Health, reasons: list[str], trouble: str) -> tuple[bytes, str, dict[str, Any]]:
        latency = list(self._latency_ms)
        p50, p99 = np.percentile(latency, [50, 99]) if latency else (np.nan, np.nan)
        values = {
            "enabled": self._enabled,
            "actions": self._actions,
            "latency_p50_ms": f"{p50:.2f}",  # from the anchor's stamp to the action's
            "latency_p99_ms": f"{p99:.2f}",
        }
        reasons += ["disabled by ~/enable"] * (not self._enabled)
        if self._raw is self._positions and not self._raw.get_subscription_count():
            reasons.append(f"nobody listens to {self._raw.topic_name}: has watchdog_node its parameter joints?")
        if trouble:
            return ERROR, trouble, values
        return WARN if reasons else OK, "; ".join(reasons) or "acting", values


def main() -> None:
    take_one_thread()
    run(EdgeNode)


if __name__ == "__main__":
    main()
