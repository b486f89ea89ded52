"""`mm-edge view RECORDING`, or `mm-edge view --ros`: what a robot senses and what its model makes of it, in a browser.

Camera with attention, LiDAR, sound, commands, captions, actions, ages and missing sensors: of a recording, which is
taken through the model and one that says what it sees, or live from the topics of a robot with an `edge_node` and a
`caption_node`. The page and all that it needs come from this machine. With --save, a file for rerun's own viewer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mm_edge.bundle import SHIPPED, SHIPPED_VLM, Bundle
from mm_edge.commands.replay import add_topic_argument, parse_topics
from mm_edge.commands.ros import find_ros, parameter_arguments
from mm_edge.errors import EdgeError, EngineError, RecordingError, SampleError
from mm_edge.language import CHANGE, Language, caption_of, change
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
        "--vlm", type=Path, help="model that says what a recording's camera saw (default: the shipped one, if both are)"
    )
    add_topic_argument(parser)
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
    if args.save and args.save.suffix != ".rrd":
        raise EdgeError(f"--save {args.save}: expected a name that ends in .rrd")
    if args.ros and args.vlm:
        raise EdgeError("--vlm is for recordings: what a live robot sees, its caption_node says")
    if args.ros:
        return _become_node(args)
    camera = next((spec.name for spec in bundle.streams if spec.kind == "image"), None)
    vlm = args.vlm or (SHIPPED_VLM if args.bundle == SHIPPED else None)
    caption = _Captions(vlm) if vlm and camera else None
    timeline = events(args.recording, bundle.streams, bundle.tick, topics)
    pipeline, viewer = Pipeline(bundle, engine="cpu"), Viewer(bundle)
    told = viewer.save(args.save) if args.save else viewer.serve(args.port)
    if not args.save:
        print(told, flush=True)

    def shown() -> Iterator[Sample | SampleError | Tick]:
        for event in timeline:
            if isinstance(event, Sample):
                viewer.sample(event)
                if caption and event.stream == camera and (text := caption(event)):
                    viewer.say("caption", text, event.stamp_ns)
            yield event

    output = None
    for output in tqdm(replay(pipeline, shown()), unit=" ticks", disable=not sys.stderr.isatty()):
        viewer.output(output)
    if output is None:
        raise RecordingError(f"{args.recording}: no tick, since nothing was recorded of {list(pipeline.specs)}")
    viewer.flush()
    if args.save:
        print(told)
    else:
        print("all of it is there; serving until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    viewer.close()
    return 0


class _Captions:
    """One as the scene changes, as `caption_node` does. Raises BundleError if the bundle knows none."""

    def __init__(self, bundle: Path):
        self._pipeline = Pipeline(Bundle.read(bundle), engine="cpu")
        self._language = Language(self._pipeline.bundle, model=self._pipeline.model)
        self._prompt = self._language.prompt("caption")
        self._scene: np.ndarray | None = None  # of the last one

    def __call__(self, frame: Sample) -> str:
        """Empty if the scene is as it was."""
        name = self._language.stream.name
        self._pipeline.push(frame._replace(stream=name))
        if not self._pipeline.tick(frame.arrival_ns).mask[name]:
            return ""
        try:
            scene = self._language.scene(frame.data)
        except EngineError:  # nothing can be said of it
            return ""
        if self._scene is not None and change(scene, self._scene) <= CHANGE:
            return ""
        self._scene = scene
        return caption_of(self._language.say(self._prompt)).text


def _become_node(args: argparse.Namespace) -> int:
    """So that Ctrl-C and the exit status are its own."""
    ros = find_ros()
    parameters = {
        "bundle": str(args.bundle.resolve()),
        "streams": args.topics,
        "save": str(args.save.resolve()) if args.save else "",
        "port": args.port,
    }
    given = parameter_arguments({name: value for name, value in parameters.items() if value})
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "mm_edge_ros.view_node", "--ros-args", *given], ros.env)
