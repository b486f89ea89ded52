"""The closed loop: a world, its sensors, and whatever drives. Demo, demonstrations and evaluation all run this.

A driver is anything with `push(sample)`, `due(now_ns)` and `tick(now_ns)` returning (v, w) or None (keep still):
see `ExpertDriver` here and `PipelineDriver` below.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mm_edge.align import TickRule
from mm_edge.faults import Fault, Faults
from mm_edge.sim.expert import Expert
from mm_edge.sim.rooms import COLOURS, SHAPES
from mm_edge.sim.sensors import HEIGHT, KINDS, WIDTH, Sensors
from mm_edge.sim.world import World
from mm_edge.types import Output, Sample

ANCHOR, MAX_PERIOD_MS = "camera", 100.0
COMPUTE_MS = (5.0, 20.0)  # from a tick to its command on the wheels
GRID = (12, 16)  # cells of the camera's labels
FILLED_SHARE = 0.3  # of a cell's pixels, for it to be an object's


@dataclass
class Outcome:
    """How an episode ended. `alarm_obeyed` is None if no alarm could be judged."""

    seed: int
    text: str
    task: str  # "named" or "sound"
    status: str  # "success", "wrong" or "timeout"
    duration_s: float
    collisions: int
    alarm_obeyed: bool | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Driver(Protocol):
    def push(self, sample: Sample) -> Any: ...
    def due(self, now_ns: int) -> bool: ...
    def tick(self, now_ns: int) -> np.ndarray | tuple[float, float] | None: ...


class Episode:
    """One seed's world with its sensors.

    run(driver) drives it to the end. `on_sample(sample)`, `on_tick(now_ns)` and, once the wheels are told,
    `on_drive(now_ns, action)` watch, in the order of time. `faults` happen to its sensors; their times count from the
    episode's begin, `start_ns`.
    """

    def __init__(self, seed: int, faults: Sequence[Fault] = ()):
        self.world = World(seed)
        self.sensors = Sensors(self.world)
        self.start_ns = self.world.now_ns
        self._faults = Faults(faults, KINDS, seed, self.start_ns)
        self._rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
        self._on_the_way: list[tuple[int, int, Sample]] = []
        self._captured = 0

    def step(self) -> list[Sample]:
        """Advance 5 ms; the samples that have arrived by then, in order of arrival."""
        self.world.step()
        for captured in self.sensors.capture():
            for sample in self._faults(captured):
                self._captured += 1
                heapq.heappush(self._on_the_way, (sample.arrival_ns, self._captured, sample))
        arrived = []
        while self._on_the_way and self._on_the_way[0][0] <= self.world.now_ns:
            arrived.append(heapq.heappop(self._on_the_way)[2])
        return arrived

    def run(
        self,
        driver: Driver,
        on_sample: Callable[[Sample], Any] = lambda sample: None,
        on_tick: Callable[[int], Any] = lambda now_ns: None,
        on_drive: Callable[[int, Any], Any] = lambda now_ns, action: None,
    ) -> Outcome:
        commands: list[tuple[int, Any]] = []
        while (status := self.world.status()) is None:
            for now_ns, sample in [*((s.arrival_ns, s) for s in self.step()), (self.world.now_ns, None)]:
                if sample is not None:
                    on_sample(sample)
                    driver.push(sample)
                if driver.due(now_ns):
                    action = driver.tick(now_ns)
                    on_tick(now_ns)
                    commands.append((now_ns + round(self._rng.uniform(*COMPUTE_MS) * 1e6), action))
            while commands and commands[0][0] <= self.world.now_ns:
                action = commands.pop(0)[1]
                action = (0.0, 0.0) if action is None else action
                self.world.drive(*action)
                on_drive(self.world.now_ns, action)
        return self.outcome(status)

    def outcome(self, status: str) -> Outcome:
        world = self.world
        return Outcome(
            seed=world.seed,
            text=world.room.text,
            task="sound" if world.room.by_sound else "named",
            status=status,
            duration_s=world.t_s,
            collisions=world.collisions,
            alarm_obeyed=world.alarm.obeyed if world.alarm else None,
        )

    def labels(self, stamp_ns: int) -> dict[str, Any]:
        """What only the simulator knows, now: training's auxiliary targets. `stamp_ns` is that of the newest camera
        frame the robot has, over which GRID lies: `cells` are [cell, share of the target's pixels], `objects` are
        [cell, colour, shape], as indices, of the cells of which an object fills the most."""
        world = self.world
        distance, bearing = world.bearing(world.room.target)
        beacon = (None, None) if world.room.beacon is None else world.bearing(world.room.beacon)
        cells: list[list[float]] = []
        objects: list[list[int]] = []
        pixels = 0
        if stamp_ns in self.sensors.seen:
            counts = _count_in_cells(self.sensors.seen[stamp_ns], len(world.room.objects))
            target, most = counts[world.room.target], counts.argmax(0)
            pixels = int(target.sum())
            cells = [[int(i), round(float(target[i]) / pixels, 4)] for i in np.flatnonzero(target)]
            for i in np.flatnonzero(counts.max(0) >= FILLED_SHARE * HEIGHT * WIDTH / (GRID[0] * GRID[1])):
                thing = world.room.objects[most[i]]
                objects.append([int(i), list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)])
        return {
            "distance_m": round(distance, 4),
            "bearing_rad": round(bearing, 4),
            "beacon_m": beacon[0] and round(beacon[0], 4),
            "beacon_rad": beacon[1] and round(beacon[1], 4),
            "alarm": world.alarm_on(),
            "by_sound": world.room.by_sound,
            "pixels": pixels,
            "cells": cells,
            "objects": objects,
        }


def _count_in_cells(seen: np.ndarray, objects: int) -> np.ndarray:
    """int (objects, cells): how many pixels of each cell of GRID show which object."""
    rows, cols = GRID
    shows = seen == np.arange(objects, dtype=np.int8)[:, None, None]
    return shows.reshape(objects, rows, HEIGHT // rows, cols, WIDTH // cols).sum((2, 4)).reshape(objects, -1)


class ExpertDriver:
    """The expert, now and then shaken by a burst of random driving: what to do is still what the expert says, so that
    a student learns the way back too.

    Attributes: wanted, the expert's last action; camera_ns, the stamp of the newest frame that arrived.
    """

    def __init__(self, episode: Episode, burst_probability: float = 0.0):
        self.expert = Expert(episode.world)
        self._rule = TickRule(ANCHOR, MAX_PERIOD_MS)
        self._rng = np.random.default_rng(np.random.SeedSequence([episode.world.seed, 3]))
        self._bursts = self._burst(burst_probability)
        self.wanted = np.zeros(2)
        self.camera_ns = 0

    def push(self, sample: Sample) -> None:
        self._rule.pushed(sample)
        if sample.stream == ANCHOR:
            self.camera_ns = max(self.camera_ns, sample.stamp_ns)

    def due(self, now_ns: int) -> bool:
        return self._rule.due(now_ns)

    def tick(self, now_ns: int) -> np.ndarray:
        self._rule.ticked(now_ns)
        self.wanted = self.expert.action()
        burst = next(self._bursts)
        return self.wanted if burst is None or self.expert.world.alarm_on() else burst

    def _burst(self, probability: float) -> Iterator[np.ndarray | None]:
        while True:
            if self._rng.random() < probability:
                action = np.array([self._rng.uniform(0, 0.45), self._rng.uniform(-1.3, 1.3)])
                for _ in range(self._rng.integers(6, 16)):
                    yield action
            yield None


class PipelineDriver:
    """A `Pipeline` at the wheel. `outputs` receives every Output if given."""

    def __init__(
        self, pipeline: Any, dead: frozenset[str] = frozenset(), outputs: Callable[[Output], Any] | None = None
    ):
        self.pipeline, self._dead, self._outputs = pipeline, dead, outputs

    def push(self, sample: Sample) -> None:
        if sample.stream not in self._dead:
            self.pipeline.push(sample)

    def due(self, now_ns: int) -> bool:
        return self.pipeline.due(now_ns)

    def tick(self, now_ns: int) -> tuple[float, float] | None:
        output = self.pipeline.tick(now_ns)
        if self._outputs:
            self._outputs(output)
        if output.action is None:
            return None
        v, w = output.action.values[0]
        return float(v), float(w)
