"""`mm-edge record`: episodes from the simulator, driven by the expert, as ROS 2 bags (MCAP), one folder an episode."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.cli import at_least
from mm_edge.errors import EdgeError
from mm_edge.messages import TOPICS
from mm_edge.recording import RecordingWriter
from mm_edge.types import Action, Sample, StreamSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for the recordings: OUT/<seed>")
    parser.add_argument("--sim", action="store_true", required=True, help="from the simulator")
    parser.add_argument("--episodes", type=at_least(1), default=1)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the first episode")
    parser.add_argument(
        "--bundle", type=Path, default=SHIPPED, help="whose streams to record (default: the shipped one)"
    )


def run(args: argparse.Namespace) -> int:
    from mm_edge.sim.sensors import TIMING

    streams = Bundle.read(args.bundle).streams
    if missing := [spec.name for spec in streams if spec.name not in {*TIMING, "text"}]:
        raise EdgeError(f"{args.bundle}: the simulator has no stream {missing}, only {[*TIMING, 'text']}")
    seeds = range(args.seed, args.seed + args.episodes)
    if there := [str(args.out / str(seed)) for seed in seeds if (args.out / str(seed)).exists()]:
        raise EdgeError(f"{there[0]}: exists already; recordings are never overwritten")
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(seeds, "record"):
        record_episode(args.out / str(seed), seed, streams)
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
            recording.command(
                topic, Action(("linear_x", "angular_z"), np.array([values], np.float32), 0.0), now_ns, now_ns
            )

        def on_tick(now_ns: int) -> None:
            recording.tick(now_ns, episode.labels(driver.camera_ns))
            command("expert/cmd_vel", driver.wanted.tolist(), now_ns)

        def on_drive(now_ns: int, action: Sequence[float]) -> None:
            command("cmd_vel", action, now_ns)

        def on_sample(sample: Sample) -> None:
            if sample.stream in topics:
                recording.write(sample)

        recording.outcome = episode.run(driver, on_sample, on_tick, on_drive).as_dict()
