"""Samples in, an Output for every tick: with an action, or with the reason why there is none."""

import math
import re
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_bundle import STREAMS, files, manifest, share, write_toy_bundle

from mm_edge.align import Aligner
from mm_edge.bundle import write_bundle
from mm_edge.errors import EdgeError, EngineError, SampleError
from mm_edge.pipeline import Pipeline, model_inputs
from mm_edge.preprocess import Vocabulary
from mm_edge.safety import Limits
from mm_edge.types import Output, Sample

MS = 1_000_000
T = 1000 * MS  # of the first tick
A = share(0.1)  # of the way that a leaky integrator goes in a tick
GREY = np.full((8, 8, 3), 51, np.uint8)  # 0.2 bright
POISON = np.full((8, 8, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("pipeline") / "toy")


@pytest.fixture
def pipeline(bundle):
    return Pipeline(bundle, "cpu")


def push(pipeline, t_ns, **data) -> list[bool]:
    return [pipeline.push(Sample(stream, t_ns, t_ns, value)) for stream, value in data.items()]


def tick(pipeline, t_ns) -> Output:
    """A tick of a robot whose imu is alive and at rest: a command alone is nothing to drive by."""
    push(pipeline, t_ns, imu=np.zeros(6, np.float32))
    return pipeline.tick(t_ns)


def test_an_action_and_all_that_led_to_it(pipeline):
    assert push(pipeline, T - 20 * MS, text="Go!", camera=GREY) == [True, True]
    output = pipeline.tick(T)
    camera, text = A * 0.2 * 1, 1
    assert output.action.names == ("linear_x", "angular_z") and output.action.dt_s == 0.1
    oldest_imu = 0.1  # never seen counts as the greatest age the model knows
    assert output.action.values == pytest.approx(np.array([[A * (camera + text), 0.02 + oldest_imu]]))
    assert output.gates == pytest.approx({"camera": camera, "imu": 0, "text": text})
    assert output.attention[0].stream == "camera" and output.attention[0].stamp_ns == T - 20 * MS
    assert output.attention[0].weights == pytest.approx(np.full((2, 2), 0.25))
    assert output.sources == {"camera": T - 20 * MS, "text": T - 20 * MS}
    assert output.mask == {"camera": True, "imu": False, "text": True}
    assert output.ages_s == {"camera": 0.02, "imu": math.inf, "text": 0.02}
    assert output.reasons == () and output.notes == ("imu never seen",)


def test_before_anything_was_seen_it_is_warming_up(pipeline):
    output = pipeline.tick(T)
    assert output.action is None and output.attention == () and output.sources == {}
    assert output.reasons == ("text never seen", "warming up: no sensor seen yet")


def test_without_a_required_stream_there_is_no_action(pipeline):
    push(pipeline, T, camera=GREY)
    output = pipeline.tick(T)
    assert output.action is None
    assert output.reasons == ("text never seen",)


def test_a_required_sensor_that_freezes_stops_the_robot(tmp_path):
    changed = manifest()
    changed["streams"][0] |= {"required": True, "frozen_ms": 150}
    pipeline = Pipeline(write_bundle(tmp_path / "toy", changed, files()), "cpu")
    push(pipeline, T, text="go")
    for i in range(4):
        push(pipeline, T + i * 100 * MS, camera=GREY.copy())
        output = tick(pipeline, T + i * 100 * MS)
        assert (output.action is None) == (i >= 2)
    assert output.reasons == ("camera frozen: the same data for 300 ms",)


def test_a_dead_sensor_is_masked_and_named_and_the_robot_drives_on(pipeline):
    push(pipeline, T, text="go", camera=GREY)
    tick(pipeline, T)
    output = tick(pipeline, T + 412 * MS)
    assert output.mask["camera"] is False and output.gates["camera"] == 0
    assert output.notes == ("camera dead: silent for 0.41 s",)
    assert output.attention == ()
    assert output.action is not None


def test_a_command_alone_is_nothing_to_drive_by(pipeline):
    push(pipeline, T, text="go", camera=GREY)
    assert pipeline.tick(T).action is not None
    output = pipeline.tick(T + 10_000 * MS)
    assert output.action is None
    assert output.reasons == ("no sensor is present",)
    assert output.notes[:2] == ("camera dead: silent for 10.00 s", "imu never seen")


def test_what_is_not_finite_never_leaves(pipeline):
    push(pipeline, T, text="crash")
    output = tick(pipeline, T)
    assert output.action is None
    assert output.reasons == ("non-finite action: fusion dropped its step",)
    push(pipeline, T + 50 * MS, text="go")
    assert tick(pipeline, T + 100 * MS).action.values[0, 0] == pytest.approx(A)


def test_a_sensor_whose_features_are_not_finite_counts_as_missing(pipeline):
    push(pipeline, T, text="go", camera=POISON)
    output = tick(pipeline, T)
    assert output.mask["camera"] is False
    assert output.notes == ("camera dropped: its features are not finite",)
    assert output.action.values[0, 0] == pytest.approx(A)
    assert pipeline.health(T).dropped == {"camera": 1}


def test_what_is_only_shown_is_left_out_if_it_is_not_finite(pipeline, monkeypatch):
    """Attention and gates, of which a part's `ok` need not say anything."""
    step = pipeline.model.step

    def spoiled(inputs):
        outputs = step(inputs)
        outputs.values["attention"][0, 0, 0] = outputs.values["gates"][0, 0] = np.nan
        return outputs

    monkeypatch.setattr(pipeline.model, "step", spoiled)
    push(pipeline, T, text="go", camera=GREY)
    output = tick(pipeline, T)
    assert output.action is not None and output.attention == () and output.gates == {}
    assert output.notes == ("non-finite attention", "non-finite gates")


def test_an_engine_that_fails_is_a_reason_not_a_crash(pipeline, monkeypatch):
    def fail():
        raise EngineError("device lost")

    push(pipeline, T, text="go")
    monkeypatch.setattr(pipeline.model.parts["fusion"].graph, "run", fail)
    output = tick(pipeline, T)
    assert output.action is None and output.attention == () and output.gates == {}
    assert output.reasons == ("device lost",)
    monkeypatch.undo()
    output = tick(pipeline, T + 100 * MS)  # what was lost is given again, the command too
    assert output.action.values[0, 0] == pytest.approx(A)


@pytest.mark.parametrize(
    ("stream", "data", "why"),
    [
        ("camera", np.zeros((8, 8), np.uint8), r"camera: expected uint8 \(height, width, 3\), got uint8 \(8, 8\)"),
        ("camera", np.zeros((0, 8, 3), np.uint8), "camera: expected pixels, got an empty image"),
        ("imu", np.full(6, np.nan, np.float32), "imu: expected finite values, got"),
        (
            "text",
            "fly to the moon",
            r"text: expected words among the 3 the model knows \(go, stop, crash\), got unknown \['fly'",
        ),
    ],
)
def test_a_bad_sample_is_refused_counted_and_named(pipeline, stream, data, why):
    assert push(pipeline, T, text="go") == [True]
    assert push(pipeline, T, **{stream: data}) == [False]
    assert (tick(pipeline, T).action is None) == (stream == "text")  # see the next test
    health = {s.name: s for s in pipeline.health(T).streams}[stream]
    assert health.counts["refused"] == 1
    assert any(re.search(why, reason) for reason in health.reasons)


def test_a_command_that_is_not_understood_ends_the_one_in_force(pipeline):
    push(pipeline, T, text="go")
    assert tick(pipeline, T).action is not None
    assert push(pipeline, T + 50 * MS, text="halt!!") == [False]
    for t_ms in (100, 200, 300):
        output = tick(pipeline, T + t_ms * MS)
        assert output.action is None
        assert output.reasons == (
            "command refused: text: expected words among the 3 the model knows (go, stop, crash), got unknown ['halt']",
        )
    push(pipeline, T + 350 * MS, text="go")
    assert tick(pipeline, T + 400 * MS).action is not None


def test_a_newer_command_that_comes_during_a_tick_does_not_bring_back_the_old_one(pipeline, monkeypatch):
    push(pipeline, T, text="go")
    assert push(pipeline, T + 50 * MS, text="halt!!") == [False]
    step = pipeline.model.step

    def told_meanwhile(inputs):
        push(pipeline, T + 150 * MS, text="stop")
        return step(inputs)

    monkeypatch.setattr(pipeline.model, "step", told_meanwhile)
    assert "command refused" in tick(pipeline, T + 100 * MS).reasons[0]
    monkeypatch.undo()
    output = tick(pipeline, T + 200 * MS)
    assert not output.reasons and output.sources["text"] == T + 150 * MS
    assert push(pipeline, T + 250 * MS, text="halt!!") == [False]  # and so does the next one
    assert "command refused" in tick(pipeline, T + 300 * MS).reasons[0]


def test_whatever_fails_in_a_tick_is_a_reason_and_nothing_is_lost(pipeline, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    push(pipeline, T, text="go", camera=GREY)
    monkeypatch.setattr("mm_edge.preprocess.prepare", fail)
    assert tick(pipeline, T).reasons == ("RuntimeError: out of memory",)
    monkeypatch.undo()
    assert tick(pipeline, T + 100 * MS).action.values[0, 0] == pytest.approx(A * (A * 0.2 + 1))


def test_health_tells_of_each_tick_without_an_action(pipeline):
    push(pipeline, T, text="go", camera=GREY)
    tick(pipeline, T)
    assert (pipeline.health(T).idle_ticks, pipeline.health(T).reasons) == (0, ())
    push(pipeline, T + 50 * MS, text="halt")
    for t_ms in (100, 200):
        tick(pipeline, T + t_ms * MS)
    push(pipeline, T + 250 * MS, text="go")
    tick(pipeline, T + 300 * MS)
    health = pipeline.health(T + 300 * MS)
    assert health.idle_ticks == 2 and "unknown ['halt']" in health.reasons[0]
    assert pipeline.health(T + 300 * MS).reasons == ()


def test_streams_are_silent_not_skewed_while_no_tick_comes(pipeline):
    push(pipeline, T, text="go", camera=GREY)
    tick(pipeline, T)
    camera = pipeline.health(T + 5000 * MS).streams[0]
    assert camera.reasons == ("camera dead: silent for 5.00 s",)


def test_a_sample_of_a_stream_that_the_model_does_not_have_is_refused(pipeline):
    assert push(pipeline, T, radar=GREY) == [False]


def test_a_message_that_holds_no_sample_is_counted_too(pipeline):
    pipeline.refuse(SampleError("camera", "rgb8", "mono16"))
    reasons = pipeline.health(T).streams[0].reasons
    assert reasons == ("camera never seen", "1 refused: camera: expected rgb8, got mono16")


def test_ticks_come_with_the_anchor_or_after_the_longest_period(pipeline):
    assert pipeline.due(T)
    pipeline.tick(T)
    assert not pipeline.due(T + 149 * MS)
    assert pipeline.due(T + 150 * MS)
    push(pipeline, T + 10 * MS, imu=np.zeros(6, np.float32))
    assert not pipeline.due(T + 10 * MS)
    push(pipeline, T + 10 * MS, camera=GREY)
    assert pipeline.due(T + 10 * MS)


def test_elapsed_time_reaches_the_model(pipeline):
    push(pipeline, T, text="go")
    tick(pipeline, T)
    h = A + share(0.25) * (1 - A)
    assert tick(pipeline, T + 250 * MS).action.values[0, 0] == pytest.approx(h)


def test_a_pause_resets_state_but_not_the_command_in_force(pipeline):
    push(pipeline, T, text="go", camera=GREY)
    tick(pipeline, T)
    output = tick(pipeline, T + 2001 * MS)
    assert output.notes[-1] == "all state starts anew: time jumped or stood still, or the engine failed"
    assert output.action.values[0, 0] == pytest.approx(A)
    assert output.gates == pytest.approx({"camera": 0, "imu": 0, "text": 1})


def test_after_a_clock_jumped_back_only_the_command_in_force_is_left(pipeline):
    push(pipeline, T, text="go", camera=GREY)
    tick(pipeline, T)
    output = tick(pipeline, T - 500 * MS)
    assert output.notes[0] == "camera never seen" and output.notes[1].startswith("all state starts anew: time jumped")
    assert output.gates == {"camera": 0, "imu": 0, "text": 1}
    assert output.action.values[0, 0] == pytest.approx(A)


def test_reset_forgets_everything(pipeline):
    def episode() -> Output:
        push(pipeline, T, text="go", camera=GREY)
        return pipeline.tick(T)

    first = episode()
    pipeline.reset()
    assert pipeline.tick(T).sources == {}
    pipeline.reset()
    np.testing.assert_array_equal(episode().action.values, first.action.values)


def test_a_robots_limits_hold_and_the_bundles_narrow_them(bundle):
    robot = Limits(("linear_x", "angular_z"), min=(-9, -9), max=(0.5, 9), max_rate=(2.0, 9))
    pipeline = Pipeline(bundle, "cpu", robot)
    push(pipeline, T, text="go")
    output = tick(pipeline, T)
    assert output.action.values[0, 0] == np.float32(0.2)  # 2 m/s^2 for 0.1 s from standing
    assert output.notes[-1] == "linear_x 0.632 limited to 0.2"
    assert tick(pipeline, T + 100 * MS).action.values[0, 0] == np.float32(0.4)
    assert tick(pipeline, T + 200 * MS).action.values[0, 0] == np.float32(0.5)


def test_after_a_tick_without_action_the_robot_starts_from_standing(bundle):
    pipeline = Pipeline(bundle, "cpu", Limits(("linear_x", "angular_z"), (-9, -9), (9, 9), (2.0, 9)))
    push(pipeline, T, text="go")
    assert [tick(pipeline, T + i * 100 * MS).action.values[0, 0] for i in range(3)][-1] == np.float32(0.6)
    push(pipeline, T + 250 * MS, text="crash")
    assert tick(pipeline, T + 300 * MS).action is None
    push(pipeline, T + 350 * MS, text="go")
    assert tick(pipeline, T + 400 * MS).action.values[0, 0] == np.float32(0.2)


def test_positions_begin_anywhere_in_their_range_and_change_at_their_rate(tmp_path):
    arm = manifest()
    arm["outputs"]["action"] |= {
        "names": ["shoulder", "elbow"], "interface": "position", "min": [0.8, -2], "max_rate": [1.0, 1.0]
    }  # fmt: skip
    pipeline = Pipeline(write_bundle(tmp_path / "arm", arm, files()), "cpu")
    push(pipeline, T, text="go", camera=GREY)
    assert tick(pipeline, T).action.values[0, 0] == pytest.approx(0.8)  # the model wants less
    push(pipeline, T + 100 * MS, text="stop")  # which is 2
    assert tick(pipeline, T + 100 * MS).action.values[0, 0] == pytest.approx(0.9)
    push(pipeline, T + 150 * MS, text="fly")
    assert tick(pipeline, T + 200 * MS).action is None
    push(pipeline, T + 250 * MS, text="stop", camera=GREY)
    assert tick(pipeline, T + 300 * MS).action.values[0, 0] > 1.5  # only the watchdog knows where it is by now


def test_limits_that_name_another_action_are_refused(bundle):
    with pytest.raises(EdgeError, match=r"expected .*linear_x"):
        Pipeline(bundle, "cpu", Limits(("x",), (-1,), (1,), (1,)))


def test_training_gets_the_same_inputs_as_the_model(pipeline, monkeypatch):
    """`model_inputs` of a window, by itself and inside the pipeline: bit for bit."""
    seen, step = [], pipeline.model.step
    monkeypatch.setattr(pipeline.model, "step", lambda inputs: seen.append(inputs) or step(inputs))
    aligner = Aligner(STREAMS, 0.1, 2000)
    random = np.random.default_rng(0)
    for i in range(20):
        now_ns = T + i * 100 * MS
        samples = [Sample("camera", now_ns - 30 * MS, now_ns, random.integers(0, 255, (16, 16, 3), np.uint8))]
        samples += [Sample("imu", t, t, np.float32(random.normal(size=6))) for t in (now_ns - 15 * MS, now_ns - 5 * MS)]
        samples += [Sample("text", now_ns, now_ns, "stop")] if i == 3 else []
        for sample in samples[i % 3 == 0 :]:
            pipeline.push(sample)
            aligner.push(sample)
        pipeline.tick(now_ns)
        want = model_inputs(STREAMS, aligner.window(now_ns), Vocabulary(("go", "stop", "crash")))
        np.testing.assert_equal(seen[-1]._asdict(), want._asdict())


def test_ages_are_seconds_up_to_the_most_the_model_knows():
    aligner = Aligner(STREAMS, 0.1)
    aligner.push(Sample("camera", T - 40 * MS, T, GREY))
    aligner.push(Sample("text", T - 40 * MS, T, "go"))
    inputs = model_inputs(STREAMS, aligner.window(T), Vocabulary(("go",)))
    assert inputs.mask.tolist() == [1, 0, 1]
    assert inputs.age.tolist() == pytest.approx([0.04, 0.1, 0])  # the imu was never seen, the text is latched
    late = model_inputs(STREAMS, aligner.window(T + 900 * MS))
    assert late.fresh == {}
    assert late.age.tolist() == pytest.approx([0.3, 0.1, 0])


def test_samples_may_be_pushed_from_any_thread_while_it_ticks(pipeline):
    def camera(number: int) -> None:
        for i in range(500):
            t_ns = T + (4 * i + number) * MS
            assert pipeline.push(Sample("camera", t_ns, t_ns, GREY))

    threads = [threading.Thread(target=camera, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    outputs = [pipeline.tick(T + i * 10 * MS) for i in range(200)]
    for thread in threads:
        thread.join()
    outputs.append(pipeline.tick(T + 2500 * MS))
    assert all(isinstance(output, Output) for output in outputs)
    counts = pipeline.health(T + 2500 * MS).streams[0].counts
    assert sum(counts.get(what, 0) for what in ("admitted", "late", "duplicate", "overflow", "refused")) == 2000


ANYTHING = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["go", "stop", "crash", GREY, POISON, GREY[:1, :1], GREY[:0], np.float32([1e38] * 6), np.zeros(6)]),
    st.integers(0, 7).map(lambda n: np.full(n, np.inf, np.float32)),
    st.floats(width=32).map(lambda x: np.full(6, x, np.float32)),
)
STREAM = st.sampled_from(["camera", "imu", "text", "radar"])
EVENTS = st.lists(st.tuples(STREAM, st.integers(-300, 3000), ANYTHING), max_size=30)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EVENTS)
def test_whatever_is_pushed_every_tick_gives_an_output_with_an_action_or_a_reason(pipeline, events):
    pipeline.reset()
    now_ns = T
    for stream, later_ms, data in events:
        pipeline.push(Sample(stream, now_ns, max(now_ns + later_ms * MS, 0), data))
        now_ns += later_ms * MS
        output = pipeline.tick(now_ns)
        assert (output.action is None) == bool(output.reasons)
        assert output.action is None or np.isfinite(output.action.values).all()
        pipeline.health(now_ns)
