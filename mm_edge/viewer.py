"""What a robot senses, and what its model makes of it, drawn with rerun: to a browser, or to a file.

    viewer = Viewer(bundle)
    viewer.serve(9090)              # or viewer.save(Path("drive.rrd"))
    viewer.sample(sample)           # each one that goes into a pipeline
    viewer.output(output)           # each one that comes out
    viewer.close()

Everything lies on the timeline "stamp": a sample at its stamp (sound at its end), an output at its own, attention at
the stamp of the frame that it is about.
"""

from __future__ import annotations

import dataclasses
import math
import re
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from mm_edge.align import Aligner
from mm_edge.bundle import Bundle
from mm_edge.errors import EdgeError, SampleError, needs
from mm_edge.overlay import AMBER, BAD, DIM, GOOD, INK, SHADE, heat_map
from mm_edge.preprocess import AUDIO_FRAME, AUDIO_HOP_S, check, log_mel
from mm_edge.types import NS, Action, Attention, Output, Sample, Scan, StreamSpec

TIMELINE = "stamp"
HIT, RING = (90, 190, 255), (70, 74, 82)
JPEG_QUALITY = 90
CELL = 8  # pixels of the heat map for each of the attention's cells
SOUND_S, SOUND_PERIOD_S = 5.0, 0.1  # how much of it a spectrogram shows, and how often it is drawn
LEVELS = (-0.5, 3.0)  # of the model's input, from black to white
PATH_S = 1.5  # how far ahead the path of an action leads
LIVE_S = 30.0  # what plots show of a robot that is live


class Viewer:
    """Draws samples and outputs of `bundle`; from one thread. Raises MissingDependency without rerun or cv2.

    Args:
        bundle: the model that they belong to: its streams and outputs say what is laid out.
        live: follow what comes, instead of playing it from its beginning.
    """

    def __init__(self, bundle: Bundle, live: bool = False):
        with needs("the viewer", "rerun", "viewer"):
            import rerun
        with needs("the viewer", "cv2", "camera"):
            import cv2
        self._rr, self._cv2 = rerun, cv2
        self._bundle, self._live = bundle, live
        self._specs = {spec.name: spec for spec in bundle.streams}
        self._frames: dict[str, tuple[int, int]] = {}  # width and height of each camera's newest
        self._sounds = {spec.name: _Sound(spec) for spec in bundle.streams if spec.kind == "audio"}
        self._mask: dict[str, bool] = {}  # of the last output
        self._heated: set[str] = set()  # cameras with a heat map in the last output
        self._said: dict[str, set[str]] = {}  # what the last output said, without its numbers
        self._recording = rerun.RecordingStream(f"mm-edge view: {bundle.task}", send_properties=False)
        rerun.set_log_time_enabled(False, recording=self._recording)

    def serve(self, port: int) -> str:
        """Begin to serve: the page on `port` and its data on the next one, to whoever reaches this machine. What comes
        before a browser does is kept, up to 1 GiB. Says what to open.

        Raises EdgeError for a port that is none, or taken.
        """
        if not 0 < port < 2**16 - 1:
            raise EdgeError(f"expected a port from 1 to {2**16 - 2}, got {port}")
        for n in (port, port + 1):  # rerun would only log it
            with closing(socket.socket()) as free:
                free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    free.bind(("", n))
                except OSError as error:
                    raise EdgeError(f"port {n} cannot be served ({error.strerror}): choose another --port") from None
        self._rr.serve_grpc(
            grpc_port=port + 1,
            default_blueprint=self._blueprint(),
            recording=self._recording,
            cors_allow_origin=[f"http://*:{port}"],
        )
        self._rr.serve_web_viewer(web_port=port, open_browser=False)
        self._draw_frame_of_reference()
        here, there = (
            f"http://{host}:{port}/?url=" + quote(f"rerun+http://{host}:{port + 1}/proxy", safe="")
            for host in ("127.0.0.1", socket.gethostname())
        )
        return f"open {here}\non another machine {there}"

    def save(self, path: Path) -> str:
        """Begin to write a file that rerun's viewers open. Says so. Raises EdgeError if that cannot be."""
        try:
            path.open("wb").close()
        except OSError as error:
            raise EdgeError(f"{path}: cannot be written ({error.strerror})") from None
        self._recording.save(path, default_blueprint=self._blueprint())
        self._draw_frame_of_reference()
        return f"{path}: see it with `{Path(sys.executable).with_name('rerun')} {path}`"

    def close(self) -> None:
        """Wait until all was sent or written."""
        self._recording.flush()
        self._recording.disconnect()

    def flush(self) -> None:
        self._recording.flush()

    # ---- what goes in

    def sample(self, sample: Sample) -> None:
        """Draw it, unless the model has no such stream or would refuse it, which its output then tells."""
        spec = self._specs.get(sample.stream)
        if spec is None:
            return
        try:
            check(spec, sample.data)
        except SampleError:
            return
        self._at(sample.stamp_ns)
        _DRAWN[spec.kind](self, spec, sample)

    def _image(self, spec: StreamSpec, sample: Sample) -> None:
        self._frames[spec.name] = sample.data.shape[1], sample.data.shape[0]
        options = [self._cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        jpeg = self._encoded(".jpg", np.ascontiguousarray(sample.data[..., ::-1]), options)
        self._log(f"{spec.name}/frame", self._rr.EncodedImage(contents=jpeg, media_type="image/jpeg", draw_order=-10.0))

    def _audio(self, spec: StreamSpec, sample: Sample) -> None:
        heard = self._sounds[spec.name].hear(sample)
        if heard is not None:
            self._at(sample.stamp_ns + round(len(sample.data.samples) / spec.sample_rate_hz * NS))
            self._png(f"{spec.name}/spectrogram", _spectrogram(self._cv2, heard, spec.channels), 2.0, 3.0)

    def _scan(self, spec: StreamSpec, sample: Sample) -> None:
        scan: Scan = sample.data
        met = np.isfinite(scan.ranges) & (scan.ranges <= scan.range_max)
        angles = (scan.angle_min + np.arange(len(scan.ranges)) * scan.angle_increment)[met]
        points = scan.ranges[met, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self._log(
            f"around/{spec.name}",
            self._rr.Points2D(_from_above(points), radii=self._rr.Radius.ui_points(2.5), colors=[HIT]),
        )

    def _points(self, spec: StreamSpec, sample: Sample) -> None:
        self._log(f"{spec.name}/points", self._rr.Points3D(sample.data, radii=self._rr.Radius.ui_points(1.5)))

    def _imu(self, spec: StreamSpec, sample: Sample) -> None:
        self._log(f"{spec.name}/acceleration", self._rr.Scalars(sample.data[:3]))
        self._log(f"{spec.name}/angular_velocity", self._rr.Scalars(sample.data[3:]))

    def _vector(self, spec: StreamSpec, sample: Sample) -> None:
        self._log(spec.name, self._rr.Scalars(sample.data))

    def _text(self, spec: StreamSpec, sample: Sample) -> None:
        self.say(spec.name, sample.data, sample.stamp_ns)

    # ---- what comes out

    def say(self, what: str, text: str, stamp_ns: int, level: str = "INFO") -> None:
        """A line among the words: `what` is "caption", "answer" or whatever else is said."""
        self._at(stamp_ns)
        self._log(f"log/{what}", self._rr.TextLog(text, level=level))

    def output(self, output: Output) -> None:
        self._at(output.stamp_ns)
        self._mark_missing(output)
        for name, age_s in output.ages_s.items():
            if math.isfinite(age_s):
                self._log(f"age_s/{name}", self._rr.Scalars(age_s))
        for what, values in (("gate", output.gates), ("value", output.values)):
            for name, value in values.items():
                self._log(f"{what}/{name}", self._rr.Scalars(value))
        self._act(output.action)
        self._tell("reasons", output.reasons, output.stamp_ns, "ERROR")
        self._tell("notes", output.notes, output.stamp_ns, "WARN")
        if output.caption:
            self.say("caption", output.caption.text, output.stamp_ns)
        for event in output.events:
            self.say("events", event.label, output.stamp_ns)
        for attention in output.attention:
            self._attend(attention)
        heated = {attention.stream for attention in output.attention}
        self._at(output.stamp_ns)
        for name in self._heated - heated:  # rerun's viewer goes on showing an EncodedImage that was cleared
            self._png(f"{name}/attention", np.zeros((1, 1, 4), np.uint8), 1.0, 1.0)
        self._heated = heated

    def _mark_missing(self, output: Output) -> None:
        """In red around its picture, too, which goes on showing the last that came."""
        reach_m = self._reach_m()
        size: tuple[float, float]
        for name, present in output.mask.items():
            if self._mask.get(name) is present or name not in self._specs:
                continue
            self._log(f"mask/{name}", self._rr.StateChange(state="present" if present else "missing"))
            kind = self._specs[name].kind
            if kind == "image" and name in self._frames:
                path, corner, size = f"{name}/missing", (0.0, 0.0), self._frames[name]
            elif kind == "scan":
                path, corner, size = f"around/missing/{name}", (-reach_m, -reach_m), (2 * reach_m, 2 * reach_m)
            else:
                continue
            if present:
                self._clear(path)
                continue
            box = self._rr.Boxes2D(mins=[corner], sizes=[size], colors=[BAD], radii=self._rr.Radius.ui_points(4.0))
            at = corner[0] + size[0] / 2, corner[1] + size[1] / 12
            label = self._rr.Points2D([at], labels=[f"{name} missing"], colors=[BAD], radii=0.0)
            self._log(path, box)
            self._log(f"{path}/label", label)
        self._mask = dict(output.mask)

    def _act(self, action: Action | None) -> None:
        spec = self._bundle.outputs.action
        values = dict(zip(action.names, action.values[0].tolist())) if action else {}
        for name in spec.names if spec else ():
            if name in values:
                self._log(f"action/{name}", self._rr.Scalars(values[name]))
            else:  # a gap, not a line to the next one
                self._clear(f"action/{name}")
        v, w = values.get("linear_x"), values.get("angular_z", 0.0)
        if v is None:
            self._clear("around/path")
            return
        heading = w * np.linspace(0, PATH_S, 24)
        steps = v * PATH_S / 24 * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
        colour = GOOD if v >= 0 else AMBER
        self._log("around/path", self._rr.LineStrips2D([_from_above(path)], colors=[colour], radii=0.04))

    def _tell(self, what: str, texts: Iterable[str], stamp_ns: int, level: str) -> None:
        """What the last output did not say already, whatever its numbers."""
        kinds = {re.sub(r"\d+(\.\d+)?", "", text): text for text in texts}
        for kind, text in kinds.items():
            if kind not in self._said.get(what, ()):
                self.say(what, text, stamp_ns, level)
        self._said[what] = set(kinds)

    def _attend(self, attention: Attention) -> None:
        if not (size := self._frames.get(attention.stream)):
            return
        rows, columns = attention.weights.shape
        colour, opacity = heat_map(attention, CELL * columns, CELL * rows)
        self._at(attention.stamp_ns)
        picture = np.dstack([colour, (255 * opacity).astype(np.uint8)])
        self._png(f"{attention.stream}/attention", picture, size[0] / (CELL * columns), size[1] / (CELL * rows))

    # ---- rerun

    def _at(self, stamp_ns: int) -> None:
        self._recording.set_time(TIMELINE, timestamp=np.datetime64(stamp_ns, "ns"))

    def _log(self, path: str, *what: Any, static: bool = False) -> None:
        self._recording.log(path, *what, static=static)

    def _clear(self, path: str) -> None:
        """It, and all below it, until something is drawn there again."""
        self._log(path, self._rr.Clear(recursive=True))

    def _png(self, path: str, picture: np.ndarray, scale_x: float, scale_y: float) -> None:
        """uint8 (h, w, 3 or 4), RGB or RGBA, its pixels so large."""
        channels = [2, 1, 0, 3][: picture.shape[2]]
        png = self._encoded(".png", np.ascontiguousarray(picture[..., channels]), [])
        image = self._rr.EncodedImage(contents=png, media_type="image/png", draw_order=1.0)
        self._log(path, image, self._rr.Transform3D(scale=[scale_x, scale_y, 1.0]))

    def _encoded(self, suffix: str, bgr: np.ndarray, options: list[int]) -> bytes:
        return self._cv2.imencode(suffix, bgr, options)[1].tobytes()

    def _draw_frame_of_reference(self) -> None:
        """What stays as it is: rings around the robot, and what lines are called."""
        rr = self._rr
        for spec in self._specs.values():
            colours = [[*GOOD, 255], [*BAD, 255]]
            states = rr.StateConfiguration(values=["present", "missing"], colors=colours)
            self._log(f"mask/{spec.name}", states, static=True)
            if spec.kind == "imu":
                for what, unit in (("acceleration", "m/s²"), ("angular_velocity", "rad/s")):
                    names = [f"{axis}, {unit}" for axis in "xyz"]
                    self._log(f"{spec.name}/{what}", rr.SeriesLines(names=names), static=True)
        if not (reach_m := self._reach_m()):
            return
        step_m = max(1, math.ceil(reach_m / 6))
        radii_m = np.arange(step_m, reach_m + 0.01, step_m)
        circle = np.stack([f(np.linspace(0, 2 * np.pi, 73)) for f in (np.cos, np.sin)], axis=1)
        rings = rr.LineStrips2D([r * circle for r in radii_m], colors=[RING], radii=rr.Radius.ui_points(0.7))
        self._log("around/rings", rings, static=True)
        places = [(r * math.sqrt(0.5), r * math.sqrt(0.5)) for r in radii_m]  # behind, where they are least in the way
        labels = rr.Points2D(places, labels=[f"{r:g} m" for r in radii_m], colors=[RING], radii=0.0)
        self._log("around/rings/labels", labels, static=True)
        robot = _from_above(np.array([(0.2, 0), (-0.12, 0.12), (-0.06, 0), (-0.12, -0.12), (0.2, 0)]))
        self._log("around/robot", rr.LineStrips2D([robot], colors=[INK], radii=rr.Radius.ui_points(1.5)), static=True)

    def _reach_m(self) -> float:
        """Of the scans, 0 if there are none."""
        return max((spec.range_max_m for spec in self._specs.values() if spec.kind == "scan"), default=0.0)

    def _blueprint(self) -> Any:
        """Left what is seen and heard; right what is around, which senses are there, numbers, and below them words."""
        from rerun import TimeRangeBoundary, VisibleTimeRange, blueprint

        ranges = None
        if self._live:
            start = TimeRangeBoundary.cursor_relative(seconds=-LIVE_S)
            ranges = VisibleTimeRange(TIMELINE, start=start, end=TimeRangeBoundary.cursor_relative())

        def of(kind: str) -> list[str]:
            return [spec.name for spec in self._specs.values() if spec.kind == kind]

        def plot(origin: str, name: str, contents: Any = "$origin/**") -> Any:
            return blueprint.TimeSeriesView(origin=origin, name=name, contents=contents, time_ranges=ranges)

        def picture(origin: str, name: str, **more: Any) -> Any:
            return blueprint.Spatial2DView(origin=origin, name=name, background=SHADE, **more)

        outputs, seen, around, numbers = self._bundle.outputs, list[Any](), list[Any](), list[Any]()
        seen += [picture(name, name) for name in of("image")]
        seen += [picture(name, f"{name}: what the model hears") for name in of("audio")]
        if reach_m := self._reach_m():
            bounds = blueprint.VisualBounds2D(x_range=(-reach_m, reach_m), y_range=(-reach_m, reach_m))
            around.append(picture("around", "around the robot", visual_bounds=bounds))
        around += [blueprint.Spatial3DView(origin=name, name=name) for name in of("points")]
        around.append(blueprint.StateTimelineView(origin="mask", name="senses"))
        if outputs.action:
            numbers.append(plot("action", f"action ({', '.join(dict.fromkeys(outputs.action.units))})"))
        if outputs.values:
            numbers.append(plot("value", "values"))
        latched = [f"- $origin/{spec.name}" for spec in self._specs.values() if spec.latched]
        more = [plot("age_s", "ages (s)", ["$origin/**", *latched])]
        if outputs.gates:
            more.append(plot("gate", "weight in the fusion"))
        more += [plot(name, name) for name in (*of("imu"), *of("vector"))]
        numbers.append(blueprint.Tabs(*more, active_tab=0))
        words = blueprint.archetypes.TextLogColumns(text_log_columns=["LogLevel", "Body"])
        told = blueprint.Vertical(
            blueprint.Horizontal(
                blueprint.Vertical(*around, row_shares=[3] * (len(around) - 1) + [2]), blueprint.Vertical(*numbers)
            ),
            blueprint.TextLogView(origin="log", name="words", columns=words),
            row_shares=[3, 1],
        )
        shares = [8] * len(of("image")) + [3] * len(of("audio"))
        columns = [blueprint.Vertical(*seen, row_shares=shares), told] if seen else [told]
        play: Any = "following" if self._live else "playing"
        time = blueprint.TimePanel(state="collapsed", timeline=TIMELINE, play_state=play)
        return blueprint.Blueprint(
            blueprint.Horizontal(*columns, column_shares=[4, 5][-len(columns) :]), time, collapse_panels=True
        )


_DRAWN: dict[str, Callable[[Viewer, StreamSpec, Sample], None]] = {
    "image": Viewer._image,
    "audio": Viewer._audio,
    "scan": Viewer._scan,
    "points": Viewer._points,
    "imu": Viewer._imu,
    "vector": Viewer._vector,
    "text": Viewer._text,
}


class _Sound:
    """The last SOUND_S of a stream, as the model would hear them."""

    def __init__(self, spec: StreamSpec):
        hop = round(AUDIO_HOP_S * spec.sample_rate_hz)
        hops = (round(SOUND_S * spec.sample_rate_hz) - AUDIO_FRAME) // hop + 1
        shape = (*spec.shape[:2], hops)
        self._spec = dataclasses.replace(spec, shape=shape, window_ms=SOUND_S * 1e3)
        self._aligner = Aligner([self._spec], AUDIO_HOP_S)
        self._drawn_ns = 0

    def hear(self, sample: Sample) -> np.ndarray | None:
        """See `log_mel`; None if it is not yet time to draw, or nothing was heard whose stamps make sense."""
        self._aligner.push(sample)
        if 0 <= sample.arrival_ns - self._drawn_ns < SOUND_PERIOD_S * NS:
            return None
        self._drawn_ns = sample.arrival_ns
        view = self._aligner.window(sample.arrival_ns).views[self._spec.name]
        return None if view.data is None else log_mel(view.data, view.valid, self._spec)


def _spectrogram(cv2: Any, heard: np.ndarray, channels: int) -> np.ndarray:
    """float32 (channels + 1, bands, hops) -> uint8 (channels * bands, hops, 3), RGB, high tones above: how loud it is,
    and below for each two neighbouring channels which is louder, the first (orange) or the second (blue). What was not
    heard is grey."""
    low, high = LEVELS
    level = np.clip(255 * (heard[0] - low) / (high - low), 0, 255).astype(np.uint8)
    pictures = [cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[..., ::-1]]
    for difference in np.clip(heard[1:channels], -1, 1)[..., None]:
        first, second = np.maximum(difference, 0), np.maximum(-difference, 0)
        pictures.append((first * (255, 150, 40) + second * (40, 150, 255)).astype(np.uint8))
    picture = np.concatenate([picture[::-1] for picture in pictures])
    unheard = heard[-1, 0] < 0.5
    picture[:, unheard] = DIM
    return picture


def _from_above(points: np.ndarray) -> np.ndarray:
    """(n, 2), x ahead and y left -> (n, 2) of a picture: x right and y down, so that ahead is up."""
    return np.stack([-points[:, 1], -points[:, 0]], axis=1)
