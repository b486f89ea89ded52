"""Pictures of simulated rooms, said in words: five captions of each and questions with answers, all from ground truth.

    scene = make_scene(seed)        # scene.image, scene.captions, scene.questions, scene.things

What counts are the coloured objects that the picture shows; obstacles are grey, boxes and pillars among them, and
nobody speaks of them. Left and right are the picture's; what is near is nearer than NEAR_M.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mujoco
import numpy as np

from mm_edge.sim.rooms import COLOURS, SHAPES, SYNONYMS
from mm_edge.sim.sensors import Sensors
from mm_edge.sim.world import World

SHOWN_PIXELS = 25  # of 96 x 128, for an object to be seen
NEAR_M = 2.0
TURNS = 12  # in which the robot looks for a picture of as many objects as were drawn
WANTED = (1, 1, 2, 3, 3)  # three are seldom to be had
NUMBERS = ("zero", "one", "two", "three", "four", "five")


class Seen(NamedTuple):
    """An object in the picture."""

    colour: str
    shape: str
    column: float  # of its middle, 0 left to 1 right
    distance_m: float
    mask: np.ndarray  # bool (h, w)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Question(NamedTuple):
    text: str
    answer: str
    kind: str  # yes/no, number or other, as VQA v2 has it


class Scene(NamedTuple):
    seed: int
    image: np.ndarray  # uint8 (h, w, 3) RGB
    things: tuple[Seen, ...]  # from left to right
    captions: tuple[str, ...]
    questions: tuple[Question, ...]


def make_scene(seed: int) -> Scene:
    """The same seed gives the same scene, which shows at least one object."""
    world, rng = World(seed), np.random.default_rng(np.random.SeedSequence([seed, 3]))
    sensors = Sensors(world)
    wanted, found = rng.choice(WANTED), list[tuple[np.ndarray, tuple[Seen, ...]]]()
    while len(found) < TURNS or not any(things for _, things in found):
        found.append(_look(world, sensors, rng.uniform(-math.pi, math.pi)))
        if len(found[-1][1]) == wanted:
            break
    image, things = min((shown for shown in found if shown[1]), key=lambda shown: abs(len(shown[1]) - wanted))
    return Scene(seed, image, things, captions(things, rng), questions(things, rng))


def _look(world: World, sensors: Sensors, yaw: float) -> tuple[np.ndarray, tuple[Seen, ...]]:
    """The next picture after the robot was turned so, and what it shows from left to right."""
    world.data.qpos[3:7] = math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)
    world.data.qvel[:] = 0
    mujoco.mj_forward(world.model, world.data)
    while True:
        world.step()
        for sample in sensors.capture():
            if sample.stream == "camera":
                return sample.data, _seen(world, sensors.seen[sample.stamp_ns])


def _seen(world: World, shown: np.ndarray) -> tuple[Seen, ...]:
    """shown (h, w): the object of each pixel, -1 for none."""
    x, y, _ = world.pose()
    found = []
    for i, thing in enumerate(world.room.objects):
        mask = shown == i
        if mask.sum() >= SHOWN_PIXELS:
            column = float(np.flatnonzero(mask.any(0)).mean()) / (mask.shape[1] - 1)
            found.append(Seen(thing.colour, thing.shape, column, math.hypot(thing.x - x, thing.y - y), mask))
    return tuple(sorted(found, key=lambda seen: seen.column))


def captions(things: tuple[Seen, ...], rng: np.random.Generator) -> tuple[str, ...]:
    """Five ways to say the same picture; each says all that there is."""
    names = [[_article(f"{t.colour} {rng.choice(SYNONYMS[t.shape])}") for t in things] for _ in range(5)]
    where = [("on the left", "in the middle", "on the right")[min(2, int(3 * t.column))] for t in things]
    far = ["close by" if t.distance_m < NEAR_M else "far away" for t in things]
    return (
        f"{_list(names[0])} from left to right" if len(things) > 1 else names[0][0],
        f"the robot sees {_list(names[1])}",
        _list([f"{name} {place}" for name, place in zip(names[2], where)]),
        f"there {'is' if len(things) == 1 else 'are'} {_list([f'{n} {how}' for n, how in zip(names[3], far)])}",
        " to the left of ".join(names[4]) if len(things) > 1 else f"{names[4][0]} and no other coloured object",
    )


def questions(things: tuple[Seen, ...], rng: np.random.Generator) -> tuple[Question, ...]:
    """Those that have one answer; as many yes as no."""
    names, colours, shapes = ([getattr(t, key) for t in things] for key in ("name", "colour", "shape"))
    shape = str(rng.choice(SHAPES))
    asked = [
        Question("how many coloured objects are there", NUMBERS[len(things)], "number"),
        Question(f"how many coloured {_plural(shape)} are there", NUMBERS[shapes.count(shape)], "number"),
    ]
    # What is not there is like something that is: otherwise a colour or a shape alone would tell.
    like = things[rng.integers(len(things))]
    near_miss = [f"{c} {s}" for c in COLOURS for s in SHAPES if (c == like.colour) != (s == like.shape)]
    absent = [name for name in near_miss if name not in names]
    asked.append(Question(f"is there {_article(str(rng.choice(names)))}", "yes", "yes/no"))
    asked.append(Question(f"is there {_article(str(rng.choice(absent)))}", "no", "yes/no"))
    if shapes.count("ball") == 1:  # no obstacle is one
        asked.append(Question("what colour is the ball", things[shapes.index("ball")].colour, "other"))
    if once := [t for t in things if colours.count(t.colour) == 1]:
        thing = once[rng.integers(len(once))]
        asked.append(Question(f"what is the {thing.colour} object", thing.shape, "other"))
    i = int(rng.integers(len(things)))
    left = names[i - 1] if i else "nothing"
    asked.append(Question(f"which coloured object is left of the {names[i]}", left, "other"))
    i = int(rng.integers(len(things)))
    right = names[i + 1] if i + 1 < len(things) else "nothing"
    asked.append(Question(f"which coloured object is right of the {names[i]}", right, "other"))
    if len(things) > 1:
        a, b = sorted(rng.choice(len(things), 2, replace=False).tolist())
        asked.append(Question(f"is the {names[a]} to the left of the {names[b]}", "yes", "yes/no"))
        a, b = sorted(rng.choice(len(things), 2, replace=False).tolist())
        asked.append(Question(f"is the {names[b]} to the left of the {names[a]}", "no", "yes/no"))
    return tuple(asked)


def words() -> list[str]:
    """Every word that captions, questions and answers can hold."""
    objects = (*COLOURS, *SHAPES, *(name for names in SYNONYMS.values() for name in names), *map(_plural, SHAPES))
    rest = (
        "a an and are away by close colour coloured far from how in is left many middle no nothing object objects of "
        "on other right robot sees the there to what which yes"
    )
    return sorted({*objects, *rest.split(), *NUMBERS})


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("x") else f"{name}s"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
