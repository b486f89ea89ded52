"""The watchdog between a model and what moves the robot: forward an action or stop, never repeat one.

    watchdog = Watchdog(Limits(("linear_x", "angular_z"), min=(-0.2, -1.8), max=(0.6, 1.8), max_rate=(2.5, 10.0)))
    command = watchdog.on_action(source, stamp_ns, values, now_steady_ns, now_ros_ns)  # None: nothing to send
    if watchdog.check(now_steady_ns):                                                  # True: the robot must stand
        ...
    if watchdog.told("stop"):                                                          # True: the robot must stand
        ...

A base stands when it is sent zeros, `watchdog.stop`. Joints that are moved by position stand when they are sent
nothing: a controller holds the last position that it reached. Of them the watchdog must hear where they are, `at`: a
joint that does not follow is not sent further and further away, so that it does not jump once it is let go.

It reads no clock. Deadlines run on the steady clock, since a robot's ROS clock may jump, or stand still.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping

import numpy as np

from mm_edge.preprocess import words_of
from mm_edge.safety import Limits, limit
from mm_edge.types import NS

STOP_WORDS = frozenset(("stop", "halt"))


def is_stop(text: str) -> bool:
    """Whether it consists of STOP_WORDS."""
    words = words_of(text)
    return bool(words) and STOP_WORDS.issuperset(words)


class Watchdog:
    """Starts stopped. A stop for silence ends by itself after `clear_after` valid actions in a row; a fault (an action
    that is not finite or from the future, two sources at the same time, `fault`) stays until `reset`; a stop that was
    told stays until something else is.

    Who a source is, the caller says. It must judge by who sends: discovery lists a dead publisher for a while.

    Args:
        limits: the robot's, of (linear_x m/s, angular_z rad/s) or of the positions of joints; what goes beyond is
            limited, also after a stop, of which whoever sends may know nothing.
        deadline_ms: longest time between actions, and greatest age of one.
        clear_after: valid actions in a row, none later than the deadline, before the first is forwarded.
        future_tolerance_ms: how far a stamp may lie ahead of the ROS clock; beyond the deadline, too, it is a fault.

    Attributes: reason, why the robot stands, None while actions pass; latched; counts of `forwarded` and `refused`;
        limited, what the limits changed in the action that was forwarded last; stop, the command to stand, None if that
        is silence; within_s, the time in which a position is to be reached that was forwarded last, so that no joint
        moves faster than its limit.
    """

    def __init__(
        self,
        limits: Limits,
        deadline_ms: float = 150.0,
        clear_after: int = 3,
        future_tolerance_ms: float = 50.0,
    ):
        self._limits, self._by_position = limits, limits.interface == "position"
        self._low, self._high, self._rate = (np.array(each) for each in (limits.min, limits.max, limits.max_rate))
        self.stop = None if self._by_position else np.zeros(len(limits.names))
        if self.stop is not None:
            self.stop.flags.writeable = False
        self.within_s = 0.0
        self._deadline_ns = round(deadline_ms * 1e6)
        self._future_ns = round(future_tolerance_ms * 1e6)
        self._clear_after = clear_after
        self.counts: Counter[str] = Counter()
        self._told = ""  # to stop, in these words
        self._leash = self._rate * deadline_ms / 1e3
        self.reset()

    def reset(self) -> None:
        """Forget faults and sources, but not what was told; stopped until `clear_after` valid actions came."""
        self.reason: str | None = "no action yet"
        self.latched = False
        self._source: Hashable = None
        self._heard_ns = self._valid_ns = self._woke_ns = -self._deadline_ns
        self._looked_ns: float = math.inf  # it cannot have slept before it first looked
        self._valid = self._stamp_ns = self._ros_ns = 0
        self.limited: tuple[str, ...] = ()
        self._why = ""  # the last action was of no use, if it was not
        n = len(self._limits.names)
        self._at, self._said_ns = np.zeros(n), np.full(n, -self._deadline_ns)  # where each joint said it is, and when
        self._at_ns = self._said_ns.copy()  # when that was certain
        self._sent, self._sent_ns = np.zeros(n), -self._deadline_ns  # what was forwarded last, and when

    def on_action(
        self, source: Hashable, stamp_ns: int, values: np.ndarray, now_steady_ns: int, now_ros_ns: int
    ) -> np.ndarray | None:
        """What to send now: the action, `stop` if this action is a fault, or None while refusing.

        Args:
            source: who sent it.
            stamp_ns: when it was sent, on the ROS clock.
            values: (A,), as the limits.
        """
        self._look(now_steady_ns)
        fault = self._fault(source, stamp_ns, values, now_steady_ns, now_ros_ns)
        same, self._source, self._heard_ns = source == self._source, source, now_steady_ns
        self._stop_if_silent(now_steady_ns)
        if self.latched or fault:
            return self.fault(fault or "")
        useless = self._useless(stamp_ns, now_steady_ns, now_ros_ns)
        if self._told:
            useless = self.reason = f"told to {self._told}"
        self._why = useless or ""
        if useless:
            self.counts["refused"] += 1
            self._valid = 0
            if self.reason:
                self.reason = useless
            return None
        in_row = same and now_steady_ns - self._valid_ns < self._deadline_ns
        self._valid, self._valid_ns = self._valid + 1 if in_row else 1, now_steady_ns
        if self.reason and self._valid < self._clear_after:
            self.counts["refused"] += 1
            self.reason = f"{self._valid} valid actions of {self._clear_after} before driving on"
            return None
        if self.reason:
            self.reason, self._sent = None, self._at.copy()  # zeros, of what is moved by velocity
        dt_s = min(now_steady_ns - self._sent_ns, self._deadline_ns) / NS
        allowed, self.limited = limit(values.tolist(), self._sent.tolist(), dt_s, self._limits)
        assert allowed is not None, "a fault was looked for before"
        command = np.array(allowed)
        if self._by_position:
            # Not further ahead of a joint than it is already, or may go in a deadline: what sags is not let down.
            room = np.maximum(self._leash, np.abs(self._sent - self._at))
            command = np.clip(command, self._at - room, self._at + room)
            # It may have gone on since it said where it is, and the other way.
            way_s = np.abs(command - self._at) / self._rate + (now_steady_ns - self._at_ns) / NS
            self.within_s = max(1e-3, dt_s, float(way_s.max()))
        self._sent, self._sent_ns = command, now_steady_ns
        self.counts["forwarded"] += 1
        return command.copy()

    def fault(self, why: str) -> np.ndarray | None:
        """Stop until `reset`: an action was refused that no sane model sends. Returns `stop`."""
        self.counts["refused"] += 1
        if not self.latched:
            self.latched, self.reason = True, why
        return self.stop

    def at(self, positions: Mapping[str, float], now_steady_ns: int) -> None:
        """Where joints are, as they say themselves: all of them, or some, others among them or not. One that is
        suddenly elsewhere has two drivers, or one that begins; where it is then is certain once that is said twice."""
        for i, name in enumerate(self._limits.names):
            if math.isfinite(position := positions.get(name, math.nan)):
                reach = self._leash[i] + self._rate[i] * (now_steady_ns - self._said_ns[i]) / NS
                certain = abs(position - self._at[i]) <= reach
                self._at_ns[i] = now_steady_ns if certain else -self._deadline_ns
                self._at[i], self._said_ns[i] = position, now_steady_ns

    def told(self, text: str) -> bool:
        """A command that the model gets, too: must the robot stand because of it? If it consists of STOP_WORDS,
        whatever the model makes of it, and until another command."""
        words = words_of(text)
        if words:  # nothing is no command
            self._told = " ".join(words) if is_stop(text) else ""
        if self._told:
            self._valid = 0
            self.reason = self.reason if self.latched else f"told to {self._told}"
        return bool(self._told)

    def check(self, now_steady_ns: int) -> bool:
        """Must the robot stand? Call it when the deadline may have passed, and at least that often."""
        self._look(now_steady_ns)
        self._stop_if_silent(now_steady_ns)
        return self.reason is not None

    def _look(self, now_steady_ns: int) -> None:
        """It tells by a pause of its own, longer than any between two checks, that it was starved."""
        if now_steady_ns - self._looked_ns >= 2 * self._deadline_ns:
            self._woke_ns = now_steady_ns
        self._looked_ns = now_steady_ns

    def _stop_if_silent(self, now_steady_ns: int) -> None:
        silent_ns = now_steady_ns - self._valid_ns
        if self.reason is None and silent_ns >= self._deadline_ns:
            self.reason = f"no valid action for {silent_ns / 1e6:.0f} ms, {self._deadline_ns / 1e6:.0f} ms allowed"
            self.reason += f": {self._why}" if self._why else ""

    def _useless(self, stamp_ns: int, now_steady_ns: int, now_ros_ns: int) -> str | None:
        """Why an action that is no fault must not be forwarded either."""
        if stamp_ns - now_ros_ns > self._future_ns:  # it may have heard earlier of a step of the simulator's clock
            return f"the last action was stamped {(stamp_ns - now_ros_ns) / 1e6:.0f} ms in the future"
        went_back, self._ros_ns = now_ros_ns < self._ros_ns, now_ros_ns
        again = stamp_ns <= self._stamp_ns and not went_back
        self._stamp_ns = max(stamp_ns, 0 if went_back else self._stamp_ns)
        age_ms, allowed_ms = (now_ros_ns - stamp_ns) / 1e6, self._deadline_ns / 1e6
        if age_ms >= allowed_ms:
            return f"the last action was {age_ms:.0f} ms old, {allowed_ms:.0f} ms allowed"
        if again:  # whoever decides by a clock that stands still decides on what it saw long ago
            return "an action with a stamp not newer than the last: does the ROS clock stand still?"
        return self._adrift(now_steady_ns) if self._by_position else None

    def _adrift(self, now_steady_ns: int) -> str | None:
        """Why joints must not be moved from where they are. Out of range by a little, they are led back; by more than
        that, the limits are more likely wrong than the arm."""
        silent = now_steady_ns - self._at_ns >= self._deadline_ns
        if silent.any():
            names = ", ".join(name for name, is_silent in zip(self._limits.names, silent) if is_silent)
            return f"joint_states is silent, or contradicts itself, about {names}"
        out = (self._at < self._low - self._leash) | (self._at > self._high + self._leash)
        for name, is_out, at, low, high in zip(self._limits.names, out, self._at, self._low, self._high):
            if is_out:
                return f"{name} is at {at:.3g}, its limits are {low:g} to {high:g}: in its unit, in the same order?"
        return None

    def _fault(
        self, source: Hashable, stamp_ns: int, values: np.ndarray, now_steady_ns: int, now_ros_ns: int
    ) -> str | None:
        # Starved itself, it then hears at once what was sent one after the other; two that go on, it latches on later.
        awake_ns = now_steady_ns - self._woke_ns
        if self._source not in (None, source) and now_steady_ns - self._heard_ns < self._deadline_ns <= awake_ns:
            return f"two sources at the same time: {self._source} and {source}"
        if not np.isfinite(values).all():
            return f"action not finite: {values} from {source}"
        if self._by_position:
            span = self._high - self._low
            for name, wanted, low, high in zip(self._limits.names, values, self._low - span, self._high + span):
                if not low <= wanted <= high:
                    return f"{name} is to go to {wanted:.3g}, far out of its limits: in its unit? From {source}"
        if stamp_ns - now_ros_ns > max(self._future_ns, self._deadline_ns):
            return f"action of {source} stamped {(stamp_ns - now_ros_ns) / 1e6:.0f} ms in the future"
        return None
