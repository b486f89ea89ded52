"""`mm-edge view RECORDING`, or `mm-edge view --ros`: what a robot senses and what its model makes of it, in a browser.

Camera with attention, LiDAR, sound, commands and what is said of them, actions, ages and missing sensors: of a
recording, which is taken through the model, or live from the topics of a robot with an `edge_node`. The page and all
that it needs come from this machine. With --save, a file for rerun's own viewer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.commands.replay import parse_topics
from mm_edge.commands.ros import find_ros
from mm_edge.errors import EdgeError, RecordingError, SampleError
from mm_edge.pipeline import Pipeline
from mm_edge.recording import Tick
from mm_edge.replay import events, replay
from mm_edge.types import Sample
from mm_edge.viewer import Viewer

PORT = 9090


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recording", nargs="?", help="folder written by `mm-edge record`, or any ROS 2 or ROS 1 bag")
    parser.add_argument("--ros", action="store_true", help="look at a robot instead, live")
    parser.add_argument("--bundle", type=Path, default=SHIPPED, help="its model (default: the shipped one)")
    parser.add_argument(
        "--topic",
        action="append",
        dest="topics",
        metavar="STREAM=TOPIC",
        help="which topic is which stream: camera=/front/image_raw; may be repeated",
    )
    parser.add_argument("--save", type=Path, metavar="FILE.rrd", help="write this file, and serve nothing")
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"of the page; the next one serves its data (default {PORT})"
    )


def run(args: argparse.Namespace) -> int:
    """Raises EdgeError if the bundle, the recording or the port cannot be used, MissingDependency without rerun."""
    if bool(args.recording) == args.ros:
        raise EdgeError("expected a recording, or --ros for a robot that is live")
    bundle = Bundle.read(args.bundle)
    topics = parse_topics(args.topics, [spec.name for spec in bundle.streams]) if args.topics else None
    if args.ros:
        return _become_node(args)
    timeline = events(args.recording, bundle.streams, bundle.tick, topics)
    pipeline, viewer = Pipeline(bundle, engine="cpu"), Viewer(bundle)
    print(viewer.save(args.save) if args.save else viewer.serve(args.port), flush=True)

    def shown() -> Iterator[Sample | SampleError | Tick]:
        for event in timeline:
            if isinstance(event, Sample):
                viewer.sample(event)
            yield event

    output = None
    for output in tqdm(replay(pipeline, shown()), unit=" ticks", disable=not sys.stderr.isatty()):
        viewer.output(output)
    if output is None:
        raise RecordingError(f"{args.recording}: no tick, since nothing was recorded of {list(pipeline.specs)}")
    viewer.flush()
    if not args.save:
        print("all of it is there; serving until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    viewer.close()
    return 0


def _become_node(args: argparse.Namespace) -> int:
    """So that Ctrl-C and the exit status are its own."""
    ros = find_ros()
    parameters = {
        "bundle": str(args.bundle.resolve()),
        "streams": args.topics,
        "save": str(args.save.resolve()) if args.save else "",
        "port": args.port,
    }
    given = [a for name, value in parameters.items() if value for a in ("-p", f"{name}:={json.dumps(value)}")]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "mm_edge_ros.view_node", "--ros-args", *given], ros.env)
