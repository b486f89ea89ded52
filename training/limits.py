"""When a robot calls a sensor of its own frozen, skewed or jittering, as far as its recordings tell.

    streams = watched(streams_of(recordings), recordings)

A limit is twice what is usual in the recordings, or more: on the same robot it shall be no alarm. It is 0, not checked,
where they do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mm_edge.align import RECENT
from mm_edge.messages import TWIST
from mm_edge.types import NS, StreamSpec
from training.recordings import STILL, UNLABELLED_S, Recording, Topic

LIVING = ("image", "scan", "points", "imu", "audio")  # kinds of sensors whose data may change where nothing moves
LEAST_MS, MOST_MS = 50.0, 1000.0  # limits lie in between
HALT_S, STOOD_S = 1.0, 2.0  # until a robot stands that was told to; and how long a sensor must have seen it stand
NO_LINK_MS, CLOCK_JUMP_MS = 1.0, 1000.0


def watched(streams: Sequence[StreamSpec], recordings: Sequence[Recording]) -> tuple[StreamSpec, ...]:
    """The streams with `frozen_ms`, `max_latency_ms` and `max_jitter_ms`.

    That data change even where nothing moves is known only of a sensor, of 3 Hz or more, that saw the robot stand for
    long; numbers, such as joints, may stand still. What was logged at the time of its stamp had no link yet.
    """
    found = []
    for spec in streams:
        topics = [(r, r.topics[spec.name]) for r in recordings if spec.name in r.topics]
        if spec.rate_hz:  # else it is a text, or came but once
            latency_ms, jitter_ms = _link_ms(spec, [topic for _, topic in topics])
            frozen_ms = _frozen_ms(spec, topics)
            spec = replace(spec, frozen_ms=frozen_ms, max_latency_ms=latency_ms, max_jitter_ms=jitter_ms)
        found.append(spec)
    return tuple(found)


def _link_ms(spec: StreamSpec, topics: Sequence[Topic]) -> tuple[float, float]:
    """Of latency and jitter, which are judged by RECENT samples in a row; one in a hundred may be worse."""
    found = []
    for topic in topics:
        late_ms = 1e3 * topic.latency_s
        chunk_ms = 1e3 / topic.rate_hz if spec.kind == "audio" and topic.rate_hz else 0.0
        logged_at_once = any(np.abs(late_ms - ms).max(initial=0.0) < NO_LINK_MS for ms in (0.0, chunk_ms))
        if len(late_ms) < RECENT or logged_at_once:
            continue
        late_ms = late_ms - chunk_ms  # sound is as old as its last sample
        runs = np.lib.stride_tricks.sliding_window_view(late_ms, RECENT)
        runs = runs[np.ptp(runs, axis=1) < CLOCK_JUMP_MS]
        if len(runs):
            found.append(np.percentile([runs.min(1), np.ptp(runs, axis=1)], 99, axis=1))
    if not found:
        return 0.0, 0.0
    least_ms, spread_ms = 2 * np.max(found, axis=0)
    # What is older than max_age_ms has another name.
    return _limit_ms(least_ms, min(MOST_MS, spec.max_age_ms - 10)), _limit_ms(spread_ms, MOST_MS)


def _frozen_ms(spec: StreamSpec, topics: Sequence[tuple[Recording, Topic]]) -> float:
    if spec.kind not in LIVING:
        return 0.0
    period_ms = 1e3 / spec.rate_hz
    # Of an imu all that its window holds has to be the same, and a row more for its jitter.
    most_ms = (spec.shape[0] - 2) * period_ms if spec.kind == "imu" else MOST_MS
    limits_ms, stood_s = [0.0], [0.0]
    for recording, topic in topics:
        same_s = longest_s(topic.stamp_ns, topic.repeats)
        if same_s > pause_s(spec.rate_hz):  # it was frozen there, the check says so
            continue
        if not (limit_ms := _limit_ms(2e3 * same_s + 3 * period_ms, most_ms)):
            return 0.0  # it may stand still for so long
        limits_ms.append(limit_ms)
        stood_s.append(_stood_s(recording, topic.arrival_ns))
    return max(limits_ms) if max(stood_s) >= STOOD_S else 0.0


def _limit_ms(ms: float, most_ms: float) -> float:
    """In tens; 0 if that is too much."""
    limit_ms = max(LEAST_MS, 10.0 * math.ceil(round(ms, 3) / 10))
    return limit_ms if limit_ms <= most_ms else 0.0


def _stood_s(recording: Recording, at_ns: np.ndarray) -> float:
    """The longest time for which samples came (at_ns) while each Twist of the recording told the robot to stand, be it
    what an expert would have done, or what was done."""
    twists = [topic for topic in recording.topics.values() if topic.kind == "command" and topic.names == TWIST]
    if not twists:
        return 0.0
    stands = np.all([_told_to_stand(topic, at_ns) for topic in twists], axis=0)
    return longest_s(at_ns, stands & np.concatenate([[False], stands[:-1]]))


def _told_to_stand(topic: Topic, at_ns: np.ndarray) -> np.ndarray:
    """bool (n,): whether it has been for HALT_S, without a pause after which nobody knows."""
    told_ns, values = topic.arrival_ns, topic.values
    finite = np.isfinite(values).all(1)
    if not finite.any():
        return np.zeros(len(at_ns), bool)
    usual = np.percentile(np.abs(values[finite]), 99, axis=0, method="lower")  # beside a slip all else would be still
    still = finite & (np.abs(values) <= STILL * usual).all(1)
    near = np.diff(told_ns) <= UNLABELLED_S * NS
    since_ns = told_ns[_begins(np.concatenate([[False], still[1:] & still[:-1] & near]))]
    last = np.searchsorted(told_ns, at_ns, side="right") - 1
    fresh = (last >= 0) & (at_ns - told_ns[last] <= UNLABELLED_S * NS)
    return fresh & still[last] & (at_ns - since_ns[last] > HALT_S * NS)


def pause_s(rate_hz: float) -> float:
    """Without a sample for longer, or without anything new in them, a stream has a fault: the check tells it."""
    return max(1.0, 5 / rate_hz if rate_hz else 0.0)


def longest_s(at_ns: np.ndarray, goes_on: np.ndarray) -> float:
    """From the first to the last of those in a row each of which goes on with the one before."""
    return float((at_ns - at_ns[_begins(goes_on)]).max(initial=0)) / NS


def _begins(goes_on: np.ndarray) -> np.ndarray:
    """int (n,): with which each row began."""
    return np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(goes_on))))
