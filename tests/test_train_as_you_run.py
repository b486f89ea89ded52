"""What training saw is what the robot sees: the same inputs to the bit, the same outputs to 1e-4.

The model here has random weights; that the numbers agree does not depend on what it learned.
"""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("mujoco", reason="the episode comes from the simulator")
pytest.importorskip("rosbags", reason="the episode is a recording")

from safetensors.torch import save_file

from export.to_onnx import export
from mm_edge.bundle import Bundle
from mm_edge.commands.record import record_episode
from mm_edge.pipeline import Pipeline
from mm_edge.preprocess import Vocabulary
from mm_edge.replay import events, replay
from mm_edge.sim.rooms import vocabulary
from training import drive
from training.batches import make_batch
from training.recipe import read_recipe
from training.runner import step
from training.tables import Tables, build_tables, load_tables, save_tables

RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "drive.yaml"
SEED = 17


@pytest.fixture(scope="module")
def recipe():
    return read_recipe(RECIPE)


@pytest.fixture(scope="module")
def model(recipe):
    return drive.build_model(recipe).eval()


@pytest.fixture(scope="module")
def bundle(recipe, model, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("export")
    save_file(model.state_dict(), folder / "random.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE.read_text())
    (folder / "commit").write_text("a test")
    report = export(folder / "random.safetensors", folder / "bundle", scores={})
    assert report["ticks"] >= 200
    assert report["max_action_error"] < 1e-5
    assert report["spike_disagreement"] <= 1e-4
    return Bundle.read(folder / "bundle")


@pytest.fixture(scope="module")
def recording(recipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recordings") / "episode"
    record_episode(path, SEED, recipe.streams)
    return path


@pytest.fixture(scope="module")
def tables(recipe, recording) -> Tables:
    timeline = events(recording, recipe.streams)
    words = Vocabulary(vocabulary())
    return build_tables(timeline, recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms, words, drive.label)


@pytest.fixture(scope="module")
def replayed(bundle, recording):
    """The pipeline's outputs for the recording, and what its model was given on each tick."""
    pipeline, given = Pipeline(bundle, engine="cpu"), []
    model_step = pipeline.model.step

    def spy(inputs):
        given.append(inputs)
        return model_step(inputs)

    pipeline.model.step = spy
    return list(replay(pipeline, events(recording, bundle.streams, bundle.tick))), given


def test_the_pipeline_is_given_what_training_saw_to_the_bit(tables, replayed, recipe):
    _, given = replayed
    assert len(given) == len(tables) > 50
    for t, inputs in enumerate(given):
        np.testing.assert_array_equal(inputs.mask, tables.mask[t])
        np.testing.assert_array_equal(inputs.age, tables.age[t])
        assert np.float32(inputs.dt_s) == tables.dt[t]
        assert inputs.reset == tables.reset[t]
        for spec in recipe.streams:
            steps = tables.steps[spec.name]
            (now,) = np.flatnonzero(steps.tick == t)[:1].tolist() or [None]
            assert (now is not None) == (spec.name in inputs.fresh)
            if now is not None:
                x, dt_s, reset = inputs.fresh[spec.name]
                np.testing.assert_array_equal(x, steps.x[now])
                assert (np.float32(dt_s), reset) == (steps.dt[now], steps.reset[now])


def in_chunks(model, tables: Tables, ticks: int) -> np.ndarray:
    """The episode as training runs it: padded chunks of two lanes, state carried from one to the next."""
    state, actions = model.zero_state(2), []
    for begin in range(0, len(tables), ticks):
        chunk = (tables, begin, min(begin + ticks, len(tables)))
        batch = make_batch([chunk, chunk], [begin == 0] * 2, ticks, "text")
        with torch.no_grad():
            result, state = model.scan(batch, state)
        actions.append(result.output[1, : chunk[2] - begin].numpy())
    return np.concatenate(actions)


def test_chunks_of_any_length_give_the_same(model, tables):
    np.testing.assert_allclose(in_chunks(model, tables, 7), in_chunks(model, tables, 1000), atol=1e-5)


def test_torch_step_by_step_gives_what_training_computed(model, tables, replayed):
    _, given = replayed
    state, actions = model.zero_state(1), []
    for inputs in given:
        action, _, state, _, _ = step(model, inputs, state)
        actions.append(action)
    np.testing.assert_allclose(actions, in_chunks(model, tables, 24), atol=1e-5)


def test_the_pipeline_acts_as_training_computed(bundle, model, tables, replayed):
    outputs, _ = replayed
    want = in_chunks(model, tables, 24)
    limits = bundle.outputs.action
    checked = 0
    previous = np.zeros(2, np.float32)
    for output, action in zip(outputs, want):
        if output.action is None:
            continue
        got = output.action.values[0]
        free = (
            (action > limits.min)
            & (action < limits.max)
            & (np.abs(action - previous) < np.array(limits.max_rate) * 0.06)
        )
        np.testing.assert_allclose(got[free], action[free], atol=1e-4)  # elsewhere the limits speak
        checked, previous = checked + int(free.sum()), got
    assert checked > len(want)  # more than half of all values


def test_labels_are_the_experts(tables, recording):
    assert set(tables.labels) == {"action", "cells", "objects", "target", "sound", "by_sound"}
    moving = np.abs(tables.labels["action"]).sum(1) > 0
    assert moving.mean() > 0.3
    assert tables.labels["cells"].shape == (len(tables), 192)


def test_tables_survive_the_disk(tables, tmp_path):
    save_tables(tmp_path / "t.npz", tables)
    again = load_tables(tmp_path / "t.npz")
    np.testing.assert_array_equal(again.newest, tables.newest)
    np.testing.assert_array_equal(again.steps["camera"].x, tables.steps["camera"].x)
    np.testing.assert_array_equal(again.labels["action"], tables.labels["action"])
