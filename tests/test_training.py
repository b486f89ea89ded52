"""The one training loop: recipes, resuming, what modality dropout does to time, and that it learns."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("accelerate", reason="training needs accelerate")
pytest.importorskip("mujoco", reason="episodes come from the simulator")

import numpy as np
from safetensors.torch import load_file

from mm_edge.errors import EdgeError
from mm_edge.sim.rooms import COLOURS, SHAPES, SYNONYMS, make_room, vocabulary
from training import drive
from training.batches import Lanes, Singles
from training.fusion import CrossModalAttentionFusion
from training.recipe import Round, read_recipe
from training.tables import load_tables
from training.train import RECIPES, main, train

SMALL = [
    "rounds=[{episodes: 2, first_seed: 5, student: 0.0, bursts: 0.05, steps: 5, lanes: 4, ticks: 1},"
    " {episodes: 1, first_seed: 8, student: 1.0, bursts: 0.0, steps: 3}]",
    "train.lanes=2",
    "train.ticks=8",
    "train.save_every_steps=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a small training, two rounds, the second with a student at the wheel."""
    out = tmp_path_factory.mktemp("run")
    train(read_recipe(RECIPES / "drive.yaml", SMALL), out, workers=1)
    return out


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("train.clip=0", "train.clip: expected more than 0, got 0"),
        ("train.learning_rate=-1", "train.learning_rate: expected 0 or more, got -1"),
        ("train.modality_dropout=1.5", "train.modality_dropout: expected a share from 0 to 1, got 1.5"),
        ("train.progressive=[30, 60]", "train.progressive: expected two shares of the steps that rise"),
        ("train.progressive=[0.6, 0.3]", "train.progressive: expected two shares of the steps that rise"),
        ("train.epochs=-1", "train.epochs: expected 0 or more, got -1"),
        ("train.patience=[", "train.patience: while parsing"),
        ("data.scale=[1]", "data.scale: expected a number above 0 for each of ['speed_change_mps', "),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        read_recipe(RECIPES / "imu_can.yaml", [override])


def test_a_training_leaves_weights_episodes_recipe_and_what_it_cost(trained):
    assert (trained / "round1.safetensors").exists()
    assert len(list((trained / "episodes" / "round0").glob("*.npz"))) == 2
    assert read_recipe(trained / "recipe.yaml").train.lanes == 2
    assert "round 1: train" in (trained / "cpu_minutes.json").read_text()


@pytest.mark.parametrize("step", [3, 7])  # the one after a checkpoint, of single ticks and of lanes that go on
def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(step, trained, tmp_path, monkeypatch):
    (tmp_path / "episodes").symlink_to(trained / "episodes")
    real, calls = drive.loss, iter(range(100))

    def power_cut(recipe, model, batch, out):
        assert batch.mask.shape[:2] == ((4, 1) if len(list(tmp_path.glob("round*"))) == 0 else (2, 8))
        if next(calls) == step:
            raise KeyboardInterrupt
        return real(recipe, model, batch, out)

    recipe = read_recipe(RECIPES / "drive.yaml", SMALL)
    monkeypatch.setattr(drive, "loss", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, workers=1)
    monkeypatch.setattr(drive, "loss", real)
    train(recipe, tmp_path, workers=1)
    want, got = (load_file(folder / "round1.safetensors") for folder in (trained, tmp_path))
    rounding = 1e-6 if torch.cuda.is_available() else 0.0  # a GPU adds up in another order each time
    for name, weights in want.items():
        torch.testing.assert_close(got[name], weights, rtol=rounding, atol=rounding)


def test_stopped_it_says_whether_there_are_weights_to_go_on_from(trained, tmp_path, monkeypatch, capsys):
    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(drive, "loss", power_cut)
    (tmp_path / "episodes").symlink_to(trained / "episodes")
    for what in ("with what was saved, which is no weights yet", "from what was saved last"):
        assert main(["drive", "--out", str(tmp_path), "--workers", "1", *SMALL]) == 130
        assert capsys.readouterr().err.endswith(f"stopped: the same command goes on {what}\n")
        shutil.copy(trained / "round0.safetensors", tmp_path)


def test_a_folder_of_another_recipe_is_refused(trained):
    with pytest.raises(ValueError, match=r"was begun by another recipe .*, not the same in .*rounds"):
        train(read_recipe(RECIPES / "drive.yaml"), trained, workers=1)


def test_what_found_no_data_may_be_begun_anew_by_another_recipe(tmp_path):
    for folder in ("nowhere", "elsewhere"):
        with pytest.raises(EdgeError, match=folder):
            train(read_recipe(RECIPES / "imu_can.yaml", [f"data.folder={tmp_path / folder}"]), tmp_path, workers=1)


def test_it_learns(trained):
    recipe = read_recipe(RECIPES / "drive.yaml", SMALL)
    model = drive.build_model(recipe)
    batch = Lanes([load_tables(p) for p in (trained / "episodes" / "round0").glob("*.npz")], 2, 16, seed=0).next()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(20):
        result, _ = model.scan(batch, model.zero_state(2))
        total, _ = drive.loss(recipe, model, batch, result)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_dropped_camera_slows_the_ticks_as_on_a_robot():
    """Tables with the camera dead from the start: absent, at its greatest age, and ticks 100 ms apart."""
    recipe = read_recipe(RECIPES / "drive.yaml")
    seed = next(s for s in range(1000) if ("camera", -1.0, np.inf) in drive.Dropout(s).spans)
    tables = drive.demonstrate(recipe, seed, recipe.rounds[0], student=None)
    assert len(tables.steps["camera"].x) == 0
    assert (tables.mask[:, 0] == 0).all()
    assert (tables.age[:, 0] == np.float32(0.33)).all()
    assert tables.dt[1:].min() >= 0.1
    assert tables.mask[:, -1].all()  # the command


def test_a_lane_begins_where_its_episode_does(trained):
    tables = [load_tables(p) for p in (trained / "episodes" / "round0").glob("*.npz")]
    lanes = Lanes(tables, lanes=2, ticks=8, seed=0)
    first, second = lanes.next(), lanes.next()
    assert first.start.all()
    assert not second.start.any()
    assert (first.steps["text"].at[:, -1] == 1).all()  # the command came in the first chunk


def test_single_ticks_come_from_anywhere_and_have_what_the_robot_had(trained):
    tables = [load_tables(p) for p in (trained / "episodes").glob("*/*.npz")]
    for i, t in enumerate(tables):
        t.labels["by_sound"] = np.float32(1000 * i + np.arange(len(t)))  # to know them by
    singles = Singles(tables, lanes=64, seed=0)
    batch = singles.next()
    drawn = [(tables[int(at) // 1000], int(at) % 1000) for at in batch.labels["by_sound"]]
    assert len({id(t) for t, _ in drawn}) == len(tables) and len({tick / len(t) for t, tick in drawn}) > 40
    assert {tick / len(t) > 0.5 for t, tick in drawn} == {True, False}
    assert batch.start.all() and batch.valid.all()
    for j, (name, steps) in enumerate(batch.steps.items()):
        lanes = steps.where[:, 0].tolist()
        assert {lane for lane in range(64) if batch.mask[lane, 0, j] > 0} <= {*lanes}  # what is there has a sample,
        for lane, x in zip(lanes, steps.x.numpy()):
            (t, tick), own = drawn[lane], drawn[lane][0].steps[name]
            assert np.array_equal(x, own.x[t.newest[tick, j] - 1])  # which is the newest
    resumed = Singles(tables, lanes=64, seed=1)
    resumed.load_state_dict(singles.state_dict())
    assert torch.equal(resumed.next().labels["by_sound"], singles.next().labels["by_sound"])


def test_a_round_may_have_lanes_and_ticks_of_its_own():
    recipe = read_recipe(RECIPES / "drive.yaml", ["train.lanes=32", "rounds.1.ticks=12"])
    sizes = [(r.train.lanes, r.train.ticks) for r in (recipe.of_round(i) for i in range(3))]
    assert sizes == [(256, 1), (32, 12), (32, 24)]


def test_terms_of_the_loss_have_weights(trained):
    plain = read_recipe(RECIPES / "drive.yaml", SMALL)
    doubled = read_recipe(RECIPES / "drive.yaml", [*SMALL, "train.weights.go=0.4"])
    model = drive.build_model(plain).eval()
    batch = Lanes([load_tables(p) for p in (trained / "episodes" / "round0").glob("*.npz")], 2, 8, seed=0).next()
    result, _ = model.scan(batch, model.zero_state(2))

    def loss(recipe):
        torch.manual_seed(0)  # the same questions
        return drive.loss(recipe, model, batch, result)

    (total, parts), (more, _) = loss(plain), loss(doubled)
    torch.testing.assert_close(more - total, 0.2 * parts["go"], rtol=1e-3, atol=1e-6)


def test_a_robot_without_a_sense_that_drive_needs_is_refused_before_an_episode_is_made(tmp_path, capsys):
    assert main(["drive", "--modalities", "scan", "audio", "text", "--out", str(tmp_path / "run")]) == 2
    assert "streams: drive cannot be learned without camera" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_keys_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="no key 'learning_rat'; did you mean 'learning_rate'"):
        read_recipe(RECIPES / "drive.yaml", ["train.learning_rat=1"])


def fusion() -> CrossModalAttentionFusion:
    torch.manual_seed(0)
    return CrossModalAttentionFusion([4, 4, 4], [0.3, 0.4, 0.0], dim=8, heads=2, outputs=8).eval()


def test_an_absent_sensors_token_does_not_matter_but_its_absence_does():
    model = fusion()
    tokens, age = [torch.randn(1, 4) for _ in range(3)], torch.zeros(1, 3)
    there, gone = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    other = [tokens[0], torch.full((1, 4), 100.0), tokens[2]]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, gone, age)[0], model(other, gone, age)[0])
        assert not torch.allclose(model(tokens, there, age)[0], model(tokens, gone, age)[0])
        assert model(tokens, gone, age)[1][0, 1] == 0  # its gate


def test_no_sensor_at_all_is_finite():
    tokens = [torch.zeros(1, 4)] * 3
    out, gates, attention = fusion()(tokens, torch.zeros(1, 3), torch.zeros(1, 3))
    for tensor in (out, gates, attention):
        assert torch.isfinite(tensor).all()


def test_age_is_an_input():
    model = fusion()
    torch.nn.init.normal_(model.age)
    tokens, mask = [torch.randn(1, 4) for _ in range(3)], torch.ones(1, 3)
    assert not torch.allclose(
        model(tokens, mask, torch.zeros(1, 3))[0], model(tokens, mask, torch.full((1, 3), 0.2))[0]
    )


def test_the_way_is_free_up_to_what_a_robot_would_touch():
    range_m = torch.full((1, 120), 6.0)
    range_m[0, 0] = 1.0  # a thin pole straight ahead
    range_m[0, 30] = 0.5  # and one to the left
    free = drive.free_m(range_m)[0]
    assert free[0] == pytest.approx(1.0 - drive.BESIDE_M)
    assert free[6] == pytest.approx(0.5 - drive.BESIDE_M)  # 90 degrees
    assert free[1] == pytest.approx(6.0 - drive.BESIDE_M)  # 15 degrees past the first, it is 0.26 m aside
    assert free[12] == pytest.approx(6.0 - drive.BESIDE_M)
    assert drive.free_m(range_m[:0]).shape == (0, drive.HEADINGS)  # a batch all of whose scans were dropped


class Guide:
    """In place of a model: it reads the command's words and finds what they name in the objects, which it is shown."""

    shape = (12,)

    def __init__(self):
        self.encoders, self.net, self.asked = {"text": lambda x: x.float(), "camera": self}, self, []
        self.encoders["text"].shape = self.shape

    def ask(self, objects, commands):
        scores = torch.zeros(len(objects), objects.shape[-1] + 1)
        for score, seen, command in zip(scores, objects, commands):
            words = [vocabulary()[int(i) - 1] for i in command if i > 0]
            colour = next(i for i, name in enumerate(COLOURS, 1) if name in words)
            shape = next(i for i, name in enumerate(SHAPES, 1) if {*SYNONYMS[name]} & {*words})
            self.asked.append((colour, shape))
            found = (seen[0] == colour) & (seen[1] == shape)
            score[:-1][found] = 50.0
            score[-1] = 0.0 if found.any() else 50.0
        return scores, scores


def test_questions_are_about_what_is_seen_or_nearly_that_and_have_an_answer():
    """A red ball in two cells and a blue pillar in one; and a frame in which nothing stands."""
    torch.manual_seed(0)
    objects = torch.zeros(2, 2, 6, dtype=torch.int64)
    objects[0, :, [0, 1]], objects[0, :, 4] = torch.tensor([[1, 1], [1, 1]]), torch.tensor([3, 3])
    objects, guide = objects[[0] * 300 + [1] * 300], Guide()
    loss = drive._questions(guide, objects, objects)
    asked = guide.asked[:300]
    balls, pillars = asked.count((1, 1)), asked.count((3, 3))
    kept = [alike + (1 - alike) / n for alike, n in zip(drive.ASKED_ALIKE, (len(COLOURS), len(SHAPES)))]
    assert (balls + pillars) / 300 == pytest.approx(np.prod(kept), abs=0.1)
    assert balls / pillars == pytest.approx(2, rel=0.3)  # by how much of the picture they fill
    assert len({*guide.asked[300:]}) == 18
    assert loss.item() == pytest.approx(balls / 600 * np.log(2), rel=1e-3)  # of two cells, either is right
    assert drive._questions(guide, objects[:0], objects[:0]) == 0


def seeded(seed):
    return np.random.default_rng(np.random.SeedSequence([seed, 0]))  # as the world makes its room


def in_a_mirror(room):
    def there(thing):
        return replace(thing, y=-thing.y, yaw=-thing.yaw)

    return replace(
        room,
        objects=tuple(map(there, room.objects)),
        obstacles=tuple(map(there, room.obstacles)),
        patches=tuple((x, -y, r) for x, y, r in room.patches),
        yaw=-room.yaw,
        shoves=tuple((at_s, x, -y, -torque) for at_s, x, y, torque in room.shoves),
    )


def test_a_mirrored_lesson_is_that_of_the_mirrored_room(monkeypatch):
    """As the simulator has it, but for noise and the floor's pattern, while both robots have been driven alike."""
    recipe = read_recipe(RECIPES / "drive.yaml")
    seed = next(s for s in range(1000) if make_room(seeded(s)).by_sound and not drive.Dropout(s).spans)
    lesson = drive.demonstrate(recipe, seed, Round(0), student=None)
    monkeypatch.setattr("mm_edge.sim.world.make_room", lambda rng: in_a_mirror(make_room(rng)))
    expected, got = drive.demonstrate(recipe, seed, Round(0), student=None), drive.mirrored(lesson)
    for name, label in expected.labels.items():
        np.testing.assert_allclose(got.labels[name][:30], np.float32(label[:30]), atol=0.02, err_msg=name)
    for name in ("camera", "scan", "imu", "audio"):
        mean, as_made, as_it_was = (np.float32(t.steps[name].x[:30]).mean(0) for t in (expected, got, lesson))
        assert np.abs(as_made - mean).max() < 0.5 * np.abs(as_it_was - mean).max(), name


def test_in_a_mirror_acceleration_to_the_side_and_turns_but_those_of_pitch_change_their_sign():
    lesson = drive.demonstrate(read_recipe(RECIPES / "drive.yaml"), 0, Round(0), student=None)
    lesson.steps["imu"].x[0] = np.arange(1, 8)  # acceleration, turns about the same axes, measured
    assert drive.mirrored(lesson).steps["imu"].x[0, 0].tolist() == [1, -2, 3, -4, 5, -6, 7]


def test_searching_the_expert_turns_to_the_left_in_a_mirror_too():
    recipe = read_recipe(RECIPES / "drive.yaml")
    lesson = drive.demonstrate(recipe, 0, Round(0), student=None)
    lesson.labels["action"][:2] = [[0, 1.2], [0.25, 1.2]]
    assert drive.mirrored(lesson).labels["action"][:2].tolist() == np.float32([[0, 1.2], [0.25, -1.2]]).tolist()
