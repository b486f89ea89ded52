"""Publishes what a camera sees, or a video file plays: `image`, and `image/compressed` where that is asked for."""

from __future__ import annotations

import cv2
from sensor_msgs.msg import CompressedImage, Image

from mm_edge.messages import to_ros
from mm_edge.sources import CameraSource
from mm_edge.types import Sample, StreamSpec
from mm_edge_ros.node import SENSOR_QOS, declare, run
from mm_edge_ros.source_node import SourceNode

JPEG_QUALITY = 90
MAX_AGE_MS, FROZEN_MS = 1000, 1000


class CameraNode(SourceNode):
    def __init__(self):
        super().__init__("camera_node")
        what = "number of a camera or its device, a video file, the URL of a stream, a GStreamer pipeline (not tried)"
        source = self._declare_device("camera", "0", what)
        rate_hz = declare(self, "rate_hz", 0.0, "frames in between are left out; 0: all come", 0.0, 1000.0)
        compressed = declare(self, "compressed", False, "publish JPEG on image/compressed, too")
        self._image, self._msg = self.create_publisher(Image, "image", SENSOR_QOS), Image()
        self._jpeg = None
        if compressed:
            topic = self.resolve_topic_name("image") + "/compressed"
            self._jpeg = self.create_publisher(CompressedImage, topic, SENSOR_QOS)
        spec = StreamSpec("camera", "image", (1, 1, 3), rate_hz, MAX_AGE_MS, frozen_ms=FROZEN_MS)
        self._start(spec, CameraSource("camera", source, rate_hz))

    def _publish(self, sample: Sample) -> None:
        to_ros("image", self._msg, sample.stamp_ns, sample.data, self._frame_id)
        self._image.publish(self._msg)
        if self._jpeg and self._jpeg.get_subscription_count():
            bgr = cv2.cvtColor(sample.data, cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
            self._jpeg.publish(CompressedImage(header=self._msg.header, format="rgb8; jpeg compressed bgr8", data=jpeg))


def main() -> None:
    cv2.setNumThreads(1)  # a robot has better use for its cores
    run(CameraNode)


if __name__ == "__main__":
    main()
