"""`mm-edge run BUNDLE --camera 0 --microphone default --text "drive to the red ball"`: a model at work on the senses of
this machine, live and without ROS.

Camera, microphone and text become the bundle's streams of their kind; the model does without all others, as on a robot
whose sensors are dead, and says so. A file plays in real time. A line that is typed, or piped in, is the next command.
Ends with Ctrl-C, after --seconds, or with the last source, and then tells what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import queue
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.bundle import Bundle
from mm_edge.clip import Video
from mm_edge.commands.view import PORT
from mm_edge.errors import EdgeError, SampleError
from mm_edge.language import Language, caption_of
from mm_edge.overlay import Lingering, draw, in_words
from mm_edge.pipeline import Pipeline
from mm_edge.preprocess import check
from mm_edge.sources import CameraSource, Feed, Source, open_sound
from mm_edge.types import Output, Sample, StreamSpec

POLL_S = 0.002  # how late a tick without the anchor stream may be
BLANK = np.full((480, 640, 3), 22, np.uint8)  # to draw on if there is no camera


def duration_s(text: str) -> float:
    """An argparse type."""
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="folder of the model, or the name of a shipped one")
    parser.add_argument("--camera", metavar="SOURCE", help="number of a camera, a video file, or the URL of a stream")
    parser.add_argument("--microphone", metavar="NAME", help='"default", number or name of one, or a sound file')
    parser.add_argument("--text", help="the command to begin with")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--view", nargs="?", type=int, const=PORT, metavar="PORT", help=f"in a browser (port {PORT})")
    shown.add_argument("--save", type=Path, metavar="FILE", help="a video (.mp4), or a recording for rerun (.rrd)")
    parser.add_argument("--seconds", type=duration_s, default=math.inf, help="how long (default: until it is ended)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Raises EdgeError if the bundle or a source cannot be used, MissingDependency. Status 1 if all sources failed."""
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)  # as on a robot
    live = Live(Pipeline(Bundle.read(args.bundle)), args)
    feeds = live.start()
    try:
        live.work(feeds, args.seconds)
    except KeyboardInterrupt:
        pass
    finally:
        for feed in feeds:
            feed.close()
        files = live.close()
    report = live.report(files)
    _print(report)
    if args.json:
        print(json.dumps(report, allow_nan=False))
    return 1 if all(feed.error for feed in feeds) else 0


class Live:
    """A pipeline, what it is shown and what it is shown with.

    Args:
        args: of the command.

    Raises EdgeError for a source that cannot be used.
    """

    def __init__(self, pipeline: Pipeline, args: argparse.Namespace):
        self._pipeline, self._text = pipeline, args.text or ""
        bundle = pipeline.bundle
        self._language = _speaker(pipeline)
        self._commands = _first(bundle, "text")
        self._sources = _open(bundle, args)
        if args.text:
            check(_expect(bundle, "text", "--text"), args.text, bundle.vocabulary)
        self._viewer, self._video, self._fps = None, None, 1e3 / bundle.tick.period_ms
        if args.save and args.save.suffix == ".mp4":
            self._video = Video(args.save, self._fps)
        elif args.save or args.view:
            from mm_edge.viewer import Viewer

            if args.save and args.save.suffix != ".rrd":
                raise EdgeError(f"--save {args.save}: expected a file .mp4 or .rrd")
            self._viewer = Viewer(bundle, live=True)
            print(self._viewer.save(args.save) if args.save else self._viewer.serve(args.view), flush=True)
        self._saved = [args.save] if self._viewer and args.save else []
        shown = bundle.outputs.attention.stream if bundle.outputs.attention else None
        self._shown = shown or next((spec.name for spec in bundle.streams if spec.kind == "image"), "")
        self._frames: deque[Sample] = deque(maxlen=8)
        self._unseen: queue.SimpleQueue[Sample] = queue.SimpleQueue()  # by the viewer, which has one thread
        self._wake = threading.Event()
        self._ticks = self._actions = self._captioned_ns = self._anchor_ns = self._drawn = 0
        self._latency_ms, self._tick_ms = deque[float](maxlen=100_000), deque[float](maxlen=100_000)  # some hours
        self._told = {"reasons": Counter[str](), "notes": Counter[str]()}  # whatever their numbers
        self._events: Counter[str] = Counter()
        self._lingering = Lingering()
        self._wording: dict[str, str] = {}  # of each, as it was first told
        self._begun_s, self._begun_cpu_s = time.monotonic(), time.process_time()

    def start(self) -> list[Feed]:
        for spec in self._pipeline.specs.values():
            source = self._sources.get(spec.name)
            text = repr(self._text) if spec is self._commands and self._text else "absent: no source was given for it"
            print(f"{spec.name:<12}{source.name if source else text}")
        self._begun_s, self._begun_cpu_s = time.monotonic(), time.process_time()
        if self._text:
            self._command(self._text)
        if self._commands and sys.stdin:
            if sys.stdin.isatty():
                print("type a command, and Enter", flush=True)
            threading.Thread(target=self._listen, daemon=True).start()
        return [Feed(source, self._push) for source in self._sources.values()]

    def work(self, feeds: list[Feed], seconds: float) -> None:
        """Tick in real time until it is over."""
        told_s, told_ticks, ended = self._begun_s, 0, set[Feed]()
        end_s = self._begun_s + seconds
        due_s, most_s = self._begun_s, self._pipeline.bundle.tick.max_period_ms / 1e3  # without the anchor
        while (now_s := time.monotonic()) < end_s:
            self._wake.wait(max(POLL_S, min(due_s, end_s) - now_s))
            self._wake.clear()
            now_ns = time.time_ns()
            if self._pipeline.due(now_ns):
                due_s = time.monotonic() + most_s
                output = self._tick(now_ns)
                if now_s - told_s >= 1:
                    self._tell(output, (self._ticks - told_ticks) / (now_s - told_s))
                    told_s, told_ticks = now_s, self._ticks
            for feed in feeds:
                if not feed.is_alive() and feed not in ended:
                    ended.add(feed)
                    print(feed.error or f"{feed.source.stream}: {feed.source.name} is at its end", flush=True)
            if len(ended) == len(feeds):
                self._tick(time.time_ns())  # what came since the last
                return

    def close(self) -> list[str]:
        """The files that were written."""
        if self._viewer:
            self._viewer.close()
        return [str(path) for path in (self._video.close() if self._video else self._saved)]

    def report(self, files: list[str]) -> dict[str, Any]:
        health = self._pipeline.health(time.time_ns())
        seconds, cpu_s = time.monotonic() - self._begun_s, time.process_time() - self._begun_cpu_s
        return {
            "seconds": round(seconds, 2),
            "cores": round(cpu_s / seconds, 4),
            "ticks": self._ticks,
            "actions": self._actions if self._pipeline.bundle.outputs.action else None,
            "latency_ms": _percentiles(self._latency_ms),
            "tick_ms": _percentiles(self._tick_ms),
            "engine": self._pipeline.engine,
            "events": dict(self._events.most_common()),
            **{
                what: {self._wording[kind]: ticks for kind, ticks in told.most_common()}
                for what, told in self._told.items()
            },
            "streams": {stream.name: {what: n for what, n in stream.counts.items() if n} for stream in health.streams},
            "files": files,
        }

    # ---- any thread

    def _push(self, sample: Sample) -> None:
        if self._viewer:
            self._unseen.put(sample)
        if not self._pipeline.push(sample):
            return
        if sample.stream == self._shown:
            self._frames.append(sample)
        if self._pipeline.due(sample.arrival_ns):
            self._wake.set()

    def _listen(self) -> None:
        for line in sys.stdin:
            if line.strip():
                self._command(line.strip())

    def _command(self, text: str) -> None:
        assert self._commands is not None
        try:
            check(self._commands, text, self._pipeline.bundle.vocabulary)
        except SampleError as error:
            print(error, flush=True)
        self._text, now_ns = text, time.time_ns()
        self._push(Sample(self._commands.name, now_ns, now_ns, text))  # one that is refused ends the one in force, too

    # ---- the thread that ticks

    def _tick(self, now_ns: int) -> Output:
        begun_s = time.perf_counter()
        frames = list(self._frames)
        output = self._pipeline.tick(now_ns)
        if self._language:
            output = self._captioned(output, self._language)
        self._tick_ms.append(1e3 * (time.perf_counter() - begun_s))
        self._ticks += 1
        self._actions += output.action is not None
        anchor_ns = output.sources.get(self._pipeline.bundle.tick.anchor, 0)
        if anchor_ns != self._anchor_ns:  # each frame once, so that a dead camera's age is not taken for latency
            self._anchor_ns = anchor_ns
            self._latency_ms.append((time.time_ns() - anchor_ns) / 1e6)
        for what, told in self._told.items():
            for text in getattr(output, what):
                kind = re.sub(r"[-+]?\d+(\.\d+)?", "", text)
                self._wording.setdefault(kind, text)
                told[kind] += 1
        for event in output.events:
            self._events[event.label] += 1
            print(f"{time.monotonic() - self._begun_s:6.1f} s  {event.label} ({event.score:.2f})", flush=True)
        self._show(output, [*frames, *self._frames])
        return output

    def _captioned(self, output: Output, language: Language) -> Output:
        """With a caption, if there is a new frame."""
        name = language.stream.name
        stamp_ns = output.sources.get(name, 0)
        if output.reasons or not output.mask[name] or stamp_ns == self._captioned_ns:
            return output
        self._captioned_ns = stamp_ns
        return dataclasses.replace(output, caption=caption_of(language.say(language.prompt("caption"))))

    def _show(self, output: Output, frames: list[Sample]) -> None:
        if self._viewer:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._viewer.sample(self._unseen.get_nowait())
            self._viewer.output(output)
        if not self._video:
            return
        output = self._lingering(output)
        due = math.ceil((time.monotonic() - self._begun_s) * self._fps)  # so that it plays in real time
        if due > self._drawn:
            used = (frame for frame in frames if output.sources.get(frame.stream) == frame.stamp_ns)
            frame = next(used, frames[-1] if frames else None)
            picture = draw(frame.data if frame else BLANK, output, self._text)
            for _ in range(due - self._drawn):
                self._video.add(picture)
            self._drawn = due

    def _tell(self, output: Output, rate_hz: float) -> None:
        senses = [
            f"{name} {output.ages_s[name] * 1e3:.0f} ms" if present else f"no {name}"
            for name, present in output.mask.items()
            if not self._pipeline.specs[name].latched
        ]
        latency = f"latency {self._latency_ms[-1]:.0f} ms" if self._latency_ms else "no latency yet"
        elapsed = f"{time.monotonic() - self._begun_s:6.1f} s  {rate_hz:4.1f} ticks/s"
        print(elapsed, latency, ", ".join(senses), _words(output), sep="  ", flush=True)


def _speaker(pipeline: Pipeline) -> Language | None:
    """Of a bundle that says captions."""
    language = pipeline.bundle.language
    if language and language.decoder and "caption" in language.decoder.prompts:
        return Language(pipeline.bundle, model=pipeline.model)
    return None


def _first(bundle: Bundle, kind: str) -> StreamSpec | None:
    return next((spec for spec in bundle.streams if spec.kind == kind), None)


def _expect(bundle: Bundle, kind: str, option: str) -> StreamSpec:
    if (spec := _first(bundle, kind)) is None:
        streams = ", ".join(f"{spec.name} ({spec.kind})" for spec in bundle.streams)
        raise EdgeError(f"{option}: {bundle.path} has no stream of kind {kind}, only {streams}")
    return spec


def _open(bundle: Bundle, args: argparse.Namespace) -> dict[str, Source]:
    """Stream -> source. Each is the first of its kind."""
    sources: dict[str, Source] = {}
    if args.camera is not None:
        spec = _expect(bundle, "image", "--camera")
        sources[spec.name] = CameraSource(spec.name, args.camera, spec.rate_hz)
    if args.microphone is not None:
        spec = _expect(bundle, "audio", "--microphone")
        sources[spec.name] = open_sound(spec.name, args.microphone, spec.sample_rate_hz, spec.channels)
    if not sources:
        raise EdgeError("nothing to sense: give --camera or --microphone, or both")
    return sources


def _words(output: Output) -> str:
    """What it does, or says, or why not."""
    if output.reasons:
        return "no output: " + "; ".join(output.reasons)
    if output.action:
        return "  ".join(f"{name} {value:+.2f}" for name, value in zip(output.action.names, output.action.values[0]))
    if output.caption:
        return output.caption.text
    return in_words(output.values)


def _percentiles(times_ms: Sequence[float]) -> dict[str, float | None]:
    return {f"p{p}": round(float(np.percentile(times_ms, p)), 2) if times_ms else None for p in (50, 99)}


def _print(report: dict[str, Any]) -> None:
    acted = "" if report["actions"] is None else f", {report['actions']} with an action"
    print(f"\nticks       {report['ticks']} in {report['seconds']:.1f} s{acted}")
    for name, what in (("latency", "from the anchor's stamp to the output"), ("tick", "a tick costs")):
        p50, p99 = report[f"{name}_ms"].values()
        print(f"{name:<12}{p50} ms p50, {p99} ms p99, {what}")
    print(f"engine      {report['engine']}, {report['cores']:.1%} of a core for all of this")
    for name, counts in report["streams"].items():
        print(f"{name:<11} {', '.join(f'{n} {what}' for what, n in counts.items()) or 'nothing came'}")
    for label, times in report["events"].items():
        print(f"event       {label}, {times} times")
    for what in ("reasons", "notes"):
        for text, ticks in report[what].items():
            print(f"{what:<12}{ticks} ticks: {text}")
    for path in report["files"]:
        print(f"see         {path}")
