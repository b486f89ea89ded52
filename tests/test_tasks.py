"""Tasks on data from outside: a robot's own recordings, digits; and the training loop's options."""

import json
import os
import shutil
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
from mm_edge.recording import RecordingWriter
from mm_edge.types import Action, Sample, Scan, StreamSpec
from tests.test_real_data import CARMEN, COMMA, comma, flaser, sound, write_zip
from tests.test_recordings import ARM, MS, RATES, T0, drop, record
from training import evaluate, robot
from training.batches import Batch, regular_batch, regular_steps
from training.digits import DigitDraw, Digits, build_model, hints, loss
from training.models import EncoderState, ModalityConfig, ModalityType, ModelState, MultiModalFusionNetwork
from training.recipe import read_recipe
from training.supervised import contrastive, newest
from training.train import RECIPES, _Lesson, _validate, main, train, until_heard, without

ROOT = Path(__file__).parents[1]
FEW_TOPICS = {"/front/image_raw": 10, "/lidar": 5}
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
    assert (scores["images"], list(scores["speakers"])) == (20, ["abe", "zoe"])
    assert all(0 <= scores[name] <= 1 for name in ("fused", "audio", "image", "none"))
    assert evaluate.main(arguments[:-1]) == 0  # for people: a row for each subset of the senses, by noise
    lines = capsys.readouterr().out.splitlines()
    rows, noises = lines[lines.index("by_noise_of_the_voice") + 1 :], list(scores["by_noise_of_the_voice"])
    assert [row.strip()[: len(snr)] for row, snr in zip(rows, noises)] == noises
    assert evaluate.main([*arguments, "--only", "bob"]) == 1
    assert "expected speakers among ['abe', 'zoe'], got ['bob']" in capsys.readouterr().err


def test_both_senses_together_learn_the_product_of_what_each_says(digits):
    """In which a voice counts for 0.6, and what is absent for nothing."""
    recipe = read_recipe(RECIPES / "digits.yaml", [*FEW, f"data.folder={digits}", "train.lanes=32"])
    model, batch = build_model(recipe).eval(), Digits(recipe).next()
    model.aux["image"].weight.data *= 20
    model.aux["audio"].weight.data *= 20  # so that they say something
    out, _ = model.scan(batch, model.zero_state(len(batch.mask)))
    says = {name: model.aux[name](out.tokens[name][:, 0]).softmax(-1) for name in ("image", "audio")}
    image, audio = batch.mask[:, 0].T[..., None]
    product = says["image"] ** image * says["audio"] ** (0.6 * audio)
    product /= product.sum(-1, keepdim=True)
    said = out._replace(output=product.log()[:, None])
    least = -(product * product.log()).sum(-1).mean()  # cross-entropy's, where it is said just so
    assert float(loss(recipe, model, batch, said)[1]["wrong"].detach()) == pytest.approx(float(least), rel=1e-4)
    assert {tuple(mask) for mask in batch.mask[:, 0].tolist()} == {(1, 1), (1, 0), (0, 1)}
    assert product.max(-1).values.std() > 0.05
    silent = out._replace(output=torch.zeros_like(out.output, requires_grad=True))
    loss(recipe, model, batch, silent)[1]["wrong"].backward()
    assert model.aux["image"].weight.grad is None  # what a sense says does not bend to the other


def test_a_voice_may_say_another_digit_than_the_picture_shows(digits):
    recipe = read_recipe(RECIPES / "digits.yaml", [*FEW, f"data.folder={digits}", "train.lanes=400"])
    labels = Digits(recipe).next().labels
    assert 0.2 < (labels["digit"] != labels["heard"]).float().mean() < 0.35  # nine tenths of three tenths


def test_a_modality_may_be_left_out_and_epochs_count(digits, tmp_path, capsys):
    options = ["--modalities", "audio", "--fusion-strategy", "late", "--fusion-dim", "16", "--epochs", "1"]
    weights = trained(tmp_path, digits, *options)
    assert not any(name.startswith("encoders.image") for name in weights)
    assert weights["fusion.absent"].shape == (1, 16)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model["fusion_strategy"], recipe.train.epochs) == ("late", 1)
    assert recipe.tick == {"anchor": "audio", "period_ms": 1000.0, "max_period_ms": 1500.0, "min_period_ms": 0.0}
    assert "10/10" in capsys.readouterr().err  # 40 pictures in batches of 4
    assert main(["digits", "--data", str(digits), "--modalities", "smell"]) == 2
    assert "--modalities: expected some of ['audio', 'image', 'vision'], got ['smell']" in capsys.readouterr().err


def test_what_a_recipe_says_of_a_modality_goes_with_it(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("training.train.train", lambda recipe, *_: made.append(recipe))
    own = (RECIPES / "digits.yaml").read_text().replace("train: {", "train: {learning_rates: {audio: 0.5}, ")
    (tmp_path / "own.yaml").write_text(own)
    assert main([str(tmp_path / "own.yaml"), "--data", "x", "--modalities", "image"]) == 0
    assert made[0].train.learning_rates == {} and "audio" not in made[0].model["modality"]


def test_an_epoch_of_less_than_a_batch_is_a_step(digits, tmp_path, capsys):
    trained(tmp_path, digits, "--modalities", "vision", "--epochs", "3", "train.lanes=64")
    assert "3/3" in capsys.readouterr().err


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


SOUND = ["model.modality={encoder_dim: 32, spiking_units: 64, liquid_units: 32, preprocessing: conv1d}"]
SOUND += ["train.warm_up_steps=1", "rounds=[{steps: 4}]"]  # neither batch normalisation nor dropout


def apart(one: Path, other: Path) -> float:
    """How far the weights of two trainings are from each other, as a share of what the one changed."""
    start = build_model(read_recipe(one / "recipe.yaml")).state_dict()
    a, b = (load_file(out / "final.safetensors") for out in (one, other))
    wrong, changed = (sum(float((a[k] - x[k]).square().sum()) for k in a) for x in (b, start))
    return (wrong / changed) ** 0.5


def test_two_half_batches_make_one_step(digits, tmp_path, monkeypatch):
    audio = "{name: audio, kind: audio, shape: [2, 40, 35], rate_hz: 1, max_age_ms: 1500, sample_rate_hz: 8000}"
    options = [*FEW, *SOUND, f"data.folder={digits}", f"streams=[{audio}]", "tick.anchor=audio"]
    for name, lanes, accumulate in (("whole", 8, 1), ("halves", 4, 2), ("first", 4, 1)):
        sizes = [f"train.lanes={lanes}", f"train.accumulate={accumulate}"]
        recipe = read_recipe(RECIPES / "digits.yaml", [*options, *sizes])
        batch = Digits(replace(recipe, train=replace(recipe.train, lanes=8))).next()
        monkeypatch.setattr("training.digits.supply", lambda *_, b=batch, n=lanes: Repeated(b, halves=n == 4))
        train(recipe, tmp_path / name, workers=1)
    assert apart(tmp_path / "whole", tmp_path / "halves") < 0.01 < apart(tmp_path / "whole", tmp_path / "first")


def test_a_weight_of_a_term_that_the_task_does_not_have_is_refused(digits, tmp_path, capsys):
    options = [*FEW, "rounds=[{steps: 1}]", "train.weights={lone: 1.0}"]
    assert main(["digits", "--data", str(digits), "--out", str(tmp_path), *options]) == 2
    assert "train.weights: no key 'lone'; did you mean 'alone'?" in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()  # a better one may go there


@pytest.mark.parametrize("falls, steps", [(0.01, 10), (0.0, 6)])
def test_a_loss_that_gets_no_better_for_two_saves_ends_the_training(digits, tmp_path, monkeypatch, falls, steps):
    losses = []

    def loss(recipe, model, batch, out):
        losses.append(1.0 - falls * len(losses))
        return losses[-1] + 0 * out.output.sum(), {}

    monkeypatch.setattr("training.digits.loss", loss)
    trained(tmp_path, digits, "rounds=[{steps: 10}]", "train.patience=2")  # it is saved at every second step
    assert len(losses) == steps
    (tmp_path / "round0.safetensors").unlink()  # as if stopped just before it was written
    trained(tmp_path, digits, "rounds=[{steps: 10}]", "train.patience=2")
    assert len(losses) == steps


def test_tokens_that_agree_are_aligned():
    tokens = torch.eye(4)
    mask = torch.ones(4, 2)
    assert contrastive([tokens, tokens], mask) < 0.01 < contrastive([tokens, tokens.roll(1, 0)], mask)
    assert contrastive([tokens, tokens.roll(1, 0)], torch.tensor([[1.0, 0.0]] * 4)) == 0  # nowhere both


def test_tokens_of_the_same_class_need_not_differ():
    same, mask = torch.ones(4, 3), torch.ones(4, 2)
    assert contrastive([same, same], mask, torch.zeros(4)) == 0 < contrastive([same, same], mask, torch.arange(4))


def test_tokens_of_different_sizes_cannot_be_aligned(digits, tmp_path, capsys):
    options = [*FEW, "rounds=[{steps: 1}]", "train.contrastive=0.1", "model.modality.image.liquid_units=32"]
    assert main(["digits", "--data", str(digits), "--out", str(tmp_path), *options]) == 2
    assert "expected two modalities with tokens of one size, got {'image': 32, 'audio': 96}" in capsys.readouterr().err


def test_what_is_aligned_is_of_each_lanes_last_tick_that_is_no_padding():
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    assert newest(x, torch.tensor([[1, 1, 0], [1, 1, 1]])[..., None] > 0).tolist() == [[2.0], [6.0]]


def test_a_modality_that_is_dropped_does_not_step_and_something_is_left():
    """Of a camera, an IMU and the command that all send at each of two ticks."""
    ones, mask = torch.ones(5, 2, 1), torch.ones(5, 2, 3)
    mask[3, :, 1] = 0  # its imu is dead
    steps = {name: regular_steps(ones, ones, 2, 1.0) for name in ("camera", "imu", "text")}
    batch = regular_batch(steps, mask, ones, {})
    draw = torch.tensor([[0.1, 0.9, 0.1], [0.9, 0.1, 0.9], [0.1, 0.2, 0.1], [0.2, 0.1, 0.9], [0.9, 0.8, 0.1]])[:, None]
    less, dropped = without(batch, draw, 0.5, "text")
    assert dropped[:, 0].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert less.mask[:, 0].tolist() == [[0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]
    steps = torch.stack([s.keep[:, 0, 0] for s in less.steps.values()], 1)
    assert steps.tolist() == [[0, 1, 1], [1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert without(batch, draw, 1.0, "text")[1].sum((1, 2)).tolist() == [1, 1, 1, 1, 1]


def test_what_was_dropped_starts_anew_when_it_is_back():
    """As on a robot after a long silence: for a chunk it was not there."""
    one = torch.ones(2, 1)
    encoders = {name: EncoderState(one, one, one) for name in "ab"}
    ones = ModelState(encoders, {"a": one, "b": one}, torch.ones(2, 4), torch.ones(2, 2))
    left = ones.without(torch.tensor([[True, False], [False, False]]))
    for name, rows in (("a", [[0], [1]]), ("b", [[1], [1]])):
        assert [x.tolist() for x in (*left.encoders[name], left.held[name])] == [rows] * 4
    assert torch.equal(left.h, ones.h) and left.stepped.tolist() == [[0, 1], [1, 1]]


def seldom(lanes: int) -> Batch:
    """Three ticks of a scan that comes with the last of them, and of an imu that comes with each."""
    ticks = torch.ones(lanes, 3, 1)
    scan, imu = regular_steps(ticks[:, :1], ticks, 3, 1.0), regular_steps(ticks, ticks, 3, 1.0)
    scan = replace(scan, at=torch.tensor([[0, 0, 1]]).expand(lanes, 3))
    return regular_batch({"scan": scan, "imu": imu}, torch.ones(lanes, 3, 2), ticks, {})


def test_what_was_dropped_is_absent_until_it_steps_again():
    batch = replace(seldom(4), start=torch.arange(4) == 3)  # an episode begins in the last lane
    batch.steps["scan"].keep[1] = False
    stepped = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    less = until_heard(batch, ModelState({}, {}, torch.ones(4, 4), stepped))
    assert less.mask[..., 0].tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert less.mask[..., 1].all()


def test_of_what_is_present_something_is_remembered_however_seldom_it_comes(monkeypatch):
    """Chunk after chunk, while half of the senses are dropped now and then."""
    shares = []

    def loss(recipe, model, batch, out):
        known = torch.stack([out.tokens[name].any(-1) for name in model.names], -1)
        assert known[batch.mask > 0].all()
        shares.append(batch.mask[..., 0].mean().item())
        return out.output.sum(), {}

    torch.manual_seed(0)
    model = MultiModalFusionNetwork(
        {name: ModalityConfig(ModalityType.SENSOR, 1) for name in ("scan", "imu")},
        fusion_dim=8, num_attention_heads=2, output_dim=1,
    )  # fmt: skip
    for encoder in model.encoders.values():
        torch.nn.init.normal_(encoder.liquid.bias)  # or a token of no spikes is zeros, too
    monkeypatch.setattr("training.digits.loss", loss)
    lesson = _Lesson(read_recipe(RECIPES / "digits.yaml", ["train.modality_dropout=0.5"]), model)
    batch, state = seldom(16), model.zero_state(16)
    batch = replace(batch, mask=torch.stack([batch.steps["scan"].at > 0, torch.ones(16, 3) > 0], -1).float())
    for _ in range(8):
        state = lesson(batch, state)[2]
        batch = replace(seldom(16), start=torch.zeros(16) > 0)
    assert all(0 < share < 1 for share in shares)


def test_dropped_modalities_leave_no_trace_in_their_encoders(digits, tmp_path, monkeypatch):
    """Half of the lanes have one sense alone, and a sense that is not there keeps its state of rest."""
    kept = []

    def loss(recipe, model, batch, out):
        for i, name in enumerate(model.names):
            rest = (out.tokens[name][:, 0] == 0).all(-1)
            assert torch.equal(rest, batch.mask[:, 0, i] == 0)
        kept.append(batch.mask.mean().item())
        return out.output.sum(), {}

    def forget(self, gone):
        forgotten.append(gone.float().mean().item())
        return self

    forgotten: list[float] = []
    monkeypatch.setattr("training.digits.loss", loss)
    monkeypatch.setattr(ModelState, "without", forget)
    options = ["train.modality_dropout=0.5", "train.lanes=40", "data.absent=0.0", "train.learning_rate=0.0"]
    trained(tmp_path, digits, "rounds=[{steps: 2}]", *options)
    assert all(0.5 <= share < 0.95 for share in kept)
    assert forgotten == pytest.approx([1 - share for share in kept])  # and nothing but that


def test_two_processes_learn_what_one_does(digits, tmp_path):
    """The same batches, half of their lanes in each. Without batch normalisation, which sees its own half alone."""
    options = ["--modalities", "audio", *FEW, *SOUND]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "training.train", "digits", "--data", str(digits), "--out", str(tmp_path / "two"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    recipe = read_recipe(tmp_path / "two" / "recipe.yaml")
    train(recipe, tmp_path / "one", workers=1)
    train(replace(recipe, train=replace(recipe.train, lanes=2)), tmp_path / "half", workers=1)
    assert apart(tmp_path / "one", tmp_path / "two") < 0.01 < apart(tmp_path / "one", tmp_path / "half")
    states = [tmp_path / "two" / "checkpoint" / f"random_states_{rank}.pkl" for rank in (0, 1)]
    seeds = [torch.load(state, weights_only=False)["torch_manual_seed"] for state in states]
    assert not torch.equal(*seeds)  # what one drops, the other need not


def test_each_of_two_processes_resumes_with_what_its_own_lanes_remember(tmp_path):
    script = tmp_path / "resume.py"
    script.write_text(f"""
import torch
from accelerate import Accelerator
from training.models import EncoderState, ModelState
from training.train import _Progress

class Supply:
    state_dict, load_state_dict = dict, lambda self, saved: None

def remembered(value):
    x, nothing = torch.full((2, 3), value, requires_grad=True) * 1, torch.zeros(2, 0)
    fields = [x, *[nothing] * (len(EncoderState._fields) - 1)]
    return ModelState({{"audio": EncoderState(*fields)}}, {{"audio": x}}, x, x)

accelerator = Accelerator(cpu=True)
mine = accelerator.process_index + 1.0
progress = _Progress(Supply(), remembered(mine), accelerator)
accelerator.register_for_checkpointing(progress)
accelerator.save_state({str(tmp_path / "saved")!r})
accelerator.wait_for_everyone()
progress.state = remembered(0.0)
accelerator.load_state({str(tmp_path / "saved")!r})
back, encoder = progress.state, progress.state.encoders["audio"]
assert all(x.shape == (2, 3) and (x == mine).all() for x in (back.h, back.held["audio"], encoder[0])), back
assert all(x.shape == (2, 0) for x in encoder[1:]), encoder
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_robot_of_your_own(tmp_path, capsys):
    """From two bags of joint commands to a bundle that runs."""
    for name in ("a", "b"):
        record(tmp_path / "bags" / name, rates={t: RATES[t] for t in ("/front/image_raw", "/rear/image_raw", "/lidar")})
    options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 2}]", "train.lanes=2", "train.ticks=6"]
    assert main(["drive", "--data", str(tmp_path / "bags"), *options, "data.validation=[b]"]) == 0
    assert "2 recordings, 5.8 s" in capsys.readouterr().out
    export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    pipeline = Pipeline(Bundle.read(tmp_path / "bundle"), "cpu")
    assert pipeline.bundle.outputs.action.names == ("shoulder", "elbow")
    assert list(pipeline.specs)[:2] == ["front_image_raw", "rear_image_raw"]
    card = pipeline.bundle.contents["README.md"].decode()
    assert "- position of shoulder: 0 to 0.59\n- position of elbow: -0.5 to -0.5\n" in card
    known = pipeline.bundle.training["data"]["recordings"]
    assert known.keys() == {"learned", "validation"} and known["learned"] == known["validation"]  # a copy is the same


def test_a_recipe_of_your_own_for_a_robot_of_your_own(tmp_path, capsys):
    record(tmp_path / "bags" / "a", rates=FEW_TOPICS)
    own = tmp_path / "own.yaml"
    own.write_text((RECIPES / "robot.yaml").read_text().replace("seed: 1", "seed: 7"))
    options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 1}]", "train.lanes=2", "train.ticks=6"]
    assert main([str(own), "--data", str(tmp_path / "bags"), *options]) == 0
    assert read_recipe(tmp_path / "run" / "recipe.yaml").seed == 7
    assert main([str(RECIPES / "drive.yaml"), "--data", str(tmp_path / "bags"), *options]) == 2
    assert "learns from no folder; with --data there is robot.yaml" in capsys.readouterr().err
    own.write_text("robot")
    assert main([str(own), "--data", str(tmp_path / "bags"), *options]) == 2
    assert f"{own}: expected a recipe, keys with values, got 'robot'" in capsys.readouterr().err


def test_a_training_that_diverges_ends_and_says_so(tmp_path, capsys):
    record(tmp_path / "bags" / "a", rates=FEW_TOPICS)
    options = ["rounds=[{steps: 9}]", "train.lanes=2", "train.ticks=6", "train.save_every_steps=4"]
    wild = ["train.learning_rate=1e30", "train.warm_up_steps=1", "--out", str(tmp_path / "run")]
    assert main(["drive", "--data", str(tmp_path / "bags"), *options, *wild]) == 2
    assert (
        "round 0: the loss or a weight is not finite before step 4: try a lower train.learning_rate"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "round0.safetensors").exists()


def otherwise(topic, at_s, msg):
    if topic == ARM:
        msg.points[0].positions[0] /= 2


def test_scores_of_recordings(tmp_path, capsys):
    """By whether they were learned; what cannot be scored says why."""
    bags = tmp_path / "bags"
    record(bags / "a", seconds=3, rates=FEW_TOPICS)
    record(bags / "b", seconds=4, rates=FEW_TOPICS)
    options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 2}]", "train.lanes=2", "train.ticks=6"]
    assert main(["robot", "--data", str(bags), *options, "data.validation=[b]"]) == 0
    export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    (bags / "b").rename(bags / "monday")  # which is the same
    shutil.rmtree(bags / "a")
    record(bags / "a", seconds=3, rates=FEW_TOPICS, edit=otherwise)  # as long as the one before, but another
    record(bags / "c", seconds=5, rates=FEW_TOPICS, edit=drop("/lidar"))
    record(bags / "d", seconds=5, rates=FEW_TOPICS, edit=drop(ARM))
    (record(bags / "e", rates=FEW_TOPICS) / "e.mcap").write_bytes(b"no recording")
    capsys.readouterr()
    arguments = ["robot", "--data", str(bags), "--bundle", str(tmp_path / "bundle"), "--json"]
    assert evaluate.main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    scores = said["recordings"]
    parts = {name: scores[name]["part"] for name in scores if "part" in scores[name]}
    assert parts == {"a": "never seen", "c": "never seen", "monday": "validation"}
    assert (scores["a"]["missing"], scores["c"]["missing"], scores["c"]["stands"]) == ([], ["lidar"], 0.0)
    assert "expected commands ['shoulder', 'elbow'] on arm/joint_trajectory" in scores["d"]["error"]
    assert "cannot be read" in scores["e"]["error"]
    assert said["all never seen"]["ticks"] == scores["a"]["ticks"] + scores["c"]["ticks"] > 70
    assert scores["monday"]["r2_previous"][0] > scores["monday"]["r2"][0]
    assert evaluate.main([*arguments, "--only", "d"]) == 1
    assert "expected commands" in capsys.readouterr().err


def test_nothing_is_told_from_zero(capsys):
    evaluate._say({"errors": 0, "all never seen": None}, as_json=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["errors", "0"], ["all", "never", "seen", "none"],
    ]  # fmt: skip


def record_told(path, *words, blind=()):
    """Four seconds of a robot that is told these, one after the other; no scan comes in the tenths that it is blind."""
    specs = [StreamSpec("scan", "scan", (), 10, 0), StreamSpec("text", "text", (), 0, 0)]
    with RecordingWriter(path, specs, {}) as recording:
        for i in range(40):
            at_ns = T0 + i * 100 * MS
            if i % (40 // len(words)) == 0:
                recording.write(Sample("text", at_ns, at_ns, words[i * len(words) // 40]))
            ranges = np.full(8, 1 + i / 40, np.float32)
            if i not in blind:
                recording.write(Sample("scan", at_ns, at_ns, Scan(ranges, 0.0, 0.5, 0.125, 12.0)))
            if i % 2 == 0:
                told = np.float32([[0.5 + i // 2 % 3]])
                recording.command("cmd_vel", Action(("linear_x",), told, 0.0), at_ns, at_ns)


def test_words_that_only_recordings_held_out_have_are_not_known(tmp_path, capsys):
    record_told(tmp_path / "bags" / "a", "go")
    record_told(tmp_path / "bags" / "b", "go", "dance")
    arguments = ["robot", "--data", str(tmp_path / "bags"), "rounds=[{steps: 2}]", "train.lanes=2", "train.ticks=6"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "data.validation=[b]"]) == 0
    assert "words that only recordings held out have, and it will not know: dance" in capsys.readouterr().out
    export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    assert Bundle.read(tmp_path / "bundle").vocabulary.words == ("go",)
    held_out = robot.validation(read_recipe(tmp_path / "run" / "recipe.yaml"))
    weight = torch.cat([batch.labels["weight"][0] for batch in held_out])
    # Told to dance, the robot stands, whatever its driver did.
    assert weight[:19].all() and not weight[20:].any()
    record_told(tmp_path / "bags" / "c", "jump")
    assert main([*arguments, "--out", str(tmp_path / "never"), "data.validation=[c]"]) == 2
    assert "data.validation: c: there is no tick at which the model would drive" in capsys.readouterr().err


def test_of_ticks_at_which_a_robot_is_blind_and_stands_nothing_is_learned(tmp_path):
    record_told(tmp_path / "bags" / "a", "go", blind=range(15, 30))
    arguments = ["robot", "--data", str(tmp_path / "bags"), "rounds=[{steps: 1}]", "train.lanes=2", "train.ticks=6"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    (log,) = robot._logs(read_recipe(tmp_path / "run" / "recipe.yaml"), [tmp_path / "bags" / "a"])
    blind, weight = log.mask[:, 0] == 0, log.labels["weight"]
    assert blind.sum() > 5 and not weight[blind].any() and weight[~blind].sum() > 10


def test_ticks_at_which_the_robot_would_stand_are_not_scored(tmp_path, capsys):
    """What it is told is required, and half of what is said here the model never heard."""
    for name, words in (("a", ("go",)), ("b", ("go", "dance")), ("c", ("dance",))):
        record_told(tmp_path / "bags" / name, *words)
        if name == "a":
            options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 2}]", "train.lanes=2", "train.ticks=6"]
            assert main(["robot", "--data", str(tmp_path / "bags"), *options]) == 0
            export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    capsys.readouterr()
    arguments = ["robot", "--data", str(tmp_path / "bags"), "--bundle", str(tmp_path / "bundle"), "--json"]
    assert evaluate.main(arguments) == 0
    scores = json.loads(capsys.readouterr().out)["recordings"]
    assert scores["a"]["part"] == "learned" and scores["b"]["part"] == "learned"  # of the same commands
    assert scores["b"]["unknown"] == ["dance"] and "unknown" not in scores["a"]
    assert scores["c"]["error"].endswith("got none; missing: [], not known: ['dance']")
    assert scores["a"]["stands"] == 0.0 and scores["b"]["stands"] == pytest.approx(0.5, abs=0.05)
    assert scores["b"]["ticks"] == pytest.approx(scores["a"]["ticks"] / 2, abs=2)
    # Of steps of 1, 1 and -2 about a variance of 2/3: the command before, though every other tick has the same answer.
    assert scores["a"]["r2_previous"] == [pytest.approx(-2, abs=0.2), None]


def test_recordings_that_are_held_out_choose_the_weights_and_when_to_stop(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        record(tmp_path / "bags" / name, rates=FEW_TOPICS)
    small = ["drive", "--data", str(tmp_path / "bags"), "train.lanes=2", "train.ticks=6", "--out"]
    arguments = [*small, str(tmp_path / "run"), "rounds=[{steps: 9}]", "train.save_every_steps=1", "train.patience=2"]
    assert main([*arguments, "data.validation=[c]"]) == 2
    assert "data.validation: expected a list of some of ['a', 'b'], in quotes, got ['c']" in capsys.readouterr().err
    assert main([*arguments, "data.validation=[2024_05_01]"]) == 2  # which is a number
    assert "expected a list of some of ['a', 'b'], in quotes, got [20240501]" in capsys.readouterr().err
    assert main([*arguments, "data.validation=[a, b]"]) == 2
    assert "data.validation: ['a', 'b'] leaves nothing to learn from" in capsys.readouterr().err
    losses, weights = iter(torch.tensor([3.0, 1.0, 2.0, 1.5])), []

    def judged(lesson, batches):
        assert [bool(batch.start) for batch in batches] == [True, *[False] * 4]  # b, from begin to end
        assert 0 < _validate(lesson, batches) == _validate(lesson, batches) and lesson.training
        weights.append({name: value.clone() for name, value in lesson.model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr("training.train._validate", judged)
    assert main([*arguments, "data.validation=[b]"]) == 0
    assert len(weights) == 4  # and then it stopped
    kept = load_file(tmp_path / "run" / "final.safetensors")
    assert all(torch.equal(value, weights[1][name]) for name, value in kept.items())
    monkeypatch.undo()
    assert main([*small, str(tmp_path / "short"), "rounds=[{steps: 2}]", "data.validation=[b]"]) == 0
    assert (tmp_path / "short" / "best0.safetensors").exists()  # the end is looked at, too


def test_recordings_with_errors_are_learned_from_only_if_told_to(tmp_path, capsys):
    record(tmp_path / "bags" / "good", rates=FEW_TOPICS)
    record(tmp_path / "bags" / "bad", edit=lambda topic, at_s, msg: topic != ARM)  # nobody commands
    arguments = ["drive", "--data", str(tmp_path / "bags"), "--out", str(tmp_path / "run")]
    arguments += ["rounds=[{steps: 1}]", "train.lanes=2", "train.ticks=6"]
    assert main(arguments) == 2
    assert "--go-on trains with the rest" in capsys.readouterr().err
    assert main([*arguments, "--go-on"]) == 0
    assert read_recipe(tmp_path / "run" / "recipe.yaml").data["recordings"].keys() == {str(tmp_path / "bags" / "good")}


def test_a_recipe_that_is_not_there_and_data_that_are_not_named(capsys):
    assert main(["digts"]) == main(["digits"]) == 2
    said = capsys.readouterr().err
    assert "no such recipe; did you mean 'digits'?" in said and "digits: where are the data? --data FOLDER" in said


@pytest.mark.parametrize(
    "option, said",
    [
        ("train.lanes", "train.lanes: expected key=value"),
        ("train.lanes=0", "train.lanes: expected at least 1, got 0"),
        ("train.lanes=many", "train: lanes: expected int, got 'many'"),
        ("train.lanes.x=1", "train.lanes.x: no key 'x', this is 4"),
        ("train.progressive=0.5", "train: progressive: expected tuple, got 0.5"),
        ("train.learning_rates.imge=1", "train.learning_rates: no key 'imge'; did you mean 'image'?"),
        ("rounds.9.steps=1", "rounds.9.steps: expected a number below 1, got '9'"),
        ("rounds=[]", "rounds: expected at least one"),
        ("rounds.0.steps=-1", "rounds.0: expected no steps, episodes, lanes and ticks below 0"),
        ("task=digts", "task: no task 'digts'; did you mean 'digits'?"),
        ("model.fusion_dimm=96", "model: no key 'fusion_dimm'; did you mean 'fusion_dim'?"),
        ("model.modality.imge.dropout=0.9", "model.modality: no key 'imge'; did you mean 'image'?"),
        ("model.modality.image.dropot=0.9", "model.modality.image: no key 'dropot'; did you mean 'dropout'?"),
        ("data.held=[x]", "data.held: no key 'held'; did you mean 'held_out'?"),
        ("data.absent=2", "data.absent: expected a number from 0 to 1, got 2"),
        ("data.absent=true", "data.absent: expected a number from 0 to 1, got True"),
        ("data.misheard=some", "data.misheard: expected a number from 0 to 1, got 'some'"),
        ("data.trust.audio=some", "data.trust.audio: expected a number above 0, got 'some'"),
        ("values.names=[a, b]", "values.names: expected ten, of the digits from 0 to 9, got ['a', 'b']"),
        ("max_gap_ms=0", "max_gap_ms: expected more than 0, got 0"),
        ("train=[", "while parsing"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused_before_anything_is_kept(tmp_path, capsys, option, said):
    assert main(["digits", "--data", "2024-05-01", "--out", str(tmp_path / "run"), *FEW, option]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_does_not_say_may_be_said(digits, tmp_path):
    options = ["train.weights.alone=0.5", "train.learning_rate=1e-3", "train.learning_rates.image=0.5"]
    options += ["model.modality.image.dropout=0.5", "model.modality.audio.liquid_units=32", "model.fusion_units=24"]
    trained(tmp_path, digits, *options, "train.warm_up_steps=0", "rounds=[{steps: 1}]")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.train.learning_rate, recipe.train.weights) == (0.001, {"alone": 0.5})
    encoders, core = build_model(recipe).encoders, build_model(recipe).core
    assert (encoders["image"].dropout.p, encoders["audio"].dropout.p, core.units) == (0.5, 0.3, 24)
    assert (encoders["image"].units, encoders["audio"].units) == (96, 32)


def test_an_epoch_of_fewer_batches_than_make_a_step_is_a_step(digits, tmp_path, capsys):
    trained(tmp_path, digits, "train.epochs=1", "train.accumulate=11")
    assert "1/1" in capsys.readouterr().err


def test_a_robots_sensors_may_differ_in_size(tmp_path):
    record(tmp_path / "bags" / "a", rates=FEW_TOPICS)
    options = ["--out", str(tmp_path / "run"), "rounds=[{steps: 1}]", "train.lanes=2", "train.ticks=6"]
    options += ["model.modality.dropout=0.1", "model.modality.front_image_raw.liquid_units=32"]
    assert main(["drive", "--data", str(tmp_path / "bags"), *options]) == 0
    encoders = robot.build_model(read_recipe(tmp_path / "run" / "recipe.yaml")).encoders
    assert (encoders["front_image_raw"].units, encoders["lidar"].units) == (32, 64)
    assert encoders["lidar"].dropout.p == 0.1


def test_ticks_come_with_the_anchor_that_is_left(monkeypatch, tmp_path):
    ticks = []
    monkeypatch.setattr("training.train.train", lambda recipe, *_: ticks.append(recipe.tick))
    (tmp_path / "scans.yaml").write_text((RECIPES / "drive.yaml").read_text().replace("anchor: camera", "anchor: scan"))
    assert main(["imu_can", "--data", "x", "--modalities", "can"]) == 0
    assert main([str(tmp_path / "scans.yaml"), "--modalities", "camera", "scan", "audio", "text"]) == 0
    assert [(tick["anchor"], tick["period_ms"]) for tick in ticks] == [("can", 12.048), ("scan", 66.667)]


def test_without_git_the_commit_is_not_known(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    trained(tmp_path, digits, "rounds=[{steps: 1}]")
    assert (tmp_path / "commit").read_text() == "unknown"


def test_an_absent_sensor_may_say_nan(digits):
    model = build_model(read_recipe(RECIPES / "digits.yaml")).train()
    inputs = {"image": torch.randn(4, 3, 28, 28), "audio": torch.full((4, 2, 40, 35), torch.nan)}
    model(inputs, mask=torch.tensor([[1.0, 0.0]] * 4)).output.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_digits_with_words_that_say_a_little_of_them(digits, tmp_path, capsys):
    options = ["--data", str(digits), "--out", str(tmp_path / "run"), "rounds=[{steps: 3}]", "train.lanes=16"]
    assert main(["digits_text", *options]) == 0
    export(tmp_path / "run" / "final.safetensors", tmp_path / "bundle", {})
    capsys.readouterr()
    assert evaluate.main(["digits", "--data", str(digits), "--bundle", str(tmp_path / "bundle"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    senses = {"image", "audio", "text", "image+audio", "image+text", "audio+text", "fused", "none"}
    assert senses <= scores.keys() and len({scores[name] for name in senses}) > 1  # which are there does matter
    draw = DigitDraw(*np.zeros((2, 4)), np.array([0, 3, 5, 8]), np.array([0, 0, 1, 1]))
    assert hints(draw) == ["it is even", "an odd one", "five or more", "five or more"]


def test_every_recipe_can_be_read():
    for path in RECIPES.glob("*.yaml"):
        if path.stem != "robot":  # what is not in it is measured
            assert path.stem.startswith(read_recipe(path).task)


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
    logs = {"attic.log": lines, "cellar.log": lines, "stairs.log": lines[:3]}
    write_zip(tmp_path / CARMEN, {name: "\n".join(log).encode() for name, log in logs.items()})
    scores = scored("lidar_velocity", tmp_path, tmp_path, capsys, "train.lanes=2", "data.held_out=[cellar]")
    assert scores["logs"].keys() == {"attic", "cellar", "stairs"}
    assert (scores["logs"]["stairs"]["windows"], scores["logs"]["stairs"]["r2"]) == (0, None)  # too short for any
    assert scores["logs"]["attic"]["r2_previous"][0] > 0.9 > scores["logs"]["attic"]["r2"][0]
    assert scores["logs"]["attic"]["windows"] > 20


def test_a_minute_of_any_car(tmp_path, capsys):
    write_zip(tmp_path / COMMA, comma(seconds=8, speed=lambda t: 10 + np.sin(t)))
    scores = scored("imu_can", tmp_path, tmp_path, capsys, "train.lanes=2", "data.learned=0.5")
    whole, rest = (scores["segments"]["car/7"][part] for part in ("whole", "not_learned"))
    assert whole["windows"] > rest["windows"] > 5
    assert whole["r2_present"][0] < 0.9  # what will be is not what is
