"""What a camera's and a microphone's node do the same way: publish each sample as it comes, and tell how they fare."""

from __future__ import annotations

from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node

from mm_edge.align import UNSEEN, Aligner
from mm_edge.errors import EdgeError, SampleError
from mm_edge.health import StreamMonitor
from mm_edge.preprocess import check
from mm_edge.sources import Feed, Source
from mm_edge.types import Sample, StreamSpec
from mm_edge_ros.node import ERROR, OK, STEADY, WARN, declare, diagnostics

LOOK_S, REPORT_S = 0.1, 1.0


class SourceNode(Node):
    """Ends with its source: with status 0 at the end of a file, with 1 and a message if a device fails, so that a
    launch file starts it anew. Stamps are system time."""

    def __init__(self, name: str):
        super().__init__(name)
        self._frame_id = declare(self, "frame_id", "", "of the messages; empty: the name of the stream")
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)

    def _declare_device(self, name: str, default: str, description: str) -> str:
        """A parameter that may be given as a number, too: `-p camera:=0`."""
        descriptor = ParameterDescriptor(description=description, dynamic_typing=True)
        return str(self.declare_parameter(name, default, descriptor).value)

    def _start(self, spec: StreamSpec, source: Source) -> None:
        """`spec`: what is expected of the stream, by which it is judged."""
        self._spec = spec
        self._frame_id = self._frame_id or spec.name
        self._aligner = Aligner([spec], LOOK_S)
        self._monitor = StreamMonitor(spec, self._aligner.streams[spec.name])
        self._view = UNSEEN
        self._told: dict[str, None] = {}  # what was wrong since the last report
        self.get_logger().info(f"{spec.name}: {source.name}")
        self._feed = Feed(source, self._push)
        self.create_timer(LOOK_S, self._look, clock=STEADY)
        self.create_timer(REPORT_S, self._report, clock=STEADY)

    def _publish(self, sample: Sample) -> None:
        """On the thread that reads."""
        raise NotImplementedError

    def _push(self, sample: Sample) -> None:
        try:
            check(self._spec, sample.data)
        except SampleError as error:
            self._monitor.refuse(error)
        else:
            self._aligner.push(sample)
        self._publish(sample)

    def _look(self) -> None:
        if not self._feed.is_alive():
            self._report()
            if self._feed.error:
                raise EdgeError(self._feed.error)
            self.get_logger().info(f"{self._feed.source.name} is at its end")
            raise ExternalShutdownException
        self._view = self._aligner.window(self.get_clock().now().nanoseconds).views[self._spec.name]
        self._told.update(dict.fromkeys(self._monitor.look(self._view)))

    def _report(self) -> None:
        health = self._monitor.report(self.get_clock().now().nanoseconds, self._view)
        reasons = list(dict.fromkeys([*health.reasons, *self._told]))
        self._told.clear()
        level = WARN if reasons else OK
        if self._feed.error or health.absent:
            level, reasons = ERROR, [self._feed.error] if self._feed.error else reasons
        values: dict[str, Any] = {"source": self._feed.source.name, "rate_hz": health.rate_hz, **health.counts}
        status = (level, self._spec.name, "; ".join(reasons) or "ok", values)
        self._diagnostics.publish(diagnostics(self, [status]))

    def destroy_node(self) -> None:
        if hasattr(self, "_feed"):
            self._feed.close()
        super().destroy_node()
