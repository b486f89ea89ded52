"""`mm-edge demo`: a simulated robot driven by the shipped model, over real ROS 2 where there is one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.cli import at_least
from mm_edge.clip import FILES, Clip
from mm_edge.commands.ros import Nodes, Ros, RosMissing, find_ros, free_domain
from mm_edge.errors import EdgeError, MissingDependency
from mm_edge.faults import Faults, FaultWatch, Finding, add_fault_argument
from mm_edge.messages import DRIVEN
from mm_edge.types import Sample

PAUSE_S = 1.0  # between episodes
SILENCE_S = 60.0  # without a word from the simulator, something is broken


@dataclass
class Report:
    ros: str  # name of the ROS 2 that carried it, empty if none did
    engine: str
    outcomes: list[dict[str, Any]]
    latency_ms: tuple[float, float]  # p50, p99
    files: list[str]

    def as_json(self) -> str:
        p50, p99 = (round(ms, 2) if np.isfinite(ms) else None for ms in self.latency_ms)
        return json.dumps(
            {
                "episodes": len(self.outcomes),
                "success": sum(o["status"] == "success" for o in self.outcomes),
                "collisions": sum(o["collisions"] for o in self.outcomes),
                "action_latency_ms": {"p50": p50, "p99": p99},
                "engine": self.engine,
                "ros": bool(self.ros),
                **({"faults": self.findings()} if self.findings() else {}),
            }
        )

    def findings(self) -> list[dict[str, Any]]:
        """Of all episodes, each with the seed of its room."""
        return [{"seed": o["seed"], **finding} for o in self.outcomes for finding in o.get("faults", ())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--episodes", type=at_least(1), default=3, help="rooms to drive through (default 3)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the first room (default 0)")
    parser.add_argument("--no-ros", action="store_true", help="one process, even where there is a ROS 2")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--bundle", type=Path, default=SHIPPED, help="model to drive with (default: the shipped one)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="for clip, strip and logs (default runs/demo)"
    )
    add_fault_argument(parser)


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started is ended, too
    if importlib.util.find_spec("mujoco") is None:
        raise MissingDependency("the simulator", "mujoco", "sim")
    from mm_edge.sim.sensors import KINDS

    bundle = Bundle.read(args.bundle)
    args.bundle, action = bundle.path.resolve(), bundle.outputs.action
    if action is None or action.names != DRIVEN:
        got = list(action.names) if action else f"none: it is a model of {bundle.task}"
        raise EdgeError(f"{bundle.path}: expected a model whose actions are {list(DRIVEN)}, got {got}")
    streams = {spec.name: spec.kind for spec in bundle.streams}
    for kinds in (KINDS, streams):  # one that makes no sense is refused before anything starts
        Faults(args.faults, kinds)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeError(f"--out {args.out}: expected a folder, or where one can be made: {error.strerror}") from None
    for name in FILES:  # of another demo
        (args.out / name).unlink(missing_ok=True)
    try:
        ros = None if args.no_ros else find_ros()
    except RosMissing as missing:
        ros = None
        print(f"Without ROS: {missing}")
    if ros:
        print(f"{ros.name}: simulator, model and watchdog as processes of their own; logs in {args.out}")
        report = _over_ros(ros, args)
    else:
        print("One process, no ROS: the same pipeline, in simulated time")
        report = _in_process(args)
    _print(report)
    if args.json:
        print(report.as_json())
    return 0


def _over_ros(ros: Ros, args: argparse.Namespace) -> Report:
    progress = Progress(args.episodes)
    with free_domain() as domain, Nodes(ros, domain, args.out) as nodes:
        print(f"To look on: export {nodes.where}", flush=True)
        nodes.start("watchdog_node")
        nodes.start("edge_node", {"bundle": args.bundle})
        faults = {"faults": " ".join(map(str, args.faults))} if args.faults else {}
        watched = {"episodes": args.episodes, "out": args.out.resolve(), **faults}
        watcher = nodes.start("demo_node", watched, piped=True)
        nodes.start("sim_node", {"seed": args.seed, "episodes": args.episodes, "pause_s": PAUSE_S, **faults})
        event: dict[str, Any] = {"event": "none yet"}
        for event in _events(watcher, nodes):
            progress.show(event)
            if event["event"] == "report":
                break
    model = event["model"]
    latency_ms = float(model["latency_p50_ms"]), float(model["latency_p99_ms"])
    return Report(ros.name, model["engine"], event["outcomes"], latency_ms, event["files"])


def _events(watcher: subprocess.Popen, nodes: Nodes) -> Iterator[dict[str, Any]]:
    """What demo_node prints, as it comes, without end. Raises EdgeError if a node dies or nothing comes for long."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in watcher.stdout or ():
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    heard_s = time.monotonic()
    while True:
        try:
            yield json.loads(lines.get(timeout=0.2))
            heard_s = time.monotonic()
        except queue.Empty:
            nodes.check()
            if time.monotonic() - heard_s > SILENCE_S:
                raise EdgeError(
                    f"no word from the simulator for {SILENCE_S:.0f} s; see {nodes.log('sim_node')}"
                ) from None


def _in_process(args: argparse.Namespace) -> Report:
    from mm_edge.pipeline import Pipeline
    from mm_edge.sim.episode import Episode

    pipeline, clip, progress = Pipeline(Bundle.read(args.bundle)), Clip(args.out), Progress(args.episodes)
    outcomes: list[dict[str, Any]] = []
    latency_ms: list[float] = []
    for i in range(args.episodes):
        episode = Episode(args.seed + i, args.faults)
        text = episode.world.room.text
        progress.show({"event": "start", "text": text})
        watch = FaultWatch(args.faults, episode.start_ns)
        driver = _Driver(pipeline, partial(clip.add, episode=i), text, watch)
        outcomes.append({**episode.run(driver).as_dict(), "idle": driver.idle})
        if args.faults:
            outcomes[-1]["faults"] = [asdict(finding) for finding in watch.findings]
        progress.show({"event": "end", **outcomes[-1]})
        latency_ms += driver.latency_ms
    p50, p99 = np.percentile(latency_ms or [np.nan], [50, 99])
    return Report("", pipeline.engine, outcomes, (float(p50), float(p99)), [str(path) for path in clip.close()])


class _Driver:
    """A pipeline at the wheel, filmed. Latency is the simulated one from camera stamp to tick, and on top the tick's
    real cost."""

    def __init__(self, pipeline: Any, film: Callable[[np.ndarray], Any], text: str, watch: FaultWatch):
        pipeline.reset()
        self._pipeline, self._film, self._text, self._watch = pipeline, film, text, watch
        self._anchor = pipeline.bundle.tick.anchor
        self._seen_by = next((name for name, spec in pipeline.specs.items() if spec.kind == "image"), "")
        self._frame: Sample | None = None
        self._acted_on_ns = 0
        self.idle = ""  # why the last tick had no action
        self.latency_ms: list[float] = []

    def push(self, sample: Sample) -> None:
        if self._pipeline.push(sample) and sample.stream == self._seen_by:
            self._frame = sample

    def due(self, now_ns: int) -> bool:
        return self._pipeline.due(now_ns)

    def tick(self, now_ns: int) -> tuple[float, float] | None:
        from mm_edge.overlay import draw

        start_s = time.perf_counter()
        output = self._pipeline.tick(now_ns)
        cost_ms = (time.perf_counter() - start_s) * 1e3
        self._watch.see(output)
        self.idle = "; ".join(output.reasons)
        if self._frame:
            self._film(draw(self._frame.data, output, self._text))
        if output.action is None:
            return None
        anchor_ns = output.sources.get(self._anchor, 0)
        if anchor_ns > self._acted_on_ns:
            self._acted_on_ns = anchor_ns
            self.latency_ms.append((now_ns - anchor_ns) / 1e6 + cost_ms)
        v, w = output.action.values[0].tolist()
        return v, w


class Progress:
    """One line an episode, and on a terminal one that moves."""

    def __init__(self, episodes: int):
        self._episodes, self._ended, self._text = episodes, 0, ""

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._text = event["text"]
        head = f'episode {self._ended + 1} of {self._episodes}: "{self._text}"'
        if event["event"] == "progress" and sys.stdout.isatty():
            print(f"\r\033[K{head}  {event['t_s']:4.1f} s  {event['speed_mps']:.2f} m/s", end="", flush=True)
        elif event["event"] == "end":
            clear = "\r\033[K" if sys.stdout.isatty() else ""
            slow = f", simulator slowed by {event['slowed_s']:.1f} s" if event.get("slowed_s", 0) > 0.5 else ""
            alarm = {None: "", True: ", alarm obeyed", False: ", alarm not obeyed"}[event["alarm_obeyed"]]
            collisions = f"{event['collisions']} collision{'' if event['collisions'] == 1 else 's'}"
            status = f"{event['status']} after {event['duration_s']:.1f} s, {collisions}{alarm}{slow}"
            print(f"{clear}{head}: {status}", flush=True)
            if event.get("idle"):
                print(f"  at its end the model did not act: {event['idle']}", flush=True)
            for finding in event.get("faults", ()):
                print(f"  {Finding(**finding)}", flush=True)
            self._ended += 1


def _print(report: Report) -> None:
    outcomes = report.outcomes
    print(f"\nepisodes    {len(outcomes)}")
    print(f"success     {sum(o['status'] == 'success' for o in outcomes)}")
    print(f"collisions  {sum(o['collisions'] for o in outcomes)}")
    p50, p99 = report.latency_ms
    told = f"{p50:.1f} ms p50, {p99:.1f} ms p99, from camera stamp to action" if np.isfinite(p50) else "none: no action"
    print(f"latency     {told}")
    print(f"engine      {report.engine}")
    print(f"ROS         {report.ros or 'none: one process'}")
    for path in report.files:
        print(f"see         {path}")
