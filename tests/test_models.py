"""The family of models: what goes in and comes out, what is refused, and that each runs on a robot as in torch."""

import pytest

torch = pytest.importorskip("torch", reason="models need torch")

import numpy as np

from mm_edge import preprocess
from mm_edge.types import StreamSpec
from training.fusion import FusionStrategy
from training.models import PRESETS, MultiModalFusionNetwork, RobotMultiSensorModel, TriModalModel, sound
from training.nets import ModalityConfig, ModalityType, log_mel

SMALL = {"encoder_dim": 16, "liquid_units": 8, "spiking_units": 12}
CAMERA = ModalityConfig(ModalityType.VISION, (3, 16, 24), **SMALL)
WHEELS = ModalityConfig(ModalityType.SENSOR, 3, **SMALL)


class Smell(torch.nn.Module):
    """A modality of the user's own."""

    def __init__(self, config: ModalityConfig):
        super().__init__()
        self.features = 5
        self.layer = torch.nn.Linear(config.shape[0], 5)

    def forward(self, x):
        return self.layer(x).relu()


MODALITIES = {
    "simple": CAMERA,
    "resnet": ModalityConfig(ModalityType.VISION, (3, 33, 40), preprocessing="resnet", **SMALL),
    "efficient": ModalityConfig(ModalityType.VISION, (3, 32, 32), preprocessing="efficient", **SMALL),
    "log_mel": ModalityConfig(ModalityType.AUDIO, (2, 20, 7), **SMALL),
    "text": ModalityConfig(ModalityType.TEXT, 6, vocabulary=9, max_age_s=0, **SMALL),
    "sensor": WHEELS,
    "scan": ModalityConfig(ModalityType.SCAN, (2, 40), range_max_m=6, **SMALL),
    "imu": ModalityConfig(ModalityType.IMU, (10, 7), **SMALL),
    "points": ModalityConfig(ModalityType.POINTS, (12, 4), **SMALL),
    "conv3d": ModalityConfig(ModalityType.VIDEO, (4, 3, 16, 16), **SMALL),
    "frames": ModalityConfig(ModalityType.VIDEO, (4, 3, 16, 16), preprocessing="frames", **SMALL),
    "custom": ModalityConfig(ModalityType.CUSTOM, 4, preprocessing=Smell, **SMALL),
    "ltc": ModalityConfig(ModalityType.SENSOR, 3, backbone="ltc", **SMALL),
    "many_spike_steps": ModalityConfig(ModalityType.SENSOR, 3, num_spike_steps=8, **SMALL),
}


def network(modalities, strategy=FusionStrategy.HYBRID, outputs=2) -> MultiModalFusionNetwork:
    torch.manual_seed(0)
    return MultiModalFusionNetwork(
        modalities, strategy, fusion_dim=16, num_attention_heads=2, output_dim=outputs
    ).eval()


def some(config: ModalityConfig, *size: int) -> torch.Tensor:
    if config.type is ModalityType.TEXT:
        return torch.randint(0, config.vocabulary + 1, (*size, *config.shape))
    return torch.randn(*size, *config.shape)


@pytest.mark.parametrize("strategy", FusionStrategy)
def test_a_network_says_what_it_was_asked_for(strategy):
    model = network({"camera": CAMERA, "wheels": WHEELS}, strategy)
    inputs = {"camera": some(CAMERA, 2, 5), "wheels": some(WHEELS, 2, 5)}
    result = model(inputs, return_modality_features=True, return_attention_maps=True)
    assert result.output.shape == (2, 5, 2)
    assert {name: tuple(x.shape) for name, x in result.modality_features.items()} == {
        "camera": (2, 5, 8),
        "wheels": (2, 5, 8),
    }
    attention = result.attention_maps["fusion"]
    assert attention.shape == (2, 5, 2, 3, 3)  # each token's share of its look at camera, wheels and nothing
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 5, 2, 3))
    torch.testing.assert_close(result.modality_weights.sum(-1), torch.ones(2, 5))
    plain = model(inputs)
    assert plain.modality_features is None and plain.attention_maps is None


@pytest.mark.parametrize("strategy", FusionStrategy)
def test_a_modality_that_is_absent_does_not_matter_and_has_no_weight(strategy):
    model = network({"camera": CAMERA, "wheels": WHEELS, "imu": MODALITIES["imu"]}, strategy)
    wheels, mask = some(WHEELS, 1), torch.tensor([[0.0, 1.0, 0.0]])
    results = [model({"camera": some(CAMERA, 1), "wheels": wheels}, mask=mask) for _ in range(2)]
    torch.testing.assert_close(results[0].output, results[1].output)
    torch.testing.assert_close(results[0].output, model({"wheels": wheels}).output)
    assert results[0].modality_weights.tolist() == [[0, 1, 0]]
    assert model({"wheels": wheels}, mask=torch.zeros(1, 3)).output.isfinite().all()  # nothing at all


@pytest.mark.parametrize("name", MODALITIES)
def test_every_modality_learns(name):
    model = network({name: MODALITIES[name]}).train()
    model({name: some(MODALITIES[name], 3, 4)}).output.square().mean().backward()
    assert [n for n, p in model.encoders.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_without_a_time_axis_are_one_step():
    model = network({"camera": CAMERA, "text": MODALITIES["text"]})
    camera, text = some(CAMERA, 2), some(MODALITIES["text"], 2)
    once = model({"camera": camera, "text": text}).output
    assert once.shape == (2, 2)
    held = model({"camera": camera[:, None].expand(-1, 3, -1, -1, -1), "text": text}).output  # a command, and frames
    torch.testing.assert_close(held[:, 0], once)


def test_uint8_pictures_are_those_of_a_camera():
    model = network({"camera": CAMERA})
    frames = torch.randint(0, 256, (1, 16, 24, 3), dtype=torch.uint8)
    floats = (frames.permute(0, 3, 1, 2).float() - 128) / 64
    torch.testing.assert_close(model({"camera": frames}).output, model({"camera": floats}).output)


def test_waveforms_become_the_log_mel_that_a_robot_makes():
    config = sound(16_000, 0.15, channels=2, bands=24)
    spec = StreamSpec("audio", "audio", config.shape, 50, 300, window_ms=150, sample_rate_hz=16_000, channels=2)
    samples = np.random.default_rng(0).integers(-3000, 3000, (2400, 2)).astype(np.int16)
    want = preprocess.log_mel(samples, np.ones(2400, bool), spec)
    got = log_mel(torch.from_numpy(samples.T.astype(np.float32))[None], config.shape, 16_000)[0].numpy()
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"camera": torch.zeros(2, 3, 16, 25)}, r"camera: expected .*3, 16, 24.* got \(2, 3, 16, 25\)"),
        ({"camera": some(CAMERA, 2), "wheels": some(WHEELS, 3)}, r"wheels: expected a batch of 2.* got \(3, 3\)"),
        ({"camera": some(CAMERA, 2, 4), "wheels": some(WHEELS, 2, 5)}, r"wheels: .*4 time steps.* got \(2, 5, 3\)"),
        ({"lidar": some(WHEELS, 2)}, r"lidar: expected one of the modalities \['camera', 'wheels'\]"),
        ({}, "expected at least one"),
    ],
)
def test_wrong_dimensions_name_the_modality(inputs, words):
    with pytest.raises(ValueError, match=words):
        network({"camera": CAMERA, "wheels": WHEELS})(inputs)


@pytest.mark.parametrize(
    "config, words",
    [
        (ModalityConfig(ModalityType.VISION, (16, 24)), "eye: VISION: expected an input_dim of 3 numbers"),
        (ModalityConfig(ModalityType.VISION, (3, 16, 24), preprocessing="vit"), "one of .*'resnet'.* got 'vit'"),
        (ModalityConfig(ModalityType.VISION, (3, 16, 24), backbone="lstm"), "eye: backbone: .* got 'lstm'"),
        (ModalityConfig(ModalityType.VISION, (3, 16, 24), preprocessing="asked"), "eye: .*needs a TEXT"),
        (ModalityConfig(ModalityType.CUSTOM, 3), "eye: a custom modality's preprocessing: expected a class"),
        (ModalityConfig(ModalityType.TEXT, 3), "eye: TEXT: expected a vocabulary"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_modality(config, words):
    with pytest.raises(ValueError, match=words):
        MultiModalFusionNetwork({"eye": config})


def test_the_robots_model_and_the_three_modal_one():
    arm = RobotMultiSensorModel(camera_size=(3, 32, 32), num_sensors=10, fusion_dim=16, action_dim=7)
    assert arm({"camera": torch.zeros(1, 3, 32, 32), "sensors": torch.zeros(1, 10)}).output.shape == (1, 7)
    three = TriModalModel((3, 32, 32), text_vocab_size=50, audio_sample_rate=8000, fusion_dim=16, num_classes=4)
    inputs = {"image": torch.zeros(2, 3, 32, 32), "text": torch.ones(2, 32).long(), "audio": torch.randn(2, 8000)}
    assert three(inputs).output.shape == (2, 4)


@pytest.mark.parametrize(
    "preset, sizes, outputs",
    [
        ("captioning", {"vocabulary": 20, "image_size": (3, 32, 32)}, 21),
        ("video", {"num_classes": 6, "clip": (4, 3, 32, 32)}, 6),
        ("robot_control", {"action_dim": 2, "camera_size": (3, 32, 32)}, 2),
        ("moderation", {"text_vocab_size": 30, "image_size": (3, 32, 32)}, 2),
    ],
)
def test_presets(preset, sizes, outputs):
    model = PRESETS[preset](fusion_dim=16, **sizes).eval()
    result = model({name: some(config, 1) for name, config in model.configs.items()})
    assert result.output.shape == (1, outputs)
