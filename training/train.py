"""The one training loop.

    python -m training.train drive [--out runs/drive] [--workers 2] [key=value ...]
    python -m training.train drive --data FOLDER_OF_RECORDINGS          # a robot of your own
    python -m training.train drive --data FOLDER_OF_RECORDINGS 'data.validation=["monday"]' train.patience=3
    python -m training.train MY_RECIPE.yaml --data FOLDER_OF_RECORDINGS         # a copy of recipes/robot.yaml
    python -m training.train vlm --data FOLDER_OF_PICTURES              # with captions, in the layout of COCO
    python -m training.train clips --data FOLDER_OF_VIDEOS              # with sound, in the layout of Kinetics or AVE
    python -m training.train digits --data FOLDER --fusion-strategy late --epochs 5
    torchrun --nproc-per-node 2 -m training.train lidar_velocity --data FOLDER

A recipe's rounds each make (or read) their episodes and train on all so far. State is saved as it goes; the same
command goes on where it was stopped. Where a task has data to validate by (as recordings that are held out), they are
looked at with every save and at the end, and the weights that do best on them (`bestN.safetensors` of round N) are the
round's; `train.patience` ends a round after so many looks that found nothing better.

Several processes share the lanes of each batch, and their gradients' mean is what one step takes. That equals what one
process learns if the loss is a mean over lanes, each of the same weight, and nothing sees or draws for several lanes at
once, as batch normalisation and dropout do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mm_edge.cli import at_least
from mm_edge.errors import EdgeError
from mm_edge.types import StreamSpec
from training import clips, coco, digits, drive, events, hearing, imu_can, lidar_velocity, robot, steering, vlm
from training.batches import Batch
from training.cached import write_text
from training.check import LABEL_HELP
from training.fusion import FusionStrategy
from training.models import ModelState, MultiModalFusionNetwork
from training.nets import ModalityType
from training.recipe import Recipe, TrainConfig, check_keys, hint, make, make_recipe, read_yaml, set_value
from training.recordings import MOST_TICK_MS, tick_of
from training.supervised import contrastive, newest

RECIPES = Path(__file__).parent / "recipes"
BEFORE_ALL = ("recipe.yaml", "commit", "cpu_minutes.json", "logs")  # what a training leaves that has learned nothing
OF_DATA = {"drive": "robot", "vlm": "vlm_folder"}  # what learns from a folder instead of a simulation
TASKS = {
    "clips": clips, "digits": digits, "drive": drive, "events": events, "imu_can": imu_can,
    "lidar_velocity": lidar_velocity, "robot": robot, "sounds": hearing, "steering": steering, "vlm": vlm,
    "words": hearing,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help=f"a recipe's name ({', '.join(p.stem for p in RECIPES.glob('*.yaml'))}) or file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=0.001 rounds.0.steps=500"
    )
    parser.add_argument("--out", type=Path, help="folder for episodes, logs and checkpoints (default: runs/TASK)")
    parser.add_argument("--data", type=Path, help="folder of the data to learn from; of drive, or robot: recordings")
    parser.add_argument("--label", default="", metavar="TOPIC", help=f"of recordings, {LABEL_HELP}")
    parser.add_argument("--go-on", action="store_true", help="although some recordings are of no use")
    parser.add_argument("--modalities", nargs="+", default=[], help="streams to be used, by name or kind (all)")
    parser.add_argument("--fusion-strategy", choices=[strategy.value for strategy in FusionStrategy])
    parser.add_argument("--fusion-dim", type=at_least(1))
    parser.add_argument("--epochs", type=at_least(1), help="instead of the recipe's steps")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes that make episodes")
    threads = "torch threads (more cost more CPU time than they save)"
    parser.add_argument("--threads", type=at_least(1), default=1, help=threads)
    args = parser.parse_intermixed_args(argv)
    args.overrides += [word for word in args.modalities if "=" in word]  # argparse gives a list all that follows it
    args.modalities = [word for word in args.modalities if "=" not in word]
    path = RECIPES / f"{args.recipe}.yaml" if not args.recipe.endswith(".yaml") else Path(args.recipe)
    out = args.out
    try:
        recipe = _recipe(args, path)
        torch.set_num_threads(args.threads)
        out = out or Path("runs") / recipe.task
        weights = train(recipe, out, args.workers)
        if PartialState().is_main_process:
            print(f"trained: {weights}")
    except SafetensorError as error:
        writing = str(error).startswith("Error while serializing")  # a disk that is full, say
        what = "weights cannot be saved" if writing else "what was saved is damaged, remove the folder"
        print(f"{what}: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, EdgeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = out and ((out / "checkpoint").exists() or any(out.glob("round*.safetensors")))
        what = "from what was saved last" if saved else "with what was saved, which is no weights yet"
        print(f"\nstopped: the same command goes on {what}", file=sys.stderr)
        return 130
    return 0


def _recipe(args: argparse.Namespace, path: Path) -> Recipe:
    """Raises ValueError, OSError or EdgeError for what is wrong with it, or with the data."""
    flags = {"model.fusion_strategy": args.fusion_strategy, "model.fusion_dim": args.fusion_dim}
    flags["train.epochs"] = args.epochs
    if args.recipe in OF_DATA and args.data:
        path = RECIPES / f"{OF_DATA[args.recipe]}.yaml"
    if not path.exists():
        raise ValueError(f"{path}: no such recipe{hint(path.stem, [p.stem for p in RECIPES.glob('*.yaml')])}")
    raw = read_yaml(path.read_text(), str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a recipe, keys with values, got {raw!r}")
    of_recordings = raw.get("task") == "robot" and args.data
    if (args.label or args.go_on) and not of_recordings:
        raise ValueError("--label, --go-on: of which recordings of a robot? drive --data FOLDER_OF_RECORDINGS")
    if args.data and "data" not in raw:
        known = f"; with --data there is {OF_DATA[task]}.yaml" if (task := str(raw.get("task"))) in OF_DATA else ""
        raise ValueError(f"{path}: learns from no folder{known}")
    if of_recordings:
        raw = robot.raw_recipe(raw, args.data, args.label, args.go_on)
    else:
        flags["data.folder"] = args.data and str(args.data)
        if not args.data and raw.get("data", {}).get("folder") == "":
            raise ValueError(f"{args.recipe}: where are the data? --data FOLDER")
    if args.modalities:
        called = [{s["name"], s["kind"], ModalityType(s["kind"]).name.lower()} for s in raw["streams"]]
        if unknown := set(args.modalities) - (known := set().union(*called)):
            raise ValueError(f"--modalities: expected some of {sorted(known)}, got {sorted(unknown)}")
        chosen = [s for s, names in zip(raw["streams"], called) if names & set(args.modalities)]
        for left_out in {s["name"] for s in raw["streams"] if s not in chosen}:
            raw["model"].get("modality", {}).pop(left_out, None)
            raw.get("train", {}).get("learning_rates", {}).pop(left_out, None)
        raw["streams"] = chosen
        if raw["tick"]["anchor"] not in [s["name"] for s in chosen]:
            most_ms = MOST_TICK_MS if "action" in raw else math.inf
            raw["tick"] = asdict(tick_of([make(StreamSpec, s, f"{path}: streams") for s in chosen], most_ms))
    if len(raw.get("streams", ())) == 1 and raw.get("train"):  # there is no other, to do without it
        raw["train"].pop("modality_dropout", None)
    for key, value in flags.items():
        if value is not None:
            set_value(raw, key, value)
    recipe = make_recipe(raw, args.overrides, str(path))
    if of_recordings:
        return robot.with_words(recipe)
    if recipe.task == "clips":
        return clips.with_names(recipe)
    return coco.with_words(recipe) if recipe.task == "vlm" and recipe.data else recipe


def train(recipe: Recipe, out: Path, workers: int) -> Path:
    """Train by the recipe into the folder `out`; returns the final weights' file. Raises ValueError for what is wrong
    with the recipe, or if what is there was made by another one."""
    check_recipe(recipe)
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        if PartialState().is_main_process:
            same_recipe(recipe, out)
            _same_code(out)
    task = TASKS[recipe.task]
    student: Path | None = None
    for index in range(len(recipe.rounds)):
        weights = out / f"round{index}.safetensors"
        if not weights.exists():
            with _cpu_minutes(out, f"round {index}: data"), PartialState().main_process_first():
                supply = task.supply(recipe.of_round(index), index, out, workers)
            with _cpu_minutes(out, f"round {index}: train"):
                model = task.build_model(recipe)
                if student is not None:
                    model.load_state_dict(load_file(student))
                if PartialState().num_processes > 1:  # each draws a dropout of its own
                    torch.manual_seed(recipe.seed + PartialState().process_index)
                steps = _train_round(recipe.of_round(index), index, model, supply, out)
                if PartialState().is_main_process:
                    write_text(out / f"steps{index}", str(steps))
                    _save_weights(model, weights)
                del supply  # the next round reads these episodes again: not to have them twice
                PartialState().wait_for_everyone()
        student = weights
    assert student is not None, "a recipe has at least one round"
    if PartialState().is_main_process:
        shutil.copyfile(student, out / "final.part")
        (out / "final.part").rename(out / "final.safetensors")
    PartialState().wait_for_everyone()
    return out / "final.safetensors"


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError for what can be known to be wrong before anything is made."""
    config, processes = recipe.train, PartialState(cpu=not torch.cuda.is_available()).num_processes
    if recipe.task not in TASKS:
        raise ValueError(f"task: no task {recipe.task!r}{hint(recipe.task, TASKS)}")
    for index in range(len(recipe.rounds)):
        if (lanes := recipe.of_round(index).train.lanes) % processes:
            key = f"rounds.{index}.lanes" if recipe.rounds[index].lanes else "train.lanes"
            raise ValueError(f"{key}: expected a multiple of {processes} processes, got {lanes}")
    task = TASKS[recipe.task]
    check_keys(config.weights, getattr(task, "TERMS", ()), "train.weights")
    model = task.build_model(recipe)
    check_keys(config.learning_rates, model.names, "train.learning_rates")
    if config.modality_dropout and len(model.names) < 2:
        raise ValueError(f"train.modality_dropout: expected two modalities or more, got {list(model.names)}")
    units = {name: encoder.units for name, encoder in model.encoders.items()}
    if config.contrastive and len(set(units.values())) == len(units):
        raise ValueError(f"train.contrastive: expected two modalities with tokens of one size, got {units}")


def same_recipe(recipe: Recipe, out: Path) -> None:
    """Keep it as `out/recipe.yaml`; raises ValueError if what is there was made by another one."""
    kept = out / "recipe.yaml"
    if _is_begun(out) and (differing := _differing(yaml.safe_load(kept.read_text()), recipe.raw)):
        raise ValueError(
            f"{out}: was begun by another recipe ({kept}), not the same in {', '.join(differing)}; "
            "remove the folder, or give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_text(kept, yaml.safe_dump(recipe.raw, sort_keys=False))


def _differing(one: Any, other: Any, key: str = "") -> list[str]:
    """Keys, as on the command line, whose values are not the same."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [key]
    keys = sorted({*one, *other})
    return [d for k in keys for d in _differing(one.get(k), other.get(k), f"{key}.{k}".lstrip("."))]


def _is_begun(out: Path) -> bool:
    """Whether there is more than what a training leaves that has learned nothing."""
    return (out / "recipe.yaml").exists() and any(
        path.name.removesuffix(".part") not in BEFORE_ALL for path in out.iterdir()
    )


def _same_code(out: Path) -> None:
    """Keep which commit trains, as `out/commit`; raises ValueError if another one began. "-dirty" is with changes."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit, kept = "", out / "commit"
    if shutil.which("git"):
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    commit = commit or "unknown"
    if _is_begun(out) and kept.exists() and kept.read_text() != commit:
        raise ValueError(
            f"{out}: was begun by commit {kept.read_text()}, this is {commit}; go back, or give another --out"
        )
    write_text(kept, commit)


@contextmanager
def _cpu_minutes(out: Path, stage: str) -> Iterator[None]:
    """Add what is spent within, by this process (the first, of several) and those it waited for, to the stage's entry
    in cpu_minutes.json."""
    before = sum(os.times()[:4])
    try:
        yield
    finally:
        file = out / "cpu_minutes.json"
        if PartialState().is_main_process:
            spent = json.loads(file.read_text()) if file.exists() else {}
            spent[stage] = round(spent.get(stage, 0.0) + (sum(os.times()[:4]) - before) / 60, 4)
            write_text(file, json.dumps(spent, indent=2))


class Supply(Protocol):
    """An endless supply of batches, each of `train.lanes` lanes; `state_dict` makes resuming exact."""

    steps_an_epoch: int

    def next(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Lesson(nn.Module):
    """A model and what it is to learn, as one module: all that has a gradient is used within its forward, which is what
    training on several machines asks for."""

    def __init__(self, recipe: Recipe, model: MultiModalFusionNetwork):
        super().__init__()
        self.recipe, self.model = recipe, model

    def forward(self, batch: Batch, state: ModelState) -> tuple[Tensor, dict[str, Tensor], ModelState]:
        config = self.recipe.train
        gone = None
        if config.modality_dropout and self.training:
            draw = torch.rand_like(batch.mask[:, :1])
            batch, gone = without(until_heard(batch, state), draw, config.modality_dropout, self.model.text)
        result, state = self.model.scan(batch, state)
        if gone is not None:
            state = state.without(gone.squeeze(1))
        with torch.autocast(batch.mask.device.type, enabled=False):
            total, parts = TASKS[self.recipe.task].loss(self.recipe, self.model, batch, result)
            if config.contrastive:
                tokens = [newest(result.tokens[name], batch.valid) for name in self.model.names]
                classes = None
                if self.recipe.values.get("classes"):
                    classes = newest(next(iter(batch.labels.values())), batch.valid)
                parts["contrastive"] = contrastive(tokens, newest(batch.mask, batch.valid), classes)
                total = total + config.contrastive * parts["contrastive"]
        return total, {name: value.detach() for name, value in parts.items()}, state


def until_heard(batch: Batch, state: ModelState) -> Batch:
    """A batch in which a modality that was dropped before is absent until it steps again, as on a robot: of itself the
    batch has one that comes seldom as present, by what was sent before, and of that nothing is remembered."""
    unknown = ~batch.start[:, None] & (state.stepped == 0)
    heard = [F.pad(s.keep.squeeze(-1).cumsum(1), (1, 0)).gather(1, s.at) > 0 for s in batch.steps.values()]
    return replace(batch, mask=batch.mask.masked_fill(unknown[:, None] & ~torch.stack(heard, -1), 0.0))


def without(batch: Batch, draw: Tensor, share: float, text: str | None) -> tuple[Batch, Tensor]:
    """A batch in which the modalities that drew less than `share` of (B, 1, M) send nothing: they are absent, and their
    encoders do not step; and which are, bool. The text is a command, and never gone; nor is, of all senses that a lane
    has, the one that drew the most."""
    sense = torch.tensor([name != text for name in batch.steps], device=draw.device)
    there = (batch.mask.amax(1, keepdim=True) > 0) & sense
    gone = sense & (draw < draw.masked_fill(~there, 0.0).amax(2, keepdim=True).clamp(max=share))
    steps = {name: replace(s, keep=s.keep & ~gone[..., [i]]) for i, (name, s) in enumerate(batch.steps.items())}
    return replace(batch, mask=batch.mask.masked_fill(gone, 0.0), steps=steps), gone


class _Progress:
    """What a stopped training needs to go on exactly: where each lane is, and what the model remembers there."""

    def __init__(self, supply: Supply, state: ModelState, accelerator: Accelerator):
        self.supply, self.state, self.step = supply, state, 0
        self._accelerator = accelerator
        self.smooth: dict[str, float] = {}  # losses and what else is shown
        self.best, self.best_step, self.since = math.inf, 0, 0

    def compare(self, loss: float) -> bool:
        """Whether there was no better loss; counts the saves since there was one."""
        self.since += 1
        if loss < self.best:
            self.best, self.best_step, self.since = loss, self.step, 0
        return not self.since

    def state_dict(self) -> dict[str, Any]:
        patience = {"best": self.best, "best_step": self.best_step, "since": self.since, "smooth": self.smooth}
        state = self.state.map(self._of_all_lanes)
        return {"supply": self.supply.state_dict(), "state": state, "step": self.step, "patience": patience}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.supply.load_state_dict(saved["supply"])
        device, share, rank = self.state.h.device, len(self.state.h), self._accelerator.process_index
        # It was loaded onto the CPU, of all lanes.
        self.state = saved["state"].map(lambda x: x[rank * share : (rank + 1) * share].to(device))
        self.step = saved["step"]
        for name, value in saved["patience"].items():
            setattr(self, name, value)

    def _of_all_lanes(self, x: Tensor) -> Tensor:
        """Of several processes each has its share of the lanes, and only the first one saves."""
        x = x.detach()
        if not x.numel():
            return x.new_zeros(len(x) * self._accelerator.num_processes, *x.shape[1:])
        return self._accelerator.gather(x.contiguous())


def _train_round(recipe: Recipe, index: int, model: MultiModalFusionNetwork, supply: Supply, out: Path) -> int:
    """Returns how many steps it took. Raises ValueError if the loss is not finite."""
    config, steps = recipe.train, recipe.rounds[index].steps
    if config.epochs:
        steps = max(1, config.epochs * supply.steps_an_epoch // config.accumulate)
    AcceleratorState._reset_state()  # a training before, in this process, may have had another precision
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision, step_scheduler_with_optimizer=False,
        log_with="tensorboard", project_config=ProjectConfiguration(str(out)),
    )  # fmt: skip
    accelerator.init_trackers(f"logs/round{index}")
    groups = _groups(model, config)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    factors = [partial(_schedule, config=config, steps=steps, part=group["part"]) for group in groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    lesson, optimizer, scheduler = accelerator.prepare(_Lesson(recipe, model), optimizer, scheduler)
    share, rank = config.lanes // accelerator.num_processes, accelerator.process_index
    progress = _Progress(supply, model.zero_state(share), accelerator)
    accelerator.register_for_checkpointing(progress)
    unseen = TASKS[recipe.task].validation(recipe) if hasattr(TASKS[recipe.task], "validation") else []
    best = out / f"best{index}.safetensors"
    saved = out / "checkpoint"
    with accelerator.main_process_first():
        if not saved.exists() and saved.with_suffix(".old").exists():  # stopped between the two renamings
            saved.with_suffix(".old").rename(saved)
    if (saved / "round.json").exists() and json.loads((saved / "round.json").read_text())["round"] == index:
        accelerator.load_state(str(saved))
    model.train()
    left = range(progress.step, steps)
    bar = tqdm(left, f"round {index}: train", initial=progress.step, total=steps, disable=rank > 0)
    since_save = []  # losses
    for step in bar:
        if 0 < config.patience <= progress.since:
            if rank == 0:
                print(f"round {index}: stopped at step {step} of {steps}, nothing better since {progress.best_step}")
            break
        optimizer.zero_grad()
        for _ in range(config.accumulate):
            batch = progress.supply.next().lanes(rank * share, (rank + 1) * share).to(accelerator.device)
            total, parts, progress.state = lesson(batch, progress.state)
            accelerator.backward(total / config.accumulate)
            since_save.append(total.detach())
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        progress.step = step + 1
        if step % 10 == 0:
            values = {k: float(v) for k, v in accelerator.reduce({**parts, "loss": total.detach()}, "mean").items()}
            progress.smooth |= {k: 0.9 * progress.smooth.get(k, v) + 0.1 * v for k, v in values.items()}
            accelerator.log(values, step=step)
            bar.set_postfix({k: f"{v:.3f}" for k, v in progress.smooth.items()})
        if progress.step % config.save_every_steps == 0 or progress.step == steps:
            # The same for all processes, or not all would stop.
            found = float(accelerator.reduce(torch.stack(since_save).mean(), "mean"))
            if not (math.isfinite(found) and all(bool(p.isfinite().all()) for p in model.parameters())):
                raise ValueError(
                    f"round {index}: the loss or a weight is not finite before step {progress.step}: try a lower "
                    "train.learning_rate, and another --out"
                )
            if unseen:
                mine = _validate(accelerator.unwrap_model(lesson), unseen)
                found = float(accelerator.reduce(mine, "mean"))
                progress.smooth["validation"] = found
                accelerator.log({"validation": found}, step=step)
            if progress.compare(found) and unseen and rank == 0:
                _save_weights(model, best)
            since_save.clear()
            _save(accelerator, saved, index)
    accelerator.wait_for_everyone()
    if unseen and best.exists():
        model.load_state_dict(load_file(best))
        if rank == 0:
            print(f"round {index}: validation {progress.best:.4f}, its best, at step {progress.best_step} of {steps}")
    for tracker in accelerator.trackers:  # not end_training: that parts the processes, and rounds may follow
        tracker.finish()
    return progress.step


@torch.no_grad()
def _validate(lesson: _Lesson, batches: list[Batch]) -> Tensor:
    """The mean loss of batches of one lane that go on one after the other, weighed by their ticks with a label."""
    lesson.eval()
    state, losses, ticks = lesson.model.zero_state(1), [], []
    for batch in batches:
        loss, _, state = lesson(batch.to(state.h.device), state)
        losses.append(loss)
        known = batch.labels.get("weight", torch.ones(()))  # nobody knows what was wanted at the other ticks
        ticks.append((batch.valid.squeeze(-1) * known).sum())
    lesson.train()
    weights = torch.stack(ticks).to(losses[0])
    return torch.stack(losses) @ weights / weights.sum().clamp(min=1)


def _save_weights(model: nn.Module, file: Path) -> None:
    """Whole or not at all."""
    save_file(model.state_dict(), file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def _groups(model: MultiModalFusionNetwork, config: TrainConfig) -> list[dict[str, Any]]:
    """Each modality's encoder with a learning rate of its own, and heads that teach them; and the rest."""
    found = [(encoder, config.learning_rates.get(name, 1.0)) for name, encoder in model.encoders.items()]
    found += [(model.aux, 1.0)] if len(model.aux) else []
    groups = [{"params": list(m.parameters()), "lr": f * config.learning_rate, "part": "encoders"} for m, f in found]
    taken = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [*groups, {"params": rest, "lr": config.learning_rate, "part": "fusion"}]


def _save(accelerator: Accelerator, folder: Path, index: int) -> None:
    """Whole or not at all."""
    part, old = folder.with_suffix(".part"), folder.with_suffix(".old")
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "round.json").write_text(json.dumps({"round": index}))
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _schedule(step: int, config: TrainConfig, steps: int, part: str) -> float:
    """Linear up, cosine down to a twentieth; 0 while another part of the model learns alone."""
    share = step / max(1, steps)
    for until, alone in zip(config.progressive, ("encoders", "fusion")):
        if share < until:
            if part != alone:
                return 0.0
            break
    return min(1.0, (step + 1) / max(1, config.warm_up_steps)) * (0.525 + 0.475 * math.cos(math.pi * min(1.0, share)))


if __name__ == "__main__":
    sys.exit(main())
