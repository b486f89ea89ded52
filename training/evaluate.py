"""Scores: of the drive task in closed loop, in worlds never trained on; of the others on a folder of real data.

    python -m training.evaluate drive --worlds 200 --seed 900000 --json
    python -m training.evaluate drive --without camera          # that sensor dead from the start
    python -m training.evaluate drive --all-masks --worlds 50   # every subset of them dead, each in the same worlds
    python -m training.evaluate drive --expert                  # what the demonstrator gets in the same worlds
    python -m training.evaluate drive --worlds 100 --fault camera:freeze@2   # what is noticed of a fault, and when
    python -m training.evaluate drive --worlds 30 --all-faults  # the same for each kind and each sensor
    python -m training.evaluate digits --data FOLDER --json     # all that is in the folder, whatever its name
    python -m training.evaluate vlm --json                      # pictures and words, on scenes never trained on
    python -m training.evaluate vlm --checkpoint runs/vlm/final.safetensors --data FOLDER --json    # on pictures

The exported bundle drives, through the same Pipeline as on a robot. The same seed gives the same worlds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from mm_edge.bundle import SHIPPED, SHIPPED_VLM, Bundle
from mm_edge.cli import at_least
from mm_edge.errors import EdgeError
from mm_edge.faults import Fault, Faults, FaultWatch, Finding, add_fault_argument, parse_fault
from mm_edge.language import Language
from mm_edge.pipeline import Pipeline
from mm_edge.sim.episode import Episode, ExpertDriver, Outcome, PipelineDriver
from mm_edge.sim.sensors import HEIGHT, KINDS, WIDTH
from mm_edge.types import Output
from training import coco, vlm
from training.scene_scores import InBundle, InTorch, Speaker, score
from training.scenes import make_scene
from training.train import TASKS

SIMULATED = ("events",)  # tasks that need no data
SENSORS = ("camera", "audio", "scan", "imu", "text")
FAULTS = (
    "die", "drop=0.3", "freeze", "delay=200ms", "jitter=50ms", "skew=300ms", "skew=-300ms", "jump=-5s", "reorder",
    "duplicate", "nan", "noise", "truncate",
)  # fmt: skip
STOOD_MPS = 0.05
SHOWN_PIXELS = 12  # a frame shows an object if at least so many of its pixels are it


@dataclass
class Result:
    """One world."""

    outcome: Outcome
    frames: int = 0  # that show the named object
    hits: int = 0  # of these, how often attention's peak, as it is drawn, lay on it
    findings: list[Finding] = field(default_factory=list)  # of the faults that began
    stop_m: list[float] = field(default_factory=list)  # driven from a fault's start until the robot stood
    false_alarms: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = whole.add_subparsers(dest="task", required=True, metavar="TASK")
    for name in sorted(name for name, task in TASKS.items() if hasattr(task, "evaluate")):
        task = tasks.add_parser(name, help=f"see {TASKS[name].__name__.replace('.', '/')}.py")
        what = "folder of clips, see clips.py, instead of simulated ones" if name in SIMULATED else "folder of the data"
        task.add_argument("--data", type=Path, required=name not in SIMULATED, help=what)
        task.add_argument("--bundle", type=Path, default=SHIPPED.parent / name)
        task.add_argument("--only", action="append", default=[], help="a speaker, log or recording; may be repeated")
        task.add_argument("--json", action="store_true", help="end with one JSON object")
    scenes = tasks.add_parser("vlm", help="pictures and words, see training/vlm.py")
    scenes.add_argument("--bundle", type=Path, default=SHIPPED_VLM)
    scenes.add_argument("--checkpoint", type=Path, help="weights beside their recipe.yaml, instead of a bundle")
    scenes.add_argument("--data", type=Path, help="pictures with captions, see training/coco.py, instead of scenes")
    scenes.add_argument("--scenes", type=at_least(1), default=500)
    scenes.add_argument("--seed", type=at_least(0), default=3_000_000, help="of the first scene")
    scenes.add_argument("--json", action="store_true", help="end with one JSON object")
    parser = tasks.add_parser("drive", help="the simulated robot")
    parser.add_argument("--bundle", type=Path, default=SHIPPED)
    parser.add_argument("--worlds", type=at_least(1), default=200)
    parser.add_argument("--seed", type=at_least(0), default=900_000, help="of the first world")
    parser.add_argument(
        "--without", choices=SENSORS, action="append", default=[], help="a sensor that is dead; may be repeated"
    )
    parser.add_argument("--all-masks", action="store_true", help="the table of scores with each sensor dead")
    add_fault_argument(parser)
    parser.add_argument(
        "--all-faults", action="store_true", help="the table of each kind of fault in each sensor, at 2 s"
    )
    parser.add_argument("--expert", action="store_true", help="let the demonstrator drive")
    parser.add_argument("--workers", type=at_least(1), default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = whole.parse_args(argv)
    if args.task == "vlm":
        return _on_pictures(args)
    if args.task != "drive":
        return _on_data(args)
    if args.expert and (args.without or args.all_masks or args.faults or args.all_faults):
        parser.error("--expert drives by what it knows, not by sensors: it takes no --without, --fault, --all-...")
    if (args.all_masks or args.all_faults) and (args.without or args.faults or (args.all_masks and args.all_faults)):
        parser.error("--all-masks and --all-faults are tables of their own: give one alone, without --without, --fault")
    faults = tuple(args.faults)
    try:
        Faults(faults, KINDS)  # one that makes no sense is refused here
        if not args.expert and (task := Bundle.read(args.bundle).task) != "drive":  # here, not in a worker
            raise EdgeError(f"{args.bundle}: expected a bundle of drive, got one of {task}: see evaluate {task}")
        if args.all_masks:
            scores: dict[str, Any] = {"worlds": args.worlds, "seed": args.seed, "masks": {}}
            for dead in [*subsets(SENSORS[:-1]), ("text",)]:  # without a command there is nothing to compare
                name = "+".join(dead) or "none"
                row = evaluate(args.bundle, args.worlds, args.seed, frozenset(dead), (), args.workers)
                scores["masks"][name] = row
                _say_row(f"dead: {name:23}", row)
        elif args.all_faults:
            scores = {"worlds": args.worlds, "seed": args.seed, "faults": {}}
            for fault in all_faults():
                scores["faults"][str(fault)] = evaluate(
                    args.bundle, args.worlds, args.seed, frozenset(), (fault,), args.workers
                )
                print(_fault_line(str(fault), scores["faults"][str(fault)]), flush=True)
        else:
            bundle = None if args.expert else args.bundle
            scores = evaluate(bundle, args.worlds, args.seed, frozenset(args.without), faults, args.workers)
            _say_row("expert:" if args.expert else f"dead: {'+'.join(args.without) or 'none':23}", scores, faults)
    except EdgeError as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(scores))
    return 0


def _say_row(what: str, row: dict[str, Any], faults: tuple[Fault, ...] = ()) -> None:
    print(f"{what} {_line(row)}", flush=True)
    if faults:
        print(_fault_line(" ".join(map(str, faults)), row))
    for text in row["false_alarm_texts"]:
        print(f"false alarm: {text}")


def _on_data(args: argparse.Namespace) -> int:
    try:
        if args.bundle == SHIPPED.parent / args.task and not args.bundle.exists():
            raise ValueError(f"no bundle of {args.task} is shipped: --bundle FOLDER, of one that export.to_onnx wrote")
        bundle = Bundle.read(args.bundle)
        if bundle.task != args.task:
            raise ValueError(f"{args.bundle}: expected a bundle of {args.task}, got one of {bundle.task}")
        task = TASKS["clips" if args.task in SIMULATED and args.data else args.task]
        if args.only and not args.data:
            raise ValueError("--only: of which folder? --data FOLDER")
        scores = task.evaluate(bundle, args.data, args.only)
    except (EdgeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return _say(scores, args.json)


def _on_pictures(args: argparse.Namespace) -> int:
    try:
        if args.checkpoint is None:
            if args.data:
                raise ValueError("--data: pictures of one's own are asked of weights: --checkpoint FILE")
            speaker: Speaker = InBundle(Language(args.bundle))
        else:
            recipe, model = vlm.read_model(args.checkpoint)
            if args.data:
                return _say(coco.score(model, vlm.words(recipe), args.data), args.json)
            if recipe.data:
                raise ValueError(
                    f"{args.checkpoint}: learned from a folder; where are pictures to ask it of? --data FOLDER"
                )
            speaker = InTorch(model)
        shown = map(make_scene, tqdm(range(args.seed, args.seed + args.scenes), "scenes", leave=False))
        return _say(score(speaker, list(shown)), args.json)
    except (OSError, ValueError, EdgeError) as error:
        print(error, file=sys.stderr)
        return 1


def _told(scores: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A line for each number, or for each row of a table."""
    for name, value in scores.items():
        if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            yield f"{indent}{name}"
            yield from _told(value, indent + "  ")
        else:
            row = "  ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            yield f"{indent + name:<25} {'none' if row is None else row}"


def _say(scores: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(scores) if as_json else "\n".join(_told(scores)))
    return 0


def evaluate(
    bundle: Path | None, worlds: int, seed: int, dead: frozenset[str], faults: tuple[Fault, ...], workers: int
) -> dict[str, Any]:
    """Scores over `worlds` worlds from `seed` on, driven by a bundle, or by the expert if that is None; the sensors
    `dead` silent from the start, and in each world the same `faults`."""
    jobs = [(bundle, s, dead, faults) for s in range(seed, seed + worlds)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        bar = tqdm(pool.imap(_drive, jobs), "worlds", total=worlds, leave=False)
        results = list(bar)
    return summarise(results) | (summarise_faults(results) if faults else {})


def all_faults() -> list[Fault]:
    """Each kind in each sensor, two seconds after the begin, where it makes sense."""
    faults = []
    for sensor, kind in itertools.product(SENSORS[:-1], FAULTS):
        fault = parse_fault(f"{sensor}:{kind}@2")
        with contextlib.suppress(EdgeError):
            Faults([fault], KINDS)
            faults.append(fault)
    return faults


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [chosen for n in range(len(names) + 1) for chosen in itertools.combinations(names, n)]


def summarise(results: list[Result]) -> dict[str, Any]:
    outcomes = [r.outcome for r in results]
    judged = [o.alarm_obeyed for o in outcomes if o.alarm_obeyed is not None]
    frames = sum(r.frames for r in results)
    by_task = {t: _rate([o.status == "success" for o in outcomes if o.task == t]) for t in ("named", "sound")}
    return {
        "worlds": len(outcomes),
        "success": _rate([o.status == "success" for o in outcomes]),
        "success_by_task": by_task,
        "wrong": _rate([o.status == "wrong" for o in outcomes]),
        "timeout": _rate([o.status == "timeout" for o in outcomes]),
        "collision_episodes": sum(o.collisions > 0 for o in outcomes),
        "collision_rate": _rate([o.collisions > 0 for o in outcomes]),
        "alarms": len(judged),
        "alarm_obeyed": _rate(judged),
        "mean_duration_s": round(float(np.mean([o.duration_s for o in outcomes])), 2),
        "attention_frames": frames,
        "attention_hit": round(sum(r.hits for r in results) / frames, 4) if frames else None,
        "hours": round(sum(o.duration_s for o in outcomes) / 3600, 3),
        "false_alarms": sum(len(r.false_alarms) for r in results),
        "false_alarm_texts": [f"world {r.outcome.seed}: {text}" for r in results for text in r.false_alarms][:20],
    }


def summarise_faults(results: list[Result]) -> dict[str, Any]:
    """Counts of worlds (of each fault in each, if there are several)."""
    findings = [finding for r in results for finding in r.findings]
    detected = [f.detected_ms for f in findings if f.detected_ms is not None]
    stops_m = [m for r in results for m in r.stop_m]
    return {
        "injected": len(findings),
        "detected": len(detected),
        "detection_ms": {"p50": _round(np.median(detected)), "max": _round(max(detected))} if detected else None,
        "words": Counter(re.sub(r"[-+\d.]+", "#", text) for f in findings for text in f.words),
        "acted_without": sum(f.acted_without_ms is not None for f in findings),
        "safe_stops": sum(f.stopped_ms is not None for f in findings),
        "stop_m": {"p50": _round(np.median(stops_m), 3), "max": _round(max(stops_m), 3)} if stops_m else None,
    }


def _round(value: float, digits: int = 1) -> float:
    return round(float(value), digits)


def _rate(values: list[Any]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def _line(row: dict[str, Any]) -> str:
    def percent(x: float | None) -> str:
        return "   - " if x is None else f"{x:5.1%}"

    tasks = row["success_by_task"]
    return (
        f"success {percent(row['success'])} (named {percent(tasks['named'])}, sound {percent(tasks['sound'])}), "
        f"collisions {percent(row['collision_rate'])}, alarm obeyed {percent(row['alarm_obeyed'])} of {row['alarms']}, "
        f"attention on the named object {percent(row['attention_hit'])} of {row['attention_frames']} frames"
    )


def _fault_line(name: str, row: dict[str, Any]) -> str:
    took = row["detection_ms"]
    detected = f"detected in {row['detected']} of {row['injected']}" + (
        f" after {took['p50']:.0f} ms (at most {took['max']:.0f})" if took else ""
    )
    stops = f", {row['safe_stops']} stops" + (f" within {row['stop_m']['max']:.2f} m" if row["stop_m"] else "")
    success, collisions = row["success"] or 0.0, row["collision_rate"] or 0.0
    return f"{name:22} success {success:5.1%}, collisions {collisions:5.1%}, {detected}{stops}"


_pipelines: dict[Path, Pipeline] = {}


def _drive(job: tuple[Path | None, int, frozenset[str], tuple[Fault, ...]]) -> Result:
    """One world, in a worker process."""
    bundle, seed, dead, faults = job
    episode = Episode(seed, faults)
    room = episode.world.room
    if bundle is None:
        return Result(episode.run(ExpertDriver(episode)))
    if bundle not in _pipelines:  # once a process
        _pipelines[bundle] = Pipeline(Bundle.read(bundle), engine="cpu")
    pipeline = _pipelines[bundle]
    pipeline.reset()
    seen: dict[int, bool] = {}  # of each frame that shows the named object: was the peak on it?
    watch, odometer = FaultWatch(faults, episode.start_ns), _Odometer(episode, faults)

    def look(output: Output) -> None:
        watch.see(output)
        odometer.see(watch)
        for attention in output.attention:
            shown = episode.sensors.seen.get(attention.stamp_ns)
            if shown is None or room.by_sound:
                continue
            mask = shown == room.target
            if mask.sum() >= SHOWN_PIXELS:
                drawn = cv2.resize(attention.weights, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)  # as the overlay
                seen[attention.stamp_ns] = bool(mask.flat[drawn.argmax()])

    outcome = episode.run(PipelineDriver(pipeline, dead, look))
    began = [f for fault, f in zip(faults, watch.findings) if fault.start_s < outcome.duration_s]
    return Result(outcome, len(seen), sum(seen.values()), began, odometer.stop_m, watch.false_alarms)


class _Odometer:
    """How far the robot goes from a fault's start until it stands, where the fault stops it."""

    def __init__(self, episode: Episode, faults: tuple[Fault, ...]):
        self._world, self._faults = episode.world, faults
        self._x, self._y, _ = episode.world.pose()
        self._driven_m = 0.0
        self._at_start_m: dict[int, float] = {}  # of each fault
        self._stood: set[int] = set()
        self.stop_m: list[float] = []

    def see(self, watch: FaultWatch) -> None:
        x, y, _ = self._world.pose()
        self._driven_m += math.hypot(x - self._x, y - self._y)
        self._x, self._y = x, y
        for i, (fault, finding) in enumerate(zip(self._faults, watch.findings)):
            if self._world.t_s >= fault.start_s:
                self._at_start_m.setdefault(i, self._driven_m)
            if finding.stopped_ms is not None and i not in self._stood and self._world.speed() < STOOD_MPS:
                self._stood.add(i)
                self.stop_m.append(self._driven_m - self._at_start_m[i])


if __name__ == "__main__":
    sys.exit(main())
