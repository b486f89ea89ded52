"""The aligner: what a robot could see, and nothing from later."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_edge.align import Aligner, TickRule
from mm_edge.types import Audio, Sample, Scan, StreamSpec

MS = 1_000_000
T0 = 10_000 * MS

CAMERA = StreamSpec("camera", "image", (2, 2, 3), rate_hz=10, max_age_ms=300)
IMU = StreamSpec("imu", "imu", (4, 7), rate_hz=100, max_age_ms=50, window_ms=35)
AUDIO = StreamSpec(
    "audio", "audio", (2, 4, 1), rate_hz=100, max_age_ms=100, window_ms=3, sample_rate_hz=1000, channels=1
)
TEXT = StreamSpec("text", "text", (4,), rate_hz=0, max_age_ms=0, latched=True)


def camera(stamp_ms: float, arrival_ms: float | None = None, data: object = "frame") -> Sample:
    arrival_ms = stamp_ms if arrival_ms is None else arrival_ms
    return Sample("camera", T0 + round(stamp_ms * MS), T0 + round(arrival_ms * MS), data)


def view(aligner: Aligner, t_ms: float, stream: str = "camera"):
    return aligner.window(T0 + round(t_ms * MS)).views[stream]


def test_a_sample_is_seen_once_it_has_arrived():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    aligner.push(camera(0, arrival_ms=40))
    assert not view(aligner, 39).present
    seen = view(aligner, 40)
    assert (seen.present, seen.fresh, seen.age_s, seen.stamp_ns) == (True, True, 0.04, T0)


def test_each_sample_is_fresh_once_and_dt_is_the_time_between_captures():
    aligner = Aligner([CAMERA], tick_period_s=0.05)
    aligner.push(camera(0))
    assert (view(aligner, 10).fresh, view(aligner, 20).fresh) == (True, False)
    aligner.push(camera(130, arrival_ms=140))
    second = view(aligner, 150)
    assert (second.fresh, second.dt_s, second.reset) == (True, 0.13, False)


def test_the_first_dt_is_nominal():
    aligner = Aligner([CAMERA], tick_period_s=0.05)
    aligner.push(camera(0))
    assert view(aligner, 10).dt_s == 0.1


def test_only_the_newest_of_several_is_stepped_on():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for stamp_ms in (0, 100, 200):
        aligner.push(camera(stamp_ms, data=stamp_ms))
    assert view(aligner, 210).data == 200


def test_too_old_is_absent():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    aligner.push(camera(0))
    assert view(aligner, 300).present
    assert not view(aligner, 301).present
    assert view(aligner, 301).age_s == pytest.approx(0.301)


def test_late_and_duplicate_samples_are_counted_and_change_nothing():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for stamp_ms, arrival_ms in ((100, 100), (50, 110), (100, 120)):
        aligner.push(camera(stamp_ms, arrival_ms, data=arrival_ms))
    assert view(aligner, 130).data == 100
    counts = aligner.counts("camera")
    assert (counts["admitted"], counts["late"], counts["duplicate"]) == (1, 1, 1)


def test_one_stamp_from_the_future_does_not_make_the_rest_late():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    aligner.push(camera(5000, arrival_ms=0))
    aligner.push(camera(100))
    assert view(aligner, 110).stamp_ns == T0 + 100 * MS
    assert aligner.counts("camera")["future"] == 1


def test_a_clock_that_is_steadily_ahead_is_believed_and_corrected():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for i in range(11):
        aligner.push(camera(i * 100 + 700, arrival_ms=i * 100))
    seen = view(aligner, 1000)
    assert (seen.present, seen.age_s) == (True, 0.0)
    assert aligner.streams["camera"].offset_ns == 700 * MS
    assert aligner.counts("camera")["reanchored"] == 1


def test_a_clock_that_jumped_back_is_believed_after_a_while():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    aligner.push(camera(0))
    for i in range(1, 12):
        aligner.push(camera(i * 100 - 5000, arrival_ms=i * 100))
        aligner.window(T0 + i * 100 * MS)
    assert (aligner.counts("camera")["late"], aligner.counts("camera")["reanchored"]) == (10, 1)
    assert view(aligner, 1100).age_s == 0.0


@pytest.mark.parametrize("off_ms", [300, 1000, 1900, 60_000, -60_000])
def test_a_clock_that_was_mended_after_it_was_believed_is_believed_again(off_ms):
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for i in range(100):
        aligner.push(camera(i * 100 + off_ms * (10 <= i < 40), arrival_ms=i * 100))
        seen = view(aligner, i * 100)
    assert aligner.counts("camera")["reanchored"] == 2
    assert (seen.present, seen.age_s, aligner.streams["camera"].offset_ns) == (True, 0.0, 0)


def test_a_command_survives_a_small_step_back_of_the_clock():
    aligner = Aligner([TEXT], tick_period_s=0.1)
    aligner.push(Sample("text", T0, T0, "go"))
    aligner.window(T0 + 200 * MS)
    aligner.push(Sample("text", T0 + 250 * MS, T0 + 250 * MS, "stop"))
    assert view(aligner, 100, "text").data == "stop"


def test_a_model_that_lost_its_state_is_given_all_that_is_present_again():
    aligner = Aligner([CAMERA, TEXT], tick_period_s=0.1)
    aligner.push(camera(0))
    aligner.push(Sample("text", T0, T0, "go"))
    aligner.window(T0)
    aligner.restart()
    window = aligner.window(T0 + 100 * MS)
    assert window.reset
    assert window.views["camera"].fresh and window.views["text"].fresh
    assert not aligner.window(T0 + 200 * MS).reset


def test_a_refusal_says_why():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    aligner.push(camera(900, arrival_ms=0))
    aligner.window(T0)
    assert aligner.streams["camera"].refusal == "future: stamp +900 ms from its arrival, allowed +50 ms"


def test_a_gap_starts_the_streams_state_anew():
    aligner = Aligner([CAMERA], tick_period_s=0.1, max_gap_ms=1000)
    aligner.push(camera(0))
    assert not view(aligner, 0).reset
    for t in range(100, 1500, 100):
        aligner.window(T0 + t * MS)
    aligner.push(camera(1500))
    after = view(aligner, 1500)
    assert (after.reset, after.dt_s) == (True, 0.1)


def test_a_clock_that_jumps_back_starts_everything_anew():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    aligner.push(camera(1000))
    assert not aligner.window(T0 + 1000 * MS).reset
    window = aligner.window(T0)
    assert window.reset
    assert not window.views["camera"].present
    aligner.push(camera(50))
    assert view(aligner, 60).fresh


def test_a_stream_that_was_absent_as_all_started_anew_does_so_when_it_returns():
    aligner = Aligner([CAMERA], tick_period_s=0.1, max_gap_ms=1000)
    aligner.push(camera(0))
    assert view(aligner, 0).fresh
    window = aligner.window(T0 + 1001 * MS)  # ticks stood still
    assert (window.reset, window.views["camera"].present) == (True, False)
    aligner.push(camera(950, arrival_ms=1050))
    after = view(aligner, 1100)
    assert (after.fresh, after.reset, after.dt_s) == (True, True, 0.1)


def test_of_commands_stamped_alike_the_one_that_comes_last_is_in_force():
    """A simulated clock goes in steps of 100 ms."""
    aligner = Aligner([TEXT], tick_period_s=0.1)
    for words in ("go", "stop", "back"):
        aligner.push(Sample("text", T0, T0, words))
    assert view(aligner, 0, "text").data == "back"
    aligner.push(Sample("text", T0, T0, "go"))
    assert (view(aligner, 10, "text").data, aligner.streams["text"].misplaced) == ("go", 0)
    assert view(aligner, -100, "text").data == "go"  # the clock went back
    aligner.push(Sample("text", T0 - 100 * MS, T0 - 100 * MS, "stop"))
    assert view(aligner, -90, "text").data == "stop"


def test_a_camera_that_was_gone_is_not_called_slow_when_it_is_back():
    aligner = Aligner([CAMERA], tick_period_s=0.1, max_gap_ms=1000)
    for t in range(0, 600, 100):
        aligner.push(camera(t))
    for t in range(500, 2000, 100):
        aligner.window(T0 + t * MS)
    assert len(aligner.streams["camera"].recent) == 6
    aligner.push(camera(2000))
    assert view(aligner, 2000).reset and not aligner.streams["camera"].recent


def test_text_does_not_go_stale_and_a_new_command_replaces_the_old():
    aligner = Aligner([TEXT], tick_period_s=0.1)
    aligner.push(Sample("text", T0, T0, "go"))
    assert view(aligner, 0, "text").fresh
    later = view(aligner, 1500, "text")
    assert (later.present, later.fresh) == (True, False)
    aligner.push(Sample("text", T0 + 1600 * MS, T0 + 1600 * MS, "stop"))
    assert view(aligner, 1600, "text").reset


def test_a_command_is_given_again_when_the_model_has_to_forget():
    aligner = Aligner([TEXT], tick_period_s=0.1, max_gap_ms=1000)
    aligner.push(Sample("text", T0, T0, "go"))
    assert view(aligner, 0, "text").fresh
    stood_still = view(aligner, 5000, "text")
    jumped_back = view(aligner, 100, "text")
    for seen in (stood_still, jumped_back):
        assert (seen.fresh, seen.reset, seen.data) == (True, True, "go")
    assert jumped_back.stamp_ns == T0 + 100 * MS


def test_imu_rows_come_oldest_first_in_a_fixed_shape():
    aligner = Aligner([IMU], tick_period_s=0.1)
    for i in range(3):
        aligner.push(Sample("imu", T0 + i * 10 * MS, T0 + i * 10 * MS, np.full(6, i, np.float32)))
    seen = view(aligner, 20, "imu")
    assert seen.valid.tolist() == [False, True, True, True]
    assert seen.data[:, 0].tolist() == [0, 0, 1, 2]
    for i in range(3, 6):
        aligner.push(Sample("imu", T0 + i * 10 * MS, T0 + i * 10 * MS, np.full(6, i, np.float32)))
    assert view(aligner, 50, "imu").data[:, 0].tolist() == [2, 3, 4, 5]


def sound(first: int, *values: int, arrival_ms: float | None = None) -> Sample:
    """At 1 kHz sample number n is captured n ms after T0."""
    end_ms = first + len(values)
    data = Audio(np.array(values, np.int16)[:, None], first, 1000)
    return Sample("audio", T0 + first * MS, T0 + round((arrival_ms or end_ms) * MS), data)


def test_audio_is_placed_by_sample_number_and_gaps_are_silence():
    aligner = Aligner([AUDIO], tick_period_s=0.1)
    aligner.push(sound(0, 1, 2))
    aligner.push(sound(3, 4))  # sample 2 never came
    seen = view(aligner, 4, "audio")
    assert seen.data[:, 0].tolist() == [2, 0, 4]
    assert seen.valid.tolist() == [True, False, True]
    assert (seen.stamp_ns, aligner.counts("audio")["gap"]) == (T0 + 4 * MS, 1)


def test_a_late_chunk_of_audio_fills_its_hole():
    aligner = Aligner([AUDIO], tick_period_s=0.1)
    for chunk in (sound(0, 1), sound(2, 3), sound(1, 2, arrival_ms=4)):
        aligner.push(chunk)
    seen = view(aligner, 5, "audio")
    assert seen.data[:, 0].tolist() == [1, 2, 3]
    assert seen.valid.all()
    assert seen.stamp_ns == T0 + 3 * MS


class Microphone:
    """One that counts its samples to stamp them, by a clock that drifts. A window as each chunk arrives."""

    def __init__(self, ppm: float, chunk_ms: int):
        self.aligner = Aligner([AUDIO], tick_period_s=chunk_ms / 1e3)
        self.ppm, self.chunk_ms, self.late_ms = ppm, chunk_ms, 0.0
        self.clock_ms = self.t_ms = 0.0
        self._random, self._number = np.random.default_rng(0), 0

    def listen(self, minutes: float) -> list[float]:
        """How wrong the age is in each window, in ms."""
        wrong_ms = []
        for _ in range(round(minutes * 60_000 / self.chunk_ms)):
            self.wait(self.chunk_ms)
            chunk = Audio(np.zeros((self.chunk_ms, 1), np.int16), self._number, 1000)
            self._number += self.chunk_ms
            late_ms = self._random.uniform(8, 18) + self.late_ms
            stamp_ns, arrival_ns = (T0 + round(ms * MS) for ms in (self.clock_ms - self.chunk_ms, self.t_ms + late_ms))
            self.aligner.push(Sample("audio", stamp_ns, arrival_ns, chunk))
            wrong_ms.append(self.aligner.window(arrival_ns).views["audio"].age_s * 1e3 - late_ms)
        return wrong_ms

    def wait(self, ms: float) -> None:
        self.t_ms += ms
        self.clock_ms += ms * (1 + self.ppm * 1e-6)

    @property
    def counts(self):
        return self.aligner.counts("audio")


@pytest.mark.parametrize("ppm", [500, 40, -40, -500])
def test_a_microphone_whose_clock_drifts_keeps_its_age_and_loses_nothing(ppm):
    microphone = Microphone(ppm, chunk_ms=20)
    assert max(map(abs, microphone.listen(minutes=20))) < 8  # of the 600 ms that 500 ppm run away
    assert (microphone.counts["admitted"], microphone.aligner.streams["audio"].misplaced) == (60_000, 0)
    told = microphone.aligner.streams["audio"].drift.ppm
    assert told == (pytest.approx(ppm, abs=30) if abs(ppm) == 500 else 0)  # a usual crystal is not worth a word


def test_over_hours_too():
    microphone = Microphone(-40, chunk_ms=500)
    assert max(map(abs, microphone.listen(minutes=180))) < 8  # of 430 ms


def test_a_drift_that_ends_is_followed_no_further():
    microphone = Microphone(300, chunk_ms=50)
    microphone.listen(minutes=2)
    microphone.ppm = 0
    assert max(map(abs, microphone.listen(minutes=5))) < 8


def test_a_link_that_becomes_slower_is_not_taken_for_a_clock():
    microphone = Microphone(0, chunk_ms=50)
    microphone.listen(minutes=2)
    microphone.late_ms = 40.0
    assert max(map(abs, microphone.listen(minutes=5))) < 8


@pytest.mark.parametrize("event", ["its clock jumps", "it falls silent"])
def test_what_drifted_before_a_jump_or_a_silence_is_not_forgotten(event):
    microphone = Microphone(-500, chunk_ms=20)
    microphone.listen(minutes=5)
    if event == "its clock jumps":
        microphone.clock_ms -= 5000
    else:
        microphone.wait(ms=1000)
    microphone.listen(minutes=1)
    assert max(map(abs, microphone.listen(minutes=5))) < 15


def test_readings_that_are_coarse_are_not_frozen_by_coincidence():
    """Of a robot that stands, two windows often end in the same row; but that all rows are the same is no chance."""
    aligner = Aligner([dataclasses.replace(IMU, frozen_ms=20)], tick_period_s=0.02)
    for i in range(40):
        row = np.full(6, i % 2 if i < 30 else 7, np.float32)
        aligner.push(Sample("imu", T0 + i * 10 * MS, T0 + i * 10 * MS, row))
        if i % 2:
            assert view(aligner, i * 10, "imu").present == (i < 33), i


@pytest.mark.parametrize("beams", [8, 1081])
@pytest.mark.parametrize(("range_m", "frozen"), [(np.inf, False), (3.0, True)])
def test_a_scan_that_meets_nothing_is_as_good_as_another(range_m, frozen, beams):
    spec = StreamSpec("scan", "scan", (2, 8), rate_hz=10, max_age_ms=300, range_max_m=6, frozen_ms=150)
    scan = Scan(np.full(beams, range_m, np.float32), -3.0, 6 / beams, 0.1, 6.0)
    aligner = Aligner([spec], tick_period_s=0.1)
    for i in range(3):
        aligner.push(Sample("scan", T0 + i * 100 * MS, T0 + i * 100 * MS, scan._replace(ranges=scan.ranges.copy())))
        seen = view(aligner, i * 100, "scan")
    assert (seen.present, seen.frozen_s) == ((False, 0.2) if frozen else (True, 0.0))


def test_pictures_are_compared_where_they_differ():
    spec = StreamSpec("camera", "image", (8, 8, 3), rate_hz=10, max_age_ms=300, frozen_ms=100)
    aligner, picture = Aligner([spec], tick_period_s=0.1), np.zeros((480, 640, 3), np.uint8)
    for i, changed in enumerate((0, 1, 1, 0, 0)):
        picture = picture.copy()
        picture[0, 0, 0] += changed  # one pixel in a corner is enough
        aligner.push(camera(i * 100, data=picture))
        assert view(aligner, i * 100).present == (i < 3)


def test_a_clock_that_is_set_starts_the_streams_state_anew():
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for i in range(10):
        aligner.push(camera(i * 100))
        assert not view(aligner, i * 100).reset
    for i in range(10, 20):
        aligner.push(camera(i * 100 + 5000, arrival_ms=i * 100))
        assert not view(aligner, i * 100).fresh
    aligner.push(camera(2000 + 5000, arrival_ms=2000))
    seen = view(aligner, 2000)
    assert (seen.fresh, seen.reset, seen.age_s) == (True, True, 0)


def test_a_chunk_longer_than_the_window_leaves_its_end():
    aligner = Aligner([AUDIO], tick_period_s=0.1)
    aligner.push(sound(0, 1, 2, 3, 4, 5))
    assert view(aligner, 5, "audio").data[:, 0].tolist() == [3, 4, 5]


def test_a_chunk_that_begins_in_the_one_before_adds_what_is_new():
    aligner = Aligner([AUDIO], tick_period_s=0.1)
    aligner.push(sound(0, 1, 2, 3))
    aligner.push(sound(2, 3, 4))
    seen = view(aligner, 4, "audio")
    assert seen.data[:, 0].tolist() == [2, 3, 4] and seen.valid.all()
    assert aligner.counts("audio")["overlap"] == 1


def test_a_microphone_that_does_not_count_its_samples_is_told():
    aligner = Aligner([AUDIO], tick_period_s=0.1)
    aligner.push(sound(0, 1, 2, arrival_ms=2))
    aligner.push(Sample("audio", T0 + 2 * MS, T0 + 4 * MS, sound(0, 3, 4).data))
    seen, stream = view(aligner, 4, "audio"), aligner.streams["audio"]
    assert seen.data[-2:, 0].tolist() == [3, 4] and not seen.valid[:-2].any()
    assert (stream.misplaced, stream.refusal[:23]) == (1, "sample 0 came after 2: ")


def test_what_a_window_has_shown_never_changes():
    aligner, shown = Aligner([AUDIO], tick_period_s=0.1), []
    aligner.push(sound(0, 1))
    for first in range(2, 40):
        aligner.push(sound(first, first + 1))
        if first == 3:
            aligner.push(sound(1, 2, arrival_ms=4))  # late, and it fills the hole that the window before had shown
        seen = view(aligner, first + 1, "audio")
        shown.append((seen, seen.data[:, 0].tolist(), seen.valid.tolist()))
    assert shown[0][1:] == ([1, 0, 3], [True, False, True])
    assert shown[1][1:] == ([2, 3, 4], [True, True, True])
    assert all((seen.data[:, 0].tolist(), seen.valid.tolist()) == (*then,) for seen, *then in shown)


@st.composite
def arrivals(draw):
    """Frames of any rate from 0.1 to 1,000 Hz with jitter, latency, loss and duplicates, pushed in any order."""
    period_ms = 1000 / draw(st.floats(0.1, 1000))
    samples = []
    for i in range(draw(st.integers(1, 30))):
        stamp_ms = i * period_ms + draw(st.floats(0, 0.9)) * period_ms
        for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2)))):
            samples.append(camera(stamp_ms, stamp_ms + draw(st.floats(0, 3)) * period_ms, data=stamp_ms))
    ticks = sorted(draw(st.lists(st.floats(0, 35 * period_ms), min_size=1, max_size=20)))
    return draw(st.permutations(samples)), ticks


@settings(max_examples=200, deadline=None)
@given(arrivals())
def test_never_from_the_future_never_backwards(case):
    samples, ticks = case
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for sample in samples:
        aligner.push(sample)
    newest = 0
    for t_ms in ticks:
        seen = view(aligner, t_ms)
        visible = [s.stamp_ns for s in samples if s.arrival_ns <= T0 + round(t_ms * MS)]
        if seen.stamp_ns:
            assert seen.stamp_ns in visible
            assert seen.stamp_ns >= newest
            assert seen.age_s >= 0
        if visible and len(samples) <= 16:  # else the oldest of so many at once go
            assert seen.stamp_ns == max(visible)
        newest = seen.stamp_ns


DATA = {"camera": "frame", "imu": np.zeros(6, np.float32)}


@st.composite
def lives(draw):
    """Of a camera, an imu and a microphone: samples in any order, with losses, duplicates, jitter, jumps of each
    sensor's clock and of the robot's; and ticks in between. Rates from 0.1 to 1,000 Hz. (arrival, what) in turn."""
    events, period_ms = [], 1000 / draw(st.floats(0.1, 1000))
    jumps_ms = st.sampled_from((0, 0, 0, 0, 0, 0, 40, 700, 5000, -30, -5000))
    for stream in ("camera", "imu", "audio"):
        clock_ms = 0.0
        for i in range(draw(st.integers(0, 25))):
            clock_ms += draw(jumps_ms)
            stamp_ms = i * period_ms + draw(st.floats(0, 0.9)) * period_ms
            data = Audio(np.full((5, 1), i, np.int16), 5 * i, 1000) if stream == "audio" else DATA[stream]
            for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2)))):
                arrival_ms = stamp_ms + draw(st.floats(0, 3)) * period_ms
                events.append((arrival_ms, Sample(stream, T0 + round((stamp_ms + clock_ms) * MS), 0, data)))
    back_ms = draw(st.sampled_from((0, 0, 0, 1, 3000)))
    for i, t_ms in enumerate(sorted(draw(st.lists(st.floats(0, 30 * period_ms), min_size=2, max_size=20)))):
        events.append((t_ms, T0 + round((t_ms - back_ms * (i > 5)) * MS)))
    events.sort(key=lambda event: event[0])
    return [
        event if isinstance(event, int) else event._replace(arrival_ns=T0 + round(t_ms * MS)) for t_ms, event in events
    ]


@settings(max_examples=300, deadline=None)
@given(lives(), st.sampled_from((0, 30)))
def test_whatever_comes_nothing_is_from_the_future_goes_back_without_a_reset_or_piles_up(events, frozen_ms):
    specs = [dataclasses.replace(spec, frozen_ms=frozen_ms) for spec in (CAMERA, IMU, AUDIO)]
    aligner, last, before = Aligner(specs, tick_period_s=0.1), None, {}
    for event in events:
        if isinstance(event, Sample):
            aligner.push(event)
            continue
        window = aligner.window(event)
        assert window.reset == (last is not None and (event < last or event - last > 2000 * MS))
        assert window.dt_s > 0 or event == last
        for name, seen in window.views.items():
            stream = aligner.streams[name]
            assert len(stream.pending) <= stream.pending.maxlen and len(stream._not_yet) <= stream.pending.maxlen
            assert stream.newest_ns is None or stream.arrival_ns <= event
            assert seen.age_s >= -0.05 - 1e-9  # a clock may be ahead within its tolerance
            jumped = last is not None and event < last
            again = stream.counts["reanchored"] > before.get(name, (0, 0))[1]
            if seen.stamp_ns and not jumped and not again:
                assert seen.stamp_ns >= before.get(name, (-(10**18), 0))[0]
            assert not (seen.fresh and not seen.present) and seen.dt_s > 0
            before[name] = (seen.stamp_ns or -(10**18), stream.counts["reanchored"])  # 0: it was never seen
        last = event


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 1000), st.integers(2, 50))
def test_a_lone_stream_always_comes_through(rate_hz, n):
    """Nothing waits for a partner."""
    aligner = Aligner([CAMERA, IMU, AUDIO, TEXT], tick_period_s=0.1)
    for i in range(n):
        stamp_ms = i * 1000 / rate_hz
        aligner.push(camera(stamp_ms))
        seen = view(aligner, stamp_ms)
        assert (seen.present, seen.fresh, seen.stamp_ns) == (True, True, T0 + round(stamp_ms * MS))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000))
def test_memory_is_bounded_when_nobody_ticks(n):
    aligner = Aligner([CAMERA], tick_period_s=0.1)
    for i in range(n):
        aligner.push(camera(i))
    kept = aligner.streams["camera"].pending
    assert len(kept) <= kept.maxlen == 20
    assert aligner.counts("camera")["overflow"] == max(0, n - 20)


def test_an_anchor_that_comes_fast_is_waited_for():
    rule, ticks = TickRule("audio", max_period_ms=250, min_period_ms=110), []
    for ms in range(0, 500, 20):  # chunks of sound
        rule.pushed(Sample("audio", T0 + ms * MS, T0 + ms * MS, None))
        if rule.due(T0 + ms * MS):
            rule.ticked(T0 + ms * MS)
            ticks.append(ms)
    assert ticks == [0, 120, 240, 360, 480]
    assert not rule.due(T0 + 595 * MS)  # nor between two chunks: a robot ticks as a replay of it
    assert rule.due(T0 + 730 * MS)  # the microphone died


def test_tick_with_the_anchor_or_when_it_is_late():
    rule = TickRule("camera", max_period_ms=100)
    assert rule.due(T0)  # the first tick waits for nothing
    rule.ticked(T0)
    assert not rule.due(T0 + 99 * MS)
    assert rule.due(T0 + 100 * MS)
    rule.pushed(Sample("imu", T0, T0 + 5 * MS, np.zeros(6, np.float32)))
    assert not rule.due(T0 + 10 * MS)
    rule.pushed(camera(0, arrival_ms=5))
    assert not rule.due(T0 + 4 * MS)
    assert rule.due(T0 + 10 * MS)
    rule.pushed(camera(6, arrival_ms=8))  # while a tick for 7 ms is under way, which does not see it
    rule.ticked(T0 + 7 * MS)
    assert rule.due(T0 + 10 * MS)
    rule.ticked(T0 + 10 * MS)
    rule.pushed(camera(10, arrival_ms=10))
    assert not rule.due(T0 + 10 * MS)  # a simulated clock stands still between its steps
    assert rule.due(T0 + 11 * MS)
    rule.ticked(T0 + 11 * MS)
    rule.pushed(camera(9, arrival_ms=9))  # it came before that tick, but took until now to be made from its message
    assert rule.due(T0 + 12 * MS)
