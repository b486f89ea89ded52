"""Faults on purpose: what a robot does when a sensor dies, freezes, lies or comes late, before one does.

faults = Faults([parse_fault("camera:freeze@2-5")], bundle.streams)
for late_or_changed in faults(sample): ...      # none, one or two samples; their arrival may lie ahead

STREAM:KIND[=VALUE]@START[-END]                 seconds since the first sample; no END: to the end

die                 nothing comes
drop=0.3            a share of the samples does not come
freeze              the data stand still, the stamps go on
delay=200ms         everything arrives later
jitter=50ms         everything arrives later by up to so much, at random
skew=300ms          the sensor's clock is ahead by so much (behind: -300ms)
jump=-5s            the sensor's clock jumps by so much
reorder             of every two samples, the second arrives first
duplicate           everything arrives twice
nan                 numbers that are none, where the kind of data has numbers
noise[=1]           noise drowns the data; 1: as strong as what the sensor usually sees
truncate            the second half of the data is missing
"""

from __future__ import annotations

import argparse
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mm_edge.errors import EdgeError
from mm_edge.types import NS, Audio, Output, Sample, Scan

KINDS = {  # kind -> what its value is
    "die": "", "drop": "share", "freeze": "", "delay": "time", "jitter": "time", "skew": "time", "jump": "time",
    "reorder": "", "duplicate": "", "nan": "", "noise": "factor", "truncate": "",
}  # fmt: skip
_NOISE = {"image": 64.0, "audio": 3000.0, "imu": 3.0, "points": 1.0, "vector": 1.0}  # at noise=1; a scan: a metre


@dataclass(frozen=True)
class Fault:
    """`value`: seconds for a time, a share, a factor, or 0. `text`: as it was given."""

    stream: str
    kind: str
    value: float
    start_s: float
    end_s: float
    text: str

    def __str__(self) -> str:
        return self.text


def parse_fault(text: str) -> Fault:
    """Raises EdgeError."""
    number = r"\d+(?:\.\d+)?"
    match = re.fullmatch(rf"(\w+):(\w+)(?:=([-+]?{number})(ms|s|))?@({number})(?:-({number}))?", text)
    if match is None:
        raise EdgeError(f"{text}: expected STREAM:KIND[=VALUE]@START[-END], as in camera:freeze@2-5")
    stream, kind, number, unit, start, end = match.groups()
    if kind not in KINDS:
        raise EdgeError(f"{text}: expected a kind of {', '.join(KINDS)}, got {kind}")
    value = float(number or (KINDS[kind] == "factor")) * (1e-3 if unit == "ms" else 1.0)
    what, right = {
        "": ("no value", not number),
        "share": ("a share between 0 and 1, as in 0.3", number and not unit and 0 <= value <= 1),
        "time": ("a time, as in 200ms", number and unit and (value >= 0 or kind in ("skew", "jump"))),
        "factor": ("a number above 0", not unit and value > 0),
    }[KINDS[kind]]
    if not right:
        raise EdgeError(f"{text}: {kind} takes {what}, got {f'{number}{unit}' if number else 'none'}")
    start_s, end_s = float(start), float(end) if end else float("inf")
    if end_s <= start_s:
        raise EdgeError(f"{text}: expected an END after START")
    return Fault(stream, kind, value, start_s, end_s, text)


def parse_faults(text: str) -> list[Fault]:
    """Several, with spaces between them. Raises EdgeError."""
    return [parse_fault(word) for word in text.split()]


def add_fault_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fault",
        type=_fault_argument,
        action="append",
        default=[],
        dest="faults",
        metavar="STREAM:KIND[=VALUE]@START[-END]",
        help=f"what goes wrong, from and to in seconds: camera:freeze@2-5; kinds: {', '.join(KINDS)}; of these drop "
        "takes a share (0.3), delay, jitter, skew and jump a time (200ms), noise a factor; may be repeated",
    )


def _fault_argument(text: str) -> Fault:
    try:
        return parse_fault(text)
    except EdgeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Faults:
    """Faults at work on samples, in the order in which they are captured.

    Args:
        faults: what to do.
        kinds: stream -> kind of its data.
        start_ns: what their times are counted from; by default the first sample's arrival.

    Raises EdgeError for a stream that is not there, or whose kind of data the fault makes no sense for.
    """

    def __init__(self, faults: Iterable[Fault], kinds: Mapping[str, str], seed: int = 0, start_ns: int | None = None):
        self.faults, self._kinds = tuple(faults), kinds
        for fault in self.faults:
            kind = kinds.get(fault.stream)
            if kind is None:
                raise EdgeError(f"{fault}: expected one of the streams {list(kinds)}, got {fault.stream}")
            if fault.kind == "nan" and kind in ("image", "audio", "text"):
                raise EdgeError(f"{fault}: {kind} has whole numbers or words, which are never NaN")
            if fault.kind in ("noise", "reorder") and kind == "text":
                raise EdgeError(f"{fault}: a command is neither noisy, nor does a second one come soon")
        self._rng = np.random.default_rng(seed)
        self.start_ns = start_ns
        self._frozen: dict[Fault, Any] = {}
        self._held: dict[Fault, Sample] = {}

    def __call__(self, sample: Sample) -> list[Sample]:
        if self.start_ns is None:
            self.start_ns = sample.arrival_ns
        t_s = (sample.arrival_ns - self.start_ns) / NS
        samples = [sample]
        for fault in self.faults:
            if fault.stream != sample.stream:
                continue
            if fault.start_s <= t_s < fault.end_s:
                samples = [changed for one in samples for changed in self._apply(fault, one)]
            elif (first := self._held.pop(fault, None)) is not None:  # no second one came to overtake it
                samples.insert(0, first._replace(arrival_ns=sample.arrival_ns))
        return samples

    def _apply(self, fault: Fault, sample: Sample) -> Iterator[Sample]:
        kind, shift_ns = fault.kind, round(fault.value * NS)
        if kind == "die" or (kind == "drop" and self._rng.random() < fault.value):
            return
        if kind == "freeze":
            yield sample._replace(data=self._freeze(fault, sample.data))
        elif kind == "delay":
            yield sample._replace(arrival_ns=sample.arrival_ns + shift_ns)
        elif kind == "jitter":
            yield sample._replace(arrival_ns=sample.arrival_ns + round(self._rng.uniform(0, fault.value) * NS))
        elif kind in ("skew", "jump"):
            yield sample._replace(stamp_ns=sample.stamp_ns + shift_ns)
        elif kind == "reorder":
            if (first := self._held.pop(fault, None)) is None:
                self._held[fault] = sample
            else:
                yield sample
                yield first._replace(arrival_ns=sample.arrival_ns)
        elif kind == "duplicate":
            yield from (sample, sample)
        elif kind == "nan":
            yield sample._replace(data=_nan(sample.data))
        elif kind == "noise":
            yield sample._replace(data=self._noise(sample, fault.value))
        elif kind == "truncate":
            yield sample._replace(data=_truncate(sample.data))
        else:  # one that did not drop
            yield sample

    def _freeze(self, fault: Fault, data: Any) -> Any:
        stuck = self._frozen.setdefault(fault, data)
        return data._replace(samples=stuck.samples) if isinstance(data, Audio) else stuck  # its numbers go on

    def _noise(self, sample: Sample, factor: float) -> Any:
        data, kind = sample.data, self._kinds[sample.stream]
        if isinstance(data, Scan):
            ranges = np.abs(data.ranges + np.float32(self._rng.normal(0, factor, data.ranges.shape)))
            return data._replace(ranges=ranges.astype(np.float32))
        values = data.samples if isinstance(data, Audio) else data
        noisy = values + self._rng.normal(0, factor * _NOISE[kind], values.shape)
        if values.dtype.kind in "ui":
            info = np.iinfo(values.dtype)
            noisy = np.clip(noisy, info.min, info.max)
        noisy = noisy.astype(values.dtype)
        return data._replace(samples=noisy) if isinstance(data, Audio) else noisy


def _nan(data: Any) -> Any:
    if isinstance(data, Scan):
        return data._replace(ranges=np.full_like(data.ranges, np.nan))
    return np.full_like(data, np.nan)


def _truncate(data: Any) -> Any:
    if isinstance(data, Scan):
        return data._replace(ranges=data.ranges[:1])
    if isinstance(data, Audio):
        return data._replace(samples=data.samples.reshape(-1)[: data.samples.size // 2])
    flat = data if isinstance(data, str) else data.reshape(-1)
    return flat[: len(flat) // 2]


def is_truncated(kind: str, data: Any) -> bool:
    """Whether the data are what that fault leaves of them, and no longer of the form that their kind has. (Text has no
    form.)"""
    if kind == "scan":
        return len(data.ranges) < 2
    if kind == "audio":
        return data.samples.ndim == 1
    if kind == "imu":
        return len(data) < 6
    return kind == "image" and data.ndim == 1


def in_order(events: Iterable[Any], faults: Faults) -> Iterator[Any]:
    """Samples with faults, each once it arrives, among events in the order of their `arrival_ns`; what has none goes
    with what comes before it."""
    waiting: list[tuple[int, int, Sample]] = []
    count = 0
    for event in events:
        if isinstance(event, Sample):
            for changed in faults(event):
                heapq.heappush(waiting, (changed.arrival_ns, count, changed))
                count += 1
        while waiting and waiting[0][0] <= getattr(event, "arrival_ns", -1):
            yield heapq.heappop(waiting)[2]
        if not isinstance(event, Sample):
            yield event
    while waiting:
        yield heapq.heappop(waiting)[2]


@dataclass
class Finding:
    """What became of one fault. Times are since its start; None: never."""

    fault: str
    began: bool = False
    detected_ms: float | None = None
    words: list[str] = field(default_factory=list)  # in which it was told, each but for its numbers once
    stopped_ms: float | None = None  # it took the robot's action away
    acted_without_ms: float | None = None  # the robot had an action, from the other streams

    def __str__(self) -> str:
        if not self.began:
            return f"{self.fault}: never began, it was over before"
        told = "not detected"
        if self.detected_ms is not None:
            told = f"detected after {self.detected_ms:.0f} ms ({'; '.join(self.words)})"
        did = [(self.stopped_ms, "stopped"), (self.acted_without_ms, "went on acting without it")]
        did = sorted((ms, f"{what} after {ms:.0f} ms") for ms, what in did if ms is not None)
        return f"{self.fault}: {told}; {', '.join(what for _, what in did) or 'went on acting'}"


class FaultWatch:
    """Watches what a pipeline makes of faults.

    Args:
        faults: as they are injected. start_ns: what their times are counted from.
        beyond_s: for so long after a fault's end, what is said of its stream is still due to it.

    Attributes: findings, one a fault; false_alarms, what was said of streams that had no fault; start_ns.
    """

    def __init__(self, faults: Sequence[Fault], start_ns: int, beyond_s: float = 3.0):
        self.start_ns, self._faults, self._beyond_s = start_ns, tuple(faults), beyond_s
        self.findings = [Finding(str(fault)) for fault in faults]
        self.false_alarms: list[str] = []
        self._before: list[set[str] | None] = [None] * len(self.findings)  # what was said when each fault began
        self._said: dict[str, set[str]] = {}  # at the last output, of each stream, without numbers
        self._alarms: set[str] = set()  # those that were false
        self._acted = False

    def see(self, output: Output) -> None:
        t_s = (output.stamp_ns - self.start_ns) / NS
        said: dict[str, list[str]] = {stream: [] for stream in output.mask}
        for text in (*output.reasons, *output.notes):
            stream = re.split("[ :]", text, maxsplit=1)[0]
            if stream in said and not text.endswith("never seen"):
                said[stream].append(text)
        suspects = set()
        for i, (fault, finding) in enumerate(zip(self._faults, self.findings)):
            if fault.start_s <= t_s < fault.end_s + self._beyond_s:
                suspects.add(fault.stream)
                finding.began = True
                if self._before[i] is None:
                    self._before[i] = self._said.get(fault.stream, set())
                new = [text for text in said[fault.stream] if _words(text) not in (self._before[i] or ())]
                self._follow(finding, round((t_s - fault.start_s) * 1e3, 1), output, fault, new)
        false = {_words(text): text for stream in said.keys() - suspects for text in said[stream]}
        self.false_alarms += [text for words, text in false.items() if words not in self._alarms]
        self._alarms = set(false)
        self._said = {stream: set(map(_words, texts)) for stream, texts in said.items()}
        self._acted |= output.action is not None

    def _follow(self, finding: Finding, since_ms: float, output: Output, fault: Fault, said: list[str]) -> None:
        stream = fault.stream
        if said and finding.detected_ms is None:
            finding.detected_ms = since_ms
        if said:
            known = set(map(_words, finding.words))
            finding.words += [text for text in said if _words(text) not in known]
        acts, because = output.action is not None, (f"{stream} ", "no sensor is present")
        if acts and not output.mask[stream] and finding.acted_without_ms is None:
            finding.acted_without_ms = since_ms
        due = since_ms < (fault.end_s - fault.start_s) * 1e3 and not output.mask[stream]
        stopped = due and not acts and self._acted and any(text.startswith(because) for text in output.reasons)
        if stopped and finding.stopped_ms is None:
            finding.stopped_ms = since_ms


def _words(text: str) -> str:
    """Without its numbers, which change from tick to tick."""
    return re.sub(r"[-+\d.]+", "", text)
