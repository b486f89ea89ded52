"""The one training loop.

    python -m training.train drive [--out runs/drive] [--workers 2] [key=value ...]

A recipe's rounds each make (or read) their episodes and train on all so far. State is saved as it goes; the same
command goes on where it was stopped.
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
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from training import drive
from training.batches import Batch
from training.models import ModelState, MultiModalFusionNetwork
from training.recipe import Recipe, Round, read_recipe

RECIPES = Path(__file__).parent / "recipes"
TASKS = {"drive": drive}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help=f"a recipe's name ({', '.join(p.stem for p in RECIPES.glob('*.yaml'))}) or file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=0.001")
    parser.add_argument("--out", type=Path, help="folder for episodes, logs and checkpoints (default: runs/RECIPE)")
    parser.add_argument("--workers", type=int, default=2, help="processes that make episodes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (more cost more CPU time than they save)")
    args = parser.parse_intermixed_args(argv)
    path = RECIPES / f"{args.recipe}.yaml" if not args.recipe.endswith(".yaml") else Path(args.recipe)
    try:
        recipe = read_recipe(path, args.overrides)
        torch.set_num_threads(args.threads)
        print(f"trained: {train(recipe, args.out or Path('runs') / recipe.task, args.workers)}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def train(recipe: Recipe, out: Path, workers: int) -> Path:
    """Train by the recipe into the folder `out`; returns the final weights' file. Raises ValueError if what is there
    was made by another recipe."""
    kept = out / "recipe.yaml"
    if kept.exists() and yaml.safe_load(kept.read_text()) != recipe.raw:
        raise ValueError(f"{out}: was made by another recipe ({kept}); remove it, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(yaml.safe_dump(recipe.raw, sort_keys=False))
    _same_code(out)
    task = TASKS[recipe.task]
    student: Path | None = None
    for index in range(len(recipe.rounds)):
        weights = out / f"round{index}.safetensors"
        if not weights.exists():
            with _cpu_minutes(out, f"round {index}: data"):
                supply = task.supply(recipe, index, out, workers)
            with _cpu_minutes(out, f"round {index}: train"):
                model = task.build_model(recipe)
                if student is not None:
                    model.load_state_dict(load_file(student))
                _train_round(recipe, index, model, supply, out)
                save_file(model.state_dict(), weights.with_suffix(".part"))
                weights.with_suffix(".part").rename(weights)  # whole or not at all
        student = weights
    assert student is not None, "a recipe has at least one round"
    return Path(shutil.copyfile(student, out / "final.safetensors"))


def _same_code(out: Path) -> None:
    """Keep which commit trains, as `out/commit`; raises ValueError if another one began. "-dirty" is with changes."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent)
    commit, kept = result.stdout.strip() or "unknown", out / "commit"
    if kept.exists() and kept.read_text() != commit:
        raise ValueError(
            f"{out}: was begun by commit {kept.read_text()}, this is {commit}; go back, or give another --out"
        )
    kept.write_text(commit)


@contextmanager
def _cpu_minutes(out: Path, stage: str) -> Iterator[None]:
    """Add what is spent within, by this process and those it waited for, to the stage's entry in cpu_minutes.json."""
    before = sum(os.times()[:4])
    try:
        yield
    finally:
        file = out / "cpu_minutes.json"
        spent = json.loads(file.read_text()) if file.exists() else {}
        spent[stage] = round(spent.get(stage, 0.0) + (sum(os.times()[:4]) - before) / 60, 2)
        file.write_text(json.dumps(spent, indent=2))


class Supply(Protocol):
    """An endless supply of batches, each of `train.lanes` lanes; `state_dict` makes resuming exact."""

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
        result, state = self.model.scan(batch, state)
        with torch.autocast(batch.mask.device.type, enabled=False):
            total, parts = TASKS[self.recipe.task].loss(self.recipe, self.model, batch, result)
        return total, {name: value.detach() for name, value in parts.items()}, state


class _Progress:
    """What a stopped training needs to go on exactly: where each lane is, and what the model remembers there."""

    def __init__(self, supply: Supply, state: ModelState):
        self.supply, self.state, self.step = supply, state, 0

    def state_dict(self) -> dict[str, Any]:
        return {"supply": self.supply.state_dict(), "state": self.state, "step": self.step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.supply.load_state_dict(saved["supply"])
        self.state, self.step = saved["state"].to(self.state.h.device), saved["step"]  # it was loaded onto the CPU


def _train_round(recipe: Recipe, index: int, model: MultiModalFusionNetwork, supply: Supply, out: Path) -> None:
    config, round_ = recipe.train, recipe.rounds[index]
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision,
        log_with="tensorboard", project_config=ProjectConfiguration(str(out)),
    )  # fmt: skip
    accelerator.init_trackers(f"logs/round{index}")
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, config.warm_up_steps, round_))
    lesson, optimizer, scheduler = accelerator.prepare(_Lesson(recipe, model), optimizer, scheduler)
    progress = _Progress(supply, model.zero_state(config.lanes))
    accelerator.register_for_checkpointing(progress)
    saved = out / "checkpoint"
    if not saved.exists() and saved.with_suffix(".old").exists():  # stopped between the two renamings
        saved.with_suffix(".old").rename(saved)
    if (saved / "round.json").exists() and json.loads((saved / "round.json").read_text())["round"] == index:
        accelerator.load_state(str(saved))
    model.train()
    bar = tqdm(range(progress.step, round_.steps), f"round {index}: train", initial=progress.step, total=round_.steps)
    smooth: dict[str, float] = {}
    for step in bar:
        batch = progress.supply.next().to(accelerator.device)
        total, parts, progress.state = lesson(batch, progress.state)
        optimizer.zero_grad()
        accelerator.backward(total)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        progress.step = step + 1
        if step % 10 == 0:
            values = {k: float(v) for k, v in parts.items()}
            smooth = {k: 0.9 * smooth.get(k, v) + 0.1 * v for k, v in values.items()}
            accelerator.log(values, step=step)
            bar.set_postfix({k: f"{v:.3f}" for k, v in smooth.items()})
        if progress.step % config.save_every_steps == 0:
            _save(accelerator, saved, index)
    accelerator.end_training()


def _save(accelerator: Accelerator, folder: Path, index: int) -> None:
    """Whole or not at all."""
    part, old = folder.with_suffix(".part"), folder.with_suffix(".old")
    accelerator.save_state(str(part))
    (part / "round.json").write_text(json.dumps({"round": index}))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _schedule(step: int, warm_up: int, round_: Round) -> float:
    """Linear up, cosine down to a twentieth."""
    return min(1.0, (step + 1) / warm_up) * (0.525 + 0.475 * math.cos(math.pi * min(1.0, step / round_.steps)))


if __name__ == "__main__":
    sys.exit(main())
