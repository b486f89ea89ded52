"""`mm-edge replay BUNDLE RECORDING`: a recording through the model, each output as a line of JSON on standard output.

Nothing else goes there, and the same recording gives the same bytes: time comes from the recording, numbers from the
CPU engine. What became of each stream goes to standard error.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from mm_edge.bundle import Bundle
from mm_edge.errors import RecordingError
from mm_edge.faults import Faults, FaultWatch, add_fault_argument
from mm_edge.messages import output_to_json
from mm_edge.pipeline import Pipeline
from mm_edge.replay import events, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="folder of the model, or the name of a shipped one")
    parser.add_argument("recording", help="folder written by `mm-edge record`, or any ROS 2 or ROS 1 bag")
    add_topic_argument(parser)
    add_fault_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Raises EdgeError if the bundle or the recording cannot be used, or a fault makes no sense."""
    bundle = Bundle.read(args.bundle)
    topics = parse_topics(args.topics, [spec.name for spec in bundle.streams]) if args.topics else None
    faults = Faults(args.faults, {spec.name: spec.kind for spec in bundle.streams}) if args.faults else None
    timeline = events(args.recording, bundle.streams, bundle.tick, topics, faults=faults)
    pipeline = Pipeline(bundle, engine="cpu")
    output, watch = None, None
    for output in tqdm(replay(pipeline, timeline), unit=" ticks", disable=not sys.stderr.isatty()):
        print(output_to_json(output))
        if faults:
            watch = watch or FaultWatch(args.faults, faults.start_ns or output.stamp_ns)
            watch.see(output)
    if output is None:
        raise RecordingError(f"{args.recording}: no tick, since nothing was recorded of {list(pipeline.specs)}")
    streams = pipeline.health(output.stamp_ns).streams
    if not faults and not any(n for stream in streams for n in stream.counts.values()):
        raise RecordingError(f"{args.recording}: there is nothing in it of the streams {list(pipeline.specs)}")
    for stream in streams:
        counts = ", ".join(f"{n} {what}" for what, n in stream.counts.items() if n) or "nothing came"
        print(f"{stream.name}: {counts}", *stream.reasons, sep="; ", file=sys.stderr)
    for finding in watch.findings if watch else ():
        print(f"fault {finding}", file=sys.stderr)
    return 0


def add_topic_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topic",
        action="append",
        dest="topics",
        metavar="STREAM=TOPIC",
        help="which topic is which stream, where their names differ: camera=/front/image_raw; may be repeated",
    )


def parse_topics(arguments: list[str], streams: list[str]) -> dict[str, str]:
    """Stream -> topic, of arguments STREAM=TOPIC. Raises RecordingError."""
    topics = dict(argument.partition("=")[::2] for argument in arguments)
    if wrong := [name for name, topic in topics.items() if name not in streams or not topic]:
        raise RecordingError(f"--topic: expected STREAM=TOPIC with a stream of {streams}, got {wrong}")
    return topics
