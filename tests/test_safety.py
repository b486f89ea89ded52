"""Limits: in range, not too fast, braking never slowed, NaN never passed on."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_edge.errors import EdgeError
from mm_edge.safety import Limits, limit

DRIVE = Limits(("linear_x", "angular_z"), min=(-0.2, -2.0), max=(0.6, 2.0), max_rate=(1.0, 8.0))


def test_an_action_within_limits_passes_untouched():
    assert limit([0.3, -1.0], [0.25, -0.9], 0.1, DRIVE) == ([0.3, -1.0], ())


def test_an_action_out_of_range_is_clipped_and_noted():
    assert limit([0.9, -3.0], [0.6, -2.0], 0.1, DRIVE) == (
        [0.6, -2.0],
        ("linear_x 0.9 limited to 0.6", "angular_z -3 limited to -2"),
    )


def test_speeding_up_is_limited_to_the_rate():
    values, notes = limit([0.6, 0.0], [0.1, 0.0], 0.1, DRIVE)
    assert values == pytest.approx([0.2, 0.0])
    assert notes == ("linear_x 0.6 limited to 0.2",)


@pytest.mark.parametrize("wanted", [0.0, 0.05, 0.59])
def test_braking_is_never_slowed(wanted):
    assert limit([wanted, 0.0], [0.6, 0.0], 0.001, DRIVE)[0][0] == wanted


def test_turning_round_may_stop_at_once_and_then_speeds_up_at_the_rate():
    assert limit([-0.2, 0.0], [0.6, 0.0], 0.1, DRIVE)[0][0] == pytest.approx(-0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_action(bad):
    assert limit([0.1, bad], [0.0, 0.0], 0.1, DRIVE) == (None, (f"non-finite action: angular_z is {bad}",))


@pytest.mark.parametrize("dt_s", [0.0, -1.0, math.nan])
def test_without_time_nothing_speeds_up(dt_s):
    assert limit([0.6, 0.0], [0.3, 0.0], dt_s, DRIVE)[0][0] == 0.3


ARM = Limits(("shoulder", "elbow"), (-1.0, 0.5), (1.0, 2.0), (1.0, 8.0), "position")


@pytest.mark.parametrize(
    ("wanted", "was", "may_be"),
    [
        (0.31, 0.3, 0.31),
        (0.9, 0.3, 0.4),  # no faster than its rate,
        (0.0, 0.3, 0.2),  # which holds toward 0, too
        (3.0, 0.95, 1.0),
        (0.9, 1.5, 1.4),  # it was pushed out of its range
    ],
)
def test_a_position_is_in_range_and_changes_no_faster_than_the_rate(wanted, was, may_be):
    values, notes = limit([wanted, 1.0], [was, 1.0], 0.1, ARM)
    assert values == pytest.approx([may_be, 1.0])
    assert notes == (() if wanted == may_be else (f"shoulder {wanted:.3g} limited to {may_be:.3g}",))


floats = st.floats(-10, 10)


@given(st.tuples(floats, floats), st.tuples(floats, floats), st.floats(0, 1))
def test_whatever_position_is_asked_no_joint_moves_too_fast_or_further_out_of_its_range(wanted, previous, dt_s):
    values, _ = limit(wanted, previous, dt_s, ARM)
    for value, was, low, high, rate in zip(values, previous, ARM.min, ARM.max, ARM.max_rate, strict=True):
        assert abs(value - was) <= rate * dt_s + 1e-9
        assert min(low, was) <= value <= max(high, was)


@given(st.tuples(floats, floats), st.tuples(st.floats(-0.2, 0.6), st.floats(-2, 2)), st.floats(0, 1))
def test_whatever_is_asked_the_result_is_in_range_and_grows_no_faster_than_the_rate(wanted, previous, dt_s):
    values, _ = limit(wanted, previous, dt_s, DRIVE)
    for value, was, low, high, rate in zip(values, previous, DRIVE.min, DRIVE.max, DRIVE.max_rate, strict=True):
        assert low <= value <= high
        grows = abs(value) - (abs(was) if value * was > 0 else 0)
        assert grows <= rate * dt_s + 1e-9


def test_a_bundle_narrows_a_robots_limits_and_never_widens_them():
    bundle = Limits(DRIVE.names, min=(-1.0, -1.0), max=(1.0, 1.0), max_rate=(0.5, 99.0))
    assert DRIVE.narrowed(bundle) == Limits(DRIVE.names, (-0.2, -1.0), (0.6, 1.0), (0.5, 8.0)) == bundle.narrowed(DRIVE)


def test_limits_for_another_action_do_not_fit():
    with pytest.raises(EdgeError, match=r"expected .*linear_x.*, got .*joint"):
        DRIVE.narrowed(Limits(("joint_1", "joint_2"), (-1, -1), (1, 1), (1, 1)))


@pytest.mark.parametrize(("low", "high", "rate"), [(0.1, 1, 1), (-1, -0.1, 1), (-1, 1, 0), (math.nan, 1, 1)])
def test_limits_of_velocities_must_allow_standing_still(low, high, rate):
    with pytest.raises(EdgeError, match="limits of linear_x: expected min <= 0 <= max"):
        Limits(("linear_x",), (low,), (high,), (rate,))


def test_limits_of_positions_need_not_hold_0():
    assert limit([0.0], [0.6], 1.0, Limits(("elbow",), (0.5,), (2.0,), (1.0,), "position"))[0] == [0.5]
    with pytest.raises(EdgeError, match=r"limits of elbow: expected min <= max, max_rate > 0, got 2\.0, 0\.5, 1\.0"):
        Limits(("elbow",), (2.0,), (0.5,), (1.0,), "position")
    with pytest.raises(EdgeError, match=r"limits: expected each position of .*, got each velocity of"):
        ARM.narrowed(Limits(ARM.names, (-1, -1), (1, 1), (1, 1)))
