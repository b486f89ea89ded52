"""The aligner: streams that arrive late, jittered and out of order in; what the robot could see at an instant out.

    aligner = Aligner(specs, tick_period_s=1 / 15)
    aligner.push(sample)            # any thread, any order
    window = aligner.window(t_ns)   # one call a tick

It reads no clock. A sample is visible at `t` once `arrival_ns <= t`; its stamp orders it and ages it. Samples that are
late, duplicate or from the future are counted and never move a stream backwards.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from mm_edge.types import NS, Audio, Sample, StreamSpec

RECENT = 6  # samples by which the time of a stream is judged


class View(NamedTuple):
    """One stream at one instant.

    `data` is the newest visible sample's, or for windowed kinds the last `window_ms` in a fixed shape, oldest first:
    audio int16 (n, channels), imu float32 (n, 6), with `valid` bool (n,); not to be written to. None if the stream was
    never seen.
    """

    data: Any
    valid: np.ndarray | None
    stamp_ns: int  # capture time of the newest data; 0 if never seen
    age_s: float  # inf if never seen
    silent_s: float  # since the newest data arrived; inf if never seen
    present: bool  # seen, not older than max_age_ms, and not frozen
    fresh: bool  # present, and not handed out by an earlier window: the model should step on it
    dt_s: float  # capture time since the stream's last step; the nominal period on the first
    reset: bool  # the model should start this stream's state anew before stepping
    frozen_s: float = 0.0  # for how long the data have been the same, once that is longer than frozen_ms
    heard: int = 0  # of sound: samples that came or were missed so far


UNSEEN = View(None, None, 0, float("inf"), float("inf"), False, False, 0.0, False)


class Window(NamedTuple):
    t_ns: int
    dt_s: float  # since the last window; the nominal period on the first
    reset: bool  # the clock jumped back or ticks stood still too long: all state starts anew
    views: dict[str, View]


class Aligner:
    """Aligns streams at tick times.

    Args:
        specs: the streams, in the model's order.
        tick_period_s: nominal time between windows.
        max_gap_ms: silence after which a stream's (or, between windows, the whole model's) state starts anew.
        future_tolerance_ms: how far a stamp may lie ahead of its arrival (clocks of one robot differ a little).
        reanchor_after: consecutive refused samples that agree on their clock's offset before that offset is believed.
    """

    def __init__(
        self,
        specs: Iterable[StreamSpec],
        tick_period_s: float,
        max_gap_ms: float = 2000.0,
        future_tolerance_ms: float = 50.0,
        reanchor_after: int = 10,
    ):
        self._tick_period_s = tick_period_s
        self._max_gap_ns = round(max_gap_ms * 1e6)
        tolerance_ns = round(future_tolerance_ms * 1e6)
        self.streams: dict[str, Stream] = {
            spec.name: _STREAMS.get(spec.kind, Stream)(
                spec,
                max(tick_period_s, 1 / spec.rate_hz if spec.rate_hz else 0.0),
                self._max_gap_ns,
                tolerance_ns,
                reanchor_after,
            )
            for spec in specs
        }
        self._t_ns: int | None = None
        self._restart = False

    def push(self, sample: Sample) -> None:
        """Take a sample in; constant time, no lock. Raises KeyError for a stream without a spec."""
        stream = self.streams[sample.stream]
        if len(stream.pending) == stream.pending.maxlen:
            stream.counts["overflow"] += 1
        stream.pending.append(sample)

    def window(self, t_ns: int) -> Window:
        """What is visible at `t_ns`. A time before the last window's means the clock jumped: everything starts anew."""
        last_ns, self._t_ns = self._t_ns, t_ns
        jumped_back = last_ns is not None and t_ns < last_ns
        reset = self._restart or (last_ns is not None and (jumped_back or t_ns - last_ns > self._max_gap_ns))
        self._restart = False
        dt_s = self._tick_period_s if last_ns is None or reset else (t_ns - last_ns) / NS
        if jumped_back:
            for stream in self.streams.values():
                stream.jump(t_ns)
        return Window(t_ns, dt_s, reset, {name: stream.view(t_ns, reset) for name, stream in self.streams.items()})

    def restart(self) -> None:
        """The model has lost its state: the next window is a reset, and gives all that is present again."""
        self._restart = True

    def counts(self, stream: str) -> Counter[str]:
        """How many samples of `stream` were `admitted`, `late`, `duplicate`, `future`, lost to `overflow` or
        `reanchored`; for audio also `gap` and `overlap`."""
        counted = self.streams[stream]
        return Counter({**counted.counts, "admitted": counted.admitted})


class TickRule:
    """When to tick: as the anchor stream's sample arrives, if that is `min_period_ms` after the last tick or later, or
    `max_period_ms` after it without one."""

    def __init__(self, anchor: str, max_period_ms: float, min_period_ms: float = 0.0):
        self.anchor = anchor
        self._min_period_ns = round(min_period_ms * 1e6)
        self._max_period_ns = round(max_period_ms * 1e6)
        self._came: Sample | None = None  # the anchor stream's newest sample
        self._seen: Sample | None = None  # and the one that a tick has seen
        self._last_ns: int | None = None

    def pushed(self, sample: Sample) -> None:
        if sample.stream == self.anchor:  # no read-modify-write: several threads push
            self._came = sample

    def due(self, now_ns: int) -> bool:
        """A sample that is pushed after a tick began calls for the next, whether or not that tick came to see it."""
        last_ns, came = self._last_ns, self._came
        if last_ns is None or not 0 <= now_ns - last_ns < self._max_period_ns:
            return True
        if now_ns == last_ns:  # a simulated clock goes in steps: no time has passed in which to act
            return False
        if came is None or (self._min_period_ns and came.arrival_ns - last_ns < self._min_period_ns):
            return False
        return came is not self._seen and came.arrival_ns <= now_ns

    def ticked(self, now_ns: int) -> None:
        """Call it before the samples are looked at."""
        self._last_ns, came = now_ns, self._came
        if came is not None and came.arrival_ns <= now_ns:
            self._seen = came


class ClockDrift:
    """Whether the clock behind a stream's stamps runs faster or slower than the robot's.

    The least latency within each block of time is free of queues and jitter; where it wanders, that is the clock. Where
    it jumps by more than any clock drifts, that is the link, and does not count.

    Attributes: behind_ns, how far stamps have fallen behind since the first block; ppm, how much faster the clock runs,
    0 until that is certain; of the block under way, least_ns and until_ns: only what is less, or later, need be seen.
    """

    BLOCK_S, BLOCK_SAMPLES, BLOCKS = 4.0, 20, 11
    MOST_PPM, MOST_NOISE_NS = 1000.0, 3_000_000
    LEAST_PPM, EXPLAINED, AGREE = 100.0, 0.95, 3  # a line explains so much of so many blocks, so often in a row

    def __init__(self, rate_hz: float):
        self.ppm, self.behind_ns = 0.0, 0
        self.until_ns = self.least_ns = 0
        self._block_ns = round(max(self.BLOCK_S, self.BLOCK_SAMPLES / rate_hz if rate_hz else 0.0) * NS)
        self._blocks: deque[tuple[int, int]] = deque(maxlen=self.BLOCKS)  # when each ended, how far behind it was
        self._last: tuple[int, int] | None = None  # when the last one ended, and its least latency
        self._agree = 0

    def see(self, now_ns: int, latency_ns: int) -> None:
        """`latency_ns`: from a sample's stamp, as its sensor gave it, to its arrival."""
        if now_ns < self.until_ns:
            self.least_ns = min(self.least_ns, latency_ns)
            return
        if self.until_ns:
            self._end_block(now_ns)
        self.until_ns, self.least_ns = now_ns + self._block_ns, latency_ns

    def _end_block(self, now_ns: int) -> None:
        if self._last is not None:
            step_ns = self.least_ns - self._last[1]
            if abs(step_ns) <= self.MOST_PPM * 1e-6 * (now_ns - self._last[0]) + self.MOST_NOISE_NS:
                self.behind_ns += step_ns
            else:
                self._blocks.clear()
        self._last = now_ns, self.least_ns
        self._blocks.append((now_ns, self.behind_ns))
        certain = self._fit() if len(self._blocks) == self.BLOCKS else 0.0
        self._agree = self._agree + 1 if certain else 0
        self.ppm = certain if self._agree >= self.AGREE else 0.0

    def _fit(self) -> float:
        """In ppm; 0 if it is no line, or too flat a one."""
        when, behind = np.array(self._blocks, float).T
        when -= when.mean()
        behind -= behind.mean()
        slope = when @ behind / (when @ when)
        explained = slope**2 * (when @ when) >= self.EXPLAINED * (behind @ behind)
        return -slope * 1e6 if explained and abs(slope) * 1e6 >= self.LEAST_PPM else 0.0


class Stream:
    """A stream of which the newest sample counts.

    Attributes:
        admitted: how many samples were. counts: of what else happened, see `Aligner.counts`.
        misplaced: how many samples were late, duplicate or from the future, or were numbered anew by a microphone.
        refusal: what was wrong with the last of these; empty if there was none.
        recent: stamp and arrival, in ns, of the last RECENT samples that were admitted.
        offset_ns: what is subtracted from its stamps since its clock was found to be off; 0 if it never was.
        drift: of its clock.
        rate_hz: how many samples a second are expected, of audio by the length of its newest chunk; 0 if any number is.
        undrifts: whether its stamps are corrected by the drift.
        heard: samples of sound that came or were missed so far, by any microphone.
    """

    undrifts = False
    heard = 0

    def __init__(self, spec: StreamSpec, period_s: float, max_gap_ns: int, tolerance_ns: int, reanchor_after: int):
        self.spec = spec
        self.period_s, self.max_gap_ns, self.tolerance_ns = period_s, max_gap_ns, tolerance_ns
        self.reanchor_after = reanchor_after
        self.max_age_ns, self.frozen_ns = round(spec.max_age_ms * 1e6), round(spec.frozen_ms * 1e6)
        self.rate_hz = spec.rate_hz
        # Room for what arrives between two windows even when ticks stand still for a second; beyond it the oldest go.
        self.pending: deque[Sample] = deque(maxlen=max(16, int(spec.rate_hz * (1.0 + spec.window_ms / 1e3) * 2)))
        self.counts: Counter[str] = Counter()
        self.offset_ns = self.admitted = self.misplaced = 0
        self.refusal = ""
        self._not_yet: list[Sample] = []  # drained, but arrived after the last window
        self._anew = False  # nothing that was remembered goes on: its clock was set, or all started anew without it
        self.drift = ClockDrift(spec.rate_hz)
        self.clear()

    def clear(self) -> None:
        self._skews_ns: list[int] = []
        self._right_again = 0  # samples in a row whose stamps need no offset any more
        self.recent: deque[tuple[int, int]] = deque(maxlen=RECENT)
        self.offset_ns -= self.drift.behind_ns if self.undrifts else 0
        self.drift = ClockDrift(self.spec.rate_hz)
        self.newest_ns: int | None = None
        self.arrival_ns = 0  # of the newest
        self.stepped_ns: int | None = None
        self.data: Any = None
        self._shown, self._changed_ns = None, 0  # the newest data that a window saw, and since when they are the same

    def jump(self, t_ns: int) -> None:
        """The robot's clock went back to `t_ns`: what came before has no time any more. A command is still in force."""
        waiting = [*self._not_yet, *(self.pending.popleft() for _ in range(len(self.pending)))]
        data = waiting[-1].data if waiting else self.data
        self.clear()
        self._not_yet = [] if self.spec.latched else [s for s in waiting if s.arrival_ns <= t_ns]
        if self.spec.latched and data is not None:
            self.newest_ns = self.arrival_ns = t_ns
            self.data = data

    def view(self, t_ns: int, reset: bool) -> View:
        if reset:  # its rate is not measured across that
            self.recent.clear()
            self._anew = True
        self._admit_until(t_ns)
        if self.newest_ns is None:
            return UNSEEN._replace(dt_s=self.period_s, reset=reset)
        age_ns, frozen_s = t_ns - self.newest_ns, self._frozen_s() if self.frozen_ns else 0.0
        present = self.spec.latched or (age_ns <= self.max_age_ns and not frozen_s)
        fresh = present and (reset or self.newest_ns != self.stepped_ns)  # state that starts anew must see it again
        dt_s = self.period_s
        if fresh:
            reset |= self._anew or self.spec.latched  # a new command replaces the one before, it adds nothing to it
            if self.stepped_ns is not None and not reset:
                dt_ns = self.newest_ns - self.stepped_ns
                if reset := dt_ns > self.max_gap_ns:
                    self.recent.clear()  # nor is it across this
                else:
                    dt_s = dt_ns / NS
            self.stepped_ns, self._anew = self.newest_ns, False
            latency_ns = self.arrival_ns - self.newest_ns + (self.drift.behind_ns if self.undrifts else 0)
            if latency_ns < self.drift.least_ns or t_ns >= self.drift.until_ns:
                self.drift.see(t_ns, latency_ns)
        data, valid = self._window()
        silent_s = (t_ns - self.arrival_ns) / NS
        return View(
            data, valid, self.newest_ns, age_ns / NS, silent_s, present, fresh, dt_s, reset, frozen_s, self.heard
        )

    def _frozen_s(self) -> float:
        """For how long the data that windows saw have been the same, if longer than a living sensor's can be."""
        newest_ns = self.newest_ns or 0
        if self._shown is None or (self.data is not self._shown and not same(self.data, self._shown)):
            self._shown, self._changed_ns = self.data, newest_ns
        same_ns = newest_ns - self._changed_ns
        return same_ns / NS if same_ns >= self.frozen_ns else 0.0

    def _admit_until(self, t_ns: int) -> None:
        take = self.pending.popleft
        waiting = self._not_yet + [take() for _ in range(len(self.pending))]
        waiting.sort(key=_arrival)  # threads may have pushed out of turn
        self._not_yet = []
        for i, sample in enumerate(waiting):
            if sample.arrival_ns > t_ns:
                self._not_yet = waiting[i:][-(self.pending.maxlen or 0) :]
                break
            self._admit(sample)

    def _admit(self, sample: Sample) -> None:
        if self.offset_ns:
            self._mend(sample)
        stamp_ns, arrival_ns = self._stamp_ns(sample), sample.arrival_ns
        if stamp_ns - arrival_ns > self.tolerance_ns:
            return self._refuse("future", sample, stamp_ns - arrival_ns)
        if self.newest_ns is None or stamp_ns > self.newest_ns:
            self._take(stamp_ns, sample.data)
            self.recent.append((stamp_ns, arrival_ns))
        elif self.spec.latched and arrival_ns >= self.arrival_ns:
            # Of commands the one that comes last counts: a clock that goes in steps stamps several alike.
            self._take(self.newest_ns + 1, sample.data)
        elif not self._fill_hole(sample):
            why = "duplicate" if stamp_ns == self.newest_ns else "late"
            return self._refuse(why, sample, stamp_ns - arrival_ns)
        if self._skews_ns:
            self._skews_ns.clear()
        self.admitted += 1
        self.arrival_ns = arrival_ns

    def _refuse(self, why: str, sample: Sample, skew_ns: int) -> None:
        """Count it. A sensor's clock that is wrong, but steadily so, is believed after a while: otherwise one wrong
        clock would silence the stream for good. Samples that are merely late say nothing about a clock."""
        self.counts[why] += 1
        self.misplaced += 1
        self.refusal = f"{why}: stamp {skew_ns / 1e6:+.0f} ms from its arrival" + (
            f", allowed {self.tolerance_ns / 1e6:+.0f} ms" if why == "future" else ", not newer than the one before"
        )
        if why != "future" and -skew_ns <= self.max_gap_ns:
            return
        if self._skews_ns and abs(skew_ns - self._skews_ns[0]) > self.tolerance_ns:
            self._skews_ns.clear()
        self._skews_ns.append(skew_ns)
        if len(self._skews_ns) >= self.reanchor_after:
            self._set_clock(self.offset_ns + max(self._skews_ns))

    def _mend(self, sample: Sample) -> None:
        """Its clock may be right again, or less wrong than the offset makes it."""
        skew_ns = self._stamp_ns(sample) - sample.arrival_ns
        right = abs(skew_ns + self.offset_ns) < min(abs(skew_ns), self.max_gap_ns)
        self._right_again = self._right_again + 1 if right else 0
        if self._right_again >= self.reanchor_after:
            self._set_clock(0)

    def _set_clock(self, offset_ns: int) -> None:
        self.offset_ns = 0 if abs(offset_ns) <= self.tolerance_ns else offset_ns
        self.counts["reanchored"] += 1
        self.clear()
        self._anew = True

    def _stamp_ns(self, sample: Sample) -> int:
        """By the robot's clock."""
        return sample.stamp_ns - self.offset_ns

    def _fill_hole(self, sample: Sample) -> bool:
        """Put an old sample where it is missed; False if it is not."""
        return False

    def _take(self, stamp_ns: int, data: Any) -> None:
        self.newest_ns, self.data = stamp_ns, data

    def _window(self) -> tuple[Any, np.ndarray | None]:
        return self.data, None


class _Rows(Stream):
    """imu: the last rows, newest last, right-aligned in a fixed shape."""

    def clear(self) -> None:
        super().clear()
        n = self.spec.shape[0]
        self._rows: deque[bytes] = deque(maxlen=n)  # numpy takes three times as long to join them
        self._stamps_ns: deque[int] = deque(maxlen=n)
        self._blank = bytes(24 * n)
        self._valid = np.arange(n) >= n - np.arange(n + 1)[:, None]  # by how many rows there are
        self._valid.setflags(write=False)
        self._window_ns = round(self.spec.window_ms * 1e6)

    def _take(self, stamp_ns: int, data: np.ndarray) -> None:
        self.newest_ns, self.data = stamp_ns, data
        self._rows.append(data.tobytes())
        self._stamps_ns.append(stamp_ns)

    def _frozen_s(self) -> float:
        """Readings are few and coarse: only where all that the window holds are the same, that is no coincidence."""
        rows = self._rows
        if len(rows) < 2 or rows[0] != rows[-1] or len(set(rows)) > 1:
            return 0.0
        same_ns = self._stamps_ns[-1] - self._stamps_ns[0]
        return same_ns / NS if same_ns >= self.frozen_ns else 0.0

    def _window(self) -> tuple[np.ndarray, np.ndarray]:
        rows, stamps_ns, n = self._rows, self._stamps_ns, self.spec.shape[0]
        since_ns = self.newest_ns - self._window_ns  # type: ignore[operator]
        while stamps_ns[0] <= since_ns:  # the newest stays
            stamps_ns.popleft()
            rows.popleft()
        held = self._blank[24 * len(rows) :] + b"".join(rows)
        return np.ndarray((n, 6), np.float32, held), self._valid[len(rows)]


class _Sound(Stream):
    """audio: the last samples, newest last. Chunks that never came leave silence marked invalid."""

    undrifts = True  # a microphone's stamps often come from counting its samples

    def clear(self) -> None:
        super().clear()
        n = round(self.spec.window_ms * self.spec.sample_rate_hz / 1e3)
        # The last n samples before `_at` are the window. Longer than that, so that samples seldom have to move.
        # What windows have shown never changes: what is full is left to them.
        self._n = self._at = n
        self._samples, self._valid = self._room(np.zeros((n, self.spec.channels), np.int16), np.zeros(n, bool))
        self._end: int | None = None  # number of the sample after the newest, which is at `_at`
        self._chunk = 0  # samples of the newest chunk

    def _stamp_ns(self, sample: Sample) -> int:
        """The end of the chunk: a chunk is as new as its last sample. By the robot's clock, as far as a microphone's
        own, which counts its samples, is known to run away from it. A chunk that goes on where the last one ended is
        newer, whatever small step such a correction makes."""
        data = sample.data
        length_ns = len(data.samples) * NS // data.sample_rate_hz
        stamp_ns = sample.stamp_ns + length_ns + self.drift.behind_ns - self.offset_ns
        newest_ns = self.newest_ns or 0
        if data.first_sample == self._end and newest_ns - length_ns < stamp_ns <= newest_ns:
            return newest_ns + 1
        return stamp_ns

    def _fill_hole(self, sample: Sample) -> bool:
        if self._end is None:
            return False
        first = self._at + sample.data.first_sample - self._end
        last = first + len(sample.data.samples)
        if first < self._at - self._n or last > self._at or self._valid[first:last].any():
            return False
        self._samples, self._valid = self._samples.copy(), self._valid.copy()
        self._samples[first:last], self._valid[first:last] = self._mixed(sample.data), True
        return True

    def _take(self, stamp_ns: int, data: Audio) -> None:
        gap = 0 if self._end is None else data.first_sample - self._end
        if gap:
            self.counts["gap" if gap > 0 else "overlap"] += 1
        samples = self._mixed(data)
        if -len(samples) < gap < 0:  # its begin was heard already
            samples = samples[-gap:]
        elif not 0 <= gap <= self._n:  # a new microphone, or a hole longer than the window
            self._miss(self._n)
            if gap < 0:
                self.misplaced += 1
                self.refusal = (
                    f"sample {data.first_sample} came after {self._end}: a new microphone, or it does not count"
                )
        elif gap:
            self._miss(gap)
        self._append(samples[-self._n :])
        self.newest_ns, self._end = stamp_ns, data.first_sample + len(data.samples)
        if len(data.samples) != self._chunk:
            self._chunk, self.rate_hz = len(data.samples), data.sample_rate_hz / len(data.samples)
            self.recent.clear()
        self.data = data

    def _mixed(self, data: Audio) -> np.ndarray:
        """Its samples; to one ear the mean of all microphones."""
        if self.spec.channels == 1 < data.samples.shape[1]:
            return np.rint(data.samples.mean(1, keepdims=True)).astype(np.int16)
        return data.samples

    def _room(self, samples: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """These, and room for three times as many to come, which are valid unless they are missed."""
        more = 3 * self._n
        return np.pad(samples, ((0, more), (0, 0))), np.pad(valid, (0, more), constant_values=True)

    def _miss(self, n: int) -> None:
        self._append(np.zeros((n, self.spec.channels), np.int16))
        self._valid[self._at - n : self._at] = False

    def _append(self, samples: np.ndarray) -> None:
        to = self._at + len(samples)
        if to > len(self._valid):
            self._samples, self._valid = self._room(*self._window())
            self._at, to = self._n, self._n + len(samples)
        self._samples[self._at : to] = samples
        self._at = to
        self.heard += len(samples)

    def _window(self) -> tuple[np.ndarray, np.ndarray]:
        last = slice(self._at - self._n, self._at)
        return self._samples[last], self._valid[last]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, also where it is NaN; and at little cost where it is not, as it nearly always is. A scan that meets
    nothing is as good as another."""
    if isinstance(a, tuple):  # a Scan, an Audio
        a, b = a[0], b[0]
    if isinstance(a, str):
        return a == b
    if a.shape != b.shape:
        return False
    if a.dtype.kind == "f":
        return a.tobytes() == b.tobytes() and bool(np.isfinite(a).any())
    if a.nbytes <= 4096:
        return a.tobytes() == b.tobytes()
    row = a.size // len(a)
    middle = len(a) // 2 * row + row // 2  # the edges of many a picture never change
    return a.item(middle) == b.item(middle) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b))


_arrival = itemgetter(2)  # of a Sample: arrival_ns


_STREAMS: dict[str, type[Stream]] = {"imu": _Rows, "audio": _Sound}
