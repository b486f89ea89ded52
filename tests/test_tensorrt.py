"""TensorRT-RTX reads and builds without a GPU: every part of every bundle, by the code that TensorRT runs."""

import os
from pathlib import Path

import pytest
from toy_bundle import onnx_bytes, write_toy_bundle

from export.to_tensorrt import build_parts, build_rtx, main
from mm_edge.bundle import Bundle
from mm_edge.engine import trt
from mm_edge.errors import EngineError, MissingDependency, install

SHIPPED = sorted((Path(__file__).parents[1] / "mm_edge" / "bundles").glob("*/manifest.json"))


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'mm-edge[trt-rtx]'")


def test_every_part_of_the_toy_builds(rtx, tmp_path):
    sizes = build_parts(write_toy_bundle(tmp_path / "toy"), build_rtx)
    assert list(sizes) == ["text", "camera", "imu", "fusion"]
    assert min(sizes.values()) > 1000


@pytest.mark.parametrize("manifest", SHIPPED, ids=lambda path: path.parent.name)
def test_every_part_of_every_shipped_bundle_builds(rtx, manifest):
    bundle = Bundle.read(manifest.parent)
    assert list(build_parts(bundle, build_rtx)) == [graph.name for graph in bundle.graphs()]


def test_a_graph_that_cannot_be_built_is_refused_with_the_reason(rtx):
    graph = "(float[1,4] x) => (float[1,4] y) { q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z) }"
    with pytest.raises(EngineError, match=r"cannot read it: .*DynamicQuantizeLinear"):
        build_rtx(onnx_bytes("quantised", graph))


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--rtx"]) == 1
    assert "nowhere: expected the folder of a bundle" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr("export.to_tensorrt.has_gpu", lambda: False)
    assert main(["drive"]) == 1
    assert "built on the GPU that it is for, and there is none here; see --rtx" in capsys.readouterr().err


def test_without_tensorrt_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("export.to_tensorrt.has_gpu", lambda: True)
    try:
        trt.describe()
    except MissingDependency:
        assert main([str(write_toy_bundle(tmp_path / "toy").path)]) == 1
        assert install("tensorrt") in capsys.readouterr().err
    else:
        pytest.skip("TensorRT is installed and has a GPU")


def test_engines_are_kept_only_where_nobody_else_can_plant_one(tmp_path):
    assert trt._private(tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    os.chmod(tmp_path / "cache", 0o777)
    with pytest.raises(EngineError, match="expected a folder that only you can write"):
        trt._private(tmp_path / "cache")
