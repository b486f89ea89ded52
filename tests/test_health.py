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
    ("age_s", "why"),
    [
        (math.inf, "camera never seen"),
        (0.3, None),
        (0.300000001, "camera stale 300 ms > 300 ms"),
        (0.412, "camera stale 412 ms > 300 ms"),
        (12.34, "camera dead: silent for 12.3 s"),
    ],
)
def test_why_a_stream_cannot_be_used(age_s, why):
    assert absence(CAMERA, age_s) == why


def test_a_latched_stream_does_not_go_stale():
    assert absence(TEXT, 1e6) is None
    assert absence(TEXT, math.inf) == "text never seen"


def test_a_stream_that_is_well_says_nothing():
    monitor = StreamMonitor(CAMERA)
    monitor.report(0, 0.05, {"admitted": 0}, 0)
    health = monitor.report(2 * NS, 0.05, {"admitted": 30}, 0)
    assert health.ok and health.reasons == () and health.rate_hz == 15


def test_a_slow_stream_is_named_with_its_rate():
    monitor = StreamMonitor(CAMERA)
    monitor.report(0, 0.05, {"admitted": 0}, 0)
    assert monitor.report(NS // 2, 0.05, {"admitted": 2}, 0).rate_hz is None  # too early to tell
    health = monitor.report(2 * NS, 0.05, {"admitted": 10}, 0)
    assert health.reasons == ("camera too slow: 5.0 Hz, expected 15 Hz",)


def test_a_rate_is_not_measured_across_a_reset():
    monitor = StreamMonitor(CAMERA)
    monitor.report(10 * NS, 0.05, {"admitted": 100}, 0)
    assert monitor.report(12 * NS, 0.05, {"admitted": 3}, 0).rate_hz is None
    assert monitor.report(14 * NS, 0.05, {"admitted": 33}, 0).rate_hz == 15


def test_a_clock_that_is_off_is_named():
    health = StreamMonitor(CAMERA).report(0, 0.05, {}, 3_200_000_000)
    assert health.reasons == ("camera clock is off by 3.200 s; its stamps are corrected",)


def test_refusals_are_reported_once_with_the_last_reason_and_counted():
    monitor = StreamMonitor(CAMERA)
    monitor.refuse(SampleError("camera", "rgb8", "mono16"))
    monitor.refuse(SampleError("camera", "pixels", "an empty image"))
    health = monitor.report(0, 0.05, {"admitted": 3, "late": 1}, 0)
    assert health.reasons == ("2 refused: camera: expected pixels, got an empty image",)
    assert health.counts == {"admitted": 3, "late": 1, "refused": 2}
    assert monitor.report(NS, 0.05, {}, 0).ok
