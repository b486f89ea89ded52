"""How a stream fares, in words."""

import math

import pytest

from mm_edge.align import NS
from mm_edge.errors import SampleError
from mm_edge.health import StreamMonitor, absence
from mm_edge.types import StreamSpec

CAMERA = StreamSpec("camera", "image", (8, 8, 3), rate_hz=15, max_age_ms=300, required=True)
TEXT = StreamSpec("text", "text", (3,), rate_hz=0, max_age_ms=1000, latched=True)


@pytest.mark.parametrize(
    ("age_s", "silent_s", "why"),
    [
        (math.inf, math.inf, "camera never seen"),
        (0.3, 0.27, None),
        (0.300000001, 0.27, "camera stale 300 ms > 300 ms"),
        (0.412, 0.38, "camera stale 412 ms > 300 ms"),
        (12.34, 12.3, "camera dead: silent for 12.3 s"),
        (900.1, 0.1, "camera skewed: stamps lie 900.0 s behind arrival"),
    ],
)
def test_why_a_stream_cannot_be_used(age_s, silent_s, why):
    assert absence(CAMERA, age_s, silent_s) == why


def test_a_latched_stream_does_not_go_stale():
    assert absence(TEXT, 1e6, 1e6) is None
    assert absence(TEXT, math.inf, math.inf) == "text never seen"


class Counted:
    """What a monitor asks an aligner."""

    def __init__(self, offset_ns: int = 0, refusal: str = "", **counts: int):
        self._offset_ns, self._refusal, self._counts = offset_ns, refusal, counts

    def counts(self, stream: str) -> dict[str, int]:
        return self._counts

    def offset_ns(self, stream: str) -> int:
        return self._offset_ns

    def refusal(self, stream: str) -> str:
        return self._refusal


def report(monitor: StreamMonitor, now_ns: int, counted: Counted):
    return monitor.report(now_ns, 0.05, 0.02, counted)


def test_a_stream_that_is_well_says_nothing():
    monitor = StreamMonitor(CAMERA)
    report(monitor, 0, Counted(admitted=0))
    health = report(monitor, 2 * NS, Counted(admitted=30))
    assert health.ok and health.reasons == () and health.rate_hz == 15


def test_a_slow_stream_is_named_with_its_rate():
    monitor = StreamMonitor(CAMERA)
    report(monitor, 0, Counted(admitted=0))
    assert report(monitor, NS // 2, Counted(admitted=2)).rate_hz is None  # too early to tell
    health = report(monitor, 2 * NS, Counted(admitted=10))
    assert health.reasons == ("camera too slow: 5.0 Hz, expected 15 Hz",)


def test_a_rate_is_not_measured_across_a_reset():
    monitor = StreamMonitor(CAMERA)
    report(monitor, 10 * NS, Counted(admitted=100))
    assert report(monitor, 12 * NS, Counted(admitted=3)).rate_hz is None
    assert report(monitor, 14 * NS, Counted(admitted=33)).rate_hz == 15


def test_a_clock_that_is_off_is_named():
    health = report(StreamMonitor(CAMERA), 0, Counted(offset_ns=3_200_000_000))
    assert health.reasons == ("camera clock is off by 3.200 s; its stamps are corrected",)


def test_refusals_are_reported_once_with_the_last_reason_and_counted():
    monitor = StreamMonitor(CAMERA)
    monitor.refuse(SampleError("camera", "rgb8", "mono16"))
    monitor.refuse(SampleError("camera", "pixels", "an empty image"))
    health = report(monitor, 0, Counted(admitted=3))
    assert health.reasons == ("2 refused: camera: expected pixels, got an empty image",)
    assert health.counts == {"admitted": 3, "refused": 2}
    assert report(monitor, NS, Counted()).ok


def test_samples_out_of_time_are_reported_once_with_the_last_reason():
    monitor = StreamMonitor(CAMERA)
    counted = Counted(admitted=3, future=2, refusal="future: stamp +900 ms from its arrival, allowed +50 ms")
    health = report(monitor, 0, counted)
    assert health.reasons == ("2 out of time, the last future: stamp +900 ms from its arrival, allowed +50 ms",)
    assert report(monitor, NS // 2, counted).ok
