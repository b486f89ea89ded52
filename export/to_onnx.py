"""Export a checkpoint to a bundle.

    python -m export.to_onnx runs/drive/final.safetensors mm_edge/bundles/drive [--scores FILE]

Each encoder becomes a graph of one step with its state as inputs and outputs; the fusion another. The graphs must do
what torch does over 400 ticks of simulated driving with losses, gaps and resets, or nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from export import language
from export.graph import MAX_ERROR, Session, export_graph, finite
from mm_edge.bundle import write_bundle
from mm_edge.engine import golden
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.errors import EdgeError, EngineError
from mm_edge.manifest import GOLDEN, VOCABULARY
from mm_edge.types import StreamSpec
from training import robot
from training.models import ModalityEncoder, MultiModalFusionNetwork
from training.nets import SCAN_RANGE_MAX_M, ModalityConfig, ModalityType
from training.recipe import Recipe, read_recipe, read_yaml
from training.runner import step
from training.train import RECIPES, TASKS
from training.vision_language import VisionLanguageModel

PARITY_TICKS, GOLDEN_TICKS = 400, 8
MAX_SPIKE_DISAGREEMENT = 1e-4
MAX_ERROR_AFTER_A_FLIP = 0.05  # a membrane at its threshold to the last bit may fire on one side alone


class EncoderPart(nn.Module):
    """One modality's step. `rest`: the state's tensors that are not empty, and the text's token if the net asks."""

    def __init__(self, encoder: ModalityEncoder):
        super().__init__()
        self.encoder = encoder
        self.carried = carried(encoder)

    def forward(self, x: Tensor, dt: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state = self.encoder.zero_state(1)._replace(**dict(zip(self.carried, rest)))
        sample, clip = self.encoder.receive(x, state.clip)
        features, scores, _ = self.encoder.features(sample, rest[-1] if self.encoder.asks else None)
        looked = () if scores is None else (scores[:, :-1].softmax(-1).view(1, *self.encoder.net.grid),)
        h, spikes, state = self.encoder.step(features, state._replace(clip=clip), dt)
        rates = (spikes,) if has_rates(self.encoder) else ()
        after = [getattr(state, name) for name in self.carried]
        return h, *looked, *rates, *after, finite(*after)


def carried(encoder: ModalityEncoder) -> dict[str, Tensor]:
    """Its state from rest, batch 1, less what it does not have."""
    return {name: value for name, value in encoder.zero_state(1)._asdict().items() if value.numel()}


def has_rates(encoder: ModalityEncoder) -> bool:
    """Whether its spikes are rates, which no membrane tells afterwards: its part puts them out, to be compared."""
    return encoder.config.num_spike_steps > 1


class FusionPart(nn.Module):
    """The fusion and the core's step, on every tick. Puts out an action (1, 1, A), or values (1, n): of `classes`
    their probabilities."""

    def __init__(self, model: MultiModalFusionNetwork, output: str, classes: bool):
        super().__init__()
        self.model, self.output, self.classes = model, output, classes

    def forward(self, dt: Tensor, mask: Tensor, age: Tensor, h_in: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        fused, gates, _ = self.model.fusion(tokens, mask, age)
        h = self.model.core.step(fused, h_in, dt)
        said = self.model.act(self.model.head(h))
        if self.classes:
            said = said.softmax(-1)
        return said[:, None] if self.output == "action" else said, gates, h, finite(h, said)


def export_parts(
    model: MultiModalFusionNetwork, streams: Sequence[StreamSpec], output: str, classes: bool = False
) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The graphs and their entries in the manifest, in the order they run: the text first, the fusion last.

    `streams`: what each modality gets on a robot, in the model's order. `output`: "action" or "values".
    """
    files, parts = {}, []
    one, specs = torch.ones(1, 1), {spec.name: spec for spec in streams}
    for name in tqdm([*model.text_first, None], "export", leave=False):
        if name is None:
            state = {"h": torch.zeros(1, model.core.units)}
            uses = {f"token{i}": f"{n}.token" for i, n in enumerate(model.names)}  # which may be called "mask"
            part: nn.Module = FusionPart(model, output, classes)
            # Different tensors: the exporter takes arguments that are the same tensor for one input.
            mask, age = torch.ones(1, len(model.names)), torch.zeros(1, len(model.names))
            tokens = [torch.zeros(1, encoder.units) for encoder in model.encoders.values()]
            args: tuple[Tensor, ...] = (one, mask, age, state["h"], *tokens)
            inputs, outputs = ["dt", "mask", "age", "h_in", *uses], [output, "gates"]
        else:
            spec, encoder = specs[name], model.encoders[name]
            state, uses = carried(encoder), {}
            x = torch.zeros(1, *spec.shape, dtype=getattr(torch, spec.dtype))
            args, inputs, outputs = (x, one, *state.values()), ["x", "dt", *(f"{s}_in" for s in state)], ["token"]
            if encoder.asks:
                uses, outputs = {"text": f"{model.text}.token"}, ["token", "attention"]
                inputs.append("text")
                args += (torch.zeros(1, model.encoders[model.text].units),)
            if has_rates(encoder):
                outputs = [*outputs, "rates"]
            part = EncoderPart(encoder)
        file = f"{name or 'fusion'}.onnx"
        files[file] = export_graph(part, args, inputs, [*outputs, *(f"{s}_out" for s in state), "ok"])
        shapes = {k: list(v.shape) for k, v in state.items()}
        parts.append({"name": name or "fusion", "file": file, "stream": name, "state": shapes, "uses": uses})
    return files, parts


def asked(model: MultiModalFusionNetwork) -> str | None:
    """The stream whose attention is shown."""
    return next((name for name, encoder in model.encoders.items() if encoder.asks), None)


def random_inputs(streams: Sequence[StreamSpec], words: int, period_s: float, ticks: int) -> list[ModelInputs]:
    """What no robot sees, for a model without a world of its own: noise, a fifth of all samples lost, sensors that are
    absent for a while, and all state starting anew."""
    rng, made = np.random.default_rng(0), list[ModelInputs]()
    for tick in range(ticks):
        reset, fresh = tick % 67 == 0, {}
        gone = streams[tick // 40 % len(streams)].name if tick // 20 % 2 and len(streams) > 1 else None
        for spec in streams:
            if spec.name != gone and (reset or rng.random() > 0.2):
                if spec.kind == "text":
                    x = rng.integers(1, words + 1, spec.shape)
                elif spec.dtype == "uint8":
                    x = rng.integers(0, 256, spec.shape, np.uint8)
                elif spec.kind in ("scan", "points"):
                    x = rng.uniform(size=spec.shape).astype(np.float32)
                else:
                    x = rng.normal(size=spec.shape).astype(np.float32)
                fresh[spec.name] = Fresh(x, float(rng.uniform(0.5, 2.5)) * period_s, reset or rng.random() < 0.02)
        mask = np.array([spec.name != gone for spec in streams], np.float32)
        age = rng.uniform(0, [max(spec.max_age_ms, 1) / 1e3 for spec in streams]).astype(np.float32)
        made.append(ModelInputs(fresh, mask, age, float(rng.uniform(0.5, 2) * period_s), reset))
    return made


def parity(
    model: MultiModalFusionNetwork,
    files: dict[str, bytes],
    parts: list[dict[str, Any]],
    output: str,
    ticks: Sequence[ModelInputs],
    classes: bool = False,
) -> tuple[dict[str, Any], list[tuple[ModelInputs, dict[str, np.ndarray]]]]:
    """Torch against plain ONNX Runtime on the same ticks, state carried on both sides.

    Returns the largest error of any output, gate or attention, and apart from it that of those since a spike differed
    (until all state starts anew), the share of spikes that differ and each stream's spike rate; and some ticks from
    where all state starts anew in the midst of a drive, with their outputs.
    """
    sessions = {p["name"]: Session(files[p["file"]]) for p in parts}
    state, memory = model.zero_state(1), _Memory(model, parts, output)
    worst, flips, neurons, trace = {False: 0.0, True: 0.0}, 0, 0, []
    flipped = False
    fired: dict[str, list[np.ndarray]] = {name: [] for name in model.names}
    for inputs in ticks:
        said, spikes, state, gates, attention = step(model, inputs, state)
        if classes:
            said = torch.from_numpy(said).softmax(-1).numpy()
        for name, values in spikes.items():
            fired[name].append(values)
        out = memory.step(sessions, inputs)
        flipped &= not inputs.reset
        for name, encoder in state.encoders.items():
            if not has_rates(model.encoders[name]):  # a spike that differs leaves the membrane a threshold apart
                apart = np.abs(memory.state[name].get("v", np.zeros((1, 0))) - encoder.v.numpy()) > 0.5
            elif name in spikes:  # and a rate a spike step apart
                apart = np.abs(memory.held[f"{name}.rates"] - spikes[name]) > 0.5 / model.configs[name].num_spike_steps
            else:
                continue
            flips, neurons = flips + int(apart.sum()), neurons + apart.size
            flipped |= bool(apart.any())
        looked = np.zeros(0) if attention is None else out["attention"].ravel() - attention.ravel()
        off = np.abs(np.concatenate([out[output].ravel() - said, out["gates"].ravel() - gates, looked])).max()
        worst[flipped] = float(np.maximum(worst[flipped], off))  # of NumPy: it keeps NaN
        if trace or _begins(inputs, model):
            trace.append((inputs, out))
    rates = {name: round(float(np.mean(values)), 3) for name, values in fired.items() if values}
    report = {
        "ticks": len(ticks),
        f"max_{output}_error": worst[False],
        f"max_{output}_error_after_a_flip": worst[True],
        "spike_disagreement": flips / max(1, neurons),
        "spike_rates": rates,
    }
    if not (
        worst[False] <= MAX_ERROR
        and worst[True] <= MAX_ERROR_AFTER_A_FLIP
        and report["spike_disagreement"] <= MAX_SPIKE_DISAGREEMENT
    ):
        raise EngineError(f"ONNX Runtime does not do what torch does: {report}")
    return report, trace[:GOLDEN_TICKS]


def _begins(inputs: ModelInputs, model: MultiModalFusionNetwork) -> bool:
    """Whether all state starts anew, and not at the begin of a drive, when hardly anything has come."""
    return inputs.reset and not len(inputs.fresh) == 1 < len(model.names)


class _Memory:
    """State and held outputs of the graphs, the plain way."""

    def __init__(self, model: MultiModalFusionNetwork, parts: list[dict[str, Any]], output: str):
        self.model, self.parts, self.output = model, parts, output
        self.clear()

    def clear(self) -> None:
        self.state = {p["name"]: {k: np.zeros(s, np.float32) for k, s in p["state"].items()} for p in self.parts}
        self.held: dict[str, np.ndarray] = {}

    def step(self, sessions: dict[str, Session], inputs: ModelInputs) -> dict[str, np.ndarray]:
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
                owner = self.model.encoders[source.split(".")[0]]
                feeds[key] = self.held.get(source, np.zeros((1, owner.units), np.float32))
            feeds |= {f"{k}_in": v for k, v in self.state[name].items()}
            values = sessions[name](**feeds)
            self.state[name] = {k: values[f"{k}_out"] for k in part["state"]}
            self.held |= {f"{name}.{k}": v for k, v in values.items()}
        said = {self.output: self.held[f"fusion.{self.output}"], "gates": self.held["fusion.gates"]}
        if shown := asked(self.model):
            blank = np.zeros((1, *self.model.encoders[shown].net.grid), np.float32)
            said["attention"] = self.held.get(f"{shown}.attention", blank)
        return said


def _expect_stream(spec: StreamSpec, config: ModalityConfig, words: int) -> None:
    """Raises ValueError unless the stream gives what the modality takes. What a config leaves open (0) may be anything,
    and so may the kind of a custom one."""
    kind = {"video": "image", "custom": spec.kind}.get(config.type.value, config.type.value)
    images = config.type in (ModalityType.VISION, ModalityType.VIDEO)
    shape = (*config.shape[-2:], config.shape[-3]) if images else config.shape
    range_max_m = config.range_max_m or (SCAN_RANGE_MAX_M if config.type is ModalityType.SCAN else spec.range_max_m)
    max_age_ms = spec.max_age_ms if spec.latched else config.max_age_s * 1e3
    for what, want, got in (
        ("kind", kind, spec.kind),
        ("shape", shape, tuple(spec.shape)),
        ("range_max_m", range_max_m, spec.range_max_m),
        ("max_age_ms", round(max_age_ms, 3), round(spec.max_age_ms, 3)),
        ("sample_rate_hz", config.sample_rate_hz or spec.sample_rate_hz, spec.sample_rate_hz),
        ("words", config.vocabulary or words, words),
    ):
        if want != got:
            raise ValueError(f"{spec.name}: {what}: expected {want} as the model has it, got {got}")


def export_model(
    model: MultiModalFusionNetwork,
    streams: Sequence[StreamSpec],
    out: Path,
    outputs: dict[str, Any],
    *,
    task: str = "custom",
    tick: dict[str, Any] | None = None,
    max_gap_ms: float = 2000.0,
    words: Sequence[str] = (),
    ticks: Sequence[ModelInputs] | None = None,
    training: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    card: str | None = None,
) -> dict[str, Any]:
    """Write the bundle of any model of the family to the folder `out`; what of parity is worth knowing is returned.

    Args:
        streams: what each modality gets on a robot, in the model's order.
        outputs: {"action": ...} or {"values": {"names": [...], "classes": bool}}, as in the manifest, without sources.
        words: of a text, as many as its modality's vocabulary has.
        tick: {"anchor", "period_ms", "max_period_ms"}; by the first stream's and the model's period.
        ticks: what to compare torch and ONNX on; noise if None. card: the model card.

    Raises EngineError if the graphs do not do what torch does; then nothing is written. ValueError, which names the
    stream, if one is not what its modality was made for, or if all state starts anew on no tick.
    """
    if [spec.name for spec in streams] != list(model.names):
        raise ValueError(f"streams: expected {list(model.names)}, got {[spec.name for spec in streams]}")
    for spec in streams:
        _expect_stream(spec, model.configs[spec.name], len(words))
    if len(outputs) != 1:
        raise ValueError(f"outputs: expected either an action or values, got {sorted(outputs)}")
    ((output, said),) = outputs.items()
    said = dict(said)
    classes = said.pop("classes", False)
    if len(names := said.get("names", ())) != model.output_dim:
        raise ValueError(
            f"outputs.{output}.names: expected {model.output_dim}, as the model puts out, got {list(names)}"
        )
    model = copy.deepcopy(model).cpu().eval()  # the caller's stays as it is
    if ticks is None:
        ticks = random_inputs(streams, len(words), model.tick_period_s, PARITY_TICKS)
    if not any(_begins(inputs, model) for inputs in ticks):
        want = "one with reset" + (" and more than one stream fresh" if len(streams) > 1 else "")
        raise ValueError(f"ticks: expected {want}, got none among {len(ticks)}")
    files, parts = export_parts(model, streams, output, classes)
    report, trace = parity(model, files, parts, output, ticks, classes)
    period_ms = round(model.tick_period_s * 1e3, 3)
    shown = asked(model)
    manifest = {
        "task": task,
        "streams": [asdict(spec) for spec in streams],
        "tick": tick or {"anchor": streams[0].name, "period_ms": period_ms, "max_period_ms": 1.5 * period_ms},
        "max_gap_ms": max_gap_ms,
        "parts": parts,
        "outputs": {
            output: {
                "source": f"fusion.{output}",
                **({"dt_s": model.tick_period_s} if output == "action" else {}),
                **said,
            },
            **({"attention": {"source": f"{shown}.attention", "stream": shown}} if shown else {}),
            "gates": {"source": "fusion.gates"},
        },
        "training": {**(training or {}), "parity": report},
        "scores": scores or {},
    }
    if words:
        files[VOCABULARY] = json.dumps(list(words)).encode()
    files[GOLDEN] = golden.pack(streams, trace)
    if card:
        files["README.md"] = card.encode()
    write_bundle(out, manifest, files)
    return report


def export(checkpoint: Path, out: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Write the bundle of a checkpoint (`*.safetensors` beside its `recipe.yaml` and `commit`) to the folder `out`.
    Raises as `export_model`."""
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: expected weights (*.safetensors), got no such file")
    for beside in ("recipe.yaml", "commit"):
        if not (checkpoint.parent / beside).is_file():
            raise ValueError(
                f"{checkpoint}: expected {beside} beside it, as training leaves it: runs/TASK/final.safetensors"
            )
    recipe = read_recipe(checkpoint.parent / "recipe.yaml")
    task = TASKS[recipe.task]
    model = task.build_model(recipe)
    try:
        model.load_state_dict(load_file(checkpoint))
    except (SafetensorError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint}: expected weights of the model in its recipe.yaml: {what}") from None
    same: dict[str, Any] = {
        "task": recipe.task, "max_gap_ms": recipe.max_gap_ms, "words": task.words(recipe), "scores": scores,
        "training": {
            "recipe": recipe.task, "seed": recipe.seed, "commit": (checkpoint.parent / "commit").read_text(),
            "ticks": recipe.train.ticks,
            "data": {  # nobody's folders
                key: robot.identities(recipe) if key == "recordings" else value
                for key, value in recipe.data.items() if key not in ("folder", "words")
            },
        },
        "card": _card(recipe, scores),
    }  # fmt: skip
    if isinstance(model, VisionLanguageModel):
        return language.export_vision_language(model, recipe.streams[0], out, tick=recipe.tick, **same)
    return export_model(
        model, recipe.streams, out, {"action": recipe.action} if recipe.action else {"values": recipe.values},
        tick=recipe.tick, ticks=task.rehearsal(recipe, PARITY_TICKS) if hasattr(task, "rehearsal") else None, **same,
    )  # fmt: skip


def _card(recipe: Recipe, scores: dict[str, Any]) -> str:
    """The model card: the project's own for what its own recipe made, or else what is known of the model."""
    own, card = RECIPES / f"{recipe.task}.yaml", RECIPES / f"{recipe.task}.md"
    made = read_yaml(own.read_text(), str(own)) if own.exists() and card.exists() else {}
    if _without_folder(made) == _without_folder(recipe.raw):
        return card.read_text()
    streams = "\n".join(
        f"- {spec.name}: {spec.kind} {tuple(spec.shape)}, {spec.rate_hz:g} Hz" for spec in recipe.streams
    )
    if recipe.action:
        what = recipe.action.get("interface", "velocity")
        dims = zip(*(recipe.action[key] for key in ("names", "min", "max", "units")))
        gives = "\n".join(f"- {what} of {name}: {low:g} to {high:g} {unit}".rstrip() for name, low, high, unit in dims)
    else:
        gives = f"- {', '.join(recipe.values.get('names', ['captions and answers']))}"
    told = "Scores are in the manifest." if scores else "Nothing was measured of how good it is."
    return f"""# {recipe.task}

Made by `python -m export.to_onnx` from weights that a recipe of its owner's made, as the end of this says. {told}

From

{streams}

it makes

{gives}

Say here what it was trained on, how well it does, and where it fails.

```yaml
{yaml.safe_dump(_without_folder(recipe.raw), sort_keys=False)}```
"""


def _without_folder(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe without where somebody's data lie, and the words in them."""
    data = {key: value for key, value in raw.get("data", {}).items() if key not in ("folder", "recordings", "words")}
    return {**raw, "data": data}


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
