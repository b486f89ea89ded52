"""The shipped drive model: small, honest about itself, and driving; without its spikes it does not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

onnx = pytest.importorskip("onnx", reason="silencing the spikes takes a change of the graphs")
pytest.importorskip("mujoco", reason="it drives in the simulator")

from mm_edge.bundle import Bundle, write_bundle
from mm_edge.faults import Finding
from training.evaluate import SHIPPED, evaluate, main, summarise_faults

WORLDS, SEED = 16, 910_000


@pytest.fixture(scope="module")
def shipped() -> dict:
    return evaluate(SHIPPED, WORLDS, SEED, frozenset(), (), 2)


def test_all_that_was_told_of_faults_is_counted_whatever_its_numbers():
    finding = Finding("camera:die@2", True, 310.0, ["camera jitters: 20 ms", "camera dead: silent for 0.30 s"])
    result = SimpleNamespace(findings=[finding], stop_m=[])
    said = summarise_faults([result, result])
    assert said["words"] == {"camera jitters: # ms": 2, "camera dead: silent for # s": 2}
    assert (said["detected"], said["detection_ms"]) == (2, {"p50": 310.0, "max": 310.0})


def test_where_nothing_is_wrong_nothing_is_said_to_be(shipped):
    assert shipped["false_alarms"] == 0, shipped["false_alarm_texts"]


def without_spikes(graph: bytes) -> bytes:
    """The graph with every spike multiplied by 0: the spikes are the only GreaterOrEqual, cast to float."""
    model = onnx.load_from_string(graph)
    nodes = model.graph.node
    at = next((i for i, node in enumerate(nodes) if node.op_type == "GreaterOrEqual"), None)
    if at is None:
        return graph  # the fusion has none
    cast = next(node for node in nodes if list(node.input) == list(nodes[at].output))
    spikes = cast.output[0]
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == spikes:
                node.input[i] = "silence"
    model.graph.initializer.append(onnx.helper.make_tensor("nought", onnx.TensorProto.FLOAT, [], [0.0]))
    after = list(nodes).index(cast) + 1
    nodes.insert(after, onnx.helper.make_node("Mul", [spikes, "nought"], ["silence"]))
    return model.SerializeToString()


def silenced(out: Path) -> Path:
    """The shipped bundle without its spikes; its golden trace is let pass."""
    bundle = Bundle.read(SHIPPED)
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    files = {n: without_spikes(d) if n.endswith(".onnx") else d for n, d in bundle.contents.items()}
    assert sum(files[n] != d for n, d in bundle.contents.items()) == len(bundle.streams)
    manifest = {k: v for k, v in manifest.items() if k not in ("format", "files")} | {"golden_atol": 1e6}
    write_bundle(out, manifest, files)
    return out


def test_it_is_small_and_says_how_well_it_drives():
    bundle = Bundle.read(SHIPPED)
    assert sum(len(data) for data in bundle.contents.values()) < 5e6
    assert bundle.scores["worlds"] == 200
    assert "README.md" in bundle.contents  # the model card
    parity = bundle.training["parity"]
    assert parity["ticks"] >= 200
    assert parity["max_action_error"] < 1e-4
    assert all(0.02 <= rate <= 0.6 for rate in parity["spike_rates"].values())


def test_it_drives(shipped):
    # Bounds for so few worlds; how well it drives is in the model card, over 200 of them. Chance is about 0.25.
    assert shipped["success"] >= 0.75
    assert shipped["collision_episodes"] <= 3
    assert shipped["attention_hit"] >= 0.7


def test_without_spikes_it_is_lost(shipped, tmp_path):
    lost = evaluate(silenced(tmp_path / "silenced"), WORLDS // 2, SEED, frozenset(), (), 2)  # each takes until its end
    assert lost["success"] <= 0.2
    assert lost["success"] < shipped["success"] - 0.2


def test_evaluate_ends_with_one_json_object(capsys):
    assert main(["drive", "--worlds", "2", "--seed", str(SEED), "--json", "--without", "camera"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["worlds"] == 2
    assert {"success", "collision_episodes", "alarm_obeyed", "success_by_task"} <= scores.keys()


@pytest.mark.parametrize(
    "flags",
    [
        ["--all-masks", "--fault", "camera:die@2"], ["--all-faults", "--without", "camera"],
        ["--all-masks", "--all-faults"], ["--expert", "--all-faults"],
    ],
)  # fmt: skip
def test_what_cannot_be_asked_at_once_is_refused_before_anything_runs(flags, capsys):
    with pytest.raises(SystemExit):
        main(["drive", *flags])
    assert "--all-" in capsys.readouterr().err.splitlines()[-1]


def test_the_expert_is_measured_in_the_same_worlds(capsys):
    assert main(["drive", "--worlds", "3", "--seed", str(SEED), "--json", "--expert"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["success"] == 1.0
