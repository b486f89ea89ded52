"""Tells what happens, by ear or by ear and eye: events with when they began and where from; and of words that are
spoken, commands."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from sensor_msgs.msg import Image
from std_msgs.msg import String

from mm_edge.bundle import SHIPPED_WORDS, Bundle
from mm_edge.errors import BundleError, EdgeError
from mm_edge.events import bearing_rad
from mm_edge.health import Health
from mm_edge.messages import output_to_json, to_ros
from mm_edge.overlay import Lingering, draw
from mm_edge.pipeline import Pipeline
from mm_edge.preprocess import words_of
from mm_edge.types import NS, Audio, Event, Output, Sample, StreamSpec
from mm_edge.watchdog import is_stop
from mm_edge_ros.bundle_node import BundleNode, take_one_thread
from mm_edge_ros.node import ERROR, EVENTS_QOS, LATCHED_QOS, OK, SENSOR_QOS, WARN, declare, run
from mm_edge_ros.streams import StreamSubscription

HEARD_S = 1.0  # of the sound that is kept, to tell where it came from
COMMAND = StreamSpec("command", "text", (1,), rate_hz=0, max_age_ms=0, latched=True)  # of whoever gives them


class EventsNode(BundleNode):
    """Active, it tells each event once.

    A label may be a command: it is published as a text, and the watchdog takes "stop" without waiting for a model.
    """

    YIELDS = "an output"

    def __init__(self):
        super().__init__("events_node", SHIPPED_WORDS)
        what = "label=text: what is published on command_text when it is told; without a text the last command before"
        commands = declare(self, "commands", [""], what + " a stop, again; a single empty one: none")
        self._commands = _commands(commands)
        ears = "m, between two microphones, left and right, to tell where a sound comes from; 0: it is not told"
        self._ears_m = declare(self, "ear_distance_m", 0.0, ears, 0.0, 10.0)
        self._heard: deque[tuple[int, Audio]] = deque()  # arrivals and chunks
        self._last: Event | None = None
        self._last_ns = 0
        self._lingering = Lingering()
        self._counts: Counter[str] = Counter()
        self._command = ""  # the last that is no stop, whoever gave it
        self._ordered = ""  # by us, the last

        self._events = self.create_publisher(String, "events", EVENTS_QOS)
        self._outputs = self.create_publisher(String, "events/output", 10)
        self._overlay = self.create_publisher(Image, "events/overlay", SENSOR_QOS)
        if self._commands:
            self._orders = self.create_publisher(String, "command_text", LATCHED_QOS)
            # Not of those that end with `deactivate`: what we ordered is kept for late comers for as long as we live.
            self._given = StreamSubscription(self, COMMAND, "command_text", False, self._on_command, self._deaf)
        self._start()

    def _open(self, bundle: Bundle, engine: str) -> Pipeline:
        values = bundle.outputs.values
        if values is None or values.events is None:
            raise BundleError(f"{bundle.path}: expected a bundle that tells events (outputs.values.events), got none")
        labels = [name for name in values.names if name not in values.events.quiet]
        if unknown := sorted(self._commands.keys() - set(labels)):
            raise EdgeError(f"commands: expected labels among {labels}, got {unknown}")
        self._shown = {spec.name for spec in bundle.streams if spec.kind == "image"}
        return Pipeline(bundle, engine)

    def _begin(self) -> None:
        self._heard.clear()
        self._last, self._lingering = None, Lingering()
        super()._begin()

    # ---- executor's thread

    def _push(self, sample: Sample) -> bool:
        pushed = super()._push(sample)
        if pushed and isinstance(sample.data, Audio) and self._ears_m and sample.data.samples.shape[1] == 2:
            now_ns = sample.arrival_ns
            while self._heard and not 0 <= now_ns - self._heard[0][0] <= HEARD_S * NS:
                self._heard.popleft()
            self._heard.append((now_ns, sample.data))
        return pushed

    def _on_command(self, sample: Sample) -> None:
        """Of anybody, ourselves included."""
        text = sample.data
        if not is_stop(text):
            self._command = text if words_of(text) else self._command
        elif self._ordered and not is_stop(self._ordered):
            self._order(text)  # or ours, which is kept for whoever comes later, would be in force again

    def _deaf(self, error: EdgeError) -> None:
        self.get_logger().warning(str(error), throttle_duration_sec=1.0)

    # ---- inference thread

    def _ticked(self, output: Output, frame: Sample | None) -> None:
        self._outputs.publish(String(data=output_to_json(output)))
        for event in output.events:
            self._last, self._last_ns = event, output.stamp_ns
            self._counts[event.label] += 1
            order = self._commands.get(event.label)
            if order is not None and (text := order or self._command):
                self._order(text)  # before all else: somebody may be in the way
            bearing = self._bearing_rad(event.start_ns)
            said = {"label": event.label, "score": round(event.score, 4), "start_ns": event.start_ns}
            said |= {"stamp_ns": output.stamp_ns, "bearing_rad": None if bearing is None else round(bearing, 3)}
            self._events.publish(String(data=json.dumps(said)))
        shown = self._lingering(output)
        if frame and self._overlay.get_subscription_count():
            msg = Image()
            to_ros("image", msg, output.stamp_ns, draw(frame.data, shown), frame.stream)
            self._overlay.publish(msg)

    def _order(self, text: str) -> None:
        self._ordered = text
        self._orders.publish(String(data=text))

    def _bearing_rad(self, start_ns: int) -> float | None:
        """Of what came since half a second before an event was the likeliest."""
        since_ns = start_ns - NS // 2
        chunks = [chunk for arrival_ns, chunk in list(self._heard) if arrival_ns >= since_ns]
        if not chunks:
            return None
        samples = np.concatenate([chunk.samples for chunk in chunks])
        return bearing_rad(samples, chunks[-1].sample_rate_hz, self._ears_m)

    # ---- diagnostics

    def _report(self) -> None:
        self._troubles = [text for _, text in self._given.follow()] if self._commands else []
        super()._report()

    def _model_status(self, health: Health, reasons: list[str], trouble: str) -> tuple[bytes, str, dict[str, Any]]:
        age_s = (self.get_clock().now().nanoseconds - self._last_ns) / NS if self._last else math.inf
        values = {"events": sum(self._counts.values()), **self._counts, "event_age_s": f"{age_s:.3f}"}
        if trouble:
            return ERROR, trouble, values
        reasons += self._troubles
        return WARN if reasons else OK, "; ".join(reasons) or "listening", values


def _commands(given: Sequence[str]) -> dict[str, str]:
    """Raises EdgeError for what is no label=text."""
    commands = {}
    for one in given:
        label, equals, text = one.partition("=")
        if one and not equals:
            raise EdgeError(f"commands: expected label=text, got {one!r}")
        if one:
            commands[label.strip()] = text.strip()
    return commands


def main() -> None:
    take_one_thread()
    run(EventsNode)


if __name__ == "__main__":
    main()
