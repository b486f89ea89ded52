"""How a stream fares, in words."""

import dataclasses
import math
from itertools import count

import numpy as np
import pytest

from mm_edge.align import NS, UNSEEN, Aligner
from mm_edge.errors import SampleError
from mm_edge.health import Shortfall, StreamMonitor, absence
from mm_edge.types import Audio, Sample, StreamSpec

MS = 1_000_000
CAMERA = StreamSpec(
    "camera", "image", (8, 8, 3), 20, 300, required=True, frozen_ms=200, max_latency_ms=100, max_jitter_ms=40
)
TEXT = StreamSpec("text", "text", (3,), rate_hz=0, max_age_ms=1000, latched=True)


@pytest.mark.parametrize(
    ("age_s", "silent_s", "frozen_s", "why"),
    [
        (math.inf, math.inf, 0.0, "camera never seen"),
        (0.3, 0.27, 0.0, None),
        (0.300000001, 0.27, 0.0, "camera dead: silent for 0.27 s"),
        (0.412, 0.01, 0.0, "camera stale 412 ms > 300 ms"),
        (12.34, 12.3, 0.0, "camera dead: silent for 12.30 s"),
        (0.05, 0.02, 0.25, "camera frozen: the same data for 250 ms"),
        (9.05, 9.02, 0.25, "camera dead: silent for 9.02 s"),  # after it froze
    ],
)
def test_why_a_stream_cannot_be_used(age_s, silent_s, frozen_s, why):
    assert absence(CAMERA, UNSEEN._replace(age_s=age_s, silent_s=silent_s, frozen_s=frozen_s)) == why


def test_a_latched_stream_does_not_go_stale():
    assert absence(TEXT, UNSEEN._replace(age_s=1e6, silent_s=1e6)) is None
    assert absence(TEXT, UNSEEN) == "text never seen"


class Watched:
    """A camera, and its monitor. Each `sample` comes 50 ms after the one before, and there is a tick as it arrives."""

    def __init__(self, spec: StreamSpec = CAMERA):
        self.aligner = Aligner([spec], 0.05)
        self.stream = self.aligner.streams["camera"]
        self.monitor = StreamMonitor(spec, self.stream)
        self.now_ns, self._pixels = 10**15, count()

    def sample(self, latency_ms: float = 20, period_ms: float = 50, data: np.ndarray | None = None) -> list[str]:
        """What is said at the tick."""
        self.now_ns += round(period_ms * MS)
        pixels = np.full((8, 8, 3), next(self._pixels) % 256, np.uint8) if data is None else data
        arrival_ns = self.now_ns + round(latency_ms * MS)
        self.aligner.push(Sample("camera", self.now_ns, arrival_ns, pixels))
        self.view = self.aligner.window(arrival_ns).views["camera"]
        return list(self.monitor.look(self.view))

    def samples(self, n: int, **how: float) -> list[list[str]]:
        return [self.sample(**how) for _ in range(n)]

    def report(self, after_s: float = 0.0):
        view = self.view._replace(age_s=self.view.age_s + after_s, silent_s=self.view.silent_s + after_s)
        return self.monitor.report(self.now_ns + round(after_s * NS), view)


def test_a_stream_that_is_well_says_nothing():
    camera = Watched()
    assert not any(camera.samples(40))
    camera.report()
    assert not any(camera.samples(40))
    health = camera.report()
    assert health.ok and health.rate_hz == 20


def test_a_rate_that_is_far_off_is_told_within_ten_samples():
    camera = Watched()
    camera.samples(20)
    said = camera.samples(10, period_ms=150)
    assert said[-1] == ["camera too slow: 6.7 Hz, expected 20 Hz"]
    assert camera.report().reasons == ("camera too slow: 6.7 Hz, expected 20 Hz",)
    assert camera.samples(10, period_ms=20)[-1] == ["camera too fast: 50.0 Hz, expected 20 Hz"]
    assert camera.samples(10)[-1] == []


def test_a_steady_loss_is_told_within_some_thirty_samples_and_every_tenth_lost_is_not():
    camera = Watched()
    assert not any(camera.sample(period_ms=100 if i % 10 == 0 else 50) for i in range(300))
    said = [camera.sample(period_ms=100 if i % 2 == 0 else 50) for i in range(30)]
    assert said[9] == [] and said[-1] == ["camera too slow: 13.5 Hz, expected 20 Hz"]
    assert camera.samples(40)[-1] == []


def test_the_rate_that_is_told_is_that_of_late():
    camera = Watched()
    for i in range(2000):
        camera.sample(period_ms=100 if i % 2 == 0 else 50)
    said = [camera.sample(period_ms=100 if i % 3 == 0 else 50) for i in range(200)]
    assert said[-1] == ["camera too slow: 14.9 Hz, expected 20 Hz"]


def test_too_many_samples_are_told_though_their_rate_is_off_by_less_than_a_factor_of_two():
    camera = Watched()
    camera.samples(20)
    assert camera.samples(40, period_ms=35)[-1] == ["camera too fast: 28.6 Hz, expected 20 Hz"]


def test_samples_lost_at_random_by_two_in_a_hundred_are_no_alarm_in_a_day_and_three_in_ten_are_told_soon():
    random, told = np.random.default_rng(0), 0
    evidence = Shortfall()
    for lost in random.random(24 * 3600 * 15) < 0.02:
        evidence = evidence.after(0 if lost else 1, 1)
        told += evidence.certain
    assert told == 0
    samples = []
    for _ in range(1000):
        evidence, n = Shortfall(), 0
        while not evidence.certain:
            evidence, n = evidence.after(0 if random.random() < 0.3 else 1, 1), n + 1
        samples.append(n)
    assert np.median(samples) <= 40


def test_the_same_data_with_new_stamps_are_a_frozen_sensor_which_is_absent_until_they_change():
    camera, picture = Watched(), np.zeros((8, 8, 3), np.uint8)
    camera.samples(5)
    for _ in range(4):  # 150 ms of the same
        camera.sample(data=picture.copy())
        assert camera.view.present
    camera.sample(data=picture.copy())
    assert not camera.view.present and camera.view.frozen_s == 0.2
    assert absence(CAMERA, camera.view) == "camera frozen: the same data for 200 ms"
    camera.sample()
    assert camera.view.present and camera.view.fresh and camera.view.dt_s == 0.1  # since the last that was stepped on


def test_a_stream_that_may_stand_still_is_never_frozen():
    camera = Watched(dataclasses.replace(CAMERA, frozen_ms=0))
    assert not any(camera.sample(data=np.zeros((8, 8, 3), np.uint8)) for _ in range(50)) and camera.view.present


def test_stamps_far_behind_arrival_are_told_within_ten_samples():
    camera = Watched()
    camera.samples(20)
    said = camera.samples(10, latency_ms=150)[-1]
    assert said == [
        "camera skewed: arrives 150 ms or more after its stamp, allowed are 100 ms: its link is slow, or its clock is "
        "behind"
    ]
    assert camera.samples(10)[-1] == []


def test_jitter_is_told_within_ten_samples():
    camera = Watched()
    camera.samples(20)
    said = [camera.sample(latency_ms=20 + 45 * (i % 2)) for i in range(10)]
    assert said[-1] == ["camera jitters: arrives 20 to 65 ms after its stamp, allowed is a spread of 40 ms"]


@pytest.mark.parametrize("ppm", [300, -300])
def test_a_clock_that_drifts_is_told_within_a_minute(ppm):
    camera, random = Watched(), np.random.default_rng(0)
    said = [camera.sample(latency_ms=random.uniform(20, 50) - i * 0.05 * ppm * 1e-3) for i in range(60 * 20)]
    assert not any(said[: 40 * 20])  # it needs most of a minute to be certain
    assert said[-1] == [f"camera clock drifts by {camera.stream.drift.ppm:+.0f} ppm"]
    assert camera.stream.drift.ppm == pytest.approx(ppm, abs=30)


def test_a_link_that_becomes_slower_at_once_is_no_drift():
    camera, random = Watched(), np.random.default_rng(0)
    for i in range(200 * 20):
        camera.sample(latency_ms=random.uniform(20, 50) + 40 * (i > 60 * 20))
        assert camera.stream.drift.ppm == 0


def test_a_clock_that_is_off_is_named():
    camera = Watched()
    camera.samples(10, latency_ms=-3200)  # its stamps lie in the future
    assert camera.sample(latency_ms=-3200) == ["camera clock is off by 3.200 s; its stamps are corrected"]
    assert camera.view.age_s == 0


def test_a_rate_is_not_measured_across_a_jump_of_the_clock():
    camera = Watched()
    camera.samples(100)
    camera.report()
    camera.now_ns -= 3600 * NS
    camera.sample()
    assert camera.report().rate_hz is None
    assert not any(camera.samples(250))
    assert camera.report().rate_hz == 20


@pytest.mark.parametrize("jump_ms", [-130, -500, 10_000])
def test_a_jump_of_the_clock_between_ticks_of_many_samples_is_no_wrong_rate(jump_ms):
    spec = StreamSpec("imu", "imu", (20, 7), 200, 200, window_ms=100)
    aligner = Aligner([spec], 0.1)
    monitor, now_ns, said = StreamMonitor(spec, aligner.streams["imu"]), 10**15, list[str]()
    for tick in range(60):
        now_ns += jump_ms * MS if tick == 30 else 0
        for _ in range(20):
            now_ns += 5 * MS
            aligner.push(Sample("imu", now_ns, now_ns, np.full(6, now_ns % 97, np.float32)))
        said += monitor.look(aligner.window(now_ns).views["imu"])
    assert said == []


def test_refusals_are_told_at_the_next_tick_and_reported_once():
    camera = Watched()
    camera.sample()
    camera.monitor.refuse(SampleError("camera", "rgb8", "mono16"))
    camera.monitor.refuse(SampleError("camera", "pixels", "an empty image"))
    assert camera.sample() == ["camera refused: camera: expected pixels, got an empty image"]
    assert camera.sample() == []
    health = camera.report()
    assert health.reasons == ("2 refused: camera: expected pixels, got an empty image",)
    assert health.counts == {"admitted": 3, "refused": 2}
    assert camera.report().ok


def test_samples_out_of_time_are_told_at_the_next_tick_and_reported_once():
    camera = Watched()
    camera.sample()
    assert camera.sample(latency_ms=-900) == [
        "camera out of time: future: stamp +900 ms from its arrival, allowed +50 ms"
    ]
    assert camera.sample() == []
    assert camera.report().reasons == (
        "1 out of time, the last future: stamp +900 ms from its arrival, allowed +50 ms",
    )
    assert camera.report().ok


AUDIO = StreamSpec(
    "audio", "audio", (1, 1, 1), 50, 300, window_ms=100, frozen_ms=100, sample_rate_hz=16_000, channels=1
)


def heard(samples: np.ndarray) -> list[str]:
    """What is said at ten ticks a second of a microphone's int16 `samples`, that come in chunks of 20 ms."""
    aligner, told = Aligner([AUDIO], 0.1), list[str]()
    monitor = StreamMonitor(AUDIO, aligner.streams["audio"])
    for i, chunk in enumerate(samples.reshape(-1, 320, 1)):
        stamp_ns = 10**15 + i * 20 * MS
        aligner.push(Sample("audio", stamp_ns, stamp_ns + 20 * MS, Audio(chunk, i * 320, 16_000)))
        if i % 5 == 4:
            view = aligner.window(stamp_ns + 20 * MS).views["audio"]
            told += [*filter(None, [absence(AUDIO, view)]), *monitor.look(view)]
            assert monitor.report(view.stamp_ns, view).reasons == tuple(told[-1:])
    return told


def tone(height: float) -> np.ndarray:
    """Half a second, whose chunks all differ."""
    return np.clip(height * np.sin(0.1 * np.arange(8000)), -32768, 32767).astype(np.int16)


def test_an_imu_is_frozen_if_all_its_readings_are_the_same_and_not_if_the_first_and_last_are():
    spec = StreamSpec("imu", "imu", (5, 7), 100, 200, window_ms=50, frozen_ms=30)
    for middle, frozen in ((0.5, False), (0.0, True)):
        aligner = Aligner([spec], 0.05)
        for i in range(5):
            at_ns = 10**15 + i * 10 * MS
            aligner.push(Sample("imu", at_ns, at_ns, np.full(6, middle if i == 2 else 0.0, np.float32)))
        assert (aligner.window(at_ns).views["imu"].frozen_s > 0) == frozen


def test_a_microphone_that_is_muted_is_told_from_one_that_is_stuck():
    muted, stuck = np.zeros(8000, np.int16), np.tile(tone(3000)[:320], 25)
    assert heard(muted) == [f"audio muted: nothing but zeros for {ms} ms" for ms in (100, 200, 300, 400)]
    assert heard(stuck) == [f"audio frozen: the same data for {ms} ms" for ms in (100, 200, 300, 400)]


def test_sound_that_is_clipped_is_told_and_sound_that_just_fits_is_not():
    assert heard(tone(32767)) == heard(tone(300)) == []
    assert heard(tone(40000))[0] == "audio clipped: 39% of its samples at full scale"
