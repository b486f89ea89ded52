"""Shows a robot live: the streams of its model, what an `edge_node` makes of them, and what a `caption_node` says.

`mm-edge view --ros` becomes this node. It only listens, best effort but to sound and commands: no other publisher waits
for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rclpy.node import Node
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from std_msgs.msg import String

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.errors import SampleError
from mm_edge.messages import output_from_json
from mm_edge.viewer import Viewer
from mm_edge_ros.node import STEADY, declare, run
from mm_edge_ros.streams import StreamSubscription, topics

FOLLOW_S = 1.0
OUTPUT_QOS = QoSProfile(depth=10, reliability=QoSReliabilityPolicy.BEST_EFFORT)


class ViewNode(Node):
    def __init__(self):
        super().__init__("view_node")
        bundle = Bundle.read(
            declare(self, "bundle", "", "folder of the robot's bundle; empty: the shipped one") or SHIPPED
        )
        streams = declare(self, "streams", [""], "STREAM=TOPIC where a stream has not its usual topic")
        save = declare(self, "save", "", "file to write; empty: serve a page")
        port = declare(self, "port", 9090, "of the page; the next one serves its data")
        given = dict(stream.partition("=")[::2] for stream in streams if stream)
        self._viewer = Viewer(bundle, live=True)
        self._streams: list[StreamSubscription] = []
        print(self._viewer.save(Path(save)) if save else self._viewer.serve(port), "until Ctrl-C", sep="\n", flush=True)
        for spec in bundle.streams:
            topic = {**topics(bundle.streams), **given}[spec.name]
            compressed = topic.endswith("/compressed")
            self._streams.append(
                StreamSubscription(
                    self, spec, topic.removesuffix("/compressed"), compressed, self._viewer.sample, self._refuse
                )
            )
        for topic, show in (("edge/output", self._output), ("caption/output", self._caption), ("answer", self._answer)):
            self.create_subscription(String, topic, partial(self._on_message, topic, show), OUTPUT_QOS)
        self.create_timer(FOLLOW_S, self._follow, clock=STEADY)

    def _on_message(self, topic: str, show: Callable[[str], None], msg: String) -> None:
        try:
            show(msg.data)
        except Exception as error:  # anything may come on a topic
            self.get_logger().warning(f"{topic}: nothing that can be shown ({error!r})", throttle_duration_sec=5.0)

    def _output(self, text: str) -> None:
        self._viewer.output(output_from_json(text))

    def _caption(self, text: str) -> None:
        output = output_from_json(text)
        if output.caption:
            self._viewer.say("caption", output.caption.text, output.stamp_ns)

    def _answer(self, text: str) -> None:
        said = json.loads(text)
        answer = f"{said['question']} {said['answer'] or said['reason']}"
        self._viewer.say("answer", answer, self.get_clock().now().nanoseconds)

    def _refuse(self, error: SampleError) -> None:
        self.get_logger().warning(str(error), throttle_duration_sec=5.0)

    def _follow(self) -> None:
        for stream in self._streams:
            for _, trouble in stream.follow():
                self.get_logger().warning(trouble, throttle_duration_sec=5.0)

    def destroy_node(self) -> None:
        self._viewer.close()
        super().destroy_node()


def main() -> None:
    os.nice(5)  # the robot comes first
    run(ViewNode)


if __name__ == "__main__":
    main()
