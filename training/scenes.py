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
WANTED = (0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3)  # three are seldom to be had
FEW = 9  # more than a picture shows
NEAR_BY = 0.5  # of the scenes are seen from beside an object, which may fill the picture
SEEN = ("what do you see", "what is there", "what can you see")
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
    """The same seed gives the same scene. Few show no object at all."""
    world, rng = World(seed), np.random.default_rng(np.random.SeedSequence([seed, 3]))
    sensors = Sensors(world)
    wanted, found = rng.choice(WANTED), list[tuple[np.ndarray, tuple[Seen, ...]]]()
    at = _beside(world, rng) if rng.random() < NEAR_BY else (0.0, 0.0)
    while len(found) < TURNS or (wanted and len(found) < 5 * TURNS and not any(things for _, things in found)):
        found.append(_look(world, sensors, at, rng.uniform(-math.pi, math.pi)))
        if len(found[-1][1]) == wanted:
            break
    image, things = min(found, key=lambda shown: abs(len(shown[1]) - wanted) + bool(wanted and not shown[1]) * FEW)
    return Scene(seed, image, things, captions(things, rng), questions(things, rng))


def _beside(world: World, rng: np.random.Generator) -> tuple[float, float]:
    """A place for the robot, near one of the objects and free; where it starts, if none was found."""
    room = world.room
    for _ in range(30):
        thing = room.objects[rng.integers(len(room.objects))]
        away, side = thing.radius + rng.uniform(0.4, 1.2), rng.uniform(-math.pi, math.pi)
        x, y = thing.x + away * math.cos(side), thing.y + away * math.sin(side)
        free = all(math.hypot(x - t.x, y - t.y) > t.radius + 0.3 for t in (*room.objects, *room.obstacles))
        if free and abs(x) < room.half[0] - 0.3 and abs(y) < room.half[1] - 0.3:
            return x, y
    return 0.0, 0.0


def _look(world: World, sensors: Sensors, at: tuple[float, float], yaw: float) -> tuple[np.ndarray, tuple[Seen, ...]]:
    """The next picture after the robot was put there and turned so, and what it shows from left to right."""
    world.data.qpos[:2] = at
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
    if not things:
        return (
            "no coloured object", "the robot sees no coloured object", "nothing coloured",
            "there is no coloured object", "there are no coloured objects",
        )  # fmt: skip
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
    """Those that have one answer, each in one of several wordings; as many yes as no, where there is an object."""

    def one_of(*texts: str) -> str:
        return texts[rng.integers(len(texts))]

    def called(name: str) -> str:
        colour, shape = name.split()
        return f"{colour} {one_of(*SYNONYMS[shape])}"

    def is_there(name: str) -> str:
        return f"{one_of('is there', 'do you see', 'can you see')} {_article(called(name))}"

    names, colours, shapes = ([getattr(t, key) for t in things] for key in ("name", "colour", "shape"))
    shape = str(rng.choice(SHAPES))
    end = one_of("are there", "do you see", "can you see")
    asked = [
        Question(f"how many coloured objects {end}", NUMBERS[len(things)], "number"),
        Question(
            f"how many coloured {_plural(one_of(*SYNONYMS[shape]))} {end}", NUMBERS[shapes.count(shape)], "number"
        ),
    ]
    # What is not there is like something that is: otherwise a colour or a shape alone would tell.
    every = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    if not things:
        return (*asked, Question(is_there(one_of(*every)), "no", "yes/no"), Question(one_of(*SEEN), "nothing", "other"))
    like = things[rng.integers(len(things))]
    near_miss = [name for name in every if (like.colour in name) != (like.shape in name)]
    absent = [name for name in near_miss if name not in names]
    asked.append(Question(is_there(one_of(*names)), "yes", "yes/no"))
    asked.append(Question(is_there(one_of(*absent)), "no", "yes/no"))
    if len(things) == 1:
        asked.append(Question(one_of(*SEEN), names[0], "other"))
    if shapes.count("ball") == 1:  # no obstacle is one
        ball = one_of(*SYNONYMS["ball"])
        text = one_of(f"what colour is the {ball}", f"which colour is the {ball}", f"what is the colour of the {ball}")
        asked.append(Question(text, things[shapes.index("ball")].colour, "other"))
    if once := [t for t in things if colours.count(t.colour) == 1]:
        thing = once[rng.integers(len(once))]
        shown = f"the {thing.colour} object"
        text = one_of(f"what is {shown}", f"what shape is {shown}", f"which shape is {shown}")
        asked.append(Question(text, thing.shape, "other"))
    for side, step in (("left", -1), ("right", 1)):
        i = int(rng.integers(len(things)))
        other = names[i + step] if 0 <= i + step < len(things) else "nothing"
        who = one_of("which coloured object", "what", "which object")
        asked.append(Question(f"{who} is {one_of('', 'to the ')}{side} of the {called(names[i])}", other, "other"))
    thing = things[rng.integers(len(things))]
    near, text = thing.distance_m < NEAR_M, one_of("close by", "far away")
    answer = "yes" if near == (text == "close by") else "no"
    asked.append(Question(f"is the {called(thing.name)} {text}", answer, "yes/no"))
    if len(things) > 1:
        for answer, side in (("yes", "left"), ("no", "right")):
            a, b = sorted(rng.choice(len(things), 2, replace=False).tolist())
            if rng.random() < 0.5:  # said the other way round
                a, b, side = b, a, "right" if side == "left" else "left"
            text = f"is the {called(names[a])} {one_of('', 'to the ')}{side} of the {called(names[b])}"
            asked.append(Question(text, answer, "yes/no"))
    return tuple(asked)


def words() -> list[str]:
    """Every word that captions, questions and answers can hold."""
    shapes = [name for names in SYNONYMS.values() for name in names]
    objects = (*COLOURS, *shapes, *map(_plural, shapes))
    rest = (
        "a an and are away by can close colour coloured do far from how in is left many middle no nothing object "
        "objects of on other right robot see sees shape the there to what which yes you"
    )
    return sorted({*objects, *rest.split(), *NUMBERS})


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("x") else f"{name}s"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
