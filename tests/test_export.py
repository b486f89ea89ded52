"""Every model of the family becomes a bundle that says on a robot what torch says."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("onnxscript", reason="export needs onnxscript")
pytest.importorskip("onnxruntime", reason="the bundle is run here")

from export.to_onnx import export_model, random_inputs
from mm_edge import engine
from mm_edge.bundle import Bundle
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.pipeline import Pipeline
from mm_edge.types import NS, Sample, StreamSpec
from tests.test_models import MODALITIES, network, some
from training.fusion import FusionStrategy
from training.models import RobotMultiSensorModel
from training.nets import ModalityConfig, ModalityType
from training.runner import step

CLASSES = {"values": {"names": ["left", "right"], "classes": True}}
KINDS = {ModalityType.VIDEO: "image", ModalityType.CUSTOM: "vector"}


def stream(name: str, config: ModalityConfig) -> StreamSpec:
    """What a robot gives a modality: of a video single frames."""
    kind, shape = KINDS.get(config.type, config.type.value), config.shape
    more = {
        "audio": {"sample_rate_hz": 8000, "channels": 1, "window_ms": 200},
        "imu": {"window_ms": 100},
        "text": {"latched": True},
    }
    if kind == "image":
        shape = (*shape[-2:], 3)
    return StreamSpec(name, kind, shape, 15, 300, **{"range_max_m": 6} | more.get(kind, {}))


@pytest.mark.parametrize("name", MODALITIES)
def test_every_modality(name, tmp_path):
    model, spec = network({name: MODALITIES[name]}), stream(name, MODALITIES[name])
    words = [f"word{i}" for i in range(9)] if spec.kind == "text" else []
    report = export_model(model, [spec], tmp_path / "bundle", CLASSES, words=words)
    assert report["max_values_error"] < 1e-4
    on_robot, state = engine.load(Bundle.read(tmp_path / "bundle"), "cpu"), model.zero_state(1)
    for inputs in random_inputs([spec], 9, 1 / 15, 30):
        said, _, state = step(model, inputs, state)
        want = torch.from_numpy(said).softmax(-1).numpy()
        np.testing.assert_allclose(on_robot.step(inputs).values["values"][0], want, atol=1e-4)


@pytest.mark.parametrize("strategy", FusionStrategy)
def test_every_strategy(strategy, tmp_path):
    configs = {name: MODALITIES[name] for name in ("simple", "log_mel", "text", "imu")}
    streams = [stream(name, config) for name, config in configs.items()]
    export_model(network(configs, strategy), streams, tmp_path / "b", CLASSES, words=[f"word{i}" for i in range(9)])
    gates = (
        engine.load(Bundle.read(tmp_path / "b"), "cpu").step(random_inputs(streams, 9, 1 / 15, 1)[0]).values["gates"]
    )
    assert gates.sum() == pytest.approx(1, abs=1e-5)


def test_a_video_on_a_robot_is_its_last_frames(tmp_path):
    """Frame after frame into the bundle gives what whole clips give in torch, once there were so many."""
    config = MODALITIES["conv3d"]
    model, spec = network({"conv3d": config}), stream("conv3d", config)
    export_model(model, [spec], tmp_path / "b", CLASSES)
    frames = torch.randint(0, 256, (7, 16, 16, 3), dtype=torch.uint8)
    black = torch.full((3, 16, 16, 3), 128, dtype=torch.uint8)  # the middle of the range is 0
    clips = torch.cat([black, frames]).unfold(0, 4, 1).movedim(-1, 1)  # (7, 4, 16, 16, 3)
    want = model({"conv3d": clips[None]}).output[0].softmax(-1)
    pipeline = Pipeline(Bundle.read(tmp_path / "b"), "cpu")
    for i, frame in enumerate(frames.numpy()):
        now_ns = NS + round(i * NS / 15)
        pipeline.push(Sample("conv3d", now_ns, now_ns, frame))
        values = pipeline.tick(now_ns).values
        assert list(values.values()) == pytest.approx(want[i].tolist(), abs=1e-4)


def test_an_arm_of_seven_joints(tmp_path):
    model = RobotMultiSensorModel((3, 32, 32), num_sensors=7, fusion_dim=16, action_dim=7)
    joints = tuple(f"joint{i}" for i in range(7))
    limits = {"units": ["rad/s"] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "max_rate": [100.0] * 7}
    streams = [StreamSpec("camera", "image", (32, 32, 3), 15, 300), StreamSpec("sensors", "vector", (7,), 50, 300)]
    export_model(model, streams, tmp_path / "arm", {"action": {"names": list(joints), **limits}})
    pipeline = Pipeline(Bundle.read(tmp_path / "arm"), "cpu")
    camera, sensors = np.zeros((32, 32, 3), np.uint8), np.linspace(-1, 1, 7, dtype=np.float32)
    pipeline.push(Sample("camera", NS, NS, camera))
    pipeline.push(Sample("sensors", NS, NS, sensors))
    output = pipeline.tick(NS + 1)
    want = model({"camera": torch.from_numpy(camera)[None], "sensors": torch.from_numpy(sensors)[None]}).output[0]
    assert output.action is not None and output.action.names == joints
    assert output.action.values[0].tolist() == pytest.approx(want.clamp(-1, 1).tolist(), abs=1e-4)


def test_streams_that_are_not_the_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"streams: expected \['sensor'\], got \['camera'\]"):
        spec = StreamSpec("camera", "image", (32, 32, 3), 15, 300)
        export_model(network({"sensor": MODALITIES["sensor"]}), [spec], tmp_path / "b", CLASSES)


def test_a_sequence_at_once_gives_what_single_steps_give():
    config = MODALITIES["sensor"]
    model, x = network({"sensor": config}), some(config, 1, 6)
    with torch.no_grad():
        at_once = model({"sensor": x}).output[0]
    state, present = model.zero_state(1), np.ones(1, np.float32)
    for t in range(6):
        fresh = {"sensor": Fresh(x[0, t].numpy(), 1 / 15, False)}
        said, _, state = step(model, ModelInputs(fresh, present, 0 * present, 1 / 15, t == 0), state)
        assert said.tolist() == pytest.approx(at_once[t].tolist(), abs=1e-6)
