"""What a model is compared with is as large as it is, trained alike, and may win."""

import gc
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
for name in ("accelerate", "matplotlib", "ncps"):
    pytest.importorskip(name, reason=f"comparing needs {name}: pip install -e .[compare]")

from mm_edge.replay import Tick
from mm_edge.types import NS, Sample
from tests.test_real_data import CARMEN, COMMA, comma, flaser, write_zip
from training import compare, drive
from training.fusion import FusionStrategy
from training.recipe import make_recipe, read_recipe, read_yaml
from training.tables import save_tables
from training.train import RECIPES, check_recipe
from training.windows import r2

LOG = [e for i in range(300) for e in (Sample("scan", i * NS, i * NS, i), Tick(i * NS, {}))]


def samples(events) -> list[int]:
    return [event.data for event in events if isinstance(event, Sample)]


def test_a_third_of_the_rate_is_every_third_sample_at_all_ticks():
    thin = compare.every_third(LOG)
    assert samples(thin) == list(range(2, 300, 3))
    assert sum(isinstance(event, Tick) for event in thin) == 300


def test_three_in_ten_are_lost():
    assert len(samples(compare.lost(LOG))) == 224  # of 300, by the seed


def test_late_samples_keep_their_stamps_and_come_in_the_order_in_which_they_arrive():
    moved = [event for event in compare.late(LOG) if isinstance(event, Sample)]
    assert sorted(event.stamp_ns for event in moved) == [i * NS for i in range(300)]
    arrivals = [event.arrival_ns for event in moved]
    assert arrivals == sorted(arrivals)
    assert 2 < max((event.arrival_ns - event.stamp_ns) / NS for event in moved) < 3


def test_a_command_is_neither_thinned_out_nor_lost_nor_late():
    said = [Sample("text", i, i, text) for i, text in enumerate(("stop", "go"))]
    for change in (compare.every_third, compare.lost, compare.late):
        assert [event for event in change([*said, *LOG]) if event in said] == said


def test_an_interval_by_hand():
    mean, half = compare.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)


@pytest.mark.parametrize("task", ["digits", "drive", "events", "imu_can", "lidar_velocity", "steering"])
def test_all_are_as_large_as_the_shipped_model_but_the_senses_alone(task):
    recipe = read_recipe(RECIPES / f"{task}.yaml")
    sizes = {name: compare.parameters(compare._model(raw)) for name, raw in compare.variants(recipe).items()}
    shipped = sizes.pop(compare.SHIPPED)
    assert {"liquid, no spikes", "concatenation"} <= sizes.keys()
    assert ({"GRU", "GRU + dt", "ncps CfC"} <= sizes.keys()) == (task != "digits")  # which remembers nothing
    fusions = {f"{s.value} fusion" for s in FusionStrategy if s.value != recipe.model["fusion_strategy"]}
    assert (sizes.keys() & fusions) == (fusions if task in ("digits", "drive", "events", "imu_can") else set())
    for name, size in sizes.items():
        assert size == pytest.approx(shipped, rel=0.03) or name.endswith("alone"), name


def test_what_a_stream_has_of_its_own_is_varied_like_the_rest():
    own = ["model.modality.imu={num_spike_steps: 1, backbone: ltc, liquid_units: 48}", "train.ticks=2"]
    found = compare.variants(read_recipe(RECIPES / "imu_can.yaml", own))
    imu = {name: raw["model"]["modality"]["imu"] for name, raw in found.items() if not name.endswith("alone")}
    assert imu["early fusion"]["backbone"] == imu["liquid, no spikes"]["backbone"] == "ltc"
    assert (imu["GRU"]["backbone"], imu["GRU"]["num_spike_steps"]) == ("gru", 0)
    assert imu["concatenation"]["backbone"] == "none" and imu["concatenation"]["liquid_units"] > 48


def test_what_only_several_senses_can_have_is_not_asked_of_one_alone():
    rates = "train.learning_rates={image: 0.5, audio: 2.0}"
    recipe = read_recipe(RECIPES / "digits.yaml", ["train.modality_dropout=0.2", rates])
    for raw in compare.variants(recipe).values():
        with torch.device("meta"):
            check_recipe(make_recipe(raw, [], ""))


def test_a_gru_that_wins_is_said_to():
    recipe = read_recipe(RECIPES / "lidar_velocity.yaml")

    def trials(*values: float) -> list[dict]:
        scores = [{"as recorded": {"scan": {"linear": v, "angular": 0.5}}} for v in values]
        return [{"scores": each, "commit": "abc"} for each in scores]

    results = {
        "liquid-spike": trials(0.50, 0.52, 0.51),
        "GRU": trials(0.60, 0.61, 0.62),
        "ncps CfC": trials(0.4, 0.7, 0.5),
    }
    linear, angular, chance = compare.verdicts(recipe, results)
    assert "better: GRU (+0.100 +- 0.025)" in linear and "worse: none" in linear
    assert "better: none; worse: none" in angular and chance.startswith("4 comparisons")
    results["GRU"][1]["commit"] = "def"
    assert compare.verdicts(recipe, results)[0] == "not all were trained by the same code: abc, def"


def test_a_label_that_never_varies_has_no_r2_and_shows_no_difference():
    true = np.tile(np.array([[1.0, 0.3], [3.0, 0.3]], np.float32), (5000, 1))
    assert r2(true + np.float32(1), true) == [0.0, None]
    assert r2(true[:0], true[:0]) is None
    recipe = read_recipe(RECIPES / "lidar_velocity.yaml")
    results = {
        name: [
            {"scores": {"as recorded": {"scan": {"linear": v, "angular": None}}}, "commit": "abc"}
            for v in (low, low + 0.01)
        ]
        for name, low in (("liquid-spike", 0.5), ("GRU", 0.2))
    }
    linear, angular, chance = compare.verdicts(recipe, results)
    assert "worse: GRU" in linear and chance.startswith("1 comparisons")
    assert angular == "R2 of the angular velocity, as recorded: none, since it never varies there"


def test_the_report_of_a_folder(tmp_path, capsys):
    lines = [flaser(10 + i / 6, i * i / 500, 0, 0.0, ranges=[5 - i * i / 500] * 180) for i in range(40)]
    write_zip(tmp_path / CARMEN, {f"{name}.log": "\n".join(lines).encode() for name in ("attic", "cellar")})
    arguments = ["lidar_velocity", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "2"]
    arguments += ["rounds=[{steps: 1}]", "train.lanes=2", "data.held_out=[cellar]"]
    assert compare.main(arguments) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    for words in (
        "GRU + dt",
        "30 % lost",
        "spike rate of scan",
        "data:image/png",
        "What was known last",
        str(tmp_path),
    ):
        assert words in page
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["GRU"][0]["rates"] == {} and 0 < results["liquid-spike"][0]["rates"]["scan"] < 1
    assert f"{results['GRU'][0]['windows']} windows that none learned by, of ticks: 6" in page
    assert compare.main([*arguments, "train.lanes=4"]) == 2
    assert "not the same in train.lanes; remove" in capsys.readouterr().err
    # What is trained already is only read.
    (tmp_path / "out" / "GRU" / "1" / "trial.json").write_text(json.dumps({**results["GRU"][0], "parameters": 7}))
    assert compare.main(arguments) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["GRU"][0]["parameters"] == 7


def test_what_a_window_holds_is_counted_once_and_let_go():
    class Model(torch.nn.Linear):
        def zero_state(self, lanes):
            return None

        def scan(self, batch, state):
            return torch.tanh(self(batch.x)), state

    model, batch = Model(100, 50), SimpleNamespace(start=torch.zeros(4), x=torch.randn(4, 100))
    assert compare._held_mib(model, batch) == round((100 + 50) * 4 / 2**20, 3)
    gone = weakref.ref(model.weight)
    del model
    gc.collect()
    assert gone() is None


def test_some_variants_alone_are_compared_with_the_shipped_one(tmp_path, capsys):
    write_zip(tmp_path / COMMA, comma(seconds=8, speed=lambda t: 10 + np.sin(t)))
    arguments = ["imu_can", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "2"]
    arguments += ["rounds=[{steps: 1}]", "train.lanes=2", "data.learned=0.5", "--variants", "GRU + dt"]
    assert compare.main(arguments) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()).keys() == {"liquid-spike", "GRU + dt"}
    assert compare.main([*arguments, "LSTM"]) == 2
    assert "--variants: expected some of ['liquid-spike', " in capsys.readouterr().err


def test_a_sense_that_is_missing_and_samples_that_are_late_are_scored_apart(tmp_path):
    write_zip(tmp_path / COMMA, comma(seconds=8, speed=lambda t: 10 + np.sin(t)))
    options = [f"data.folder={tmp_path}", "rounds=[{steps: 1}]", "train.lanes=2", "data.learned=0.5"]
    recipe = read_recipe(RECIPES / "imu_can.yaml", options)
    weights = compare.train(recipe, tmp_path / "run", workers=1)
    scores = compare.trial(recipe, weights)["scores"]
    assert list(scores["as recorded"]) == ["imu+can", "imu", "can"]
    assert all(list(scores[condition]) == ["imu+can"] for condition in compare.CONDITIONS if condition != "as recorded")
    assert scores["a third of the rate"] != {"imu+can": scores["as recorded"]["imu+can"]}


def test_drive_is_learned_by_the_lessons_of_another_training_and_scored_at_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "EXAM", range(980_000, 980_001))
    monkeypatch.setattr(drive, "LOOP", range(970_000, 970_001))
    monkeypatch.setattr(drive, "LOOP_S", 1.0)
    raw = read_yaml((RECIPES / "drive.yaml").read_text(), "drive")
    raw["data"] = {"folder": str(tmp_path)}
    recipe = make_recipe(raw, ["rounds=[{steps: 1}]", "train.lanes=2"], "drive")
    with pytest.raises(ValueError, match="expected a drive's training, as in runs/drive; got no episodes"):
        compare.train(recipe, tmp_path / "run", workers=1)
    lesson = tmp_path / "episodes" / "round0" / "1000.npz"
    lesson.parent.mkdir(parents=True)
    save_tables(lesson, drive.demonstrate(recipe, 1000, recipe.rounds[0], student=None))
    trial = compare.trial(recipe, compare.train(recipe, tmp_path / "run", workers=1))
    scores = trial["scores"]["as recorded"]
    assert len(scores) == 16 and all("text" in senses for senses in scores)  # subsets of four senses, and a command
    assert all(score.keys() == {"speed", "turn"} for score in scores.values())
    assert trial["loop"] == {"success": 0.0, "no collision": 1.0}  # a second is not enough for either
    page = compare.report(recipe, {compare.SHIPPED: [trial, trial]})
    assert "Shares of 1 worlds" in page and "success" in page
