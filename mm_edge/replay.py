"""A recording as the timed pushes and ticks that the robot went through. The replay command, the tests and training's
tables all read recordings through `events`, so that each sees exactly what the robot could see.

    for output in replay(pipeline, events("episodes/0", bundle.streams)):
        ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mm_edge.align import TickRule
from mm_edge.errors import RecordingError, SampleError
from mm_edge.faults import Faults, in_order
from mm_edge.recording import Command, Tick, read, read_metadata
from mm_edge.types import NS, Output, Sample, StreamSpec

PAUSE_S = 60.0  # nothing arrives for longer: the clock was set, or the recording stood still

Record = Sample | SampleError | Command | Tick


class TickTimes(Protocol):
    """When to tick where a recording does not say: a bundle's `tick`."""

    @property
    def anchor(self) -> str: ...
    @property
    def max_period_ms(self) -> float: ...
    @property
    def min_period_ms(self) -> float: ...


def events(
    path: str | Path,
    specs: Sequence[StreamSpec],
    tick: TickTimes | None = None,
    topics: Mapping[str, str] | None = None,
    latency_ns: int = 0,
    faults: Faults | None = None,
) -> Iterator[Sample | SampleError | Tick]:
    """Samples of the streams `specs` in the order they arrived, each tick after all it could see, and for each message
    that holds no sample the SampleError that says why.

    A tick's `labels` are those it was recorded with, and under each topic of commands ("expert/cmd_vel") the one in
    force `latency_ns` after the tick, float32 (6,) in the order of `messages.TWIST`.

    Args:
        tick: when to tick if the recording holds no ticks.
        topics: stream -> topic, for bags that mm_edge did not write.
        faults: what happens to the samples; then the robot would have ticked at other times, by the rule `tick`.

    Raises RecordingError.
    """
    records: Iterable[Record] = read(path, specs, topics)
    if faults:
        records = in_order((record for record in records if not isinstance(record, Tick)), faults)
    if faults or read_metadata(path)["ticks"] == 0:
        if tick is None:
            raise RecordingError(f"{path}: holds no ticks, and no rule was given for when to tick")
        records = _with_ticks(records, tick)
    return _with_commands(records, latency_ns)


def replay(pipeline: Any, events: Iterable[Sample | SampleError | Tick]) -> Iterator[Output]:
    """Take `events` through a pipeline, as fast as it goes: an output a tick."""
    for event in events:
        if isinstance(event, Tick):
            yield pipeline.tick(event.now_ns)
        elif isinstance(event, SampleError):
            pipeline.refuse(event)
        else:
            pipeline.push(event)


def _with_ticks(records: Iterable[Record], tick: TickTimes) -> Iterator[Record]:
    """Tick as a robot with an exact timer would: as the anchor arrives, and `max_period_ms` after a tick without. From
    1970, where a robot may begin, until now that would be without end: a pause of more than PAUSE_S has no ticks."""
    rule, period_ns = TickRule(tick.anchor, tick.max_period_ms, tick.min_period_ms), round(tick.max_period_ms * 1e6)
    now_ns = 0  # a SampleError has no time: it goes with what arrived before it
    due_ns: int | None = None

    def time_ns(record: Record) -> int:
        nonlocal now_ns
        now_ns = now_ns if isinstance(record, (SampleError, Tick)) else record.arrival_ns
        return now_ns

    for arrival_ns, arrived in groupby(records, time_ns):
        if due_ns is not None and arrival_ns - due_ns > PAUSE_S * NS:
            due_ns = None
        while due_ns is not None and due_ns < arrival_ns:
            yield Tick(due_ns, {})
            rule.ticked(due_ns)
            due_ns += period_ns
        for record in arrived:
            if isinstance(record, Sample):
                rule.pushed(record)
            yield record
        if arrival_ns and rule.due(arrival_ns):
            yield Tick(arrival_ns, {})
            rule.ticked(arrival_ns)
            due_ns = arrival_ns + period_ns


def _with_commands(records: Iterable[Record], latency_ns: int) -> Iterator[Sample | SampleError | Tick]:
    """Fold commands into the labels of ticks: a tick waits, and all after it, until its command can be known."""
    waiting: deque[Sample | SampleError | Tick] = deque()
    in_force: dict[str, np.ndarray] = {}

    def ready(now_ns: float) -> Iterator[Sample | SampleError | Tick]:
        """What need not wait, now that all commands before `now_ns` are known."""
        while waiting:
            record = waiting[0]
            if isinstance(record, Tick):
                if record.now_ns + latency_ns >= now_ns:
                    return
                record = record._replace(labels={**record.labels, **in_force})
            waiting.popleft()
            yield record

    for record in records:
        if not isinstance(record, SampleError):
            yield from ready(record.now_ns if isinstance(record, Tick) else record.arrival_ns)
        if isinstance(record, Command):
            in_force[record.topic] = record.values
        else:
            waiting.append(record)
    yield from ready(float("inf"))
