"""How each stream fares, with names and reasons: what /diagnostics and `Output.reasons` say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mm_edge.align import RECENT, Stream, View
from mm_edge.errors import SampleError
from mm_edge.types import NS, Output, StreamSpec

RATE_WITHIN = 2.0  # factor between the rate of the last RECENT samples and the one the model was made for
# How much likelier it is that three tenths are lost than that one is: log(0.3 / 0.1) by a sample that did not come,
# log(0.7 / 0.9) by one that came.
LOST, CAME, CERTAIN = 1.10, -0.25, 5.0
RATE_OF = 40  # samples due
RATE_OVER = 10  # sample periods, for the rate that is reported
# Share of a window's sound at full scale. A sine that just fits has 0.4 %; one that is 1 % too high for it, 9 %.
CLIPPED = 0.01


@dataclass(frozen=True)
class StreamHealth:
    name: str
    required: bool
    absent: bool  # the model does without it
    reasons: tuple[str, ...]  # empty if it is well
    age_s: float  # inf if never seen
    rate_hz: float | None  # None until measured
    counts: dict[str, int] = field(default_factory=dict)  # see Aligner.counts; and `refused`

    @property
    def ok(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Health:
    engine: str
    streams: tuple[StreamHealth, ...]
    reasons: tuple[str, ...]  # why the last tick without an action, of those since the last report, had none
    idle_ticks: int  # how many these were
    dropped: dict[str, int]  # part -> steps dropped because they were not finite


class IdleTicks(NamedTuple):
    """Ticks without an action since the last report: one a second would hide what happened in between."""

    ticks: int = 0
    reasons: tuple[str, ...] = ()  # of the last

    def after(self, output: Output) -> IdleTicks:
        return IdleTicks(self.ticks + 1, output.reasons) if output.reasons else self


def absence(spec: StreamSpec, view: View) -> str | None:
    """Why a stream seen like this cannot be used; None if it can."""
    name, age_s, silent_s = spec.name, view.age_s, view.silent_s
    if age_s == float("inf"):
        return f"{name} never seen"
    if spec.latched:
        return None
    if round(age_s * NS) <= round(spec.max_age_ms * 1e6):  # as the aligner has it, to the nanosecond
        if not view.frozen_s:
            return None
        if spec.kind == "audio" and not view.data[-max(1, int(view.frozen_s * spec.sample_rate_hz)) :].any():
            return f"{name} muted: nothing but zeros for {view.frozen_s * 1e3:.0f} ms"
        return f"{name} frozen: the same data for {view.frozen_s * 1e3:.0f} ms"
    if (age_s - silent_s) * 1e3 > spec.max_age_ms:  # it is too old when it arrives
        return f"{name} stale {age_s * 1e3:.0f} ms > {spec.max_age_ms:.0f} ms"
    return f"{name} dead: silent for {silent_s:.2f} s"


def _clipping(spec: StreamSpec, view: View) -> tuple[str, ...]:
    """What there is to say of the sound in a window, if it is too loud for the microphone."""
    if view.data.max() < 32767 and view.data.min() > -32767:  # as nearly always, and far less work
        return ()
    share = float(np.mean((view.data >= 32767) | (view.data <= -32767)))
    return (f"{spec.name} clipped: {share:.0%} of its samples at full scale",) if share > CLIPPED else ()


class Shortfall(NamedTuple):
    """Evidence that fewer come than are due: a cumulative sum (CUSUM, Page 1954) since there last was none. It tells a
    steady loss as early as that can be done from a few samples lost at random, up to about one in twenty."""

    evidence: float = 0.0
    came: float = 0.0
    due: float = 0.0
    certain: bool = False  # until nothing is left of the evidence

    def after(self, came: float, due: float) -> Shortfall:
        evidence = self.evidence + LOST * (due - came) + CAME * came
        if evidence <= 0:
            return Shortfall()
        certain = self.certain or evidence >= CERTAIN
        fade = min(1.0, RATE_OF / (self.due + due))  # the rate that is told is that of late
        return Shortfall(min(evidence, CERTAIN + 1), fade * (self.came + came), fade * (self.due + due), certain)


class StreamMonitor:
    """Watches one stream of an aligner: what was refused and why, whether its samples come when they should."""

    def __init__(self, spec: StreamSpec, stream: Stream):
        self.spec, self._stream = spec, stream
        self._max_latency_ns = round(spec.max_latency_ms * 1e6) or math.inf
        self._max_jitter_ns = round(spec.max_jitter_ms * 1e6) or math.inf
        self._refused = self._refused_reported = self._refused_told = 0
        self._misplaced_reported = self._misplaced_told = 0
        self._last_refusal = ""
        self._timing: tuple[str, ...] = ()  # what is wrong with its time
        self._clipped: tuple[str, ...] = ()  # or with its sound
        self._judge_at = 0  # samples admitted
        self._counted: tuple[int, int] | None = None  # samples admitted and their newest stamp, when last judged
        self._slow, self._fast = Shortfall(), Shortfall()
        self._since: tuple[int, int] | None = None  # time and samples admitted when the rate was last reported
        self._rate_hz: float | None = None

    def refuse(self, error: SampleError) -> None:
        self._refused += 1
        self._last_refusal = str(error)

    def look(self, view: View) -> tuple[str, ...]:
        """What is wrong with the stream besides its absence, at this tick; refusals since the last."""
        if view.reset:
            self._counted = None
        if view.fresh:
            if self._stream.admitted >= self._judge_at and not self.spec.latched:
                self._timing = self._judge(view)
            self._clipped = _clipping(self.spec, view) if self.spec.kind == "audio" else ()
        elif not view.present:
            self._timing, self._clipped, self._counted = (), (), None  # silence is told by its own name
        if self._refused == self._refused_told and self._stream.misplaced == self._misplaced_told:
            return self._timing + self._clipped
        told = list[str]()
        if self._refused > self._refused_told:
            told.append(f"{self.spec.name} refused: {self._last_refusal}")
        if self._stream.misplaced > self._misplaced_told:
            told.append(f"{self.spec.name} out of time: {self._stream.refusal}")
        self._refused_told, self._misplaced_told = self._refused, self._stream.misplaced
        return (*self._timing, *self._clipped, *told)

    def report(self, now_ns: int, view: View) -> StreamHealth:
        """How the stream fares at `now_ns`, seen like this."""
        self._measure(now_ns, self._stream.admitted)
        absent = absence(self.spec, view)
        reasons = [absent, *self._timing, *self._clipped]
        if new := self._refused - self._refused_reported:
            reasons.append(f"{new} refused: {self._last_refusal}")
            self._refused_reported += new
        if new := self._stream.misplaced - self._misplaced_reported:
            reasons.append(f"{new} out of time, the last {self._stream.refusal}")
            self._misplaced_reported += new
        found = tuple(reason for reason in reasons if reason)
        counted = {"admitted": self._stream.admitted, **self._stream.counts, "refused": self._refused}
        return StreamHealth(
            self.spec.name, self.spec.required, absent is not None, found, view.age_s, self._rate_hz, counted
        )

    def _judge(self, view: View) -> tuple[str, ...]:
        """What is wrong with the stream's time, by its last samples; anew after so many that none is passed over."""
        stream, name, found = self._stream, self.spec.name, tuple[str, ...]()
        admitted, recent = stream.admitted, stream.recent
        self._judge_at = admitted + RECENT - 1
        if len(recent) < RECENT:  # it begins, or its clock was set
            self._counted = None
        else:
            latencies_ns = [arrival_ns - stamp_ns for stamp_ns, arrival_ns in recent]
            least_ns, most_ns = min(latencies_ns), max(latencies_ns)
            if stream.rate_hz:
                found = self._wrong_rate(admitted, view.stamp_ns)
            if least_ns > self._max_latency_ns:
                found += (
                    f"{name} skewed: arrives {least_ns / 1e6:.0f} ms or more after its stamp, allowed are "
                    f"{self.spec.max_latency_ms:.0f} ms: its link is slow, or its clock is behind",
                )
            if most_ns - least_ns > self._max_jitter_ns:
                found += (
                    f"{name} jitters: arrives {least_ns / 1e6:.0f} to {most_ns / 1e6:.0f} ms after its stamp, allowed "
                    f"is a spread of {self.spec.max_jitter_ms:.0f} ms",
                )
        if stream.offset_ns:
            found += (f"{name} clock is off by {stream.offset_ns / NS:.3f} s; its stamps are corrected",)
        if stream.drift.ppm:
            found += (f"{name} clock drifts by {stream.drift.ppm:+.0f} ppm",)
        return found

    def _wrong_rate(self, admitted: int, stamp_ns: int) -> tuple[str, ...]:
        """A rate that is far off shows within few samples; one that is off by a steady loss takes more."""
        expected_hz, recent = self._stream.rate_hz, self._stream.recent
        rate_hz = (RECENT - 1) * NS / (recent[-1][0] - recent[0][0])
        if not expected_hz / RATE_WITHIN <= rate_hz <= expected_hz * RATE_WITHIN:
            self._counted = None
            return (self._off(rate_hz),)
        if self._counted is None:
            self._slow, self._fast = Shortfall(), Shortfall()
        else:
            came, due = admitted - self._counted[0], (stamp_ns - self._counted[1]) * expected_hz / NS
            self._slow, self._fast = self._slow.after(came, due), self._fast.after(due, came)
        self._counted = admitted, stamp_ns
        if self._slow.certain:
            return (self._off(expected_hz * self._slow.came / self._slow.due),)
        if self._fast.certain:
            return (self._off(expected_hz * self._fast.due / self._fast.came),)
        return ()

    def _off(self, rate_hz: float) -> str:
        expected_hz = self._stream.rate_hz
        what = "slow" if rate_hz < expected_hz else "fast"
        return f"{self.spec.name} too {what}: {rate_hz:.1f} Hz, expected {expected_hz:g} Hz"

    def _measure(self, now_ns: int, admitted: int) -> None:
        if self.spec.latched or not self.spec.rate_hz:
            return
        if self._since is None or now_ns < self._since[0] or admitted < self._since[1]:
            self._since = now_ns, admitted
        elif (elapsed_s := (now_ns - self._since[0]) / NS) >= max(1.0, RATE_OVER / self.spec.rate_hz):
            self._rate_hz = (admitted - self._since[1]) / elapsed_s
            self._since = now_ns, admitted
