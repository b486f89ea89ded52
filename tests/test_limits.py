"""What a robot's own recordings tell of when its sensors are frozen, skewed or jittering."""

from pathlib import Path

import numpy as np
import pytest

from mm_edge.messages import TWIST
from mm_edge.types import NS, StreamSpec
from training.limits import watched
from training.recordings import Recording, Topic

CAMERA = StreamSpec("camera", "image", (96, 128, 3), rate_hz=10, max_age_ms=420)
SECONDS = 8


def sensor(kind="image", rate_hz=10, late_ms=20.0, repeats=(), seconds=SECONDS):
    """`late_ms`: after their stamps they arrive, in turn; `repeats`: of which samples the data are those before."""
    stamps = np.arange(seconds * rate_hz) * NS // rate_hz
    late = np.resize(np.round(np.array(late_ms) * 1e6), len(stamps)).astype(np.int64)
    again = np.isin(np.arange(len(stamps)), np.array(repeats, int))
    values = np.tile([16_000, 1], (len(stamps), 1))
    return Topic("/" + kind, "", kind, arrival_ns=stamps + late, stamp_ns=stamps, values=values, repeats=again)


def commands(value, rate_hz=10, names=TWIST, seconds=SECONDS):
    """`value(at_s)` is the speed, None no command."""
    at_s = [i / rate_hz for i in range(seconds * rate_hz) if value(i / rate_hz) is not None]
    values = np.zeros((len(at_s), len(names)), np.float32)
    values[:, 0] = [value(s) for s in at_s]
    at_ns = np.array([round(s * NS) for s in at_s], np.int64)
    return Topic("/cmd_vel", "", "command", names, arrival_ns=at_ns, stamp_ns=at_ns, values=values)


def halt(begin_s, end_s):
    return lambda at_s: 0.0 if begin_s <= at_s < end_s else 0.5


def limits(topic=None, *told, spec=CAMERA, others=()):
    topics = {spec.name: topic or sensor(), **{f"told{i}": t for i, t in enumerate(told)}}
    recordings = [Recording(Path("one"), topics), *(Recording(Path("other"), {spec.name: other}) for other in others)]
    (found,) = watched([spec], recordings)
    return found.frozen_ms, found.max_latency_ms, found.max_jitter_ms


def test_frozen_is_what_is_the_same_for_longer_than_it_ever_was():
    stands = commands(halt(1, 5))
    assert limits(sensor(), stands)[0] == 300  # three periods
    assert limits(sensor(repeats=[7]), stands)[0] == 500  # and twice the longest time
    assert limits(sensor(repeats=[7, 8, 9]), stands)[0] == 900
    assert limits(sensor(repeats=[7, 8, 9, 10]), stands)[0] == 0  # longer than a second: it may stand still
    once_frozen = sensor(repeats=range(20, 60))
    assert limits(sensor(), stands, others=[once_frozen])[0] == 300  # which the check tells
    assert limits(sensor(), stands, others=[sensor(repeats=range(7, 11))])[0] == 0  # which it does not
    assert limits(once_frozen, stands, others=[sensor()])[0] == 0  # it was not seen to change as it stood


@pytest.mark.parametrize(
    "told",
    [
        [],
        [commands(lambda at_s: 0.5)],
        [commands(halt(1, 3.9))],  # two seconds, when the robot had come to stand
        [commands(lambda at_s: 0.0 if at_s % 2 < 1.5 else 0.5)],  # many times, but never for long
        [commands(lambda at_s: 0.5 if at_s < 1 else None)],  # nobody knows what was wanted then
        [commands(lambda at_s: None if 2 <= at_s < 4 else halt(1, 5)(at_s))],
        [commands(lambda at_s: np.nan if 1 <= at_s < 5 else 0.5)],
        [commands(halt(1, 5)), commands(lambda at_s: 0.5)],  # the expert would have, but did not drive
        [commands(halt(1, 5), names=("shoulder", "elbow"))],  # an arm may be on its way to what it was told
    ],
    ids=["no commands", "always", "short", "shorts", "silence", "hole", "nan", "expert", "arm"],
)
def test_of_a_sensor_that_never_saw_the_robot_stand_nobody_knows(told):
    assert limits(sensor(), *told)[0] == 0


def test_numbers_may_stand_still_but_have_a_link():
    joints = StreamSpec("joints", "vector", (4,), rate_hz=10, max_age_ms=420)
    assert limits(sensor("vector"), commands(halt(1, 5)), spec=joints) == (0, 50, 50)


def test_an_imu_can_be_frozen_only_within_its_window():
    stands = commands(halt(1, 5))
    fast = StreamSpec("imu", "imu", (20, 7), rate_hz=200, max_age_ms=200, window_ms=100)
    assert limits(sensor("imu", 200), stands, spec=fast)[0] == 50
    assert limits(sensor("imu", 200, repeats=range(9, 18)), stands, spec=fast)[0] == 0  # 105 ms, of 100
    slow = StreamSpec("imu", "imu", (4, 7), rate_hz=20, max_age_ms=400, window_ms=200)
    assert limits(sensor("imu", 20), stands, spec=slow)[0] == 0


def test_link_by_hand():
    assert limits(sensor(late_ms=20))[1:] == (50, 50)  # at least
    assert limits(sensor(late_ms=80))[1:] == (160, 50)
    assert limits(sensor(late_ms=[20, 20, 80, 20]))[1:] == (50, 120)  # six in a row are never all late
    assert limits(sensor(late_ms=[0.0]))[1:] == (0, 0)  # as converted data have it
    assert limits(sensor(late_ms=[0.0, 1e-4]))[1:] == (0, 0)  # and by rounding
    assert limits(sensor(late_ms=220))[1:] == (0, 50)  # 440 ms are stale
    assert limits(sensor(late_ms=[20, 20, 600, 20]))[1:] == (50, 0)


def test_one_run_in_a_hundred_may_be_worse():
    seldom = [20] * 1999 + [300]
    assert limits(sensor(late_ms=seldom, seconds=200))[1:] == (50, 50)
    assert limits(sensor(late_ms=seldom[1000:] * 10, seconds=200))[1:] == (50, 50)
    often = [20] * 199 + [300]
    assert limits(sensor(late_ms=often, seconds=200))[1:] == (50, 560)


def test_recordings_without_a_link_do_not_hide_the_one_that_has_it():
    assert limits(sensor(late_ms=80), others=[sensor(late_ms=0)] * 12)[1:] == (160, 50)


def test_a_clock_that_is_set_is_no_latency():
    jump = [20] * 40 + [3_600_020] * 40
    assert limits(sensor(late_ms=[20] * 80, seconds=8))[1:] == (50, 50)
    assert limits(sensor(late_ms=jump, seconds=8))[1:] == (0, 50)  # by which clock it was late nobody knows


def test_a_chunk_of_sound_is_as_old_as_its_last_sample():
    ears = StreamSpec("audio", "audio", (2, 24, 7), rate_hz=10, max_age_ms=520, sample_rate_hz=16_000, channels=1)
    assert limits(sensor("audio", 10, late_ms=105), spec=ears)[1:] == (50, 50)
    assert limits(sensor("audio", 10, late_ms=180), spec=ears)[1:] == (160, 50)
    assert limits(sensor("audio", 10, late_ms=100), spec=ears)[1:] == (0, 0)  # logged when it ended


def test_a_slip_among_the_commands_does_not_make_the_others_a_stand():
    slip = commands(lambda at_s: 50.0 if at_s == 3 else 0.5)
    assert limits(sensor(), slip)[0] == 0


def test_what_came_once_and_a_command_tell_nothing():
    once = StreamSpec("camera", "image", (96, 128, 3), rate_hz=0, max_age_ms=200)
    assert limits(sensor(seconds=1, rate_hz=1), commands(halt(1, 5)), spec=once) == (0, 0, 0)
    text = StreamSpec("text", "text", (12,), rate_hz=0, max_age_ms=0, latched=True)
    assert limits(sensor("text", 1), spec=text) == (0, 0, 0)
