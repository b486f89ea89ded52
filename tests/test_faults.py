"""Faults on purpose: what each does to samples, and what a pipeline makes of it."""

import numpy as np
import pytest

from mm_edge.errors import EdgeError, SampleError
from mm_edge.faults import Fault, Faults, FaultWatch, in_order, is_truncated, parse_fault, parse_faults
from mm_edge.recording import Command
from mm_edge.types import NS, Action, Audio, Output, Sample, Scan

MS = 1_000_000
T0 = 1_000 * NS
KINDS = {"camera": "image", "scan": "scan", "imu": "imu", "audio": "audio", "text": "text"}


def data(stream: str, i: int):
    return {
        "camera": lambda: np.full((4, 4, 3), i % 256, np.uint8),
        "scan": lambda: Scan(np.full(8, i, np.float32), -3.0, 0.75, 0.05, 6.0),
        "imu": lambda: np.full(6, i, np.float32),
        "audio": lambda: Audio(np.full((4, 2), i, np.int16), 4 * i, 16000),
        "text": lambda: "drive to the red ball",
    }[stream]()


def samples(stream: str = "camera", n: int = 10) -> list[Sample]:
    """One every 100 ms, which arrives 20 ms after its capture."""
    return [Sample(stream, T0 + i * 100 * MS - 20 * MS, T0 + i * 100 * MS, data(stream, i)) for i in range(n)]


def with_fault(text: str, stream: str = "camera", n: int = 10) -> list[Sample]:
    return list(in_order(samples(stream, n), Faults([parse_fault(f"{stream}:{text}")], KINDS)))


def whole(sample: Sample) -> int:
    """Which of `samples` it was."""
    return (sample.stamp_ns + 20 * MS - T0) // (100 * MS)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("camera:die@2", ("camera", "die", 0.0, 2.0, float("inf"))),
        ("camera:freeze@2-5.5", ("camera", "freeze", 0.0, 2.0, 5.5)),
        ("scan:drop=0.3@0", ("scan", "drop", 0.3, 0.0, float("inf"))),
        ("imu:delay=200ms@1-2", ("imu", "delay", 0.2, 1.0, 2.0)),
        ("imu:jump=-3600s@1000000", ("imu", "jump", -3600.0, 1e6, float("inf"))),
        ("imu:noise@1", ("imu", "noise", 1.0, 1.0, float("inf"))),
    ],
)
def test_a_fault_is_read_and_written_as_it_was_given(text, fields):
    assert parse_fault(text) == Fault(*fields, text)
    assert str(parse_fault(text)) == text


def test_several_are_read_with_spaces_between_them():
    assert parse_faults("camera:die@2 scan:drop=0.3@0-1") == [
        parse_fault("camera:die@2"),
        parse_fault("scan:drop=0.3@0-1"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("camera", "expected STREAM:KIND"),
        ("camera:die", "expected STREAM:KIND"),
        ("camera:explode@2", "expected a kind of die, drop, freeze"),
        ("camera:delay@2", "delay takes a time, as in 200ms, got none"),
        ("camera:delay=200@2", "delay takes a time, as in 200ms, got 200"),
        ("camera:delay=-1s@2", "delay takes a time, as in 200ms, got -1s"),
        ("camera:drop@2", "drop takes a share between 0 and 1, as in 0.3, got none"),
        ("camera:drop=30@2", "drop takes a share between 0 and 1, as in 0.3, got 30"),
        ("camera:drop=0.3s@2", "drop takes a share between 0 and 1, as in 0.3, got 0.3s"),
        ("camera:die=1@2", "die takes no value, got 1"),
        ("camera:noise=0@2", "noise takes a number above 0, got 0"),
        ("camera:die@5-2", "expected an END after START"),
    ],
)
def test_a_fault_that_cannot_be_read_is_refused(text, expected):
    with pytest.raises(EdgeError, match=expected):
        parse_fault(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("radar:die@1", r"expected one of the streams \['camera', .*\], got radar"),
        ("camera:nan@1", "image has whole numbers"),
        ("text:noise@1", "a command is neither noisy"),
        ("text:reorder@1", "nor does a second one come soon"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(text, expected):
    with pytest.raises(EdgeError, match=expected):
        Faults([parse_fault(text)], KINDS)


def test_outside_its_time_and_its_stream_a_fault_changes_nothing():
    faults = Faults([parse_fault("camera:die@0.3-0.6")], KINDS)
    assert [whole(s) for s in in_order(samples(), faults)] == [0, 1, 2, 6, 7, 8, 9]
    assert [whole(s) for s in in_order(samples("imu"), faults)] == list(range(10))


def test_drop():
    assert 200 < len(with_fault("drop=0.7@0", n=1000)) < 400


@pytest.mark.parametrize("stream", ["camera", "scan", "imu", "audio"])
def test_freeze(stream):
    got = with_fault("freeze@0.3", stream)
    assert [s.stamp_ns for s in got] == [s.stamp_ns for s in samples(stream)]
    values = [np.ravel(s.data[0] if isinstance(s.data, tuple) else s.data)[0] for s in got]
    assert values == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    if stream == "audio":  # which a microphone goes on counting
        assert [s.data.first_sample for s in got] == [4 * i for i in range(10)]


def test_delay_and_jitter_change_arrival_alone():
    late = with_fault("delay=250ms@0.5")
    assert [(s.arrival_ns - s.stamp_ns) // MS for s in late] == [20] * 5 + [270] * 5
    jittered = with_fault("jitter=1s@0")
    assert [s.arrival_ns for s in jittered] == sorted(s.arrival_ns for s in jittered)  # as they arrive
    assert sorted(map(whole, jittered)) == list(range(10)) != list(map(whole, jittered))
    assert all(20 <= (s.arrival_ns - s.stamp_ns) / MS <= 1020 for s in jittered)


@pytest.mark.parametrize("kind", ["skew", "jump"])
def test_a_clock_that_is_off_changes_stamps_alone(kind):
    got = with_fault(f"{kind}=-5s@0.5-0.8")
    assert [(s.arrival_ns - s.stamp_ns) // MS for s in got] == [20] * 5 + [5020] * 3 + [20] * 2


def test_reorder_and_duplicate():
    assert [whole(s) for s in with_fault("reorder@0.2-0.6")] == [0, 1, 3, 2, 5, 4, 6, 7, 8, 9]
    assert [whole(s) for s in with_fault("reorder@0.2-0.5")] == [0, 1, 3, 2, 4, 5, 6, 7, 8, 9]  # none overtakes the 4th
    assert [whole(s) for s in with_fault("duplicate@0.8")] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9]


def test_nan():
    assert np.isnan(with_fault("nan@0", "imu")[0].data).all()
    assert np.isnan(with_fault("nan@0", "scan")[0].data.ranges).all()


@pytest.mark.parametrize("stream", ["camera", "scan", "imu", "audio"])
def test_noise_keeps_the_form(stream):
    for was, is_ in zip(samples(stream), with_fault("noise=2@0", stream)):
        was, is_ = (s.data[0] if isinstance(s.data, tuple) else s.data for s in (was, is_))
        assert (was.shape, was.dtype) == (is_.shape, is_.dtype) and (was != is_).mean() > 0.4


@pytest.mark.parametrize("stream", ["camera", "scan", "imu", "audio"])
def test_truncated_data_have_not_the_form_of_their_kind(stream):
    assert not any(is_truncated(KINDS[stream], s.data) for s in samples(stream))
    assert all(is_truncated(KINDS[stream], s.data) for s in with_fault("truncate@0", stream))


def test_what_has_no_fault_stays_in_the_order_of_arrival():
    """Late frames among the commands of a recording, and what holds no sample."""
    commands = [Command("cmd_vel", T0 + i * 50 * MS, np.zeros(6, np.float32)) for i in range(20)]
    refused = SampleError("imu", "a stamp", "0")
    events = sorted([*samples(), *commands], key=lambda event: event.arrival_ns)
    got = list(in_order([*events[:9], refused, *events[9:]], Faults([parse_fault("camera:delay=170ms@0")], KINDS)))
    arrivals = [event.arrival_ns for event in got if event is not refused]
    assert len(got) == 31 and arrivals == sorted(arrivals)
    assert got[got.index(refused) - 1] is events[8]


def test_the_same_seed_gives_the_same_faults():
    def stamps(seed: int) -> list[int]:
        faults = Faults(parse_faults("camera:drop=0.5@0 camera:jitter=1s@0"), KINDS, seed)
        return [s.arrival_ns for s in in_order(samples(n=50), faults)]

    assert stamps(1) == stamps(1) != stamps(2)


def output(t_ms: float, notes: tuple[str, ...] = (), reasons: tuple[str, ...] = (), camera: bool = True) -> Output:
    action = None if reasons else Action(("linear_x",), np.zeros((1, 1), np.float32), 0.1)
    return Output(T0 + round(t_ms * MS), {}, {"camera": camera, "imu": True}, {}, reasons, notes, action)


def test_a_fault_that_was_noticed_and_driven_through():
    watch = FaultWatch([parse_fault("camera:die@1")], T0)
    watch.see(output(900))
    watch.see(output(1200))
    watch.see(output(1310, ("camera dead: silent for 0.30 s",), camera=False))
    watch.see(output(1400, ("camera dead: silent for 0.39 s",), camera=False))
    assert str(watch.findings[0]) == (
        "camera:die@1: detected after 310 ms (camera dead: silent for 0.30 s); went on acting without it after 310 ms"
    )
    assert watch.false_alarms == []


def test_all_that_was_told_of_a_fault_is_kept_each_kind_once():
    """What comes first may be chance: a busy machine delivers late."""
    watch = FaultWatch([parse_fault("camera:die@1")], T0)
    watch.see(output(900))
    watch.see(output(1100, ("camera jitters: 20 ms",)))
    watch.see(output(1310, ("camera jitters: 21 ms", "camera dead: silent for 0.30 s"), camera=False))
    assert watch.findings[0].words == ["camera jitters: 20 ms", "camera dead: silent for 0.30 s"]
    assert str(watch.findings[0]).startswith(
        "camera:die@1: detected after 100 ms (camera jitters: 20 ms; camera dead: silent for 0.30 s); "
    )


def test_a_fault_that_stopped_the_robot_after_a_while():
    watch = FaultWatch([parse_fault("camera:die@1")], T0)
    watch.see(output(900))
    for t_ms in (1310, 1500):
        watch.see(output(t_ms, reasons=("camera dead: silent for 0.30 s",), camera=False))
    assert str(watch.findings[0]) == (
        "camera:die@1: detected after 310 ms (camera dead: silent for 0.30 s); stopped after 310 ms"
    )


def test_what_comes_after_a_fault_is_not_due_to_it():
    watch = FaultWatch([parse_fault("camera:freeze@1-2"), parse_fault("camera:die@9")], T0)
    for t_ms in (900, 1500):
        watch.see(output(t_ms))
    watch.see(output(2400, reasons=("no sensor is present",), camera=False))  # a pause in the recording
    assert watch.findings[0].stopped_ms is None
    assert str(watch.findings[1]) == "camera:die@9: never began, it was over before"


def test_a_fault_that_went_unnoticed():
    watch = FaultWatch([parse_fault("imu:noise@1")], T0)
    watch.see(output(1500))
    assert str(watch.findings[0]) == "imu:noise@1: not detected; went on acting"


def test_only_what_is_new_is_due_to_a_fault():
    """Neither a robot that had not started, nor one that stands for another reason, nor words said before."""
    watch = FaultWatch([parse_fault("camera:die@1")], T0)
    watch.see(output(900, ("camera jitters: 20 ms",), reasons=("text never seen",)))
    watch.see(output(1100, ("camera jitters: 21 ms",), reasons=("camera never seen",)))
    watch.see(output(1200))
    watch.see(output(1300, reasons=("text never seen",)))
    assert str(watch.findings[0]) == "camera:die@1: not detected; went on acting"


def test_what_is_said_of_a_stream_without_a_fault_is_a_false_alarm_once_as_long_as_it_lasts():
    watch = FaultWatch([parse_fault("camera:die@1-2")], T0)
    watch.see(output(100, ("imu never seen",)))  # the truth, as long as nothing has come
    for t_ms in (200, 300):
        watch.see(output(t_ms, (f"imu stale {t_ms} ms > 100 ms",)))
    watch.see(output(400))
    watch.see(output(500, ("imu stale 150 ms > 100 ms",)))
    watch.see(output(4000, ("camera clock is off by 1.000 s; its stamps are corrected",)))  # still the fault's
    watch.see(output(6000, ("camera clock is off by 1.000 s; its stamps are corrected",)))
    assert watch.false_alarms == [
        "imu stale 200 ms > 100 ms",
        "imu stale 150 ms > 100 ms",
        "camera clock is off by 1.000 s; its stamps are corrected",
    ]
