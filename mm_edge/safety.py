"""The last word on an action: it is finite, in range, and grows no faster than the robot may. Braking is never slowed.

All comparisons are written so that NaN fails them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mm_edge.errors import EdgeError


@dataclass(frozen=True)
class Limits:
    """For each dimension of an action its range, which holds 0 (standing still), and its largest change a second."""

    names: tuple[str, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    max_rate: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.min) == len(self.max) == len(self.max_rate):
            raise EdgeError(f"limits: expected a min, max and max_rate for each of {self.names}, got {self}")
        for name, low, high, rate in zip(self.names, self.min, self.max, self.max_rate):
            if not (low <= 0 <= high and rate > 0):
                raise EdgeError(f"limits of {name}: expected min <= 0 <= max, max_rate > 0, got {low}, {high}, {rate}")

    def narrowed(self, other: Limits) -> Limits:
        """The stricter of both, whichever way round. Raises EdgeError unless both name the same dimensions."""
        if self.names != other.names:
            raise EdgeError(f"limits: expected {self.names}, got {other.names}")
        return Limits(
            self.names,
            tuple(map(max, self.min, other.min)),
            tuple(map(min, self.max, other.max)),
            tuple(map(min, self.max_rate, other.max_rate)),
        )


def limit(
    values: Sequence[float], previous: Sequence[float], dt_s: float, limits: Limits
) -> tuple[list[float] | None, tuple[str, ...]]:
    """The action, A values, that may be done `dt_s` after `previous`, and notes on what was limited.

    None, with the reason as the note, if a value is not finite.
    """
    allowed, notes = [], []
    for name, wanted, was, low, high, rate in zip(
        limits.names, values, previous, limits.min, limits.max, limits.max_rate
    ):
        if not math.isfinite(wanted):
            return None, (f"non-finite action: {name} is {wanted}",)
        # A step may go toward 0 as far as it likes, and from wherever it stands further from 0 only at the rate.
        reach = rate * max(0.0, dt_s) + (abs(was) if wanted * was > 0 else 0.0)
        value = max(low, -reach, min(high, reach, wanted))
        if value != wanted:
            notes.append(f"{name} {wanted:.3g} limited to {value:.3g}")
        allowed.append(value)
    return allowed, tuple(notes)
