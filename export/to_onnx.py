"""Export a checkpoint to a bundle.

    python -m export.to_onnx runs/drive/final.safetensors mm_edge/bundles/drive [--scores FILE]

Each encoder becomes a graph of one step with its state as inputs and outputs; the fusion another. The graphs must do
what torch does over 400 ticks of simulated driving with losses, gaps and resets, or nothing is written.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mm_edge.align import Aligner, Window
from mm_edge.bundle import write_bundle
from mm_edge.engine import golden
from mm_edge.engine.part import ModelInputs
from mm_edge.errors import EdgeError, EngineError, MissingDependency
from mm_edge.manifest import GOLDEN, VOCABULARY
from mm_edge.pipeline import model_inputs
from mm_edge.preprocess import Vocabulary
from mm_edge.sim.episode import Episode, ExpertDriver
from mm_edge.sim.rooms import vocabulary
from mm_edge.types import Sample
from training.drive import load_model
from training.models import EncoderState as State
from training.models import ModalityEncoder, RobotMultiSensorModel
from training.recipe import Recipe, read_recipe
from training.runner import step

OPSET = 20
PARITY_TICKS, GOLDEN_TICKS = 400, 8
MAX_ERROR, MAX_SPIKE_DISAGREEMENT = 1e-4, 1e-4
MAX_ERROR_AFTER_A_FLIP = 0.02  # a membrane at its threshold to the last bit may fire on one side alone


class EncoderPart(nn.Module):
    """One modality's step."""

    def __init__(self, encoder: ModalityEncoder, grid: tuple[int, int] | None):
        super().__init__()
        self.encoder, self.grid = encoder, grid

    def forward(
        self, x: Tensor, dt: Tensor, v_in: Tensor, h_in: Tensor, text: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if self.grid is None:
            features, looked = self.encoder.net(x), ()
        else:
            features, scores, _ = self.encoder.net(x, text)
            looked = (scores[:, :-1].softmax(-1).view(1, *self.grid),)
        h, _, state = self.encoder.step(features, State(v_in, h_in), dt)
        return h, *looked, state.v, h, _finite(state.v, h)


class FusionPart(nn.Module):
    """The fusion and the core's step, on every tick."""

    def __init__(self, model: RobotMultiSensorModel):
        super().__init__()
        self.model = model

    def forward(self, dt: Tensor, mask: Tensor, age: Tensor, h_in: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        fused, gates, _ = self.model.fusion(tokens, mask, age)
        h = self.model.core.step(fused, h_in, dt)
        action, _ = self.model.act(h)
        return action[:, None], gates, h, _finite(h, action)


def _finite(*tensors: Tensor) -> Tensor:
    """(1,): 1 if all are finite. No comparison with NaN or infinity is true."""
    return (sum(t.abs().sum() for t in tensors) < 1e30).float().view(1)


def export_parts(model: RobotMultiSensorModel) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The graphs and their entries in the manifest, in the order they run: the text first, the fusion last."""
    files, parts = {}, []
    one = torch.ones(1, 1)
    for spec in tqdm([*model.text_first, None], "export", leave=False):
        if spec is None:
            state, uses = {"h": torch.zeros(1, model.core.units)}, {s.name: f"{s.name}.token" for s in model.streams}
            part: nn.Module = FusionPart(model)
            # Different tensors: the exporter takes arguments that are the same tensor for one input.
            mask, age = torch.ones(1, len(model.streams)), torch.zeros(1, len(model.streams))
            tokens = [torch.zeros(1, model.encoders[s.name].cfc.units) for s in model.streams]
            args: tuple[Tensor, ...] = (one, mask, age, state["h"], *tokens)
            inputs, outputs = ["dt", "mask", "age", "h_in", *uses], ["action", "gates"]
        else:
            encoder = model.encoders[spec.name]
            state, uses = encoder.zero_state(1)._asdict(), {}
            x = torch.zeros(1, *spec.shape, dtype=getattr(torch, spec.dtype))
            args, inputs, outputs = (x, one, state["v"], state["h"]), ["x", "dt", "v_in", "h_in"], ["token"]
            if spec.kind == "image":
                uses, outputs = {"text": f"{model.text}.token"}, ["token", "attention"]
                inputs.append("text")
                args += (torch.zeros(1, model.encoders[model.text].cfc.units),)
            part = EncoderPart(encoder, encoder.net.grid if spec.kind == "image" else None)
        name = spec.name if spec else "fusion"
        files[f"{name}.onnx"] = _export(part, args, inputs, [*outputs, *(f"{s}_out" for s in state), "ok"])
        shapes = {k: list(v.shape) for k, v in state.items()}
        parts.append(
            {"name": name, "file": f"{name}.onnx", "stream": spec and spec.name, "state": shapes, "uses": uses}
        )
    return files, parts


def image_stream(model: RobotMultiSensorModel) -> str:
    """The stream whose attention is shown."""
    return next(spec.name for spec in model.streams if spec.kind == "image")


def _export(part: nn.Module, args: tuple[Tensor, ...], inputs: list[str], outputs: list[str]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            part.eval(), args, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
        )
    assert program is not None
    for value in program.model.graph.outputs:  # what each value was in torch is of no use on a robot
        value.metadata_props.clear()
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def simulated_inputs(recipe: Recipe, ticks: int) -> list[ModelInputs]:
    """What a model would be given on an expert's drives, with trouble: see `_Troubled`."""
    words, made, seed = Vocabulary(vocabulary()), list[ModelInputs](), 990_000
    while len(made) < ticks:
        episode = Episode(seed)
        driver = _Troubled(episode, recipe)
        episode.run(driver)
        drive = [model_inputs(recipe.streams, window, words) for window in driver.windows]
        made += [drive[0]._replace(reset=True), *drive[1:]]
        seed += 1
    return made[:ticks]


class _Troubled(ExpertDriver):
    """Keeps the windows of a drive on which a fifth of all samples are lost, one sensor (another on each drive) falls
    silent for so long that its state starts anew, and shortly before it is back all state does."""

    def __init__(self, episode: Episode, recipe: Recipe):
        super().__init__(episode, burst_probability=0.03)
        self.windows: list[Window] = []
        self._world, self._back_s = episode.world, 1.5 + recipe.max_gap_ms / 1e3
        self._restarted = False
        self._aligner = Aligner(recipe.streams, recipe.tick["period_ms"] / 1e3, recipe.max_gap_ms)
        self._names = [spec.name for spec in recipe.streams if not spec.latched]
        self._losses = np.random.default_rng(episode.world.seed)

    def push(self, sample: Sample) -> None:
        silent = self._names[self._world.seed % len(self._names)]
        lost = sample.stream in self._names and self._losses.random() < 0.2
        if not lost and not (sample.stream == silent and 1.0 <= self._world.t_s < self._back_s):
            super().push(sample)
            self._aligner.push(sample)

    def tick(self, now_ns: int) -> np.ndarray:
        if not self._restarted and self._world.t_s > self._back_s - 0.2:
            self._aligner.restart()
            self._restarted = True
        self.windows.append(self._aligner.window(now_ns))
        return super().tick(now_ns)


def parity(
    recipe: Recipe, model: RobotMultiSensorModel, files: dict[str, bytes], parts: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[ModelInputs, dict[str, np.ndarray]]]]:
    """Torch against plain ONNX Runtime on the same ticks, state carried on both sides.

    Returns the largest error of any action, and apart from it that of actions since a spike differed (until all state
    starts anew), the share of spikes that differ and each stream's spike rate; and some ticks from where all state
    starts anew in the midst of a drive, with their outputs.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependency("comparing torch with ONNX Runtime", "onnxruntime", "ort") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {p["name"]: onnxruntime.InferenceSession(files[p["file"]], options) for p in parts}
    state, memory = model.zero_state(1), _Memory(parts)
    worst, flips, neurons, trace = {False: 0.0, True: 0.0}, 0, 0, []
    flipped = False
    fired: dict[str, list[np.ndarray]] = {spec.name: [] for spec in recipe.streams}
    for inputs in simulated_inputs(recipe, PARITY_TICKS):
        action, spikes, state = step(model, inputs, state)
        for name, values in spikes.items():
            fired[name].append(values)
        out = memory.step(sessions, model, inputs)
        flipped &= not inputs.reset
        for name, encoder in state.encoders.items():  # a spike that differs leaves the membrane a threshold apart
            apart = np.abs(memory.state[name]["v"] - encoder.v.numpy()) > 0.5
            flips, neurons = flips + int(apart.sum()), neurons + apart.size
            flipped |= bool(apart.any())
        worst[flipped] = max(worst[flipped], float(np.abs(out["action"][0, 0] - action).max()))
        if trace or (inputs.reset and len(inputs.fresh) > 1):  # not the begin of a drive, when nothing has come
            trace.append((inputs, out))
    rates = {name: round(float(np.mean(values)), 3) for name, values in fired.items()}
    report = {"ticks": PARITY_TICKS, "max_action_error": worst[False], "max_action_error_after_a_flip": worst[True]}
    return {**report, "spike_disagreement": flips / neurons, "spike_rates": rates}, trace[:GOLDEN_TICKS]


class _Memory:
    """State and held outputs of the graphs, the plain way."""

    def __init__(self, parts: list[dict[str, Any]]):
        self.parts = parts
        self.clear()

    def clear(self) -> None:
        self.state = {p["name"]: {k: np.zeros(s, np.float32) for k, s in p["state"].items()} for p in self.parts}
        self.held: dict[str, np.ndarray] = {}

    def step(
        self, sessions: dict[str, Any], model: RobotMultiSensorModel, inputs: ModelInputs
    ) -> dict[str, np.ndarray]:
        if inputs.reset:
            self.clear()
        for part in self.parts:
            name = part["name"]
            if part["stream"] is None:
                feeds = {"mask": inputs.mask[None], "age": inputs.age[None], "dt": np.float32([[inputs.dt_s]])}
            elif name in inputs.fresh:
                x, dt_s, reset = inputs.fresh[name]
                feeds = {"x": x[None], "dt": np.float32([[dt_s]])}
                if reset:
                    self.state[name] = {k: np.zeros_like(v) for k, v in self.state[name].items()}
            else:
                continue
            for key, source in part["uses"].items():
                owner = model.encoders[source.split(".")[0]]
                feeds[key] = self.held.get(source, np.zeros((1, owner.cfc.units), np.float32))
            feeds |= {f"{k}_in": v for k, v in self.state[name].items()}
            names = [o.name for o in sessions[name].get_outputs()]
            values = dict(zip(names, sessions[name].run(None, feeds)))
            self.state[name] = {k: values[f"{k}_out"] for k in part["state"]}
            self.held |= {f"{name}.{k}": v for k, v in values.items()}
        name = image_stream(model)
        blank = np.zeros((1, *model.encoders[name].net.grid), np.float32)
        attention = self.held.get(f"{name}.attention", blank)
        return {"action": self.held["fusion.action"], "attention": attention, "gates": self.held["fusion.gates"]}


def export(checkpoint: Path, out: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Write the bundle of a checkpoint (`*.safetensors` beside its `recipe.yaml` and `commit`) to the folder `out`.

    Raises EngineError if the graphs do not do what torch does; then nothing is written.
    """
    recipe = read_recipe(checkpoint.parent / "recipe.yaml")
    commit = (checkpoint.parent / "commit").read_text()
    model = load_model(recipe, checkpoint)
    files, parts = export_parts(model)
    report, trace = parity(recipe, model, files, parts)
    if not (
        report["max_action_error"] <= MAX_ERROR
        and report["max_action_error_after_a_flip"] <= MAX_ERROR_AFTER_A_FLIP
        and report["spike_disagreement"] <= MAX_SPIKE_DISAGREEMENT
    ):
        raise EngineError(f"{checkpoint}: ONNX Runtime does not do what torch does: {report}")
    period_s = recipe.tick["period_ms"] / 1e3
    image = image_stream(model)
    manifest = {
        "task": recipe.task,
        "streams": [asdict(spec) for spec in recipe.streams],
        "tick": recipe.tick,
        "max_gap_ms": recipe.max_gap_ms,
        "parts": parts,
        "outputs": {
            "action": {"source": "fusion.action", "dt_s": period_s, **recipe.action},
            "attention": {"source": f"{image}.attention", "stream": image},
            "gates": {"source": "fusion.gates"},
        },
        "training": {"recipe": recipe.task, "seed": recipe.seed, "commit": commit, "parity": report},
        "scores": scores,
    }
    files[VOCABULARY] = json.dumps(vocabulary()).encode()
    files[GOLDEN] = golden.pack(recipe.streams, trace)
    card = Path(__file__).parents[1] / "training" / "recipes" / f"{recipe.task}.md"
    if card.exists():
        files["README.md"] = card.read_bytes()
    write_bundle(out, manifest, files)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .safetensors file beside its recipe.yaml")
    parser.add_argument("out", type=Path, help="folder of the bundle; replaced if it is there")
    parser.add_argument("--scores", type=Path, help="JSON of training.evaluate, to be kept in the manifest")
    args = parser.parse_args(argv)
    try:
        report = export(args.checkpoint, args.out, json.loads(args.scores.read_text()) if args.scores else {})
    except (EdgeError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6
    print(f"{args.out}: {size:.2f} MB")
    for name, value in report.items():
        print(f"{name:20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
