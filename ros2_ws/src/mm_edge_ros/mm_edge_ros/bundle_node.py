"""What every node that runs a bundle does the same way: its life, its streams, a thread that ticks, and what it tells
of them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from mm_edge.bundle import Bundle
from mm_edge.errors import EdgeError
from mm_edge.health import Health
from mm_edge.pipeline import Pipeline
from mm_edge.types import NS, Output, Sample
from mm_edge_ros.node import ERROR, OK, STEADY, WARN, declare, diagnostics
from mm_edge_ros.streams import StreamSubscription, topics

POLL_S = 0.01  # how late a tick without the anchor stream may be
REPORT_S = 1.0

Status = tuple[bytes, str, str, dict[str, Any]]  # level, name, message, values


class BundleNode(LifecycleNode):
    """`configure` reads the bundle named by the parameter and proves it on this machine's engine, `activate` subscribes
    and ticks; so a model is swapped by deactivate, cleanup, setting `bundle`, configure, activate.

    Callbacks only convert and push. A thread of its own ticks: a request for a tick is a flag, so the newest wins and
    nothing queues up behind a slow inference.

    A node says what is its own in `_open`, `_ticked` and `_model_status`, and ends its constructor with `_start`.
    """

    HANG_S = 2.0  # what takes longer never ends
    YIELDS = "an action"  # of a tick

    def __init__(self, name: str, shipped: Path):
        super().__init__(name)
        self._shipped = shipped
        what = f"folder of the bundle to run; empty: the shipped {shipped.name} bundle"
        declare(self, "bundle", "", what, fixed=False)
        declare(self, "engine", "auto", "auto, tensorrt, cuda or cpu", fixed=False)
        declare(self, "image_transport", "raw", "raw or compressed", fixed=False)
        self._autostart = declare(self, "autostart", True, "configure and activate without being told to")

        self._pipeline: Pipeline | None = None
        self._streams: list[StreamSubscription] = []
        self._worker: threading.Thread | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._trouble = ""
        self._shown: set[str] = set()  # streams that an overlay can be drawn on
        self._frames: deque[Sample] = deque(maxlen=8)
        self._tick_ns = self._ticks = 0
        self._ticked_steady_ns = 0
        self._under_way: object | None = None  # the step that the inference thread is at
        self._under_way_before: object | None = None  # at the last report
        self._hung_s = 0.0

        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(REPORT_S, self._report, clock=STEADY)

    def _start(self) -> None:
        """Raises EdgeError if it shall start by itself and cannot."""
        if self._autostart:
            for change in (self.trigger_configure, self.trigger_activate):
                if change() != TransitionCallbackReturn.SUCCESS:
                    raise EdgeError(self._trouble)

    # ---- a node's own

    def _open(self, bundle: Bundle, engine: str) -> Pipeline:
        """The bundle at work. Raises EdgeError if it is none for this node."""
        raise NotImplementedError

    def _ticked(self, output: Output, frame: Sample | None) -> None:
        """Publish what came of a tick, on the inference thread. `frame`: the one of the streams `_shown` that the model
        used, or else the newest."""
        raise NotImplementedError

    def _model_status(self, health: Health, reasons: list[str], trouble: str) -> tuple[bytes, str, dict[str, Any]]:
        """Level, message and values of the model's diagnostics. `reasons`: why there is no output; `trouble`: what
        failed since the last report."""
        raise NotImplementedError

    # ---- lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        value = {name: self.get_parameter(name).value for name in ("bundle", "engine", "image_transport")}
        try:
            if value["image_transport"] not in ("raw", "compressed"):
                raise EdgeError(f"image_transport: expected raw or compressed, got {value['image_transport']!r}")
            bundle = Bundle.read(value["bundle"] or self._shipped)
            self._pipeline = self._open(bundle, value["engine"])
        except Exception as error:
            self._pipeline = None
            return self._failed("configured", error)
        self._trouble = ""
        self.get_logger().info(f"{bundle.path} ({bundle.id[:12]}) runs on {self._pipeline.engine}")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self._subscribe()
            self._begin()
        except Exception as error:
            self._halt()
            return self._failed("activated", error)
        return super().on_activate(state)

    def _failed(self, what: str, error: Exception) -> TransitionCallbackReturn:
        """Whatever it is: of an exception rclpy would say nothing."""
        self._trouble = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
        self.get_logger().error(f"not {what}: {self._trouble}")
        return TransitionCallbackReturn.FAILURE

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
        self._ticked_steady_ns = STEADY.now().nanoseconds
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
        self._worker.start()

    def _end(self) -> None:
        self._stop.set()
        if self._worker is not None:
            self._worker.join(self.HANG_S)
            if self._worker.is_alive():
                self._give_up()
            self._worker, self._trouble = None, ""

    def _give_up(self) -> None:
        """Nobody can end a thread in an engine that hangs, but a process can be respawned."""
        self.get_logger().fatal(f"inference hangs for more than {self.HANG_S:g} s: this process ends")
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

    # ---- executor's thread

    def _push(self, sample: Sample) -> bool:
        """False if the model refuses it."""
        if not self._pipeline.push(sample):
            return False
        if sample.stream in self._shown:
            self._frames.append(sample)
        if self._pipeline.due(sample.arrival_ns):
            self._wake.set()
        return True

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
                before = list(self._frames)  # a slow tick outlives those that it began with
                output = self._pipeline.tick(now_ns)
                self._ticks += 1
                if output.stamp_ns != self._tick_ns:  # while the ROS clock stands still, ticks get nowhere
                    self._tick_ns, self._ticked_steady_ns = output.stamp_ns, STEADY.now().nanoseconds
                self._ticked(output, _used([*before, *self._frames], output))
            except Exception as error:  # a thread that dies would be silence
                self._trouble = f"{type(error).__name__}: {error}"
                self.get_logger().error(f"tick failed: {self._trouble}", throttle_duration_sec=1.0)
                self._stop.wait(POLL_S)
            self._under_way = None

    # ---- diagnostics

    def _report(self) -> None:
        self._end_if_hung()
        if self._pipeline is None or self._worker is None:
            status = (ERROR if self._trouble else WARN, "model", self._trouble or "not active", {})
            self._diagnostics.publish(diagnostics(self, [status]))
            return
        self._subscribe()
        now_ns = self.get_clock().now().nanoseconds
        # As of the last tick, unless that is long ago: what came since was not looked at yet, and would seem stale.
        recent = 0 <= now_ns - self._tick_ns < self.HANG_S / 2 * NS
        health = self._pipeline.health(self._tick_ns if recent else now_ns)
        statuses = [self._report_model(health)]
        troubles = {subscription.spec.name: subscription.follow() for subscription in self._streams}
        for stream in health.streams:
            level = ERROR if stream.required and stream.absent else WARN
            found = troubles.pop(stream.name, []) + [(level, reason) for reason in stream.reasons]
            values = {"age_s": f"{stream.age_s:.3f}", "rate_hz": stream.rate_hz, **stream.counts}
            statuses.append(_stream_status(stream.name, found, values))
        statuses += [_stream_status(name, found, {}) for name, found in troubles.items()]  # streams of the node's own
        self._diagnostics.publish(diagnostics(self, statuses))

    def _end_if_hung(self) -> None:
        """Counted in reports, not by the clock: while a process is stopped or starved, no tick of it can end."""
        before, self._under_way_before = self._under_way_before, self._under_way
        self._hung_s = self._hung_s + REPORT_S if before and before is self._under_way_before else 0.0
        if self._hung_s >= self.HANG_S:
            self._give_up()

    def _report_model(self, health: Health) -> Status:
        bundle = self._pipeline.bundle
        reasons = list(health.reasons)
        if reasons and health.idle_ticks > 1:
            reasons[-1] += f" ({health.idle_ticks} ticks without {self.YIELDS})"
        reasons += [] if self._streams else ["waiting for /clock"]
        trouble, self._trouble = self._trouble, ""  # told once; what lasts, the next tick says again
        level, message, values = self._model_status(health, reasons, trouble or self._silence())
        dropped = {f"{part}_steps_dropped": n for part, n in health.dropped.items()}
        about = {"bundle": bundle.path, "id": bundle.id, "engine": health.engine, "ticks": self._ticks}
        return level, "model", message, {**about, **values, **dropped}

    def _silence(self) -> str:
        """What there is to say of it, if no tick came for long."""
        silent_s = (STEADY.now().nanoseconds - self._ticked_steady_ns) / NS
        if self._streams and silent_s > REPORT_S + self._pipeline.bundle.tick.max_period_ms / 1e3:
            return f"no tick for {silent_s:.1f} s: inference hangs, or the ROS clock stands still"
        return ""


def _used(frames: Sequence[Sample], output: Output) -> Sample | None:
    used = (frame for frame in frames if output.sources.get(frame.stream) == frame.stamp_ns)
    return next(used, frames[-1] if frames else None)


def _stream_status(name: str, found: list[tuple[bytes, str]], values: dict[str, Any]) -> Status:
    message = "; ".join(text for _, text in found) or "ok"
    return max((level for level, _ in found), default=OK), name, message, values


def take_one_thread() -> None:
    """As in `mm-edge bench`: a robot has better use for its cores than resizing a frame."""
    with contextlib.suppress(ImportError):  # a bundle without images does without
        import cv2

        cv2.setNumThreads(1)
