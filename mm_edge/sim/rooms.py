"""Random rooms and tasks: what stands where, and what the robot is told. Pure numpy; one seed, one room."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.10, 0.70),
    "orange": (1.00, 0.50, 0.05),
}
SHAPES = ("ball", "box", "pillar")
OBJECT_RADIUS_M = {"ball": 0.24, "box": 0.22, "pillar": 0.15}
REACH_M = 0.55  # an episode ends when the robot's centre is this near to any object's centre

NAMED = ("go to the {}", "drive to the {}", "move to the {}", "find the {}", "approach the {}", "head for the {}",
         "please go to the {}", "robot drive to the {} now")  # fmt: skip
SOUNDING = ("go to the beeping object", "drive to the object that beeps", "find the sound", "move to the sound",
            "head for the beeping object", "follow the sound", "please find the beeping object")  # fmt: skip
SYNONYMS = {"ball": ("ball", "sphere"), "box": ("box", "cube"), "pillar": ("pillar", "column")}


@dataclass(frozen=True)
class Thing:
    """An object to go to (colour and shape set) or an obstacle. Metres; `height` is the full height."""

    x: float
    y: float
    radius: float
    height: float
    shape: str  # ball, box, pillar
    rgb: tuple[float, float, float]
    colour: str = ""  # empty for obstacles
    yaw: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Room:
    """A room and the task in it. `alarm_s` and `shoves` are in seconds from the start of the episode."""

    half: tuple[float, float]
    objects: tuple[Thing, ...]
    obstacles: tuple[Thing, ...]
    patches: tuple[tuple[float, float, float], ...]  # slippery discs: x, y, radius
    yaw: float
    floor: float  # brightness
    wall: float
    target: int  # index into objects
    by_sound: bool
    text: str
    beacon: int | None  # the object that beeps
    beacon_hz: float
    alarm_s: tuple[float, float] | None  # onset, end
    shoves: tuple[tuple[float, float, float, float], ...]  # at, force x, force y (N, robot frame), torque (N m)


def vocabulary() -> list[str]:
    """Every word a command can hold."""
    words = {w for phrase in (*NAMED, *SOUNDING) for w in phrase.replace("{}", "").split()}
    words |= set(COLOURS) | {w for names in SYNONYMS.values() for w in names}
    return sorted(words)


def make_room(rng: np.random.Generator) -> Room:
    """Rejection-samples layouts until all things fit and a named target can be seen from the start."""
    by_sound = bool(rng.random() < 0.4)
    while (layout := _layout(rng)) is None or not (by_sound or _in_sight(layout)):
        pass
    half, objects, obstacles = layout
    target = objects[0]
    order = rng.permutation(len(objects))
    objects = [objects[i] for i in order]
    index = objects.index(target)
    if by_sound:
        text = SOUNDING[rng.integers(len(SOUNDING))]
        beacon: int | None = index
    else:
        name = f"{target.colour} {rng.choice(SYNONYMS[target.shape])}"
        text = NAMED[rng.integers(len(NAMED))].format(name)
        beacon = int(rng.integers(len(objects))) if rng.random() < 0.3 else None
    onset = rng.uniform(1.5, 6.0)
    alarm = (float(onset), float(onset + rng.uniform(2.0, 4.0))) if rng.random() < 0.35 else None
    shoves = []
    for at in np.sort(rng.uniform(0.8, 9.0, rng.integers(1, 4))):
        if alarm is None or not alarm[0] - 0.7 < at < alarm[1] + 0.5:  # obedience is judged by the robot's speed
            push, side = rng.uniform(30, 60), rng.uniform(-math.pi, math.pi)
            shoves.append((float(at), push * math.cos(side), push * math.sin(side), float(rng.uniform(-3, 3))))
    patches = [(*rng.uniform(-0.8, 0.8, 2) * half, rng.uniform(0.4, 0.8)) for _ in range(rng.integers(1, 4))]
    return Room(
        half=half, objects=tuple(objects), obstacles=tuple(obstacles),
        patches=tuple((float(x), float(y), float(r)) for x, y, r in patches),
        yaw=float(rng.uniform(-math.pi, math.pi)),
        floor=float(rng.uniform(0.25, 0.5)), wall=float(rng.uniform(0.55, 0.9)),
        target=index, by_sound=by_sound, text=text, beacon=beacon, beacon_hz=float(rng.choice([600.0, 900.0, 1300.0])),
        alarm_s=alarm, shoves=tuple(shoves),
    )  # fmt: skip


def _layout(rng: np.random.Generator) -> tuple[tuple[float, float], list[Thing], list[Thing]] | None:
    """The room's half size, its objects (the target first) and its obstacles; None if they did not fit."""
    half = (float(rng.uniform(2.5, 3.2)), float(rng.uniform(2.5, 3.2)))
    placed: list[tuple[float, float, float]] = [(0.0, 0.0, 0.2)]  # the robot

    def place(radius: float, gap: float, from_start: float) -> tuple[float, float] | None:
        for _ in range(60):
            x, y = rng.uniform(-1, 1, 2) * (np.array(half) - radius - 0.15)
            if math.hypot(x, y) > from_start and all(math.hypot(x - a, y - b) > radius + r + gap for a, b, r in placed):
                placed.append((x, y, radius))
                return float(x), float(y)
        return None

    objects: list[Thing] = []
    for colour, shape in _kinds(rng):
        radius = OBJECT_RADIUS_M[shape]
        if (at := place(radius, 0.75, 1.3 if objects else 2.0)) is None:
            return None
        r, g, b = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.06, 0.06, 3), 0, 1).tolist()
        height = {"ball": 2 * radius, "box": 0.44, "pillar": 0.9}[shape]
        objects.append(Thing(*at, radius, height, shape, (r, g, b), colour, float(rng.uniform(0, math.pi))))
    obstacles = []
    for i in range(rng.integers(10, 14)):
        tall = i < 3
        radius = rng.uniform(0.10, 0.16) if tall else rng.uniform(0.12, 0.26)
        if (at := place(radius, 0.56, 0.6)) is None:
            return None
        grey = rng.uniform(0.25, 0.6)
        rgb = (float(grey), float(grey * rng.uniform(0.85, 1.0)), float(grey * rng.uniform(0.7, 0.95)))
        height = rng.uniform(0.7, 1.2) if tall else rng.uniform(0.16, 0.3)
        shape = "box" if rng.random() < 0.5 else "pillar"
        obstacles.append(Thing(*at, float(radius), float(height), shape, rgb, "", float(rng.uniform(0, math.pi))))
    return half, objects, obstacles


def _kinds(rng: np.random.Generator) -> list[tuple[str, str]]:
    """4 or 5 different (colour, shape), the target first. In half the rooms another shares its colour or shape."""
    colours, shapes = list(COLOURS), list(SHAPES)
    target = (colours[rng.integers(6)], shapes[rng.integers(3)])
    others = [(c, s) for c in colours for s in shapes if c != target[0] and s != target[1]]
    kinds, n = [target], rng.integers(4, 6)
    if rng.random() < 0.5:
        alike = [(target[0], s) for s in shapes if s != target[1]] + [(c, target[1]) for c in colours if c != target[0]]
        share_colour = rng.random() < 0.5
        kinds.append(alike[rng.integers(2)] if share_colour else alike[2 + rng.integers(5)])
    for i in rng.permutation(len(others)):
        if len(kinds) < n:
            kinds.append(others[i])
    return kinds


def _in_sight(layout: tuple[tuple[float, float], list[Thing], list[Thing]]) -> bool:
    """Nothing higher than the camera stands between the start and the target."""
    _, (target, *others), obstacles = layout
    at = np.array([target.x, target.y])
    for thing in (*others, *(o for o in obstacles if o.height > 0.35)):
        along = np.clip(np.dot([thing.x, thing.y], at) / np.dot(at, at), 0, 1)
        if math.hypot(*(along * at - [thing.x, thing.y])) < thing.radius + 0.1:
            return False
    return True
