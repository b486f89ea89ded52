"""Events out of a model's shares of classes, and where a sound comes from."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_ear import GO_HZ, RATE_HZ, STOP_HZ, tone, write_toy_ear

from mm_edge.events import SOUND_MPS, Spotter, bearing_rad
from mm_edge.manifest import EventsSpec
from mm_edge.pipeline import Pipeline
from mm_edge.types import Audio, Sample

MS = 1_000_000
NAMES = ("fall", "knock", "quiet")
FALL, KNOCK, QUIET = np.eye(3)


def spotter(sure=0.6, ticks=2):
    return Spotter(NAMES, EventsSpec(("quiet",), sure, ticks))


def take(spotter, *shares):
    """What each tick, 100 ms after the one before, tells."""
    events = [spotter.take(100 * MS * i, share) for i, share in enumerate(shares)]
    return [event and (event.label, round(event.score, 3), event.start_ns // MS) for event in events]


def test_an_event_is_told_once_as_soon_as_it_is_sure():
    # The mean of two ticks: 0.5 is not sure; the fall has been the likeliest since 100 ms, by a hair.
    assert take(spotter(), QUIET, 0.51 * FALL + 0.49 * QUIET, FALL, FALL, FALL) == [
        None, None, ("fall", 0.755, 200), None, None,
    ]  # fmt: skip


def test_it_is_told_again_after_it_was_over():
    assert take(spotter(ticks=1), FALL, 0.4 * FALL, FALL) == [("fall", 1.0, 0), None, None]  # it only wavered
    assert take(spotter(ticks=1), FALL, 0.2 * FALL, FALL) == [("fall", 1.0, 0), None, ("fall", 1.0, 0)]


def test_one_event_may_follow_another():
    assert take(spotter(ticks=1), FALL, KNOCK, FALL) == [("fall", 1.0, 0), ("knock", 1.0, 100), ("fall", 1.0, 200)]


def test_what_means_that_nothing_happens_is_no_event():
    assert take(spotter(ticks=1), QUIET, QUIET) == [None, None]


def test_what_wavers_between_two_is_each_told_once():
    either, other = 0.6 * FALL + 0.4 * KNOCK, 0.4 * FALL + 0.6 * KNOCK
    told = take(spotter(ticks=1), either, other, either, other)
    assert told == [("fall", 0.6, 0), ("knock", 0.6, 100), None, None]


@given(
    st.lists(st.sampled_from([FALL, KNOCK, QUIET, 0.5 * FALL, 0.4 * KNOCK + 0.6 * FALL]), max_size=40),
    st.integers(1, 4),
)
def test_between_two_tellings_of_an_event_it_was_over(shares, ticks):
    told = take(spotter(ticks=ticks), *shares)
    means = [np.sum(shares[max(0, i + 1 - ticks) : i + 1], 0) / ticks for i in range(len(shares))]
    for i, label in enumerate(NAMES):
        at = [tick for tick, event in enumerate(told) if event and event[0] == label]
        assert all(min(mean[i] for mean in means[a:b]) < 0.3 for a, b in pairwise(at))
    assert any(told) or not any(mean.argmax() < 2 and mean.max() >= 0.6 for mean in means)


@pytest.mark.parametrize("degrees", [-90, -45, -10, 0, 20, 60, 90])
def test_a_bearing_is_told_by_the_delay_between_two_ears(degrees):
    distance_m, n = 0.16, 4000
    delay = distance_m * math.sin(math.radians(degrees)) / SOUND_MPS * RATE_HZ  # of the right ear, in samples
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(0, 1000, n))
    late = np.exp(-2j * math.pi * np.arange(n // 2 + 1) / n * delay)
    ears = np.stack([np.fft.irfft(spectrum), np.fft.irfft(spectrum * late)], 1)
    assert math.degrees(bearing_rad(np.int16(ears), RATE_HZ, distance_m)) == pytest.approx(degrees, abs=6)


def test_of_silence_there_is_no_bearing():
    assert bearing_rad(np.zeros((800, 2), np.int16), RATE_HZ, 0.16) is None
    assert bearing_rad(np.zeros((0, 2), np.int16), RATE_HZ, 0.16) is None
    assert bearing_rad(np.int16([[5, 0], [0, 0], [0, 5]]), RATE_HZ, 0.16) is not None  # of a few samples there is one


def test_a_pipeline_tells_events_of_what_it_hears(tmp_path):
    """Silence, a low tone, silence, a high one, with 20 ms chunks of two microphones into one ear."""
    pipeline, told = Pipeline(write_toy_ear(tmp_path / "toy")), []
    still = np.zeros(RATE_HZ // 2, np.int16)
    heard = np.concatenate([still, tone(GO_HZ, 0.5), still, tone(STOP_HZ, 0.5)])
    for first in range(0, len(heard), 320):
        now_ns = (first + 320) * 1_000_000_000 // RATE_HZ
        samples = np.stack([heard[first : first + 320]] * 2, 1)
        pipeline.push(Sample("audio", first * 1_000_000_000 // RATE_HZ, now_ns, Audio(samples, first, RATE_HZ)))
        if pipeline.due(now_ns):
            told += [(e.label, e.start_ns / 1e9) for e in pipeline.tick(now_ns).events]
    assert [label for label, _ in told] == ["go", "stop"]
    for (_, start_s), onset_s in zip(told, (0.5, 1.5)):
        assert onset_s <= start_s <= onset_s + 0.2
