"""How each stream fares, with names and reasons: what /diagnostics and `Output.reasons` say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from mm_edge.align import Aligner
from mm_edge.errors import SampleError
from mm_edge.types import NS, Output, StreamSpec

DEAD_AFTER_S = 2.0
SLOW_BELOW = 0.5  # of the rate the model was made for
RATE_OVER = 10  # sample periods
MISPLACED = ("future", "late", "duplicate")  # counts of the aligner


@dataclass(frozen=True)
class StreamHealth:
    name: str
    required: bool
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


def absence(spec: StreamSpec, age_s: float, silent_s: float) -> str | None:
    """Why a stream whose data are this old, and last came this long ago, cannot be used; None if it can."""
    if age_s == float("inf"):
        return f"{spec.name} never seen"
    if spec.latched or round(age_s * NS) <= round(spec.max_age_ms * 1e6):  # as the aligner has it, to the nanosecond
        return None
    if silent_s > max(DEAD_AFTER_S, spec.max_age_ms / 1e3):
        return f"{spec.name} dead: silent for {silent_s:.1f} s"
    if age_s - silent_s > DEAD_AFTER_S:  # a slow link or a wrong clock: one cannot tell which, so it is not corrected
        return f"{spec.name} skewed: stamps lie {age_s - silent_s:.1f} s behind arrival"
    return f"{spec.name} stale {age_s * 1e3:.0f} ms > {spec.max_age_ms:.0f} ms"


class StreamMonitor:
    """Watches one stream: what was refused and why, and its rate between reports."""

    def __init__(self, spec: StreamSpec):
        self.spec = spec
        self._refused = self._refused_reported = self._misplaced_reported = 0
        self._last_refusal = ""
        self._since: tuple[int, int] | None = None  # time and samples admitted when the rate was last measured
        self._rate_hz: float | None = None

    def refuse(self, error: SampleError) -> None:
        self._refused += 1
        self._last_refusal = str(error)

    def report(self, now_ns: int, age_s: float, silent_s: float, aligner: Aligner) -> StreamHealth:
        """How the stream fares at `now_ns`, with data of this age that came this long ago."""
        name = self.spec.name
        counts, offset_ns = dict(aligner.counts(name)), aligner.offset_ns(name)
        reasons = [absence(self.spec, age_s, silent_s)]
        self._measure(now_ns, counts.get("admitted", 0))
        if self._rate_hz is not None and self._rate_hz < SLOW_BELOW * self.spec.rate_hz:
            reasons.append(f"{self.spec.name} too slow: {self._rate_hz:.1f} Hz, expected {self.spec.rate_hz:g} Hz")
        if offset_ns:
            reasons.append(f"{self.spec.name} clock is off by {offset_ns / NS:.3f} s; its stamps are corrected")
        if new := self._refused - self._refused_reported:
            reasons.append(f"{new} refused: {self._last_refusal}")
            self._refused_reported += new
        misplaced = sum(counts.get(what, 0) for what in MISPLACED)
        if new := misplaced - self._misplaced_reported:
            reasons.append(f"{new} out of time, the last {aligner.refusal(name)}")
            self._misplaced_reported = misplaced
        found = tuple(reason for reason in reasons if reason)
        counted = {**counts, "refused": self._refused}
        return StreamHealth(self.spec.name, self.spec.required, found, age_s, self._rate_hz, counted)

    def _measure(self, now_ns: int, admitted: int) -> None:
        if self.spec.latched or not self.spec.rate_hz:
            return
        if self._since is None or now_ns < self._since[0] or admitted < self._since[1]:
            self._since = now_ns, admitted
        elif (elapsed_s := (now_ns - self._since[0]) / NS) >= max(1.0, RATE_OVER / self.spec.rate_hz):
            self._rate_hz = (admitted - self._since[1]) / elapsed_s
            self._since = now_ns, admitted
