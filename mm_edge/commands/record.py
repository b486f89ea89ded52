"""`mm-edge record OUT`: what a robot senses, does and decides, as a ROS 2 bag (MCAP), until Ctrl-C.

Recorded are the topics of a bundle's streams, its outputs (whose ticks replay repeats) and the commands, or any topics
by name. It is a process of its own, and no publisher waits for it. Where a power cut or a full disk left OUT.partial,
`mm-edge record OUT` repairs it, says what was lost and ends; record on under another name. With --sim, episodes from
the simulator, driven by the expert, are recorded as OUT/<seed>.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.cli import at_least
from mm_edge.commands.ros import find_ros, parameter_arguments
from mm_edge.errors import EdgeError
from mm_edge.messages import DRIVEN, TOPICS
from mm_edge.recording import RecordingWriter, partial, refuse_existing
from mm_edge.repair import repair
from mm_edge.types import Action, Sample, StreamSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for the recording; with --sim for the recordings OUT/<seed>")
    parser.add_argument("--bundle", type=Path, help="whose streams to record (default: the shipped one)")
    parser.add_argument(
        "--topic",
        action="append",
        default=[],
        dest="streams",
        metavar="STREAM=TOPIC",
        help="where the robot has a stream of the bundle: camera=/front/image_raw; may be repeated",
    )
    parser.add_argument(
        "--topics", nargs="+", default=[], metavar="TOPIC", help="record these, and of a bundle only if it is named"
    )
    parser.add_argument(
        "--min-free-mb",
        type=at_least(0),
        default=200,
        help="end the recording, with status 1, when the disk has less (default 200)",
    )
    parser.add_argument("--sim", action="store_true", help="from the simulator")
    parser.add_argument("--episodes", type=at_least(1), default=1, help="with --sim")
    parser.add_argument("--seed", type=at_least(0), default=0, help="with --sim: of the first episode")


def run(args: argparse.Namespace) -> int:
    if args.sim:
        return _record_sim(args)
    args.out = args.out.resolve()  # "." has no name
    if partial(args.out).exists():
        print(repair(args.out))
        return 0
    return _record_robot(args)


def _record_robot(args: argparse.Namespace) -> int:
    """Become `record_node`, so that Ctrl-C and the exit status are its own."""
    ros = find_ros()
    bundle = args.bundle or (None if args.topics and not args.streams else SHIPPED)
    parameters = {
        "out": str(args.out),
        "bundle": str(bundle.resolve()) if bundle else "",
        "streams": args.streams,
        "topics": args.topics,
        "min_free_mb": float(args.min_free_mb),
    }
    given = parameter_arguments({name: value for name, value in parameters.items() if value not in ("", [])})
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "mm_edge_ros.record_node", "--ros-args", *given], ros.env)


def _record_sim(args: argparse.Namespace) -> int:
    from mm_edge.sim.sensors import TIMING

    bundle = args.bundle or SHIPPED
    streams = Bundle.read(bundle).streams
    if missing := [spec.name for spec in streams if spec.name not in {*TIMING, "text"}]:
        raise EdgeError(f"{bundle}: the simulator has no stream {missing}, only {[*TIMING, 'text']}")
    paths = {seed: args.out / str(seed) for seed in range(args.seed, args.seed + args.episodes)}
    for path in paths.values():
        refuse_existing(path)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, path in tqdm(paths.items(), "record"):
        try:
            record_episode(path, seed, streams)
        except BaseException:  # half an episode has no outcome, and its seed gives it again
            shutil.rmtree(partial(path), ignore_errors=True)
            print(f"{path}: cut short, and not kept", file=sys.stderr)
            raise
    last = args.seed + args.episodes - 1
    print(f"{args.out}: recorded {args.seed}" + (f" to {last}" if args.episodes > 1 else ""))
    return 0


def record_episode(path: Path, seed: int, streams: tuple[StreamSpec, ...]) -> None:
    """One episode with the expert at the wheel: samples, ticks with labels, executed and expert actions, outcome."""
    from mm_edge.sim.episode import Episode, ExpertDriver

    episode = Episode(seed)
    driver = ExpertDriver(episode, burst_probability=0.02)
    meta = {"robot": "mm_edge.sim", "seed": seed, "task": episode.world.room.text}
    topics = {spec.name: TOPICS.get(spec.kind, spec.name) for spec in streams}
    with RecordingWriter(path, streams, topics, meta) as recording:

        def command(topic: str, values: Sequence[float], now_ns: int) -> None:
            recording.command(topic, Action(DRIVEN, np.array([values], np.float32), 0.0), now_ns, now_ns)

        def on_tick(now_ns: int) -> None:
            recording.tick(now_ns, episode.labels(driver.camera_ns))
            command("expert/cmd_vel", driver.wanted.tolist(), now_ns)

        def on_drive(now_ns: int, action: Sequence[float]) -> None:
            command("cmd_vel", action, now_ns)

        def on_sample(sample: Sample) -> None:
            if sample.stream in topics:
                recording.write(sample)

        recording.outcome = episode.run(driver, on_sample, on_tick, on_drive).as_dict()
