"""Is it worth it? A task's model against what a good engineer would take instead, on what none of them learned by.

    python -m training.compare imu_can --data FOLDER [--seeds 3] [--out runs/compare/imu_can] [key=value ...]
    python -m training.compare digits --data FOLDER data.held_out=[lucas] rounds.0.steps=800
    python -m training.compare drive --data runs/drive "rounds=[{steps: 250}]"     # by the lessons of that training
    python -m training.compare events --data runs/events --variants GRU "GRU + dt"

Trains every variant with every seed by the task's own recipe (whose rates and steps were chosen for the shipped model),
at as many parameters as the recipe's model has, and writes `report.html`: scores for every subset of missing senses,
and of streams with samples lost, late and rarer than in training, with 95 % confidence over the seeds; what comes of it
in closed loop, if a task has one; times, sizes, spike rates, and what the fusion weighs. What is trained already is not
trained again.
"""

from __future__ import annotations

import argparse
import base64
import copy
import html
import importlib.util
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors.torch import load_file

from mm_edge.cli import at_least
from mm_edge.engine.part import Fresh, ModelInputs
from mm_edge.errors import EdgeError, MissingDependency
from mm_edge.replay import Tick
from mm_edge.types import NS, Sample
from training.batches import Batch
from training.cached import write_text
from training.fusion import FusionStrategy
from training.models import MultiModalFusionNetwork
from training.recipe import Recipe, make_recipe, read_yaml
from training.runner import step
from training.train import RECIPES, TASKS, check_recipe, same_recipe, train
from training.windows import Change, Event

SHIPPED = "liquid-spike"
BASELINES: dict[str, dict[str, Any]] = {
    "liquid, no spikes": {"spikes": 0},
    "GRU": {"spikes": 0, "cell": "gru"},
    "GRU + dt": {"spikes": 0, "cell": "gru_dt"},
    "ncps CfC": {"spikes": 0, "cell": "ncps"},
    "concatenation": {"spikes": 0, "cell": "none", "strategy": "early"},  # of the newest samples: no memory
}
CELLS_ALONE = ("GRU", "GRU + dt", "ncps CfC")  # differ where there is something to remember
T_95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's, by degrees of freedom
STYLE = (
    "body{font:15px sans-serif;max-width:75em;margin:2em auto}img{max-width:100%}td,th{padding:.2em .7em;"
    "text-align:right}td:first-child{text-align:left}tr:nth-child(even){background:#f3f3f3}"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[name for name, task in sorted(TASKS.items()) if hasattr(task, "exam")])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the task's recipe")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, help="for checkpoints and the report (runs/compare/TASK)")
    parser.add_argument("--seeds", type=at_least(2), default=3, help=f"2 to {len(T_95)} (%(default)s)")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"these, beside {SHIPPED}, and no others (all)")
    parser.add_argument("--threads", type=at_least(1), default=1, help="torch threads")
    args = parser.parse_intermixed_args(argv)
    args.overrides += [word for word in args.variants or () if "=" in word]  # argparse gives a list all that follows it
    args.variants = [word for word in args.variants or () if "=" not in word]
    out = args.out or Path("runs/compare") / args.task
    torch.set_num_threads(args.threads)
    try:
        for module in ("matplotlib", "sklearn"):  # missed now, not when all is trained
            if importlib.util.find_spec(module) is None:
                raise MissingDependency("comparing", module, "compare")
        raw = read_yaml((RECIPES / f"{args.task}.yaml").read_text(), args.task)
        raw.setdefault("data", {})["folder"] = str(args.data)
        recipe = make_recipe(raw, args.overrides, args.task)
        results = compare(recipe, args.seeds, out, args.variants)
    except (OSError, ValueError, EdgeError) as error:
        print(error, file=sys.stderr)
        return 2
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "report.html").write_text(report(recipe, results))
    print("\n".join(verdicts(recipe, results)))
    print(f"report: {out / 'report.html'}")
    return 0


def compare(
    recipe: Recipe, seeds: int, out: Path, only: Collection[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Of each variant, or of `only` some beside the shipped one, its trial of each seed, see `trial`."""
    if seeds > len(T_95):
        raise ValueError(f"--seeds: expected at most {len(T_95)}, got {seeds}")
    chosen = variants(recipe)
    if unknown := set(only or ()) - set(chosen):
        raise ValueError(f"--variants: expected some of {list(chosen)}, got {sorted(unknown)}")
    chosen = {name: raw for name, raw in chosen.items() if not only or name in (SHIPPED, *only)}
    if next(iter(TASKS[recipe.task].exam(recipe, list)), None) is None:
        raise ValueError(
            f"expected windows of {recipe.train.ticks} ticks that are not learned, got none: see data and train.ticks "
            "of the recipe"
        )
    for raw in chosen.values():
        with torch.device("meta"):  # what cannot be made or trained is refused before anything is
            check_recipe(make_recipe(copy.deepcopy(raw), [], "variant"))
    results: dict[str, list[dict[str, Any]]] = {}
    for name, raw in chosen.items():
        for seed in range(1, seeds + 1):
            mine = make_recipe({**copy.deepcopy(raw), "seed": seed}, [], name)
            folder = out / "".join(c if c.isalnum() else "_" for c in name) / str(seed)
            file = folder / "trial.json"
            if folder.exists():
                same_recipe(mine, folder)
            if not file.exists():
                print(f"{name}, seed {seed}", file=sys.stderr)
                weights = train(mine, folder, workers=1)
                write_text(file, json.dumps(trial(mine, weights)))
            found = json.loads(file.read_text())
            if "commit" not in found:
                raise ValueError(f"{file}: of an earlier version, whose scores need not be the same: remove {folder}")
            results.setdefault(name, []).append(found)
    return results


def variants(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Recipes by name: the shipped one, with other fusions, with one sense alone, and the baselines, each with cells as
    large as makes the whole model as large as the shipped one."""
    shipped = FusionStrategy(recipe.raw["model"]["fusion_strategy"])
    found = {SHIPPED: recipe.raw}
    if len(recipe.streams) > 1:
        for strategy in FusionStrategy:
            if strategy is not shipped:
                found[f"{strategy.value} fusion"] = _varied(recipe, strategy=strategy.value)
    for name, how in BASELINES.items():
        if recipe.train.ticks > 1 or name not in CELLS_ALONE:
            found[name] = _varied(recipe, **how)
    if len(recipe.streams) > 1:
        needed = getattr(TASKS[recipe.task], "NEEDED", frozenset())
        for spec in recipe.raw["streams"]:
            if not needed <= {spec["name"]}:
                continue
            raw = copy.deepcopy(recipe.raw)
            raw["streams"] = [spec]
            raw["tick"]["anchor"] = spec["name"]
            for other in {s["name"] for s in recipe.raw["streams"]} - {spec["name"]}:
                raw["model"]["modality"].pop(other, None)
                raw.get("train", {}).get("learning_rates", {}).pop(other, None)
            raw.get("train", {}).pop("modality_dropout", None)  # there is no other, to do without it
            found[f"{spec['name']} alone"] = raw
    return found


def _varied(recipe: Recipe, spikes: int = 1, cell: str | None = None, strategy: str | None = None) -> dict[str, Any]:
    target = parameters(_model(recipe.raw))

    def sized(factor: float) -> dict[str, Any]:
        raw = copy.deepcopy(recipe.raw)
        model, modality = raw["model"], raw["model"]["modality"]
        model["fusion_strategy"] = strategy or model["fusion_strategy"]
        if cell:
            model["core"] = cell
        for own in (modality, *(value for value in modality.values() if isinstance(value, dict))):  # or one stream's
            if cell:
                own["backbone"] = cell
            if not spikes:
                own["num_spike_steps"] = 0
            if "liquid_units" in own:
                own["liquid_units"] = max(1, round(own["liquid_units"] * factor))
        model["fusion_units"] = max(1, round(model.get("fusion_units", model["fusion_dim"]) * factor))
        return raw

    low, high = 0.1, 10.0
    for _ in range(16):  # the size grows with the factor
        middle = math.sqrt(low * high)
        low, high = (low, middle) if parameters(_model(sized(middle))) > target else (middle, high)
    return sized(low)


def _model(raw: dict[str, Any]) -> MultiModalFusionNetwork:
    """Without numbers in it: drawing weights takes longer than all else."""
    recipe = make_recipe(copy.deepcopy(raw), [], "variant")
    with torch.device("meta"):
        return TASKS[recipe.task].build_model(recipe)


def parameters(model: MultiModalFusionNetwork) -> int:
    """Of what is shipped: heads that only training has are not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("aux."))


def trial(recipe: Recipe, weights: Path) -> dict[str, Any]:
    """What a trained model does: "scores" of each condition, each subset of senses present, each measure; "loop", what
    comes of it in closed loop; its "parameters", "tick_ms", "train_ms" a step, "held_mib" of a window, "rates" of
    spikes, and "weights" of the fusion; in how many "windows" it was examined; by which "commit" it was trained."""
    task = TASKS[recipe.task]
    model = task.build_model(recipe)
    model.load_state_dict(load_file(weights))
    model.eval()
    scores: dict[str, Any] = {}
    asks = any(encoder.asks for encoder in model.encoders.values())  # what steers an encoder cannot be masked alone
    timed = max(spec.rate_hz for spec in recipe.streams) > 1  # what happens once has no rate
    for condition, change in (CONDITIONS if timed else {ALL_WELL: list}).items():
        batches = list(task.exam(recipe, change))
        for present in subsets(model.names, model.text if asks else None) if condition == ALL_WELL else [model.names]:
            said, labels, seen = _examine(model, batches, present)
            scores.setdefault(condition, {})["+".join(present)] = task.score(said, labels)
            if condition == ALL_WELL and len(present) == len(model.names):
                shown = {**seen, "windows": len(said), "held_mib": _held_mib(model, batches[0])}
                refer = task.score(task.reference(labels), labels) if hasattr(task, "reference") else None
    spent = json.loads((weights.parent / "cpu_minutes.json").read_text())
    minutes = sum(m for stage, m in spent.items() if stage.endswith("train"))
    steps = sum(int(file.read_text()) for file in weights.parent.glob("steps[0-9]*"))
    return {
        "scores": scores,
        "reference": refer,
        "loop": task.in_the_loop(recipe, model) if hasattr(task, "in_the_loop") else {},
        "parameters": parameters(model),
        "tick_ms": _tick_ms(recipe, model),
        "steps": steps,
        "train_ms": round(minutes * 60e3 / max(1, steps), 2),
        "commit": (weights.parent / "commit").read_text(),
        **shown,
    }


def subsets(names: Iterable[str], always: str | None = None) -> list[tuple[str, ...]]:
    """All but none, the whole first; those alone that hold `always`."""
    names = tuple(names)
    found = [chosen for n in range(len(names), 0, -1) for chosen in itertools.combinations(names, n)]
    return [chosen for chosen in found if always is None or always in chosen]


@torch.no_grad()
def _examine(
    model: MultiModalFusionNetwork, batches: Iterable[Batch], present: tuple[str, ...]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """What the model said at the end of each window (n, d), the labels there, spike rates and weights."""
    here = torch.tensor([float(name in present) for name in model.names])
    said, labels, rates, gates = [], {}, {}, []
    for whole in batches:
        batch = replace(whole, mask=whole.mask * here)
        result, _ = model.scan(batch, model.zero_state(len(batch.start)))
        said.append(result.output[:, -1].numpy())
        gates.append(result.gates[:, -1].numpy())
        for name, spikes in result.spikes.items():
            rates.setdefault(name, []).append(float(spikes[batch.steps[name].keep.squeeze(-1)].mean()))
        for name, label in batch.labels.items():
            labels.setdefault(name, []).append(label[:, -1].numpy())
    weighed = np.concatenate(gates).mean(0)
    seen = {
        "rates": {name: round(float(np.mean(r)), 4) for name, r in rates.items()},
        "weights": {name: round(float(w), 4) for name, w in zip(model.names, weighed)},
    }
    return np.concatenate(said), {name: np.concatenate(rows) for name, rows in labels.items()}, seen


def _tick_ms(recipe: Recipe, model: MultiModalFusionNetwork) -> float:
    """Median CPU time of a tick of one robot on which every sense has something new, in torch on one thread."""
    threads, n = torch.get_num_threads(), len(recipe.streams)
    torch.set_num_threads(1)
    period_s = recipe.tick["period_ms"] / 1e3
    fresh = {spec.name: Fresh(np.zeros(spec.shape, spec.dtype), period_s, False) for spec in recipe.streams}
    inputs = ModelInputs(fresh, np.ones(n, np.float32), np.zeros(n, np.float32), period_s, False)
    state, times = model.zero_state(1), []
    for _ in range(100):
        started = time.thread_time()
        state = step(model, inputs, state).state
        times.append(time.thread_time() - started)
    torch.set_num_threads(threads)
    return round(float(np.median(times)) * 1e3, 3)


def _held_mib(model: MultiModalFusionNetwork, batch: Batch) -> float:
    """What a window keeps in memory for its gradient, as it is examined: without dropout and loss. Weights are left
    out."""
    held, weights = dict[int, int](), {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # what made it would keep itself, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = model.scan(batch, model.zero_state(len(batch.start)))
    del outputs  # until here it is all alive, and no memory is met twice
    return round(sum(size for at, size in held.items() if at not in weights) / len(batch.start) / 2**20, 3)


def every_third(events: list[Event]) -> list[Event]:
    """A sensor at a third of the rate that the model was trained with."""
    return _kept(events, lambda number: number % 3 == 2)


def lost(events: list[Event]) -> list[Event]:
    """Three samples in ten do not come."""
    rng = np.random.default_rng(0)
    return _kept(events, lambda number: rng.random() >= 0.3)


def _kept(events: list[Event], keep: Callable[[int], bool]) -> list[Event]:
    numbers: dict[str, itertools.count] = {}
    return [
        event for event in events
        if not _sensed(event) or keep(next(numbers.setdefault(event.stream, itertools.count())))
    ]  # fmt: skip


def _sensed(event: Event) -> TypeGuard[Sample]:
    """By a sensor that may fail: no tick, and no command."""
    return isinstance(event, Sample) and not isinstance(event.data, str)


def late(events: list[Event]) -> list[Event]:
    """Every sample arrives later, by up to three of its stream's periods at random; its stamp is true. What is
    overtaken is refused by the aligner, as on a robot: so more is lost than by `lost`."""
    rng, stamps = np.random.default_rng(0), dict[str, list[int]]()
    for event in filter(_sensed, events):
        stamps.setdefault(event.stream, []).append(event.stamp_ns)
    most_s = {stream: 3 * float(np.median(np.diff(s))) / NS if len(s) > 1 else 0.0 for stream, s in stamps.items()}
    moved = [
        event._replace(arrival_ns=event.arrival_ns + round(rng.uniform(0, most_s[event.stream]) * NS))
        if _sensed(event) else event
        for event in events
    ]  # fmt: skip
    return sorted(moved, key=lambda e: (e.now_ns, 1) if isinstance(e, Tick) else (e.arrival_ns, 0))


ALL_WELL = "as recorded"
CONDITIONS: dict[str, Change] = {
    ALL_WELL: list, "a third of the rate": every_third, "30 % lost": lost, "late by up to 3 periods": late
}  # fmt: skip


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval, over seeds; nan if one is None or nan."""
    x = np.array(list(values), float)
    freedom = len(x) - 1
    return float(x.mean()), float(T_95[freedom] * x.std(ddof=1) / math.sqrt(len(x)))


def verdicts(recipe: Recipe, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for each measure and condition: from which other models the shipped one differs, paired by seed, by
    more than its confidence interval. Of twenty comparisons without any difference, one does, too."""
    said, compared = [], 0
    if len(commits := sorted({trial["commit"] for trials in results.values() for trial in trials})) > 1:
        said.append(f"not all were trained by the same code: {', '.join(commits)}")
    for measure, what in TASKS[recipe.task].MEASURES.items():
        for condition in results[SHIPPED][0]["scores"]:
            mine = [_all_present(t, condition)[measure] for t in results[SHIPPED]]
            if any(map(math.isnan, mine)):
                said.append(f"{what}, {condition}: none, since it never varies there")
                continue
            better, worse = [], []
            for name, trials in results.items():
                if name == SHIPPED or name.endswith(" alone"):
                    continue
                compared += 1
                gain, half = interval(_all_present(t, condition)[measure] - m for t, m in zip(trials, mine))
                if abs(gain) > half:
                    (better if gain > 0 else worse).append(f"{name} ({gain:+.3f} +- {half:.3f})")
            mean, half = interval(mine)
            said.append(
                f"{what}, {condition}: {SHIPPED} {mean:.3f} +- {half:.3f}; better: {', '.join(better) or 'none'}; "
                f"worse: {', '.join(worse) or 'none'}; the others: no difference that {len(mine)} seeds can show"
            )
    by_chance = f"about {compared / 20:.0f} of them would show a difference by chance"
    said.append(f"{compared} comparisons, the senses alone left out: {by_chance}")
    return said


def _all_present(trial: dict[str, Any], condition: str) -> dict[str, float]:
    scores = next(iter(trial["scores"][condition].values()))
    return {measure: math.nan if value is None else value for measure, value in scores.items()}


def report(recipe: Recipe, results: dict[str, list[dict[str, Any]]]) -> str:
    """One page of HTML with its plots in it."""
    steps = sorted({trial["steps"] for trials in results.values() for trial in trials})
    made = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
    parts = [
        f"<h1>{recipe.task}: {SHIPPED} and what could be instead</h1>",
        f"<p>{len(results[SHIPPED])} seeds, {made} steps each; +- is a 95 % confidence interval over the seeds. "
        f"Examined in {results[SHIPPED][0]['windows']} windows that none learned by, of ticks: {recipe.train.ticks}. "
        f"Data: {html.escape(str(recipe.data.get('folder') or 'made as it goes'))}. "
        "All but the senses alone have as many parameters as the shipped model. "
        f"Fusion: {recipe.raw['model']['fusion_strategy']}, unless another is named.</p><h2>In words</h2>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in verdicts(recipe, results)) + "</ul>",
    ]
    if len(results[SHIPPED][0]["scores"]) > 1:
        parts.append(
            "<p>All learned as recorded. A third of the rate: every third sample of each sensor; 30 % lost: at random; "
            "late: each arrives later by up to three of its sensor's periods, and what is overtaken is lost.</p>"
        )
    for measure, what in TASKS[recipe.task].MEASURES.items():
        parts += [f"<h2>{html.escape(what)}</h2>", *_scores(measure, results)]
    if loop := results[SHIPPED][0].get("loop"):
        rows = [[n, *(_told(interval(t["loop"][k] for t in trials)) for k in loop)] for n, trials in results.items()]
        parts += ["<h2>In closed loop</h2>", _table(["", *loop], rows)]
        parts.append(f"<p>Shares of {len(TASKS[recipe.task].LOOP)} worlds, each of which is a step of them.</p>")
    dropped = recipe.train.modality_dropout or recipe.data.get("absent") or getattr(TASKS[recipe.task], "DROPS", False)
    if len(recipe.streams) > 1 and not dropped:
        parts.append("<p>No sense was missing in training: what a model does without one is left to chance.</p>")
    parts += ["<h2>Size and time</h2>", _sizes(results), "<h2>Spikes, and what the fusion weighs</h2>"]
    parts.append(_inside([spec.name for spec in recipe.streams], results))
    return f"<!doctype html><meta charset=utf-8><title>{recipe.task}</title><style>{STYLE}</style>" + "\n".join(parts)


def _scores(measure: str, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of one measure: the plot, the table of conditions, that of missing senses."""
    first, conditions = results[SHIPPED][0], list(results[SHIPPED][0]["scores"])
    reference = first["reference"] and first["reference"][measure]
    rows = {
        name: [interval(_all_present(t, c)[measure] for t in trials) for c in conditions]
        for name, trials in results.items()
    }
    parts = [_plot(rows, conditions, reference)]
    parts.append(_table(["", *conditions], [[name, *map(_told, row)] for name, row in rows.items()]))
    if reference is not None:
        parts.append(f"<p>What was known last, as a prediction: {reference:.3f}.</p>")
    present = list(first["scores"][ALL_WELL])
    if len(present) > 1:
        whole = {n: trials for n, trials in results.items() if len(trials[0]["scores"][ALL_WELL]) == len(present)}
        masked = [
            [p, *(_told(interval(t["scores"][ALL_WELL][p][measure] for t in trials)) for trials in whole.values())]
            for p in present
        ]
        parts += ["<h3>By the senses that are present</h3>", _table(["", *whole], masked)]
    return parts


def _sizes(results: dict[str, list[dict[str, Any]]]) -> str:
    heads = [
        "",
        "parameters",
        "weights (MB)",
        "a tick, all senses new, torch on one thread (ms)",
        "a training step (CPU ms)",
        "held for the gradient of a window (MiB)",
    ]
    rows = []
    for name, trials in results.items():
        keys = ("parameters", "tick_ms", "train_ms", "held_mib")
        count, tick_ms, train_ms, held_mib = (np.mean([t[key] for t in trials]) for key in keys)
        sizes = (f"{count:,.0f}", f"{count * 4e-6:.2f}", f"{tick_ms:.3f}", f"{train_ms:.1f}", f"{held_mib:.2f}")
        rows.append([name, *sizes])
    return _table(heads, rows)


def _inside(streams: list[str], results: dict[str, list[dict[str, Any]]]) -> str:
    heads = ["", *(f"spike rate of {n}" for n in streams), *(f"weight of {n}" for n in streams)]
    rows = []
    for name, trials in results.items():
        found = [[t[key][s] for t in trials if s in t[key]] for key in ("rates", "weights") for s in streams]
        rows.append([name, *(f"{np.mean(values):.3f}" if values else "" for values in found)])
    return _table(heads, rows)


def _told(value: tuple[float, float]) -> str:
    return "none" if math.isnan(value[0]) else f"{value[0]:.3f} +- {value[1]:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(r, "td") for r in rows) + "</table>"


def _plot(rows: dict[str, list[tuple[float, float]]], conditions: list[str], reference: float | None) -> str:
    """A group of bars a condition, a bar a model."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    width = 0.85 / len(rows)
    for i, (name, values) in enumerate(rows.items()):
        at = np.arange(len(conditions)) + (i - (len(rows) - 1) / 2) * width
        means, halves = np.array(values).T
        axes.bar(at, means, width, yerr=halves, label=name, color=colours[i % 20], error_kw={"lw": 1})
    if reference is not None:
        axes.axhline(reference, color="k", ls=":", lw=1, label="what was known last")
    axes.set_xticks(range(len(conditions)), conditions)
    low = min((mean - half for values in rows.values() for mean, half in values if not math.isnan(mean)), default=0.0)
    axes.set_ylim(max(-1.0, min(0.0, 1.1 * low)), 1.0)  # what is far below nothing is far below nothing
    axes.axhline(0, color="k", lw=0.8)
    axes.grid(axis="y", lw=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return f'<img alt="scores" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


if __name__ == "__main__":
    sys.exit(main())
