"""Parts carry their state, drop what is not finite, and prove themselves on the golden trace."""

import io
import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
from toy_bundle import STREAMS, Toy, files, golden_ticks, manifest, onnx_bytes, share, write_toy_bundle

from mm_edge import engine
from mm_edge.bundle import write_bundle
from mm_edge.engine import golden
from mm_edge.engine.ort import OrtGraph
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.errors import BundleError, EngineError

ALL = np.ones(3, np.float32)
NO_AGE = np.zeros(3, np.float32)
GO = Fresh(np.array([1, 0, 0]), 0.1, False)
POISON = Fresh(np.full((8, 8, 3), 255, np.uint8), 0.1, False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("engine") / "toy")


@pytest.fixture
def model(bundle):
    return engine.load(bundle, "cpu")


def grey(value: int) -> Fresh:
    return Fresh(np.full((8, 8, 3), value, np.uint8), 0.1, False)


def tick(model, **fresh):
    return model.step(ModelInputs(fresh, ALL, NO_AGE, 0.1, False))


def test_two_hundred_irregular_ticks_equal_the_same_model_in_numpy(model):
    for inputs, want in golden_ticks(200):
        got = model.step(inputs)
        for name, value in want.items():
            np.testing.assert_allclose(got.values[name], value, atol=1e-5)


def test_a_part_runs_only_when_its_stream_is_fresh_and_is_held_between(model):
    tick(model, text=GO, camera=grey(51))
    seen = share(0.1) * 51 / 255  # 0.2 bright, times the text's token 1
    assert tick(model).values["gates"][0] == pytest.approx([seen, 0, 1])
    assert tick(model).values["gates"][0] == pytest.approx([seen, 0, 1])
    assert tick(model, camera=grey(51)).values["gates"][0] == pytest.approx([seen + share(0.1) * (0.2 - seen), 0, 1])


def test_a_text_that_is_held_steers_the_camera(model):
    tick(model, text=Fresh(np.array([2, 0, 0]), 0.1, False))
    assert tick(model, camera=grey(51)).values["gates"][0, 0] == pytest.approx(2 * share(0.1) * 0.2)


def test_a_step_that_is_not_finite_is_dropped(model):
    before = tick(model, text=GO, camera=grey(51)).values
    poisoned = tick(model, camera=POISON)
    assert poisoned.mask.tolist() == [0, 1, 1]  # what is held is older than the frame: the fusion must not trust it
    assert poisoned.values["gates"][0] == pytest.approx([0, 0, 1])
    np.testing.assert_array_equal(poisoned.values["attention"], before["attention"])
    assert poisoned.reasons == ()
    after = tick(model, camera=grey(51))
    seen = before["gates"][0, 0]
    assert after.values["gates"][0, 0] == pytest.approx(seen + share(0.1) * (0.2 - seen))


def test_after_five_failures_in_a_row_a_part_starts_anew(model):
    tick(model, text=GO, camera=grey(51))
    for _ in range(5):
        tick(model, camera=POISON)
    assert model.parts["camera"].outputs["token"] == 0
    assert model.parts["camera"].dropped_steps == 5
    assert tick(model, camera=grey(51)).values["gates"][0, 0] == pytest.approx(share(0.1) * 0.2)


def test_a_fusion_that_is_not_finite_says_so_and_keeps_its_state(model):
    tick(model, text=GO)
    crash = tick(model, text=Fresh(np.array([3, 0, 0]), 0.1, False))
    assert crash.reasons == ("non-finite action: fusion dropped its step",)
    h = share(0.1)
    assert tick(model, text=GO).values["action"][0, 0, 0] == pytest.approx(h + share(0.1) * (1 - h))


def test_reset_forgets_state_and_what_is_held(model):
    first = tick(model, text=GO, camera=grey(51)).values
    tick(model, camera=grey(200))
    model.reset()
    assert tick(model).values["gates"].tolist() == [[0, 0, 0]]
    model.reset()
    np.testing.assert_array_equal(tick(model, text=GO, camera=grey(51)).values["action"], first["action"])


def test_a_run_that_is_not_kept_changes_nothing():
    graph = OrtGraph(onnx_bytes("imu"), ["v"], "cpu")
    graph.inputs["x"][..., 0], graph.inputs["dt"][...] = 1, 0.1
    assert [graph.run()["token"].item() for _ in range(3)] == [pytest.approx(share(0.1))] * 3
    graph.keep()
    assert graph.run()["token"].item() == pytest.approx(1 - np.exp(-2))


def test_state_in_memory_of_the_engines_own_is_reset_too():
    """How it is done for a GPU, done on the CPU."""
    graph = OrtGraph(onnx_bytes("imu"), ["v"], "cpu")
    graph._on_cpu = False
    graph.inputs["x"][..., 0], graph.inputs["dt"][...] = 1, 0.1
    graph.run()
    graph.keep()
    graph.reset()
    assert graph.run()["token"].item() == pytest.approx(share(0.1))


def test_the_engine_that_really_runs_is_named(bundle):
    import onnxruntime

    name = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
    assert engine.load(bundle, "cpu").engine == name
    if not engine.has_gpu():
        assert engine.load(bundle).engine == name


@pytest.mark.skipif(engine.has_gpu(), reason="has a GPU")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_an_engine_that_is_not_here_is_refused(bundle, monkeypatch):
    for gpu, why in ((True, "text.onnx: onnxruntime .* CUDAExecutionProvider"), (False, "no NVIDIA driver with a GPU")):
        monkeypatch.setattr(engine, "has_gpu", lambda gpu=gpu: gpu)
        with pytest.raises(EngineError, match=why):
            engine.load(bundle, "cuda")
    with pytest.raises(EngineError, match="engine tensorrt: there is no NVIDIA driver with a GPU here"):
        engine.load(bundle, "tensorrt")
    with pytest.raises(EngineError, match="expected auto or one of"):
        engine.load(bundle, "tpu")


def test_an_engine_of_a_version_unknown_to_us_is_refused_and_the_next_one_runs(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))  # has nothing that we ask for
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    with pytest.raises(EngineError, match=r"engine tensorrt: AttributeError: module 'tensorrt' has no attribute"):
        engine.load(bundle, "tensorrt")
    assert engine.load(bundle).engine.startswith("onnxruntime")


def test_a_graph_that_the_engine_refuses_is_named(tmp_path):
    contents = files() | {"imu.onnx": onnx_bytes("imu").replace(b"Identity", b"Identify")}
    with pytest.raises(EngineError, match=r"imu.onnx: onnxruntime .* refuses it.*Identify"):
        engine.load(write_bundle(tmp_path / "b", manifest(), contents), "cpu")


def test_a_graph_that_the_engine_refuses_leaves_stdout_alone(tmp_path, capfd):
    """Outputs go there. Of an error with a byte that is no text ONNX Runtime's fallback would tell it all."""
    contents = files() | {"imu.onnx": onnx_bytes("imu").replace(b"Identity", b"Ident\xffty")}
    with pytest.raises(EngineError, match=r"imu.onnx: onnxruntime .* refuses it"):
        engine.load(write_bundle(tmp_path / "b", manifest(), contents), "cpu")
    assert capfd.readouterr().out == ""


def test_an_output_may_have_a_dot_in_its_name(tmp_path):
    """As torch names them. Of "imu.first.token" the part is imu."""
    graph = onnx.load_from_string(onnx_bytes("imu"))
    for node in graph.graph.node:
        node.output[:] = ["first.token" if name == "token" else name for name in node.output]
    graph.graph.output[2].name = "first.token"
    changed = manifest()
    changed["parts"][3]["uses"]["imu"] = "imu.first.token"
    contents = files() | {"imu.onnx": graph.SerializeToString()}
    assert tick(engine.load(write_bundle(tmp_path / "b", changed, contents), "cpu"), text=GO).reasons == ()


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_a_model_that_does_not_reproduce_its_golden_trace_is_refused(tmp_path, wrong):
    ticks = golden_ticks()
    ticks[7][1]["action"][0, 0, 1] += wrong
    contents = files() | {"golden.npz": golden.pack(STREAMS, ticks)}
    bundle = write_bundle(tmp_path / "b", manifest(), contents)
    with pytest.raises(EngineError, match=r"does not reproduce .*: at tick 7 action is off by (0.01|nan)"):
        engine.load(bundle, "cpu")


def test_a_golden_trace_that_does_not_fit_is_refused(tmp_path):
    contents = files() | {"golden.npz": golden.pack(STREAMS[1:], golden_ticks())}
    with pytest.raises(BundleError, match=r"golden.npz: camera.x: expected uint8 \(12, 8, 8, 3\), got nothing"):
        engine.load(write_bundle(tmp_path / "b", manifest(), contents), "cpu")


def test_a_golden_trace_whose_times_are_one_number_is_refused(tmp_path):
    file = io.BytesIO()
    np.savez(file, **{**np.load(io.BytesIO(files()["golden.npz"])), "dt": np.float64(0.1)})
    with pytest.raises(BundleError, match=r"golden.npz: dt: expected float64 \(1,\), got float64 \(\)"):
        engine.load(write_bundle(tmp_path / "b", manifest(), files() | {"golden.npz": file.getvalue()}), "cpu")


def test_a_golden_trace_is_packed_and_unpacked_bit_for_bit(bundle):
    for (packed, outputs), (inputs, want) in zip(golden.unpack(bundle), golden_ticks(), strict=True):
        assert packed.fresh.keys() == inputs.fresh.keys()
        assert (packed.dt_s, packed.reset) == (inputs.dt_s, inputs.reset)
        for name, fresh in inputs.fresh.items():
            np.testing.assert_array_equal(packed.fresh[name].x, fresh.x)
            assert packed.fresh[name][1:] == fresh[1:]
        np.testing.assert_array_equal(outputs["action"], want["action"])


def test_numpy_twin_knows_resets():
    """The twin that the tests above trust, against numbers by hand."""
    toy = Toy()
    toy.step(ModelInputs({"text": GO, "camera": grey(51)}, ALL, NO_AGE, 0.1, False))
    assert toy.camera == pytest.approx(0.632121 * 0.2, abs=1e-6)
    toy.step(ModelInputs({"camera": grey(51)._replace(reset=True)}, ALL, NO_AGE, 0.1, False))
    assert toy.camera == pytest.approx(0.632121 * 0.2, abs=1e-6)
