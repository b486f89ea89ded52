"""`mm-edge bench` says what a tick costs, and leaves nothing behind."""

import argparse
import json

import numpy as np
import pytest
from toy_bundle import write_toy_bundle

from mm_edge import preprocess
from mm_edge.bundle import Bundle
from mm_edge.commands import bench
from mm_edge.pipeline import Pipeline
from mm_edge.preprocess import prepare


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return str(write_toy_bundle(tmp_path_factory.mktemp("bench") / "toy").path)


def test_json_is_the_last_line(toy, capsys):
    assert run(toy, "--ticks", "20", "--engine", "cpu", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["preprocess_us"]) == {"image_640x480", "imu", "text"}
    for name in ("tick_ms", "engine_ms", "session_run_ms"):
        assert 0 < result[name]["p50"] <= result[name]["p99"]
    assert result["engine_ms"]["p50"] < result["tick_ms"]["p50"]
    assert result["overhead"] > 1
    assert "CPUExecutionProvider" in result["engine"]


def test_the_table_names_bundle_and_engine(toy, capsys):
    assert run(toy, "--ticks", "5", "--engine", "cpu") == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{toy} on onnxruntime")
    assert [row.split()[0] for row in rows[:4]] == ["tick_ms", "engine_ms", "session_run_ms", "overhead"]


def test_a_session_run_is_one_of_each_part_on_the_inputs_of_the_tick(toy):
    pipeline = Pipeline(Bundle.read(toy), "cpu")
    bench.measure(pipeline, 3)  # leaves inputs, and a state
    said = bench.session_runs(pipeline)()
    for outputs, part in zip(said, pipeline.model.parts.values(), strict=True):
        assert part.graph.inputs["dt"][0] > 0
        part.graph.reset()
        for want in part.graph.run().values():
            assert any(np.array_equal(got, want) for got in outputs)


def test_another_engine_is_compared_with_itself_alone(toy, monkeypatch):
    pipeline = Pipeline(Bundle.read(toy), "cpu")
    monkeypatch.setattr(pipeline.model, "engine", "another")
    assert not {"session_run_ms", "overhead_vs_session_run"} & bench.measure(pipeline, 1).keys()


def test_what_is_timed_beside_the_engine_finds_its_inputs_prepared(toy, monkeypatch):
    """And preprocessing is left as it was."""
    made = []
    monkeypatch.setattr(preprocess, "prepare", spy := lambda spec, *args: made.append(spec) or prepare(spec, *args))
    pipeline = Pipeline(Bundle.read(toy), "cpu")
    bench.measure(pipeline, 3)
    assert len(made) == (bench.WARM_UP_TICKS + 3) * len(pipeline.specs)  # by the whole ticks alone
    assert preprocess.prepare is spy
