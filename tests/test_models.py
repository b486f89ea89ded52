"""The family of models: what goes in and comes out, what is refused, and that each runs on a robot as in torch."""

import pytest

torch = pytest.importorskip("torch", reason="models need torch")

from dataclasses import replace

import numpy as np

from mm_edge import preprocess
from mm_edge.types import StreamSpec
from training.fusion import FusionStrategy
from training.models import (
    PRESETS,
    ModalityEncoder,
    MultiModalFusionNetwork,
    RobotMultiSensorModel,
    TriModalModel,
    sound,
)
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
    "conv2d": ModalityConfig(ModalityType.AUDIO, (2, 20, 7), preprocessing="conv2d", **SMALL),
    "sequence": ModalityConfig(ModalityType.TEXT, 6, vocabulary=9, preprocessing="sequence", max_age_s=0, **SMALL),
    "ltc": ModalityConfig(ModalityType.SENSOR, 3, backbone="ltc", **SMALL),
    "many_spike_steps": ModalityConfig(ModalityType.SENSOR, 3, num_spike_steps=8, **SMALL),
}
ASKED = {
    "camera": ModalityConfig(ModalityType.VISION, (3, 32, 40), preprocessing="asked", **SMALL),
    "text": MODALITIES["text"],
}
COMPARED = {name: replace(WHEELS, backbone=name) for name in ("gru", "gru_dt", "none")}
COMPARED["no_spikes"] = replace(WHEELS, num_spike_steps=0)
NETWORKS = {name: {name: config} for name, config in MODALITIES.items()} | {"asked": ASKED, "compared": COMPARED}
PRESET_SIZES = {
    "captioning": {"vocabulary": 20, "image_size": (3, 32, 32)},
    "video": {"num_classes": 6, "clip": (4, 3, 32, 32)},
    "robot_control": {"action_dim": 2, "camera_size": (3, 32, 32)},
    "moderation": {"text_vocab_size": 30, "image_size": (3, 32, 32)},
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


@pytest.mark.parametrize("strategy", FusionStrategy)
def test_what_is_masked_is_not_looked_at_as_a_robot_does_not_step_on_it(strategy):
    model, mask = network({"camera": CAMERA, "wheels": WHEELS}, strategy), torch.ones(1, 3, 2)
    mask[0, 1, 0] = 0
    camera, wheels = some(CAMERA, 1, 3), some(WHEELS, 1, 3)
    other = camera.clone()
    other[:, 1] += 1
    result, changed = (model({"camera": x, "wheels": wheels}, mask, None, True) for x in (camera, other))
    assert torch.equal(result.output, changed.output)
    alone = model({"camera": camera[:, [0, 2]]}, dt=torch.tensor([[[1 / 15], [2 / 15]]]), return_modality_features=True)
    torch.testing.assert_close(result.modality_features["camera"][:, [0, 2]], alone.modality_features["camera"])


def test_a_text_that_is_masked_does_not_steer():
    model = network({**ASKED, "text": replace(ASKED["text"], num_spike_steps=0)})
    camera = some(ASKED["camera"], 1, 3)
    texts = torch.tensor([[[1, 2, 0, 0, 0, 0]], [[3, 4, 5, 0, 0, 0]]])
    for there in (1.0, 0.0):
        results = [model({"camera": camera, "text": x}, torch.tensor([[1, there]]), None, False, True) for x in texts]
        one, other = (result.attention_maps["camera"] for result in results)
        assert torch.equal(one, other) == (not there)


def test_a_sample_that_is_held_ages_until_it_is_absent():
    model = network({"camera": CAMERA, "wheels": WHEELS})
    weights = model({"camera": some(CAMERA, 1), "wheels": some(WHEELS, 1, 7)}).modality_weights[0, :, 0]
    assert (weights > 0).tolist() == [True] * 5 + [False] * 2  # at 15 Hz it is older than 0.3 s at the sixth tick


def test_a_type_may_be_said_by_its_value():
    assert ModalityConfig("vector", 3).type is ModalityType.SENSOR
    with pytest.raises(ValueError, match=r"type: expected a ModalityType, or one of \['image', .*, got 'smell'"):
        ModalityConfig("smell", 3)


def test_what_is_not_finite_is_refused_unless_it_is_masked():
    model, x = network({"wheels": WHEELS}), some(WHEELS, 2)
    x[1, 0] = float("nan")
    with pytest.raises(ValueError, match="wheels: expected finite numbers, or a mask"):
        model({"wheels": x})
    assert model({"wheels": x}, torch.tensor([[1.0], [0.0]])).output.isfinite().all()


def test_maps_of_an_asked_camera_are_of_what_it_saw_last():
    model = network(ASKED)
    camera, text = some(ASKED["camera"], 1, 2), torch.tensor([[1, 2, 0, 0, 0, 0]])
    mask = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    maps = model({"camera": camera, "text": text}, mask, return_attention_maps=True).attention_maps["camera"][0]
    assert maps.shape == (2, 4, 5)
    assert maps.sum((1, 2)).tolist() == [0, pytest.approx(1)]
    assert list(model({"text": text}, return_attention_maps=True).attention_maps) == ["fusion"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_modality_learns(name):
    model = network(NETWORKS[name]).train()
    model({name: some(config, 3, 4) for name, config in NETWORKS[name].items()}).output.square().mean().backward()
    assert [n for n, p in model.encoders.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("strategy", FusionStrategy)
def test_every_strategy_learns_whom_to_trust(strategy):
    model = network({"camera": CAMERA, "wheels": WHEELS}, strategy)
    model({"camera": some(CAMERA, 3), "wheels": some(WHEELS, 3)}).output.square().mean().backward()
    assert model.fusion.weight.grad.all() and model.fusion.gate.weight.grad.any()


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


def test_a_waveform_is_int16_or_float_from_minus_1_to_1():
    config = sound(8000, 0.15, num_spike_steps=0, **SMALL)
    model, samples = network({"audio": config}), torch.randint(-3000, 3000, (2, 1200), dtype=torch.int16)
    whole, floats, silence = (model({"audio": x}).output for x in (samples, samples / 32768, 0 * samples))
    torch.testing.assert_close(whole, floats)
    assert not torch.allclose(whole, silence)


def test_a_sequence_hears_the_order_of_words_and_a_bag_does_not():
    for name, differs in (("sequence", True), ("bag", False)):
        model = network({"text": replace(MODALITIES["text"], preprocessing=name, num_spike_steps=0)})
        one, other = model({"text": torch.tensor([[1, 2, 3, 0, 0, 0], [3, 1, 2, 0, 0, 0]])}).output
        assert torch.allclose(one, other) != differs


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({"camera": torch.zeros(2, 3, 16, 25)}, r"camera: expected .*3, 16, 24.* got float32 \(2, 3, 16, 25\)"),
        (
            {"camera": torch.zeros(2, 3, 16, 24).byte()},
            r"camera: expected uint8 \(batch, \[time,\] 16, 24, 3\) or float",
        ),
        ({"camera": torch.zeros(2, 16, 24, 3)}, r"camera: expected .* got float32 \(2, 16, 24, 3\)"),
        ({"wheels": torch.zeros(2, 3).long()}, r"wheels: expected float32 \(batch, \[time,\] 3\), got int64"),
        ({"text": torch.zeros(2, 6)}, r"text: expected int64 .* got float32 \(2, 6\)"),
        ({"text": torch.full((2, 6), 10)}, r"text: expected tokens from 0 to 9, got 10 to 10"),
        ({"text": torch.full((2, 6), -1)}, r"text: expected tokens from 0 to 9, got -1 to -1"),
        ({"camera": some(CAMERA, 2), "wheels": some(WHEELS, 3)}, r"wheels: expected a batch of 2.* got \(3, 3\)"),
        ({"camera": some(CAMERA, 2, 4), "wheels": some(WHEELS, 2, 5)}, r"wheels: .*4 time steps.* got \(2, 5, 3\)"),
        ({"lidar": some(WHEELS, 2)}, r"lidar: expected one of the modalities \['camera', 'wheels', 'text'\]"),
        ({}, "expected at least one"),
    ],
)
def test_wrong_dimensions_name_the_modality(inputs, words):
    with pytest.raises(ValueError, match=words):
        network({"camera": CAMERA, "wheels": WHEELS, "text": MODALITIES["text"]})(inputs)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"mask": torch.ones(2, 2)}, r"mask: expected \(2, 3, 1\) or \(2, 1\), got \(2, 2\)"),
        ({"mask": torch.ones(2, 1, 1)}, r"mask: expected .* got \(2, 1, 1\)"),
        ({"dt": torch.ones(2, 3)}, r"dt: expected \(2, 3, 1\), got \(2, 3\)"),
        ({"dt": torch.ones(2, 1, 1)}, r"dt: expected \(2, 3, 1\), got \(2, 1, 1\)"),
        ({"dt": 0.1}, "dt: expected a tensor, got float"),
    ],
)
def test_a_mask_or_dt_of_another_shape_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        network({"wheels": WHEELS})({"wheels": some(WHEELS, 2, 3)}, **more)


def test_an_encoder_alone_gives_the_tokens_that_the_network_holds():
    torch.manual_seed(0)
    model, x = network({"wheels": WHEELS}).eval(), torch.randn(2, 5, *WHEELS.shape)
    tokens = model({"wheels": x}, return_modality_features=True).modality_features["wheels"]
    assert torch.allclose(model.encoders["wheels"](x), tokens, atol=1e-6)


def test_an_encoder_alone_tells_of_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"expected float32 \(batch, time, 3\), got float32 \(2, 5, 4\)"):
        ModalityEncoder(ModalityConfig(ModalityType.SENSOR, 3))(torch.zeros(2, 5, 4))


def test_sizes_are_whole_numbers_of_any_kind():
    assert ModalityConfig(ModalityType.SENSOR, np.int64(3)).shape == (3,)
    with pytest.raises(ValueError, match=r"SENSOR: expected an input_dim of whole numbers, got 3\.5"):
        ModalityConfig(ModalityType.SENSOR, 3.5)


def test_configs_have_names():
    with pytest.raises(ValueError, match="modality_configs: expected configs by name, got list"):
        MultiModalFusionNetwork([WHEELS])


def test_ticks_take_time():
    with pytest.raises(ValueError, match=r"^tick_period_s: expected more than 0, got 0$"):
        MultiModalFusionNetwork({"wheels": WHEELS}, tick_period_s=0)


@pytest.mark.parametrize(
    "kind, shape, more, words",
    [
        ("VISION", (16, 24), {}, r"VISION: expected an input_dim of \(channels, height, width\), got \(16, 24\)"),
        ("VISION", (3, 16, 24), {"preprocessing": "vit"}, "one of .*'resnet'.* got 'vit'"),
        ("VISION", (3, 16, 24), {"backbone": "lstm"}, "backbone: .* got 'lstm'"),
        ("SENSOR", 3, {"spiking_units": 0}, "spiking_units: expected a whole number above 0, got 0"),
        ("SENSOR", 3, {"period_s": -1.0}, "period_s: expected more than 0, got -1.0"),
        ("SENSOR", 3, {"num_spike_steps": 2.5}, "num_spike_steps: expected 0 or more, whole, got 2.5"),
        ("SENSOR", 3, {"beta": "x"}, "beta: expected a share between 0 and 1, got 'x'"),
        ("VISION", (3, 32, 32), {"preprocessing": "asked"}, "preprocessing 'asked' needs a TEXT"),
        ("VISION", (3, 24, 32), {"preprocessing": "asked"}, r"'asked': .*at least 25 pixels, got \(3, 24, 32\)"),
        ("VISION", (1, 32, 32), {"preprocessing": "asked"}, r"'asked': .*\(3, height, width\).* got \(1, 32, 32\)"),
        ("SCAN", (1, 40), {}, r"SCAN: expected an input_dim of \(2, beams\), got \(1, 40\)"),
        ("SCAN", (2, 6), {}, "SCAN: expected at least 7 beams, got 6"),
        ("POINTS", (12, 3), {}, r"POINTS: expected an input_dim of \(n, 4\), got \(12, 3\)"),
        ("SENSOR", 0, {}, r"SENSOR: expected an input_dim of \(n\), got 0"),
        ("SENSOR", 3, {"beta": 1}, "beta: expected a share between 0 and 1, got 1"),
        ("SENSOR", 3, {"beta": 0}, "beta: expected a share between 0 and 1, got 0"),
        ("TEXT", 3, {}, "TEXT: expected a vocabulary"),
        ("CUSTOM", 3, {}, "a custom modality's preprocessing: expected a class"),
        ("CUSTOM", 3, {"preprocessing": lambda _: torch.nn.Identity()}, "Identity.features: expected .* got NoneType"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_modality(kind, shape, more, words):
    with pytest.raises(ValueError, match=f"eye: .*{words}"):
        MultiModalFusionNetwork({"eye": ModalityConfig(ModalityType[kind], shape, **more)})


@pytest.mark.parametrize("name", ["cam.left", "values", "fusion"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(ValueError, match=f"expected names without dots, .* got '{name}'"):
        network({name: WHEELS})


def test_an_asked_camera_takes_sizes_that_are_no_multiple_of_8():
    model = network({**ASKED, "camera": replace(ASKED["camera"], input_dim=(3, 25, 100))})
    camera, text = torch.zeros(1, 3, 25, 100), torch.tensor([[1, 2, 0, 0, 0, 0]])
    maps = model({"camera": camera, "text": text}, return_attention_maps=True).attention_maps["camera"]
    assert maps.shape == (1, 4, 13)


class Griddy(Smell):
    """With an attribute that an "asked" net has, too."""

    grid = (1, 1)


class Boaster(Smell):
    """It says that it puts out more than it does."""

    def __init__(self, config: ModalityConfig):
        super().__init__(config)
        self.features = 7


def test_a_custom_net_may_have_attributes_of_its_own_and_must_say_how_many_features_it_has():
    smell = {"nose": some(MODALITIES["custom"], 2)}
    nose = network({"nose": replace(MODALITIES["custom"], preprocessing=Griddy)})
    assert nose(smell, return_attention_maps=True).output.shape == (2, 2)
    with pytest.raises(ValueError, match=r"Boaster: expected \(n, 7\) of it, .* got \(2, 5\)"):
        network({"nose": replace(MODALITIES["custom"], preprocessing=Boaster)})(smell)


def test_the_robots_model_and_the_three_modal_one():
    arm = RobotMultiSensorModel(camera_size=(3, 32, 32), num_sensors=10, fusion_dim=16, action_dim=7)
    assert arm({"camera": torch.zeros(1, 3, 32, 32), "sensors": torch.zeros(1, 10)}).output.shape == (1, 7)
    three = TriModalModel((3, 32, 32), text_vocab_size=50, audio_sample_rate=8000, fusion_dim=16, num_classes=4)
    inputs = {"image": torch.zeros(2, 3, 32, 32), "text": torch.ones(2, 32).long(), "audio": torch.randn(2, 8000)}
    assert three(inputs).output.shape == (2, 4)


@pytest.mark.parametrize("preset, outputs", [("captioning", 21), ("video", 6), ("robot_control", 2), ("moderation", 2)])
def test_presets_take_what_the_family_takes(preset, outputs):
    family = {"fusion_dim": 16, "num_attention_heads": 2, "fusion_strategy": FusionStrategy.LATE, "core": "ltc"}
    model = PRESETS[preset](**PRESET_SIZES[preset], **family, fusion_units=8, tick_period_s=0.1).eval()
    result = model({name: some(config, 1) for name, config in model.configs.items()})
    assert result.output.shape == (1, outputs)
    assert (model.strategy, model.tick_period_s, model.core.units) == (FusionStrategy.LATE, 0.1, 8)


def test_the_next_word_of_a_caption_depends_on_the_order_of_those_before():
    model = PRESETS["captioning"](fusion_dim=16, **PRESET_SIZES["captioning"]).eval()
    image, words = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, dtype=torch.int64)
    words[0, :3], words[1, :3] = torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1])
    one, other = model({"image": image, "text": words}).output
    assert not torch.allclose(one, other)
