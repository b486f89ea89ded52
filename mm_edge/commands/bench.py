"""`mm-edge bench [BUNDLE]`: what a tick costs on this machine, and how much of that is not the engine.

Every tick finds new data of every stream, so all parts run. What is not the engine and not preprocessing is measured on
ticks that find their inputs prepared, in turn with the engine alone, so that both meet the same machine. The engine
alone is its parts one after the other with all buffers bound, the least it can cost; beside it, where that is ONNX
Runtime on a CPU, `InferenceSession.run`, as one would call it without a runtime.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np

from mm_edge import preprocess
from mm_edge.align import Aligner
from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.cli import at_least
from mm_edge.errors import EdgeError
from mm_edge.onnx_file import read_signature
from mm_edge.pipeline import Pipeline
from mm_edge.preprocess import AUDIO_HOP_S, LogMel, prepare
from mm_edge.types import NS, Audio, Sample, Scan, StreamSpec

WARM_UP_TICKS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", nargs="?", default=SHIPPED, help="folder of the model, or the name of a shipped one (drive)"
    )
    parser.add_argument("--ticks", type=at_least(1), default=500, help="how many ticks to time (%(default)s)")
    parser.add_argument("--engine", default="auto", help="auto, tensorrt, cuda or cpu (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Raises EdgeError if the bundle cannot be used."""
    try:
        import cv2

        cv2.setNumThreads(1)  # a robot has better use for its cores than resizing a frame
    except ImportError:
        pass
    bundle = Bundle.read(args.bundle)
    result = measure(Pipeline(bundle, args.engine), args.ticks)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{bundle.path} on {result['engine']}")
    for name in ("tick_ms", "engine_ms", "session_run_ms"):
        if name in result:
            print(f"{name:<24}{result[name]['p50']:8.3f} p50 {result[name]['p99']:8.3f} p99")
    print(f"{'overhead':<24}{result['overhead']:8.2f} x, {result['overhead_us']:.0f} us: a tick without preprocessing")
    if "overhead_vs_session_run" in result:
        print(f"{'  beside session.run':<24}{result['overhead_vs_session_run']:8.2f} x")
    for name, cost in result["preprocess_us"].items():
        print(f"{name + ' (us)':<24}{cost:8.1f}")
    return 0


def measure(pipeline: Pipeline, ticks: int) -> dict[str, Any]:
    """Times of `ticks` whole ticks; of as many without preprocessing (align, all parts, safety, output), in turn with
    the engine alone on the same inputs; of as many more, in turn with `session_runs`; and of preprocessing. `overhead`
    is the median of ticks without preprocessing over the engine's, `overhead_vs_session_run` that of those more over
    that of `session_runs`."""
    sensors = [samples(spec, pipeline.bundle) for spec in pipeline.specs.values()]
    parts = pipeline.model.parts.values()
    period_ns, now_ns = round(pipeline.bundle.tick.period_ms * 1e6), NS

    def push() -> None:
        nonlocal now_ns
        now_ns += period_ns
        for sensor in sensors:
            for sample in sensor(now_ns - period_ns, now_ns):
                if not pipeline.push(sample):
                    raise EdgeError(f"the bench's own sample is refused: {pipeline.health(now_ns).streams}")

    def timed_ns(form: Callable[[], Any]) -> int:
        started = time.perf_counter_ns()
        form()
        return time.perf_counter_ns() - started

    def tick() -> None:
        pipeline.tick(now_ns)

    def engine() -> None:
        for part in parts:
            part.graph.run()  # without keep: the state stays as it is

    whole_ns = list[int]()
    for _ in range(WARM_UP_TICKS + ticks):
        push()
        whole_ns.append(timed_ns(tick))
    prepared = {part.spec.stream: part.graph.inputs["x"][0].copy() for part in parts if part.spec.stream}

    def in_turn(alone: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
        """Times of ticks and of the other; of these two only: a third would leave other weights in the caches."""
        times_ns: dict[Callable[[], Any], list[int]] = {tick: [], alone: []}
        # Patched from outside: what is timed is `Pipeline.tick` as it is, which needs no seam for a bench's sake.
        with mock.patch.object(preprocess, "prepare", lambda spec, *_: prepared.get(spec.name)):
            for i in range(ticks):
                push()
                for form in (tick, alone)[:: 1 if i % 2 else -1]:  # who is second is warmer
                    times_ns[form].append(timed_ns(form))
        return np.array(times_ns[tick]), np.array(times_ns[alone])

    own_ns, engine_ns = in_turn(engine)
    result = {
        "tick_ms": _percentiles(whole_ns[WARM_UP_TICKS:]),
        "engine_ms": _percentiles(engine_ns),
        "preprocess_us": preprocess_us(pipeline.bundle),
        "overhead": round(float(np.median(own_ns) / np.median(engine_ns)), 3),
        "overhead_us": round(float(np.median(own_ns) - np.median(engine_ns)) / 1e3, 1),
        "engine": pipeline.engine,
    }
    if pipeline.engine.endswith("CPUExecutionProvider"):
        own_ns, run_ns = in_turn(session_runs(pipeline))
        result["session_run_ms"] = _percentiles(run_ns)
        result["overhead_vs_session_run"] = round(float(np.median(own_ns) / np.median(run_ns)), 3)
    return result


def session_runs(pipeline: Pipeline) -> Callable[[], list[list[np.ndarray]]]:
    """All parts by `InferenceSession.run`, on what the engine's inputs hold when it is called, and a state of zero that
    is not carried on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runs = []
    for part in pipeline.model.parts.values():
        onnx = pipeline.bundle.contents[part.spec.file]
        zeros = {name: np.zeros(info.shape, info.dtype) for name, info in read_signature(onnx).inputs.items()}
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        runs.append((session, zeros | part.graph.inputs))
    return lambda: [session.run(None, feeds) for session, feeds in runs]


def preprocess_us(bundle: Bundle, repeat: int = 200) -> dict[str, float]:
    """Median time to prepare one new sample of each kind. Sound is prepared by windows, one a tick: `audio_hop` is a
    window's cost divided by the 20 ms hops that come between ticks."""
    costs = {}
    tick_ns = round(bundle.tick.period_ms * 1e6)
    for spec in {spec.kind: spec for spec in reversed(bundle.streams)}.values():
        aligner, sensor, times = Aligner([spec], 1.0, max_gap_ms=1e9), samples(spec, bundle), []
        ear = LogMel(spec) if spec.kind == "audio" else None
        for now_ns in range(NS, NS + repeat * tick_ns, tick_ns):
            for sample in sensor(now_ns - tick_ns, now_ns):
                if spec.kind == "image":  # whose driver has just written it: it is in a cache, not far off in memory
                    sample = sample._replace(data=sample.data.copy())
                aligner.push(sample)
            view = aligner.window(now_ns).views[spec.name]
            started = time.perf_counter_ns()
            prepare(spec, view, bundle.vocabulary, ear)
            times.append(time.perf_counter_ns() - started)
        cost = float(np.median(times)) / 1e3
        if spec.kind == "audio":
            costs["audio_window"] = round(cost, 1)
            cost /= max(1.0, tick_ns / (AUDIO_HOP_S * NS))
        costs[{"image": "image_640x480", "audio": "audio_hop"}.get(spec.kind, spec.kind)] = round(cost, 1)
    return costs


def samples(spec: StreamSpec, bundle: Bundle) -> Callable[[int, int], list[Sample]]:
    """A sensor: what arrives of a stream between two instants, at its rate; at least one sample, except of sound the
    last of them at the later instant."""
    pool = [_data(spec, bundle, np.random.default_rng(seed)) for seed in range(8)]
    period_ns = round(AUDIO_HOP_S * NS if spec.kind == "audio" else NS / (spec.rate_hz or 1))

    def sample(number: int, stamp_ns: int, arrival_ns: int) -> Sample:
        data = pool[number % len(pool)]
        if spec.kind == "audio":
            data = Audio(data, number * len(data), spec.sample_rate_hz)
        return Sample(spec.name, stamp_ns, arrival_ns, data)

    def arrived(since_ns: int, until_ns: int) -> list[Sample]:
        numbers = range(since_ns // period_ns, until_ns // period_ns)
        if spec.kind == "audio":  # chunks without a gap, each stamped at its begin
            return [sample(number, number * period_ns, (number + 1) * period_ns) for number in numbers]
        count = max(1, len(numbers))
        stamps_ns = [until_ns - i * period_ns for i in reversed(range(count))]
        return [sample(stamp_ns // period_ns, stamp_ns, stamp_ns) for stamp_ns in stamps_ns]

    return arrived


def _data(spec: StreamSpec, bundle: Bundle, random: np.random.Generator) -> Any:
    if spec.kind == "image":
        return random.integers(0, 255, (480, 640, 3), np.uint8)
    if spec.kind == "audio":
        return random.integers(-3000, 3000, (round(AUDIO_HOP_S * spec.sample_rate_hz), spec.channels), np.int16)
    if spec.kind == "scan":
        ranges = random.uniform(0.1, spec.range_max_m, 360).astype(np.float32)
        return Scan(ranges, -np.pi, 2 * np.pi / 360, 0.05, spec.range_max_m)
    if spec.kind == "text":
        assert bundle.vocabulary is not None
        return bundle.vocabulary.words[0]
    shape = {"points": (10_000, 3), "imu": (6,)}.get(spec.kind, spec.shape)
    return random.normal(size=shape).astype(np.float32)


def _percentiles(times_ns: Sequence[int] | np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(times_ns, p)) / 1e6, 4) for p in (50, 99)}
