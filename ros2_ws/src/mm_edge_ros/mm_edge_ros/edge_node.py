"""Runs a bundle on a robot: sensor topics in, cmd_vel_raw out, and on every tick what it did or why it did nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections import deque

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TwistStamped
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import SetBool

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.errors import BundleError, EdgeError
from mm_edge.health import Health
from mm_edge.messages import DRIVEN, action_to_ros, output_to_json, to_ros
from mm_edge.overlay import draw
from mm_edge.pipeline import Pipeline
from mm_edge.safety import Limits
from mm_edge.types import NS, Output, Sample, Scan
from mm_edge_ros.node import COMMAND_QOS, ERROR, OK, SENSOR_QOS, STEADY, WARN, declare, diagnostics, run
from mm_edge_ros.streams import StreamSubscription, topics

POLL_S = 0.01  # how late a tick without the anchor stream may be
REPORT_S = 1.0
HANG_S = 2.0  # a tick that takes longer never ends


class EdgeNode(LifecycleNode):
    """`configure` reads the bundle named by the parameter and proves it on this machine's engine, `activate` subscribes
    and drives; so a model is swapped by deactivate, cleanup, setting `bundle`, configure, activate.

    Callbacks only convert and push. A thread of its own ticks: a request for a tick is a flag, so the newest wins and
    nothing queues up behind a slow inference.
    """

    def __init__(self):
        super().__init__("edge_node")
        declare(self, "bundle", "", "folder of the bundle to run; empty: the shipped drive bundle")
        declare(self, "engine", "auto", "auto, tensorrt, cuda or cpu")
        declare(self, "image_transport", "raw", "raw or compressed")
        declare(self, "scan_yaw_deg", 0.0, "where the LiDAR's x axis points: 0 ahead, 90 left", -360.0, 360.0)
        declare(self, "publish_overlay", True, "publish edge/overlay while somebody subscribes to it")
        for name, what in (("min", "least"), ("max", "greatest"), ("max_rate", "greatest change a second")):
            declare(self, f"limits.{name}", [0.0], f"the robot's {what} of each action value; a single 0: the bundle's")
        autostart = declare(self, "autostart", True, "configure and activate without being told to")

        self._pipeline: Pipeline | None = None
        self._streams: list[StreamSubscription] = []
        self._worker: threading.Thread | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._enabled, self._trouble = True, ""
        self._shown: set[str] = set()  # streams that an overlay can be drawn on
        self._frames: deque[Sample] = deque(maxlen=8)
        self._text = ""
        self._latency_ms: deque[float] = deque(maxlen=10_000)
        self._anchor_ns = self._tick_ns = self._ticks = self._actions = 0
        self._ticked_steady_ns = 0
        self._under_way: object | None = None  # the tick that the inference thread is at
        self._under_way_before: object | None = None  # at the last report
        self._hung_s = 0.0
        self._scan_yaw = 0.0
        self._sender = f"{self.get_fully_qualified_name()}@{os.getpid()}"  # see watchdog_node.Sources

        self._raw = self.create_publisher(TwistStamped, "cmd_vel_raw", COMMAND_QOS)
        self._outputs = self.create_publisher(String, "edge/output", 10)
        self._overlay = self.create_publisher(Image, "edge/overlay", SENSOR_QOS)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.create_timer(REPORT_S, self._report, clock=STEADY)
        if autostart:
            self.trigger_configure()
            if self._pipeline is None:
                raise EdgeError(self._trouble)
            self.trigger_activate()

    # ---- lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        value = {name: self.get_parameter(name).value for name in ("bundle", "engine", "image_transport")}
        try:
            if value["image_transport"] not in ("raw", "compressed"):
                raise EdgeError(f"image_transport: expected raw or compressed, got {value['image_transport']!r}")
            bundle = Bundle.read(value["bundle"] or SHIPPED)
            self._pipeline = Pipeline(bundle, value["engine"], self._limits(bundle))
            action = bundle.outputs.action
            if action and (unknown := set(action.names) - set(DRIVEN)):  # the watchdog would drop it without a word
                raise BundleError(
                    f"{bundle.path}: a base moves by {' and '.join(DRIVEN)}, this model also by {unknown}"
                )
        except Exception as error:  # any other rclpy would swallow without a word
            self._pipeline = None
            self._trouble = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
            self.get_logger().error(f"not configured: {error}")
            return TransitionCallbackReturn.FAILURE
        attention = bundle.outputs.attention
        self._shown = {attention.stream} if attention else {s.name for s in bundle.streams if s.kind == "image"}
        self._scan_yaw = math.radians(self.get_parameter("scan_yaw_deg").value)
        self._trouble = ""
        self._latency_ms.clear()
        self.get_logger().info(f"{bundle.path} ({bundle.id[:12]}) runs on {self._pipeline.engine}")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._subscribe()
        self._begin()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._halt()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._pipeline = None
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._halt()
        return TransitionCallbackReturn.SUCCESS

    def destroy_node(self) -> None:
        self._halt()
        super().destroy_node()

    def _begin(self) -> None:
        """Start to tick, with nothing remembered."""
        self._pipeline.reset()
        self._frames.clear()
        self._text = ""
        self._ticked_steady_ns = STEADY.now().nanoseconds
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
        self._worker.start()

    def _end(self) -> None:
        self._stop.set()
        if self._worker is not None:
            self._worker.join(HANG_S)
            if self._worker.is_alive():
                self._give_up()
            self._worker, self._trouble = None, ""

    def _give_up(self) -> None:
        """Nobody can end a thread in an engine that hangs, but a process can be respawned."""
        self.get_logger().fatal(f"inference hangs for more than {HANG_S:g} s: this process ends")
        os._exit(1)

    def _halt(self) -> None:
        self._end()
        for stream in self._streams:
            stream.destroy()
        self._streams.clear()

    def _subscribe(self) -> None:
        """Not before simulated time has begun: a command that came before would have no time, and come only once."""
        if self._streams or not self.get_clock().now().nanoseconds:
            return
        compressed = self.get_parameter("image_transport").value == "compressed"
        for name, topic in topics(self._pipeline.specs.values()).items():
            spec = self._pipeline.specs[name]
            self._streams.append(StreamSubscription(self, spec, topic, compressed, self._push, self._pipeline.refuse))

    def _limits(self, bundle: Bundle) -> Limits | None:
        """The robot's, if its parameters say so."""
        given = [tuple(self.get_parameter(f"limits.{name}").value) for name in ("min", "max", "max_rate")]
        if all(values == (0.0,) for values in given) or bundle.outputs.action is None:
            return None
        return Limits(bundle.outputs.action.names, *given)

    # ---- executor's thread

    def _push(self, sample: Sample) -> None:
        if isinstance(sample.data, Scan):  # as the base sees it, for which 0 is ahead
            scan = sample.data
            sample = sample._replace(data=scan._replace(angle_min=scan.angle_min + self._scan_yaw))
        if self._pipeline.push(sample):
            if isinstance(sample.data, str):
                self._text = sample.data
            elif sample.stream in self._shown:
                self._frames.append(sample)
            if self._pipeline.due(sample.arrival_ns):
                self._wake.set()

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

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(POLL_S)
            self._wake.clear()
            now_ns = self.get_clock().now().nanoseconds
            if not now_ns or not self._pipeline.due(now_ns):
                continue
            self._under_way = object()
            try:
                self._publish(self._pipeline.tick(now_ns))
            except Exception as error:  # a thread that dies would be silence
                self._trouble = f"{type(error).__name__}: {error}"
                self.get_logger().error(f"tick failed: {self._trouble}", throttle_duration_sec=1.0)
                self._stop.wait(POLL_S)
            self._under_way = None

    def _publish(self, output: Output) -> None:
        self._ticks += 1
        if output.stamp_ns != self._tick_ns:  # while the ROS clock stands still, frames call for ticks that get nowhere
            self._tick_ns, self._ticked_steady_ns = output.stamp_ns, STEADY.now().nanoseconds
        if not self._enabled:
            output = dataclasses.replace(output, action=None, reasons=(*output.reasons, "disabled by ~/enable"))
        if output.action is not None:
            now_ns = self.get_clock().now().nanoseconds
            msg = TwistStamped()
            action_to_ros(msg, now_ns, output.action, self._sender)
            self._raw.publish(msg)
            self._actions += 1
            anchor_ns = output.sources.get(self._pipeline.bundle.tick.anchor, 0)
            if anchor_ns != self._anchor_ns:  # each frame once, so that a dead camera's age is not taken for latency
                self._anchor_ns = anchor_ns
                self._latency_ms.append((now_ns - anchor_ns) / 1e6)
        self._outputs.publish(String(data=output_to_json(output)))
        if self._frames and self.get_parameter("publish_overlay").value and self._overlay.get_subscription_count():
            self._publish_overlay(output)

    def _publish_overlay(self, output: Output) -> None:
        """On the frame that the model used, or else the newest."""
        frames = list(self._frames)
        used = next((f for f in frames if output.sources.get(f.stream) == f.stamp_ns), frames[-1])
        msg = Image()
        to_ros("image", msg, output.stamp_ns, draw(used.data, output, self._text), used.stream)
        self._overlay.publish(msg)

    # ---- diagnostics

    def _report(self) -> None:
        self._end_if_hung()
        if self._pipeline is None or self._worker is None:
            status = (ERROR if self._trouble else WARN, "model", self._trouble or "not active", {})
            self._diagnostics.publish(diagnostics(self, [status]))
            return
        self._subscribe()
        now_ns = self.get_clock().now().nanoseconds
        # As of the last tick: what came since then was not looked at yet, and would seem stale.
        health = self._pipeline.health(self._tick_ns if 0 <= now_ns - self._tick_ns < NS else now_ns)
        statuses = [self._report_model(health)]
        troubles = {subscription.spec.name: subscription.follow() for subscription in self._streams}
        for stream in health.streams:
            level = ERROR if stream.required and stream.absent else WARN
            found = troubles.get(stream.name, []) + [(level, reason) for reason in stream.reasons]
            values = {"age_s": f"{stream.age_s:.3f}", "rate_hz": stream.rate_hz, **stream.counts}
            message = "; ".join(text for _, text in found) or "ok"
            statuses.append((max((lev for lev, _ in found), default=OK), stream.name, message, values))
        self._diagnostics.publish(diagnostics(self, statuses))

    def _end_if_hung(self) -> None:
        """Counted in reports, not by the clock: while a process is stopped or starved, no tick of it can end."""
        before, self._under_way_before = self._under_way_before, self._under_way
        self._hung_s = self._hung_s + REPORT_S if before and before is self._under_way_before else 0.0
        if self._hung_s >= HANG_S:
            self._give_up()

    def _report_model(self, health: Health) -> tuple[bytes, str, str, dict]:
        bundle, latency = self._pipeline.bundle, list(self._latency_ms)
        p50, p99 = np.percentile(latency, [50, 99]) if latency else (np.nan, np.nan)
        values = {
            "bundle": bundle.path,
            "id": bundle.id,
            "engine": health.engine,
            "enabled": self._enabled,
            "ticks": self._ticks,
            "actions": self._actions,
            "latency_p50_ms": f"{p50:.2f}",  # from the anchor's stamp to the action's
            "latency_p99_ms": f"{p99:.2f}",
            **{f"{part}_steps_dropped": n for part, n in health.dropped.items()},
        }
        reasons = list(health.reasons)
        if reasons and health.idle_ticks > 1:
            reasons[-1] += f" ({health.idle_ticks} ticks without an action)"
        reasons += ["disabled by ~/enable"] * (not self._enabled)
        reasons += [] if self._streams else ["waiting for /clock"]
        trouble, self._trouble = self._trouble, ""  # told once; what lasts, the next tick says again
        silent_s = (STEADY.now().nanoseconds - self._ticked_steady_ns) / NS
        if self._streams and silent_s > REPORT_S + bundle.tick.max_period_ms / 1e3:
            trouble = trouble or f"no tick for {silent_s:.1f} s: inference hangs, or the ROS clock stands still"
        if trouble:
            return (ERROR, "model", trouble, values)
        return (WARN if reasons else OK, "model", "; ".join(reasons) or "acting", values)


def main() -> None:
    with contextlib.suppress(ImportError):  # a bundle without images does without
        import cv2

        cv2.setNumThreads(1)  # as in `mm-edge bench`: a robot has better use for its cores than resizing a frame
    run(EdgeNode)


if __name__ == "__main__":
    main()
