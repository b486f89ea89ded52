"""The runtime in one page: samples in, an `Output` for every tick.

pipeline = Pipeline(Bundle.read("mm_edge/bundles/drive"))
pipeline.push(sample)                   # from any thread
if pipeline.due(now_ns):
    output = pipeline.tick(now_ns)      # on one thread
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mm_edge import engine as engines
from mm_edge import preprocess
from mm_edge.align import UNSEEN, Aligner, TickRule, View, Window
from mm_edge.bundle import Bundle
from mm_edge.engine.part import Fresh, ModelInputs, ModelOutputs
from mm_edge.errors import EdgeError, SampleError
from mm_edge.events import Spotter
from mm_edge.health import Health, IdleTicks, StreamMonitor, absence
from mm_edge.manifest import ActionSpec
from mm_edge.preprocess import LogMel, Vocabulary
from mm_edge.safety import Limits, limit
from mm_edge.types import NS, Action, Attention, Event, Output, Sample, StreamSpec


def model_inputs(
    specs: Iterable[StreamSpec],
    window: Window,
    vocabulary: Vocabulary | None = None,
    ears: dict[str, LogMel] | None = None,
) -> ModelInputs:
    """What the model is told about a window: new data, and of every stream whether it is present and how old. `ears`:
    of the streams of sound, for windows one after the other.

    Training calls this too; a model sees on the robot exactly what it learned on. Raises SampleError if the data of a
    stream was not checked before it was pushed.
    """
    fresh, mask, age = {}, [], []
    for spec in specs:
        view = window.views[spec.name]
        if view.fresh:
            ear = ears.get(spec.name) if ears else None
            fresh[spec.name] = Fresh(preprocess.prepare(spec, view, vocabulary, ear), view.dt_s, view.reset)
        mask.append(view.present)
        age.append(0.0 if spec.latched else min(max(view.age_s, 0.0), spec.max_age_ms / 1e3))
    return ModelInputs(fresh, np.array(mask, np.float32), np.array(age, np.float32), window.dt_s, window.reset)


def ears(specs: Iterable[StreamSpec]) -> dict[str, LogMel]:
    """One for each stream of sound."""
    return {spec.name: LogMel(spec) for spec in specs if spec.kind == "audio"}


class Pipeline:
    """A bundle at work.

    Args:
        bundle: what to run.
        engine: "auto", or one of `engine.ENGINES`.
        limits: the robot's; the bundle's can only narrow them.

    Raises EngineError or MissingDependency if no engine runs the bundle as it should, EdgeError if the limits do not
    name the bundle's action.
    """

    def __init__(self, bundle: Bundle, engine: str = "auto", limits: Limits | None = None):
        self.bundle = bundle
        self.specs = {spec.name: spec for spec in bundle.streams}
        self._sensors = [spec.name for spec in bundle.streams if not spec.latched]
        self._limits = _narrow(bundle.outputs.action, limits)
        self.model = engines.load(bundle, engine)
        for spec in bundle.streams:
            if spec.kind == "image":  # cv2 is missed now, not on the road; and the first tick need not wait for it
                preprocess.resize(np.zeros((1, 1, 3), np.uint8), *spec.shape[:2])
        self.reset()

    @property
    def engine(self) -> str:
        """What really runs the model."""
        return self.model.engine

    def reset(self) -> None:
        """Forget all that was pushed and all the model remembers."""
        tick = self.bundle.tick
        self._aligner = Aligner(self.bundle.streams, tick.period_ms / 1e3, self.bundle.max_gap_ms)
        self._ears = ears(self.bundle.streams)
        self._rule = TickRule(tick.anchor, tick.max_period_ms, tick.min_period_ms)
        self._monitors = {name: StreamMonitor(spec, self._aligner.streams[name]) for name, spec in self.specs.items()}
        self.model.reset()
        self._previous = self._standing()  # the last action
        self._last: Output | None = None
        self._seen: dict[str, View] = {}  # at the last tick
        self._refused: dict[str, SampleError] = {}  # the last command of each stream that was
        self._answers: dict[str, tuple[SampleError, Any]] = {}  # and the one that came after it
        self._settled: dict[str, SampleError] = {}  # by an answer that a tick has seen
        values = self.bundle.outputs.values
        self._spotter = Spotter(values.names, values.events) if values and values.events else None
        self._idle = IdleTicks()

    def push(self, sample: Sample) -> bool:
        """Take a sample in: no lock, no copy, from any thread. False if refused, which `health` counts with why.

        A command that is refused ends the one in force, too: whoever says "stop" in words that the model does not know
        wants anything but that it goes on.
        """
        try:
            if sample.stream not in self.specs:
                raise SampleError(sample.stream, f"one of the streams {list(self.specs)}", "none of them")
            preprocess.check(self.specs[sample.stream], sample.data, self.bundle.vocabulary)
        except SampleError as error:
            self.refuse(error)
            return False
        if refused := self._refused.get(sample.stream):
            self._answers[sample.stream] = refused, sample.data
        self._aligner.push(sample)
        self._rule.pushed(sample)
        return True

    def refuse(self, error: SampleError) -> None:
        """Count a sample of the model that is of no use, or could not even be made from its message."""
        if error.stream in self._monitors:
            self._monitors[error.stream].refuse(error)
            if self.specs[error.stream].latched:
                self._refused[error.stream] = error

    def due(self, now_ns: int) -> bool:
        return self._rule.due(now_ns)

    def tick(self, now_ns: int) -> Output:
        """One step of the whole model. Always an Output; without an action it says why."""
        self._rule.ticked(now_ns)
        window = self._aligner.window(now_ns)
        try:
            outputs = self.model.step(model_inputs(self.bundle.streams, window, self.bundle.vocabulary, self._ears))
        except Exception as error:  # whatever fails, the robot must hear of it, and stop
            why = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
            outputs = ModelOutputs({}, np.ones(len(self.specs), np.float32), (why,))
            self._aligner.restart()  # some parts may have stepped, others not
        self._last, self._seen = self._output(window, outputs), window.views
        self._idle = self._idle.after(self._last)
        return self._last

    def health(self, now_ns: int) -> Health:
        """How every stream fares, for /diagnostics; call it about once a second."""
        since_s = (now_ns - self._last.stamp_ns) / NS if self._last else 0.0  # what has come since, nobody looked at
        streams = []
        for name, monitor in self._monitors.items():
            view = self._seen.get(name, UNSEEN)
            view = view._replace(age_s=view.age_s + since_s, silent_s=view.silent_s + since_s)
            streams.append(monitor.report(now_ns, view))
        idle, self._idle = self._idle, IdleTicks()
        reasons = idle.reasons if self._last else ("no tick yet",)
        dropped = {name: part.dropped_steps for name, part in self.model.parts.items() if part.dropped_steps}
        return Health(self.engine, tuple(streams), reasons, idle.ticks, dropped)

    def _output(self, window: Window, outputs: ModelOutputs) -> Output:
        spec, values = self.bundle.outputs, outputs.values
        mask, sources, ages_s = {}, {}, {}
        reasons, notes = list(outputs.reasons), list[str]()
        for stream, kept in zip(self.bundle.streams, outputs.mask.tolist()):
            name, view = stream.name, window.views[stream.name]
            mask[name], ages_s[name] = view.present and kept > 0, view.age_s
            if view.data is not None:
                sources[name] = view.stamp_ns
            if not mask[name]:
                absent = absence(stream, view) or f"{name} dropped: its features are not finite"
                (reasons if stream.required else notes).append(absent)
            notes += self._monitors[name].look(view)
        if self._refused:
            reasons += self._commands_refused(window)
        if self._sensors and not any(map(mask.get, self._sensors)):  # a command alone is nothing to drive by
            seen = any(name in sources for name in self._sensors)
            reasons.append("no sensor is present" if seen else "warming up: no sensor seen yet")
        if window.reset:
            notes.append("all state starts anew: time jumped or stood still, or the engine failed")
        said: dict[str, float] = {}
        if spec.values and not reasons:
            numbers = values["values"][0].tolist()
            if all(map(math.isfinite, numbers)):
                said = dict(zip(spec.values.names, numbers))
            else:
                reasons.append("non-finite values")
        action = None
        if reasons or window.reset:
            self._previous = self._standing()  # the robot stands, or has stopped meanwhile
        if spec.action and not reasons:
            action, limited = self._limited(spec.action, values["action"][0].tolist(), window.dt_s)
            (notes if action else reasons).extend(limited)
        attention: tuple[Attention, ...] = ()
        if spec.attention and values and mask[spec.attention.stream]:
            name, weights = spec.attention.stream, values["attention"][0]
            if math.isfinite(weights.sum()):
                attention = (Attention(name, sources[name], weights),)
            else:
                notes.append("non-finite attention")
        gates = dict(zip(self.specs, values["gates"][0].tolist())) if "gates" in values else {}
        if not math.isfinite(sum(gates.values())):
            gates = {}
            notes.append("non-finite gates")
        events: tuple[Event, ...] = ()
        if self._spotter and said and not window.reset:
            event = self._spotter.take(window.t_ns, values["values"][0])
            events = (event,) if event else ()
        elif self._spotter:
            self._spotter.reset()
        why, also = tuple(reasons), tuple(notes)
        return Output(
            window.t_ns, sources, mask, ages_s, why, also, action, attention, events=events, gates=gates, values=said
        )

    def _commands_refused(self, window: Window) -> list[str]:
        """A refusal ends with the tick that sees a newer command, whatever other threads push meanwhile."""
        for name, (refused, data) in list(self._answers.items()):
            if data is window.views[name].data:
                self._settled[name] = refused
        pending = [error for name, error in list(self._refused.items()) if error is not self._settled.get(name)]
        return [f"command refused: {error}" for error in pending]

    def _limited(self, spec: ActionSpec, rows: list[list[float]], dt_s: float) -> tuple[Action | None, tuple[str, ...]]:
        """The model's action, H rows, within the limits, and notes; or None and why."""
        allowed, notes, previous = [], list[str](), self._previous
        dt_s = min(dt_s, self.bundle.tick.max_period_ms / 1e3)
        if previous is None:
            previous, dt_s = rows[0], math.inf  # any in range will do
        for row in rows:
            now, said = limit(row, previous, dt_s, self._limits)
            if now is None:
                self._previous = self._standing()
                return None, said
            allowed.append(now)
            notes += said
            previous, dt_s = now, spec.dt_s
        self._previous = allowed[0]
        return Action(spec.names, np.array(allowed, np.float32), spec.dt_s), tuple(notes)

    def _standing(self) -> list[float] | None:
        """The action of a robot that stands; None for positions: where its joints are, the watchdog knows."""
        return None if self._limits.interface == "position" else [0.0] * len(self._limits.names)


def _narrow(action: ActionSpec | None, robot: Limits | None) -> Limits:
    """The bundle's limits, narrowed by the robot's: whichever is stricter."""
    if action is None:
        return Limits((), (), (), ())
    limits = Limits(action.names, action.min, action.max, action.max_rate, action.interface)
    return limits.narrowed(robot) if robot else limits
