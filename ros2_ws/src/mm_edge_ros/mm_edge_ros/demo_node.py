"""Watches a demo: prints its events as lines of JSON, the last of them a report; films the overlay.

Between episodes it has the model forget, by switching `edge_node/enable` off and on; the simulator gives the next
episode's command after a pause, so that it is not forgotten, too.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from sensor_msgs.msg import Image
from std_msgs.msg import String
from std_srvs.srv import SetBool

from mm_edge.clip import Clip
from mm_edge.faults import FaultWatch, parse_faults
from mm_edge.messages import from_ros
from mm_edge.types import StreamSpec
from mm_edge_ros.node import EVENTS_QOS, SENSOR_QOS, declare, run

OVERLAY = StreamSpec("overlay", "image", (1, 1, 3), 15.0, 1e3)


class DemoNode(Node):
    def __init__(self):
        super().__init__("demo_node")
        self._episodes = declare(self, "episodes", 3, "after how many to end")
        out = declare(self, "out", "", "folder for the clip and the strip; empty: keep none")
        self._faults = parse_faults(declare(self, "faults", "", "those that the simulator has"))
        self._watch: FaultWatch | None = None  # of this episode
        self._clip = Clip(Path(out)) if out else None
        self._outcomes: list[dict[str, Any]] = []
        self._model: dict[str, str] = {}
        self._idle = ""  # why the last tick had no action
        self._driving = False
        self._enable = self.create_client(SetBool, "edge_node/enable")
        self.create_subscription(String, "episode", self._on_episode, EVENTS_QOS)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.create_subscription(String, "edge/output", self._on_output, 10)
        if self._clip:
            self.create_subscription(Image, "edge/overlay", self._on_overlay, SENSOR_QOS)

    def _on_episode(self, msg: String) -> None:
        event = json.loads(msg.data)
        if event["event"] == "start":
            self._idle = ""
            self._watch = FaultWatch(self._faults, event["start_ns"])
        elif event["event"] == "progress" and self._watch:
            self._watch.start_ns = event["start_ns"]  # later, if the simulator had to slow down
        elif event["event"] == "end" and self._watch:
            event["idle"] = self._idle
            event["faults"] = [asdict(finding) for finding in self._watch.findings]
        print(json.dumps(event), flush=True)
        self._driving = event["event"] != "end"
        if self._driving:
            return
        self._outcomes.append(event)
        self._model = {}  # what counts for the report is said after the last episode
        for enabled in (False, True):
            self._enable.call_async(SetBool.Request(data=enabled))

    def _on_output(self, msg: String) -> None:
        if self._driving and self._watch:
            output = SimpleNamespace(**json.loads(msg.data))
            self._idle = "; ".join(output.reasons)
            self._watch.see(output)

    def _on_overlay(self, msg: Image) -> None:
        if self._driving:
            self._clip.add(from_ros(OVERLAY, "sensor_msgs/msg/Image", msg, 1).data, len(self._outcomes))

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            if status.name.endswith("edge_node: model") and status.values:
                self._model = {pair.key: pair.value for pair in status.values}
        if self._model and len(self._outcomes) >= self._episodes:
            self._finish()

    def _finish(self) -> None:
        files = [str(path) for path in self._clip.close()] if self._clip else []
        print(
            json.dumps({"event": "report", "outcomes": self._outcomes, "model": self._model, "files": files}),
            flush=True,
        )
        raise ExternalShutdownException


def main() -> None:
    run(DemoNode)


if __name__ == "__main__":
    main()
