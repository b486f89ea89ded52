"""Events: what a model's classes say happened, told once, and where its sound came from.

spotter = Spotter(names, bundle.outputs.values.events)
event = spotter.take(stamp_ns, shares)      # on every tick; None unless one begins
angle = bearing_rad(samples, 16000, 0.16)   # of two microphones
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from mm_edge.manifest import EventsSpec
from mm_edge.types import Event

SOUND_MPS = 343.0
PHAT_HZ = (200.0, 6000.0)  # where a bearing is listened for: below, waves are long; above, there is little but noise
FINE = 16  # steps in which a delay is found, to a sample


class Spotter:
    """Tells events from a model's shares of classes, tick by tick.

    An event begins when the mean share of its class over the last ticks is the greatest of all and sure enough. It is
    told once, whatever else is told meanwhile, and again only after it was over: when its mean fell below half of that.

    Args:
        names: the classes. spec: which of them mean that nothing happens, and what is sure enough.
    """

    def __init__(self, names: Sequence[str], spec: EventsSpec):
        self._names, self._spec = tuple(names), spec
        self._quiet = np.array([name in spec.quiet for name in names])
        self.reset()

    def reset(self) -> None:
        self._recent: deque[np.ndarray] = deque(maxlen=self._spec.ticks)
        self._leader, self._since_ns = -1, 0
        self._told = np.zeros(len(self._names), bool)  # and not over since

    def take(self, stamp_ns: int, shares: np.ndarray) -> Event | None:
        """The event that begins with a tick, whose `shares` are float (n,). Its start is when it became the likeliest;
        ticks that have not been yet count as nothing."""
        self._recent.append(shares)
        mean = np.sum(self._recent, 0) / self._spec.ticks
        best = int(mean.argmax())
        if best != self._leader:
            self._leader, self._since_ns = best, stamp_ns
        self._told &= mean >= self._spec.sure / 2
        if self._quiet[best] or mean[best] < self._spec.sure or self._told[best]:
            return None
        self._told[best] = True
        return Event(self._names[best], float(mean[best]), self._since_ns)


def bearing_rad(samples: np.ndarray, sample_rate_hz: int, distance_m: float) -> float | None:
    """Where a sound comes from, left positive, from -pi/2 to pi/2: two microphones cannot tell front from back.

    By the delay between them, found as the peak of their generalised cross-correlation with phase transform (Knapp &
    Carter 1976).

    Args:
        samples: (n, 2), left and right. distance_m: between the microphones.

    None if there is nothing to be heard on both.
    """
    most = max(1, math.ceil(distance_m / SOUND_MPS * sample_rate_hz * FINE))
    n = 1 << max(2 * len(samples), 2 * most // FINE + 2).bit_length()  # fast, and no delay wraps round
    left, right = np.fft.rfft(np.asarray(samples, np.float64), n, axis=0).T
    cross = left * right.conj()
    hz = np.fft.rfftfreq(n, 1 / sample_rate_hz)
    cross[(hz < PHAT_HZ[0]) | (hz > PHAT_HZ[1])] = 0
    size = np.abs(cross)
    if not size.any():
        return None
    cross = np.divide(cross, size, out=np.zeros_like(cross), where=size > 1e-3 * size.mean())
    correlation = np.fft.irfft(cross, FINE * n)
    delays = np.arange(-most, most + 1)  # of the left one, which is later if the sound comes from the right
    delay_s = delays[correlation[delays].argmax()] / (FINE * sample_rate_hz)
    return math.asin(max(-1.0, min(1.0, -delay_s * SOUND_MPS / distance_m)))
