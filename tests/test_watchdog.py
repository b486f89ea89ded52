"""The watchdog forwards or stops. Time is in milliseconds here; the deadline is 150 ms, three valid actions clear."""

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_edge.safety import Limits
from mm_edge.watchdog import Watchdog

MS = 1_000_000
GO = (0.4, 1.0)


LIMITS = Limits(("linear_x", "angular_z"), min=(-0.2, -1.8), max=(0.6, 1.8), max_rate=(10.0, 100.0))


def make(limits=LIMITS, **kwargs):
    return Watchdog(limits, deadline_ms=150, clear_after=3, **kwargs)


def act(dog, t_ms, values=GO, source="model", age_ms=0.0, ros_offset_ms=10**9):
    """An action sent `age_ms` ago, heard at `t_ms`. The ROS clock is far from the steady one, as on a robot."""
    now_ros_ns = round((t_ms + ros_offset_ms) * MS)
    return dog.on_action(source, now_ros_ns - round(age_ms * MS), np.array(values), round(t_ms * MS), now_ros_ns)


def running(at_ms=200, **kwargs):
    dog = make(**kwargs)
    for t_ms in (at_ms - 133, at_ms - 67, at_ms):
        command = act(dog, t_ms)
    assert command is not None and dog.reason is None
    return dog


def test_starts_stopped_and_drives_after_three_valid_actions():
    dog = make()
    assert dog.check(0) and dog.reason == "no action yet"
    assert act(dog, 0) is None
    assert act(dog, 67) is None
    assert dog.reason == "2 valid actions of 3 before driving on"
    assert act(dog, 133).tolist() == [0.4, 1.0]
    assert not dog.check(134 * MS)


def test_silence_stops_at_the_deadline_and_clears_by_itself():
    dog = running(at_ms=200)
    assert not dog.check(349 * MS)
    assert dog.check(350 * MS)
    assert dog.reason == "no valid action for 150 ms, 150 ms allowed"
    assert [act(dog, t) is None for t in (400, 467, 533)] == [True, True, False]


def test_actions_too_far_apart_never_clear():
    dog = make()
    assert all(act(dog, t) is None for t in range(0, 3000, 150))


def test_an_old_action_is_not_forwarded_and_does_not_feed_the_watchdog():
    dog = running(at_ms=200)
    assert act(dog, 345, age_ms=144) is not None
    assert act(dog, 365, age_ms=150) is None
    assert dog.check(495 * MS)
    assert act(dog, 505, age_ms=200) is None
    assert dog.reason == "the last action was 200 ms old, 150 ms allowed"


@pytest.mark.parametrize(
    "fault, reason",
    [
        ({"values": (np.nan, 0)}, "action not finite: [nan  0.] from model"),
        ({"values": (0, -np.inf)}, "action not finite: [  0. -inf] from model"),
        ({"age_ms": -151}, "action of model stamped 151 ms in the future"),
        ({"source": "other"}, "two sources at the same time: model and other"),
    ],
)
def test_a_fault_stops_at_once_until_reset(fault, reason):
    dog = running(at_ms=200)
    assert act(dog, 250, **fault).tolist() == [0, 0]
    assert dog.latched and dog.reason == reason
    assert all(act(dog, t).tolist() == [0, 0] for t in range(300, 2000, 67)), "valid actions do not clear a fault"
    assert dog.reason == reason
    dog.reset()
    assert not dog.latched
    assert [act(dog, t) is None for t in (2000, 2067, 2133)] == [True, True, False]


def test_a_clock_a_little_ahead_is_no_fault():
    assert act(running(at_ms=200), 250, age_ms=-50) is not None


def test_one_that_heard_earlier_of_a_step_of_the_simulators_clock_is_not_followed_but_no_fault():
    dog = running(at_ms=200)
    assert act(dog, 250, age_ms=-100) is None
    assert act(dog, 300, age_ms=-100) is None
    assert dog.check(350 * MS) and dog.reason.endswith("the last action was stamped 100 ms in the future")
    assert [act(dog, t) is None for t in (360, 400, 440)] == [True, True, False]


def test_a_respawned_source_takes_over_once_the_old_one_fell_silent():
    dog = running(at_ms=200)
    assert act(dog, 350, source="model again") is None
    assert not dog.latched
    assert act(dog, 400, source="model again") is None
    assert act(dog, 450, source="model again").tolist() == list(GO)


def test_a_source_that_only_sends_rubbish_still_counts_as_sending():
    dog = running(at_ms=200)
    for t in range(250, 1000, 50):
        act(dog, t, age_ms=500)
    act(dog, 1010, source="other")
    assert dog.reason == "two sources at the same time: model and other"


def test_an_old_source_that_wakes_up_while_another_drives_is_a_second_one():
    dog = running(at_ms=200)
    assert act(dog, 250, source="old", age_ms=3000).tolist() == [0, 0]
    assert dog.reason == "two sources at the same time: model and old"


def starved(until_ms):
    """The last time that it could look was a second ago."""
    dog = running(at_ms=200)
    assert dog.check(350 * MS) and dog.check(until_ms * MS)
    return dog


def test_starved_itself_it_does_not_take_a_source_that_was_replaced_meanwhile_for_a_second_one():
    dog = starved(until_ms=1350)
    act(dog, 1351, age_ms=900)  # what queued up
    assert [act(dog, t, source="model again") is None for t in (1360, 1427, 1493)] == [True, True, False]


def test_starved_it_may_come_to_the_actions_that_queued_up_before_it_comes_to_a_check():
    dog = running(at_ms=200)
    act(dog, 1351, age_ms=900)
    act(dog, 1352, source="model again")
    assert not dog.latched


def test_two_sources_that_go_on_after_it_was_starved_move_nothing_and_latch():
    dog = starved(until_ms=1350)
    for t in range(1351, 1490, 20):
        assert act(dog, t) is None and act(dog, t + 10, source="other") is None
    act(dog, 1500)
    assert dog.latched


def test_limits_clip():
    dog = running(at_ms=200)
    assert act(dog, 250, values=(5.0, -9.0)).tolist() == [0.6, -1.8]


def test_after_a_stop_the_wheels_start_from_rest():
    dog = running(at_ms=200, limits=Limits(LIMITS.names, LIMITS.min, LIMITS.max, max_rate=(2.0, 100.0)))
    for t in range(250, 600, 50):
        command = act(dog, t)
    assert command.tolist() == [0.4, 1.0]
    assert [act(dog, t) is None for t in (1000, 1050)] == [True, True]
    assert act(dog, 1100)[0] == pytest.approx(2.0 * 0.150)  # at most the deadline's worth of speeding up
    assert act(dog, 1120)[0] == pytest.approx(0.3 + 2.0 * 0.020)


def test_a_ros_clock_that_stands_still_stops_the_wheels():
    dog = running(at_ms=200)
    assert act(dog, 250).tolist() == list(GO)
    assert all(act(dog, t, ros_offset_ms=10**9 + 250 - t) is None for t in range(260, 600, 20))
    assert dog.reason == "an action with a stamp not newer than the last: does the ROS clock stand still?"
    assert not dog.latched
    assert [act(dog, t) is None for t in (600, 667, 733)] == [True, True, False]


def test_an_action_that_came_before_is_not_forwarded_again():
    dog = running(at_ms=200)
    assert act(dog, 250).tolist() == list(GO) and act(dog, 270).tolist() == list(GO)
    assert act(dog, 290, age_ms=290 - 250) is None  # the one of 250 ms, once more
    assert act(dog, 300).tolist() == list(GO)


def test_a_ros_clock_that_jumps_back_is_followed():
    dog = running(at_ms=200)
    assert act(dog, 250, ros_offset_ms=0).tolist() == list(GO)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 30.0, 66.7, 66.7, 149.0, 151.0, 400.0]),  # ms since the last event
        st.sampled_from([GO, (np.nan, 0.0), (0.1, np.inf), (9.0, -9.0)]),
        st.sampled_from(["a", "a", "a", "b"]),
        st.sampled_from([-51.0, -49.0, 0.0, 0.0, 5.0, 149.0, 151.0]),  # age, ms
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_comes_what_is_forwarded_is_valid_and_not_late(events):
    dog, t, forwarded = make(), 0.0, 0
    for gap, values, source, age_ms in events:
        t += gap
        was_latched = dog.latched
        command = act(dog, t, values, source, age_ms)
        if command is not None and dog.reason is None:
            forwarded += 1
            assert np.isfinite(command).all() and -50 <= age_ms < 150 and not was_latched
            assert (command >= [-0.2, -1.8]).all() and (command <= [0.6, 1.8]).all()
        else:
            assert command is None or not command.any()
        assert deepcopy(dog).check(round(t * MS) + 150 * MS)
    assert dog.counts["forwarded"] == forwarded
    assert sum(dog.counts.values()) == len(events)


@pytest.mark.parametrize(
    "text", ["stop", "Stop!", "STOP stop", "halt", "\uff33\uff34\uff2f\uff30", "stop \u26a0\ufe0f", "stop\u00b4"]
)
def test_told_to_stop_it_stops_whatever_the_model_makes_of_it(text):
    dog = running(at_ms=200)
    assert dog.told(text) and dog.check(201 * MS)
    assert all(act(dog, t) is None for t in (267, 333, 400, 467))
    assert dog.reason.startswith("told to ") and not dog.latched
    assert not dog.told("drive to the red ball")
    assert [act(dog, t) is None for t in (533, 600, 667)] == [True, True, False]


def test_a_text_without_words_ends_no_stop():
    dog = running(at_ms=200)
    assert dog.told("stop") and dog.told("") and dog.told("...")
    assert all(act(dog, t) is None for t in (267, 333, 400, 467))


@pytest.mark.parametrize("text", ["", "...", "stop at the red ball", "do not stop", "go"])
def test_what_is_no_bare_stop_is_left_to_the_model(text):
    dog = running(at_ms=200)
    assert not dog.told(text)
    assert act(dog, 267) is not None


def test_a_reset_does_not_drive_on_against_what_was_told():
    dog = running(at_ms=200)
    dog.told("stop")
    act(dog, 210, values=(np.nan, 0.0))
    assert dog.latched
    dog.reset()
    assert all(act(dog, t) is None for t in (267, 333, 400, 467)) and dog.reason == "told to stop"


ARM = Limits(("shoulder", "elbow"), min=(-1.0, 0.5), max=(1.0, 2.0), max_rate=(1.0, 2.0), interface="position")
RESTS = (0.5, 1.0)


def say(dog, t_ms, at):
    dog.at(dict(zip(ARM.names, at)), round(t_ms * MS))


def reach(dog, t_ms, values, at=None):
    """As `act`, of an arm that has just said where it is."""
    if at is not None:
        say(dog, t_ms, at)
    return act(dog, t_ms, values)


def test_an_arm_starts_from_where_it_is_and_no_joint_moves_too_fast():
    dog = make(ARM)
    assert dog.stop is None  # a controller that hears nothing holds its position
    say(dog, -67, RESTS)
    assert reach(dog, 0, (0.9, 0.9), RESTS) is None and reach(dog, 67, (0.9, 0.9), RESTS) is None
    assert reach(dog, 133, (0.9, 0.9), RESTS).tolist() == pytest.approx([0.65, 0.9])  # what a deadline allows
    assert dog.within_s == pytest.approx(0.15)
    assert reach(dog, 200, (0.9, 0.9), (0.65, 0.9)).tolist() == pytest.approx([0.717, 0.9])
    assert dog.within_s == pytest.approx(0.067)
    assert dog.reason is None and dog.limited == ("shoulder 0.9 limited to 0.717",)
    assert reach(dog, 267, (0.72, 0.9), (0.717, 0.9)).tolist() == [0.72, 0.9]
    assert dog.within_s == pytest.approx(0.067)  # nor abruptly: it has until the next action


def test_an_arm_that_does_not_say_where_it_is_is_not_moved():
    dog = make(ARM)
    assert all(reach(dog, t, RESTS) is None for t in (0, 67, 133, 200))
    assert dog.reason == "joint_states is silent, or contradicts itself, about shoulder, elbow"
    say(dog, 250, RESTS)
    assert [reach(dog, t, RESTS, RESTS) is None for t in (267, 333, 400)] == [True, True, False]
    assert reach(dog, 467, RESTS, (0.5, np.nan)) is not None  # that was said 67 ms ago
    assert reach(dog, 550, RESTS, (0.5, np.nan)) is None
    why = "no valid action for 150 ms, 150 ms allowed: joint_states is silent, or contradicts itself, about elbow"
    assert dog.check(617 * MS) and dog.reason == why


def test_joints_may_speak_for_themselves():
    dog = make(ARM)
    say(dog, -67, RESTS)
    for t_ms in (0, 67, 133):
        dog.at({"shoulder": 0.5, "wheel": 9.0}, t_ms * MS)  # with a driver each
        dog.at({"elbow": 1.0}, t_ms * MS)
        command = act(dog, t_ms, RESTS)
    assert command.tolist() == list(RESTS)


def test_limits_that_an_arm_is_far_from_move_nothing():
    dog = make(Limits(ARM.names, (-57.0, 28.0), (57.0, 114.0), (57.0, 114.0), "position"))  # degrees
    assert all(reach(dog, t, RESTS, RESTS) is None for t in (0, 67, 133, 200))
    assert dog.reason == "elbow is at 1, its limits are 28 to 114: in its unit, in the same order?"
    dog = make(ARM)
    say(dog, -67, (1.1, 1.0))
    assert [reach(dog, t, RESTS, (1.1, 1.0)) is None for t in (0, 67, 133)] == [True, True, False]  # led back


def test_an_action_of_another_unit_is_a_fault():
    dog = make(ARM)
    assert reach(dog, 0, (0.5, 57.0), RESTS) is None and dog.latched
    assert dog.reason == "elbow is to go to 57, far out of its limits: in its unit? From model"


def test_two_that_say_where_a_joint_is_move_nothing():
    dog = make(ARM)
    for t_ms in range(0, 600, 20):  # such as joint_state_publisher, beside the arm's driver
        say(dog, t_ms, RESTS)
        say(dog, t_ms + 1, (0.0, 1.0))
        assert act(dog, t_ms + 2, (0.9, 1.0)) is None
    assert dog.reason == "joint_states is silent, or contradicts itself, about shoulder"


def test_an_arm_that_sags_is_not_let_down():
    dog, at = make(ARM), 0.5
    for t_ms in range(0, 9000, 60):
        command = reach(dog, t_ms, (0.5, 1.0), (at, 1.0))
        if command is not None:
            at = max(command[0] - 0.4, at - 0.02)  # a soft controller, with a load
    assert command[0] > 0.45


def test_an_arm_that_is_held_does_not_jump_when_it_is_let_go():
    dog = make(ARM)
    for t_ms in range(0, 3000, 60):
        command = reach(dog, t_ms, (-0.9, 1.0), RESTS)  # it is told to go on, and does not move
    assert command.tolist() == pytest.approx([0.5 - 0.15, 1.0])
    assert dog.within_s == pytest.approx(0.15)  # not faster than it may


@given(st.lists(st.tuples(st.floats(1, 140), st.floats(-2.5, 2.5), st.booleans()), min_size=5, max_size=40))
def test_however_seldom_an_arm_says_where_it_is_no_joint_moves_faster_than_it_may(steps):
    """The arm goes from where it is to where it is told, in the time that it is told, and says so only now and then."""
    dog, t_ms, at, goal, until_ms = make(ARM), 0.0, 0.5, 0.5, 0.0
    say(dog, -20, RESTS)
    for gap_ms, wanted, says in steps:
        share = min(1.0, gap_ms / (until_ms - t_ms)) if until_ms > t_ms else 1.0
        t_ms, at = t_ms + gap_ms, at + share * (goal - at)
        command = reach(dog, t_ms, (wanted, 1.0), (at, 1.0) if says else None)
        if command is not None:
            goal, until_ms = command[0], t_ms + 1e3 * dog.within_s
            assert abs(goal - at) <= 1.0 * dog.within_s + 1e-9


def test_a_message_that_no_sane_model_sends_is_a_fault():
    dog = running(at_ms=200)
    assert dog.fault("joints of another arm").tolist() == [0, 0]
    assert dog.latched and dog.reason == "joints of another arm" and dog.counts["refused"] == 3
    assert act(dog, 267).tolist() == [0, 0]
