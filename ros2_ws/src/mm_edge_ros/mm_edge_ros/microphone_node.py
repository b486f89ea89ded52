"""Publishes what a microphone hears, or a sound file plays, on `audio`; see mm_edge/messages.py for how.

Samples are numbered since it began, and what was lost shows as a jump of the number. /diagnostics names a microphone
that is muted, clipped, dead or of another rate.
"""

from __future__ import annotations

from rclpy.qos import QoSProfile
from sensor_msgs.msg import PointCloud2, PointField

from mm_edge.errors import EdgeError
from mm_edge.messages import AUDIO_CHUNK, audio_chunk_to_ros, to_ros
from mm_edge.sources import CHUNK_S, open_sound
from mm_edge.types import Sample, StreamSpec
from mm_edge_ros.node import declare, run
from mm_edge_ros.source_node import LOOK_S, SourceNode
from mm_edge_ros.streams import message_class

QOS = QoSProfile(depth=50)  # reliable: each sample counts
MAX_AGE_MS, FROZEN_MS = 1000, 500


class MicrophoneNode(SourceNode):
    def __init__(self):
        super().__init__("microphone_node")
        what = "default, a microphone's number or a part of its name, or a sound file"
        device = self._declare_device("microphone", "default", what)
        rate_hz = declare(self, "sample_rate_hz", 16000, "what the model was made for")
        channels = declare(self, "channels", 2, "what the model was made for")
        chunk = declare(self, "audio_chunk", False, "publish mm_edge_msgs/AudioChunk, where that was built")
        self._msg = self._message_of_our_own() if chunk else PointCloud2()
        self._writes_chunk = chunk
        self._audio = self.create_publisher(type(self._msg), "audio", QOS)
        window_ms = 1e3 * LOOK_S + 2e3 * CHUNK_S  # so that none goes unheard
        spec = StreamSpec(
            "audio",
            "audio",
            (1, 1, 1),
            1 / CHUNK_S,
            MAX_AGE_MS,
            window_ms=window_ms,
            frozen_ms=FROZEN_MS,
            sample_rate_hz=rate_hz,
            channels=channels,
        )
        self._start(spec, open_sound("audio", device, rate_hz, channels))

    def _message_of_our_own(self):
        try:
            return message_class(AUDIO_CHUNK)()
        except ImportError as error:
            raise EdgeError(f"audio_chunk: {AUDIO_CHUNK} is not built ({error}): colcon build, and source it") from None

    def _publish(self, sample: Sample) -> None:
        if self._writes_chunk:
            audio_chunk_to_ros(self._msg, sample.stamp_ns, sample.data, self._frame_id)
        else:
            to_ros("audio", self._msg, sample.stamp_ns, sample.data, self._frame_id, PointField)
        self._audio.publish(self._msg)


def main() -> None:
    run(MicrophoneNode)


if __name__ == "__main__":
    main()
