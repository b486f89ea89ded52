"""Every model of the family becomes a bundle that says on a robot what torch says."""

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="export needs torch")
pytest.importorskip("onnxscript", reason="export needs onnxscript")
pytest.importorskip("onnxruntime", reason="the bundle is run here")

from export import to_onnx
from export.to_onnx import export_model, export_parts, parity, random_inputs
from mm_edge import engine
from mm_edge.bundle import Bundle
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.errors import EngineError
from mm_edge.pipeline import Pipeline
from mm_edge.preprocess import AUDIO_FRAME
from mm_edge.types import NS, Audio, Sample, StreamSpec
from tests.test_models import MODALITIES, NETWORKS, PRESET_SIZES, network, some
from training.fusion import FusionStrategy
from training.models import PRESETS, RobotMultiSensorModel, TriModalModel
from training.nets import ModalityConfig, ModalityType
from training.runner import step

CLASSES = {"values": {"names": ["left", "right"], "classes": True}}
KINDS = {ModalityType.VIDEO: "image", ModalityType.CUSTOM: "vector"}


def stream(name: str, config: ModalityConfig) -> StreamSpec:
    """What a robot gives a modality: of a video single frames."""
    kind, shape = KINDS.get(config.type, config.type.value), config.shape
    rate_hz = config.sample_rate_hz or 8000
    more = {
        "audio": {"sample_rate_hz": rate_hz, "channels": 1, "window_ms": 1e3 * samples(config) / rate_hz},
        "imu": {"window_ms": 100},
        "text": {"latched": True},
    }
    if kind == "image":
        shape = (*shape[-2:], 3)
    return StreamSpec(name, kind, shape, 15, 300, **{"range_max_m": 6} | more.get(kind, {}))


def samples(config: ModalityConfig) -> int:
    """Of sound, at 20 ms a hop."""
    return AUDIO_FRAME + (config.shape[-1] - 1) * (config.sample_rate_hz or 8000) // 50


def exported(model, folder, names=("left", "right")) -> tuple[list[StreamSpec], Bundle]:
    """The streams that the model wants, and its bundle, the model having been compared with it."""
    streams = [stream(name, config) for name, config in model.configs.items()]
    words = [f"word{i}" for i in range(model.configs[model.text].vocabulary)] if model.text else []
    export_model(model, streams, folder, {"values": {"names": list(names), "classes": True}}, words=words)
    return streams, Bundle.read(folder)


def check_same_on_robot(model, streams, bundle) -> None:
    """Torch and the bundle, tick after tick."""
    on_robot, state = engine.load(bundle, "cpu"), model.zero_state(1)
    words = model.configs[model.text].vocabulary if model.text else 0
    for inputs in random_inputs(streams, words, 1 / 15, 30):
        said, _, state, _, _ = step(model, inputs, state)
        want = torch.from_numpy(said).softmax(-1).numpy()
        np.testing.assert_allclose(on_robot.step(inputs).values["values"][0], want, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_modality(name, tmp_path):
    model = network(NETWORKS[name])
    check_same_on_robot(model, *exported(model, tmp_path / "b"))


@pytest.mark.parametrize("strategy", FusionStrategy)
def test_every_strategy(strategy, tmp_path):
    model = network({name: MODALITIES[name] for name in ("simple", "log_mel", "text", "imu")}, strategy)
    check_same_on_robot(model, *exported(model, tmp_path / "b"))


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"moderation"}))  # that is the three-modal model below
def test_every_preset(preset, tmp_path):
    torch.manual_seed(0)
    model = PRESETS[preset](fusion_dim=16, **PRESET_SIZES[preset]).eval()
    names = [f"class{i}" for i in range(model.output_dim)]
    check_same_on_robot(model, *exported(model, tmp_path / "b", names))


def test_picture_words_and_sound_say_on_a_robot_what_they_say_in_torch(tmp_path):
    torch.manual_seed(0)
    model = TriModalModel((3, 32, 32), 9, 8000, fusion_dim=16, num_classes=2, text_length=4, audio_s=0.2).eval()
    streams, bundle = exported(model, tmp_path / "b")
    check_same_on_robot(model, streams, bundle)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    heard = rng.integers(-3000, 3000, (samples(model.configs["audio"]), 1)).astype(np.int16)
    pipeline, start_ns = Pipeline(bundle, "cpu"), 2 * NS
    now_ns = start_ns + NS * len(heard) // 8000
    pipeline.push(Sample("image", now_ns, now_ns, image))
    pipeline.push(Sample("audio", start_ns, now_ns, Audio(heard, 0, 8000)))
    pipeline.push(Sample("text", now_ns, now_ns, "word2 word0"))
    tokens, frames = torch.tensor([[3, 1, 0, 0]]), torch.from_numpy(image)[None]
    want = model({"image": frames, "audio": torch.from_numpy(heard.T)[None], "text": tokens}).output.softmax(-1)
    assert list(pipeline.tick(now_ns).values.values()) == pytest.approx(want[0].tolist(), abs=1e-4)


def test_a_rate_that_differs_counts_as_a_flip_and_not_as_an_error(monkeypatch):
    config = MODALITIES["many_spike_steps"]
    model, streams = network({"a": config}), [stream("a", config)]
    files, parts = export_parts(model, streams, "values")
    with torch.no_grad():
        model.encoders["a"].spikes.fc2.bias += 3e-4  # which nothing tells but a spike that is there or not
    monkeypatch.setattr(to_onnx, "MAX_SPIKE_DISAGREEMENT", 1)
    report, _ = parity(model, files, parts, "values", random_inputs(streams, 0, 1 / 15, 400))
    assert report["max_values_error"] < 1e-5 < report["max_values_error_after_a_flip"]
    assert report["spike_disagreement"] > 0


def test_weights_that_are_not_finite_make_no_bundle(tmp_path):
    config = MODALITIES["sensor"]
    model = network({"a": config})
    with torch.no_grad():
        model.head[-1].bias[0] = math.nan
    with pytest.raises(EngineError, match="'max_values_error': nan"):
        export_model(model, [stream("a", config)], tmp_path / "b", CLASSES)
    assert not (tmp_path / "b").exists()


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
    if torch.cuda.is_available():  # where it may have been trained
        model.cuda()
    joints = tuple(f"joint{i}" for i in range(7))
    limits = {"units": ["rad/s"] * 7, "min": [-1.0] * 7, "max": [1.0] * 7, "max_rate": [100.0] * 7}
    streams = [StreamSpec("camera", "image", (32, 32, 3), 15, 300), StreamSpec("sensors", "vector", (7,), 50, 300)]
    export_model(model, streams, tmp_path / "arm", {"action": {"names": list(joints), **limits}})
    assert model.training  # the caller's is left as it was
    model.eval()
    pipeline = Pipeline(Bundle.read(tmp_path / "arm"), "cpu")
    camera, sensors = np.zeros((32, 32, 3), np.uint8), np.linspace(-1, 1, 7, dtype=np.float32)
    pipeline.push(Sample("camera", NS, NS, camera))
    pipeline.push(Sample("sensors", NS, NS, sensors))
    output = pipeline.tick(NS + 1)
    want = model.cpu()({"camera": torch.from_numpy(camera)[None], "sensors": torch.from_numpy(sensors)[None]}).output[0]
    assert output.action is not None and output.action.names == joints
    assert output.action.values[0].tolist() == pytest.approx(want.clamp(-1, 1).tolist(), abs=1e-4)


def test_streams_that_are_not_the_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"streams: expected \['sensor'\], got \['camera'\]"):
        spec = StreamSpec("camera", "image", (32, 32, 3), 15, 300)
        export_model(network({"sensor": MODALITIES["sensor"]}), [spec], tmp_path / "b", CLASSES)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("simple", {"shape": (24, 16, 3)}, r"shape: expected \(16, 24, 3\) as the model has it, got \(24, 16, 3\)"),
        ("frames", {"shape": (16, 17, 3)}, r"shape: expected \(16, 16, 3\) .* got \(16, 17, 3\)"),
        ("imu", {"kind": "vector"}, "kind: expected imu .* got vector"),
        ("scan", {"range_max_m": 10.0}, "range_max_m: expected 6 .* got 10.0"),
        ("sensor", {"max_age_ms": 500}, "max_age_ms: expected 300.0 .* got 500"),
        ("waves", {"sample_rate_hz": 8000}, "sample_rate_hz: expected 16000 .* got 8000"),
        ("text", {}, "words: expected 9 .* got 0"),
    ],
)
def test_a_stream_that_is_not_what_its_modality_was_made_for_is_refused(name, change, words, tmp_path):
    config = {**MODALITIES, "waves": replace(MODALITIES["log_mel"], sample_rate_hz=16_000)}[name]
    spec = replace(stream(name, config), **change)
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        export_model(network({name: config}), [spec], tmp_path / "b", CLASSES)


@pytest.mark.parametrize("name", ["mask", "age", "dt", "gates", "token"])
def test_a_modality_may_be_called_as_what_the_fusion_takes_and_gives(name, tmp_path):
    model = network({name: MODALITIES["sensor"]}).eval()
    check_same_on_robot(model, *exported(model, tmp_path / "bundle"))


def test_fewer_names_than_the_model_puts_out_are_refused(tmp_path):
    model, spec = network({"sensor": MODALITIES["sensor"]}), stream("sensor", MODALITIES["sensor"])
    with pytest.raises(ValueError, match=rf"outputs\.values\.names: expected {model.output_dim}, .*, got \['one'\]"):
        export_model(model, [spec], tmp_path / "b", {"values": {"names": ["one"]}})


def test_ticks_without_a_reset_are_refused(tmp_path):
    model, spec = network({"sensor": MODALITIES["sensor"]}), stream("sensor", MODALITIES["sensor"])
    ticks = random_inputs([spec], 0, 1 / 15, 9)[1:]
    with pytest.raises(ValueError, match="ticks: expected one with reset, got none among 8"):
        export_model(model, [spec], tmp_path / "b", CLASSES, ticks=ticks)


def test_a_sequence_at_once_gives_what_single_steps_give():
    config = MODALITIES["sensor"]
    model, x = network({"sensor": config}), some(config, 1, 6)
    with torch.no_grad():
        at_once = model({"sensor": x}).output[0]
    state, present = model.zero_state(1), np.ones(1, np.float32)
    for t in range(6):
        fresh = {"sensor": Fresh(x[0, t].numpy(), 1 / 15, False)}
        said, _, state, _, _ = step(model, ModelInputs(fresh, present, 0 * present, 1 / 15, t == 0), state)
        assert said.tolist() == pytest.approx(at_once[t].tolist(), abs=1e-6)


def test_one_sample_beside_a_sequence_gives_what_a_stream_gives_that_fell_silent():
    configs = {"wheels": MODALITIES["sensor"], "sensor": MODALITIES["sensor"]}
    model, once, x = network(configs), some(configs["wheels"], 1), some(configs["sensor"], 1, 7)
    with torch.no_grad():
        model.fusion.age.normal_()
        at_once = model({"wheels": once, "sensor": x}).output[0]
    state = model.zero_state(1)
    for t in range(7):
        fresh = {"sensor": Fresh(x[0, t].numpy(), 1 / 15, False)}
        if t == 0:
            fresh["wheels"] = Fresh(once[0].numpy(), 1 / 15, False)
        mask, age = np.float32([t / 15 <= 0.3, 1]), np.float32([min(t / 15, 0.3), 0])
        said, _, state, _, _ = step(model, ModelInputs(fresh, mask, age, 1 / 15, t == 0), state)
        assert said.tolist() == pytest.approx(at_once[t].tolist(), abs=1e-5)
