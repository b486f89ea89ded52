"""The last word on an action: finite, in range, and changing no faster than the robot may. Braking is never slowed.

All comparisons are written so that an action that is NaN fails them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mm_edge.errors import EdgeError


@dataclass(frozen=True)
class Limits:
    """For each dimension of an action its range and its largest change a second. `interface`, as ros2_control calls it,
    is what a value is: a "velocity", whose range holds 0 (standing still), or the "position" of a joint."""

    names: tuple[str, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    max_rate: tuple[float, ...]
    interface: str = "velocity"

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.min) == len(self.max) == len(self.max_rate):
            raise EdgeError(f"limits: expected a min, max and max_rate for each of {self.names}, got {self}")
        by_position = self.interface == "position"
        order = "min <= max" if by_position else "min <= 0 <= max"
        for name, low, high, rate in zip(self.names, self.min, self.max, self.max_rate):
            if not ((low <= high if by_position else low <= 0 <= high) and rate > 0):
                raise EdgeError(f"limits of {name}: expected {order}, max_rate > 0, got {low}, {high}, {rate}")

    def narrowed(self, other: Limits) -> Limits:
        """The stricter of both, whichever way round. Raises EdgeError unless both name the same dimensions, or if of
        positions no range is left."""
        if (self.names, self.interface) != (other.names, other.interface):
            raise EdgeError(
                f"limits: expected each {self.interface} of {self.names}, got each {other.interface} of {other.names}"
            )
        return Limits(
            self.names,
            tuple(map(max, self.min, other.min)),
            tuple(map(min, self.max, other.max)),
            tuple(map(min, self.max_rate, other.max_rate)),
            self.interface,
        )


def limit(
    values: Sequence[float], previous: Sequence[float], dt_s: float, limits: Limits
) -> tuple[list[float] | None, tuple[str, ...]]:
    """The action, A values, that may be done `dt_s` after `previous`, and notes on what was limited. A position that is
    out of range is led back into it at the rate.

    None, with the reason as the note, if a value is not finite.
    """
    allowed, notes, by_position = [], [], limits.interface == "position"
    for name, wanted, was, low, high, rate in zip(
        limits.names, values, previous, limits.min, limits.max, limits.max_rate
    ):
        if not math.isfinite(wanted):
            return None, (f"non-finite action: {name} is {wanted}",)
        reach = rate * max(0.0, dt_s)
        if by_position:
            value = max(was - reach, min(was + reach, max(low, min(high, wanted))))
        else:  # toward 0 as far as it likes, and from wherever it stands further from 0 only at the rate
            reach += abs(was) if wanted * was > 0 else 0.0
            value = max(low, -reach, min(high, reach, wanted))
        if value != wanted:
            notes.append(f"{name} {wanted:.3g} limited to {value:.3g}")
        allowed.append(value)
    return allowed, tuple(notes)
