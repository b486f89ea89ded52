"""How each stream fares, with names and reasons: what /diagnostics and `Output.reasons` say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mm_edge.align import RECENT, Aligner, View
from mm_edge.errors import SampleError
from mm_edge.types import NS, Output, StreamSpec

RATE_WITHIN = 2.0  # factor between the rate of the last RECENT samples and the one the model was made for
MANY, MANY_WITHIN = 100, 4 / 3  # the same over many samples, by which a steady loss is told from a few
RATE_OVER = 10  # sample periods, for the rate that is reported
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


def absence(spec: StreamSpec, view: View) -> str | None:
    """Why a stream seen like this cannot be used; None if it can."""
    name, age_s, silent_s = spec.name, view.age_s, view.silent_s
    if age_s == float("inf"):
        return f"{name} never seen"
    if spec.latched:
        return None
    if view.frozen_s:
        return f"{name} frozen: the same data for {view.frozen_s * 1e3:.0f} ms"
    if round(age_s * NS) <= round(spec.max_age_ms * 1e6):  # as the aligner has it, to the nanosecond
        return None
    if (age_s - silent_s) * 1e3 > spec.max_age_ms:  # it is too old when it arrives
        return f"{name} stale {age_s * 1e3:.0f} ms > {spec.max_age_ms:.0f} ms"
    return f"{name} dead: silent for {silent_s:.2f} s"


class StreamMonitor:
    """Watches one stream of an aligner: what was refused and why, whether its samples come when they should."""

    def __init__(self, spec: StreamSpec, aligner: Aligner):
        self.spec, self._aligner = spec, aligner
        self._refused = self._refused_reported = self._refused_told = 0
        self._misplaced_reported = self._misplaced_told = 0
        self._last_refusal = ""
        self._timing: tuple[str, ...] = ()  # what is wrong with its time
        self._hundred: tuple[int, int] | None = None  # samples admitted and their newest stamp, a while ago
        self._lossy = ""
        self._since: tuple[int, int] | None = None  # time and samples admitted when the rate was last reported
        self._rate_hz: float | None = None

    def refuse(self, error: SampleError) -> None:
        self._refused += 1
        self._last_refusal = str(error)

    def look(self, view: View) -> list[str]:
        """What is wrong with the stream besides its absence, at this tick; refusals since the last."""
        name = self.spec.name
        if view.fresh and not self.spec.latched:
            self._timing = self._judge(view)
        elif not view.present:
            self._timing = ()
        found = list(self._timing)
        if self._refused > self._refused_told:
            self._refused_told = self._refused
            found.append(f"{name} refused: {self._last_refusal}")
        if (misplaced := self._misplaced()) > self._misplaced_told:
            self._misplaced_told = misplaced
            found.append(f"{name} out of time: {self._aligner.refusal(name)}")
        return found

    def report(self, now_ns: int, view: View) -> StreamHealth:
        """How the stream fares at `now_ns`, seen like this."""
        name = self.spec.name
        counts = dict(self._aligner.counts(name))
        self._measure(now_ns, counts.get("admitted", 0))
        reasons = [absence(self.spec, view), *self._timing]
        if new := self._refused - self._refused_reported:
            reasons.append(f"{new} refused: {self._last_refusal}")
            self._refused_reported += new
        if new := (misplaced := self._misplaced()) - self._misplaced_reported:
            reasons.append(f"{new} out of time, the last {self._aligner.refusal(name)}")
            self._misplaced_reported = misplaced
        found = tuple(reason for reason in reasons if reason)
        counted = {**counts, "refused": self._refused}
        return StreamHealth(name, self.spec.required, found, view.age_s, self._rate_hz, counted)

    def _judge(self, view: View) -> tuple[str, ...]:
        """What is wrong with the stream's time, by its last samples."""
        spec, aligner, found = self.spec, self._aligner, list[str]()
        recent, expected_hz = aligner.recent(spec.name), aligner.rate_hz(spec.name)
        if len(recent) == RECENT:
            if expected_hz:
                found += self._wrong_rate(view, recent, expected_hz)
            latencies_ms = [(arrival_ns - stamp_ns) / 1e6 for stamp_ns, arrival_ns in recent]
            least_ms, most_ms = min(latencies_ms), max(latencies_ms)
            if spec.max_latency_ms and least_ms > spec.max_latency_ms:
                found.append(
                    f"{spec.name} skewed: arrives {least_ms:.0f} ms or more after its stamp, allowed are "
                    f"{spec.max_latency_ms:.0f} ms: its link is slow, or its clock is behind"
                )
            if spec.max_jitter_ms and most_ms - least_ms > spec.max_jitter_ms:
                found.append(
                    f"{spec.name} jitters: arrives {least_ms:.0f} to {most_ms:.0f} ms after its stamp, allowed is a "
                    f"spread of {spec.max_jitter_ms:.0f} ms"
                )
        if offset_ns := aligner.offset_ns(spec.name):
            found.append(f"{spec.name} clock is off by {offset_ns / NS:.3f} s; its stamps are corrected")
        if ppm := aligner.drift_ppm(spec.name):
            found.append(f"{spec.name} clock drifts by {ppm:+.0f} ppm")
        return tuple(found)

    def _wrong_rate(self, view: View, recent: Sequence[tuple[int, int]], expected_hz: float) -> list[str]:
        """A rate that is far off shows within few samples; one that is off by a steady loss takes many."""
        rate_hz = (len(recent) - 1) * NS / (recent[-1][0] - recent[0][0])
        if not expected_hz / RATE_WITHIN <= rate_hz <= expected_hz * RATE_WITHIN:
            self._hundred = None
            self._lossy = self._off(rate_hz, expected_hz)
            return [self._lossy]
        admitted = self._aligner.counts(self.spec.name)["admitted"]
        if self._hundred is None or not 0 <= admitted - self._hundred[0] < 2 * MANY:
            self._hundred, self._lossy = (admitted, view.stamp_ns), ""
        elif (n := admitted - self._hundred[0]) >= MANY:
            rate_hz = n * NS / (view.stamp_ns - self._hundred[1])
            within = expected_hz / MANY_WITHIN <= rate_hz <= expected_hz * MANY_WITHIN
            self._hundred, self._lossy = (admitted, view.stamp_ns), "" if within else self._off(rate_hz, expected_hz)
        return [self._lossy] if self._lossy else []

    def _off(self, rate_hz: float, expected_hz: float) -> str:
        what = "slow" if rate_hz < expected_hz else "fast"
        return f"{self.spec.name} too {what}: {rate_hz:.1f} Hz, expected {expected_hz:g} Hz"

    def _misplaced(self) -> int:
        counts = self._aligner.counts(self.spec.name)
        return sum(counts[what] for what in MISPLACED)

    def _measure(self, now_ns: int, admitted: int) -> None:
        if self.spec.latched or not self.spec.rate_hz:
            return
        if self._since is None or now_ns < self._since[0] or admitted < self._since[1]:
            self._since = now_ns, admitted
        elif (elapsed_s := (now_ns - self._since[0]) / NS) >= max(1.0, RATE_OVER / self.spec.rate_hz):
            self._rate_hz = (admitted - self._since[1]) / elapsed_s
            self._since = now_ns, admitted
