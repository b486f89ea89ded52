"""Tasks on data from outside: a robot's own recordings, digits; and the training loop's options."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
for library in ("accelerate", "onnxscript", "onnxruntime", "soundfile", "rosbags"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from safetensors.torch import load_file

from export.to_onnx import export
from mm_edge.bundle import Bundle
from mm_edge.pipeline import Pipeline
from tests.test_real_data import CARMEN, COMMA, comma, flaser, sound, write_zip
from tests.test_recordings import ARM, record
from training import evaluate
from training.digits import Digits, build_model
from training.recipe import read_recipe
from training.supervised import contrastive
from training.train import RECIPES, main, train

ROOT = Path(__file__).parents[1]
FEW = ["train.lanes=4", "train.save_every_steps=2", "train.mixed_precision=no"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Ten pictures and ten tones, by two speakers that nobody knows."""
    folder, n = tmp_path_factory.mktemp("digits"), 40
    labels = np.arange(n) % 10
    images = np.zeros((n, 28, 28), np.uint8)
    for i, digit in enumerate(labels):
        images[i, 2 * digit : 2 * digit + 8] = 255
    np.savez(folder / "mnist.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    t = np.arange(4000) / 8000
    tones = [0.5 * np.sin(2 * np.pi * (300 + 250 * digit) * t) for digit in range(10)]
    clips = {f"{digit}_{who}_0.flac": sound(tone, 8000) for digit, tone in enumerate(tones) for who in ("zoe", "abe")}
    write_zip(folder / "fsdd_8k_flac.zip", clips)
    return folder


def trained(out: Path, folder: Path, *options: str) -> dict[str, torch.Tensor]:
    assert main(["digits", "--data", str(folder), "--out", str(out), *FEW, *options]) == 0
    return load_file(out / "final.safetensors")


def test_digits_of_a_folder_that_the_code_has_not_seen(digits, tmp_path, capsys):
    trained(tmp_path / "run", digits, "rounds=[{steps: 4}]")
    export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    capsys.readouterr()
    arguments = ["digits", "--data", str(digits), "--bundle", str(tmp_path / "bundle"), "--json"]
    assert evaluate.main(arguments) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["images"], scores["speakers"]) == (20, ["abe", "zoe"])
    assert all(0 <= scores[name] <= 1 for name in ("fused", "audio", "image", "none"))
    assert evaluate.main([*arguments, "--only", "bob"]) == 1
    assert "expected one of ['abe', 'zoe'] to be named, got ['bob']" in capsys.readouterr().err


def test_a_modality_may_be_left_out_and_epochs_count(digits, tmp_path, capsys):
    options = ["--modalities", "audio", "--fusion-strategy", "late", "--fusion-dim", "16", "--epochs", "1"]
    weights = trained(tmp_path, digits, *options)
    assert not any(name.startswith("encoders.image") for name in weights)
    assert weights["fusion.absent"].shape == (1, 16)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model["fusion_strategy"], recipe.train.epochs) == ("late", 1)
    assert "10/10" in capsys.readouterr().err  # 40 pictures in batches of 4
    assert main(["digits", "--data", str(digits), "--modalities", "smell"]) == 2
    assert "--modalities: expected some of ['audio', 'image'], got ['smell']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, still",
    [
        ("train.progressive=[1.0]", ("fusion.", "core.", "head.")),
        ("train.progressive=[0.0, 1.0]", ("encoders.", "aux.")),
        ("train.learning_rates={image: 0.0}", ("encoders.image.",)),
    ],
)
def test_a_part_that_is_not_to_learn_does_not(digits, tmp_path, option, still):
    before = trained(tmp_path / "a", digits, "rounds=[{steps: 0}]")
    after = trained(tmp_path / "b", digits, "rounds=[{steps: 2}]", option)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name]) and "running" not in name}
    changed = {name for name in changed if not name.endswith("num_batches_tracked")}
    assert changed and not any(name.startswith(still) for name in changed)


class Repeated:
    """The same batch again and again, whole, or one half after the other."""

    steps_an_epoch = 1

    def __init__(self, batch, halves: bool):
        half = len(batch.start) // 2
        self.batches = [batch.lanes(0, half), batch.lanes(half, 2 * half)] if halves else [batch]
        self.given = 0

    def next(self):
        self.given += 1
        return self.batches[(self.given - 1) % len(self.batches)]

    def state_dict(self):
        return {}


def test_two_half_batches_make_one_step(digits, tmp_path, monkeypatch):
    folder = f"data.folder={digits}"
    options = ["train.mixed_precision=no", "rounds=[{steps: 2}]", "model.modality.dropout=0.0", folder]
    options += ["model.modality.audio={preprocessing: conv1d}", "train.save_every_steps=9"]  # no batch normalisation
    weights = {}
    for halves, lanes, accumulate in ((False, 8, 1), (True, 4, 2)):
        sizes = [f"train.lanes={lanes}", f"train.accumulate={accumulate}"]
        recipe = read_recipe(RECIPES / "digits.yaml", [*options, *sizes])
        recipe = replace(recipe, streams=recipe.streams[1:])  # the sound
        batch = Digits(replace(recipe, train=replace(recipe.train, lanes=8))).next()
        monkeypatch.setattr("training.digits.supply", lambda *_, b=batch, h=halves: Repeated(b, h))
        weights[halves] = load_file(train(recipe, tmp_path / str(halves), workers=1))
    before = build_model(recipe).state_dict()
    assert not torch.equal(weights[True]["head.0.weight"], before["head.0.weight"])
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_weight_of_a_term_that_the_task_does_not_have_is_refused(digits, tmp_path, capsys):
    arguments = ["digits", "--data", str(digits), "--out", str(tmp_path), "train.weights={lone: 1.0}"]
    assert main(arguments) == 2
    assert "train.weights: expected some of ['alone'], got ['lone']" in capsys.readouterr().err


def test_a_loss_that_gets_no_better_ends_the_training(digits, tmp_path, capsys):
    trained(tmp_path, digits, "rounds=[{steps: 500}]", "train.patience=1", "train.learning_rate=0.0")
    assert "500/500" not in capsys.readouterr().err


def test_tokens_that_agree_are_aligned():
    tokens = torch.eye(4)
    mask = torch.ones(4, 2)
    assert contrastive([tokens, tokens], mask) < 0.01 < contrastive([tokens, tokens.roll(1, 0)], mask)
    assert contrastive([tokens, tokens.roll(1, 0)], torch.tensor([[1.0, 0.0]] * 4)) == 0  # nowhere both


def test_two_processes_learn_what_one_does(digits, tmp_path):
    """The same batches, half of their lanes in each. Without batch normalisation, which sees its own half alone."""
    options = ["--modalities", "audio", *FEW, "rounds=[{steps: 4}]", "model.modality.audio={preprocessing: conv1d}"]
    options += ["model.modality.dropout=0.0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "training.train", "digits", "--data", str(digits), "--out", str(tmp_path / "two"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    train(read_recipe(tmp_path / "two" / "recipe.yaml"), tmp_path / "one", workers=1)
    two, one = (load_file(tmp_path / name / "final.safetensors") for name in ("two", "one"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-3, atol=1e-4, msg=name)


def test_a_robot_of_your_own(tmp_path, capsys):
    """From two bags of joint commands to a bundle that runs."""
    for name in ("a", "b"):
        record(tmp_path / "bags" / name)
    options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 2}]", "train.lanes=2", "train.ticks=6"]
    assert main(["drive", "--data", str(tmp_path / "bags"), *options]) == 0
    assert "2 recordings, 6.0 s" in capsys.readouterr().out.replace("5.9", "6.0")
    export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    pipeline = Pipeline(Bundle.read(tmp_path / "bundle"), "cpu")
    assert pipeline.bundle.outputs.action.names == ("shoulder", "elbow")
    assert list(pipeline.specs)[:2] == ["front_image_raw", "rear_image_raw"]


def test_recordings_with_errors_are_learned_from_only_if_told_to(tmp_path, capsys):
    record(tmp_path / "bags" / "good")
    record(tmp_path / "bags" / "bad", edit=lambda topic, at_s, msg: topic != ARM)  # nobody commands
    arguments = ["drive", "--data", str(tmp_path / "bags"), "--out", str(tmp_path / "run")]
    arguments += ["rounds=[{steps: 1}]", "train.lanes=2", "train.ticks=6"]
    assert main(arguments) == 2
    assert "--go-on trains with the rest" in capsys.readouterr().err
    assert main([*arguments, "--go-on"]) == 0


def test_a_recipe_that_is_not_there_and_data_that_are_not_named(capsys):
    assert main(["digts"]) == main(["digits"]) == 2
    said = capsys.readouterr().err
    assert "no such recipe; did you mean 'digits'?" in said and "digits: where are the data? --data FOLDER" in said


def test_every_recipe_can_be_read():
    for path in RECIPES.glob("*.yaml"):
        if path.stem != "robot":  # what is not in it is measured
            assert read_recipe(path).task == path.stem


def scored(task: str, folder: Path, out: Path, capsys, *options: str) -> dict:
    """Two steps of training on a folder, the bundle, and what evaluate says of it."""
    assert main([task, "--data", str(folder), "--out", str(out / "run"), "rounds=[{steps: 2}]", *options]) == 0
    export(out / "run" / "final.safetensors", out / "bundle", {})
    capsys.readouterr()
    assert evaluate.main([task, "--data", str(folder), "--bundle", str(out / "bundle"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_velocity_of_logs_of_any_name(tmp_path, capsys):
    """A robot goes straight on, faster and faster; the last known velocity is nearly right."""
    lines = [flaser(10 + i / 6, i * i / 500, 0, 0.0, ranges=[5 - i * i / 500] * 180) for i in range(40)]
    write_zip(tmp_path / CARMEN, {f"{name}.log": "\n".join(lines).encode() for name in ("attic", "cellar")})
    scores = scored("lidar_velocity", tmp_path, tmp_path, capsys, "train.lanes=2", "data.held_out=[cellar]")
    assert scores["logs"].keys() == {"attic", "cellar"}
    assert scores["logs"]["attic"]["r2_previous"][0] > 0.9 > scores["logs"]["attic"]["r2"][0]
    assert scores["logs"]["attic"]["windows"] > 20


def test_a_minute_of_any_car(tmp_path, capsys):
    write_zip(tmp_path / COMMA, comma(seconds=8, speed=lambda t: 10 + np.sin(t)))
    scores = scored("imu_can", tmp_path, tmp_path, capsys, "train.lanes=2", "data.learned=0.5")
    whole, rest = (scores["segments"]["car/7"][part] for part in ("whole", "not_learned"))
    assert whole["windows"] > rest["windows"] > 5
    assert whole["r2_present"][0] < 0.9  # what will be is not what is
