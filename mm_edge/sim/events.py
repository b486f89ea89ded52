"""Things that fall, roll and knock, as seen and heard by a robot that stands: for models of sound and sight.

    clip = make_clip(seed)      # clip.frames, clip.sound, clip.label, clip.onset_s, clip.direction_rad

MuJoCo moves what is seen; its contacts make what is heard: each impulse strikes the body's modes, whose pitch goes by
its size and whose ring by its material. All look alike whatever they are made of: what it is made of can only be heard.
What is out of view is behind the robot, and sounds as if it were in front of it, as far to the side: two ears cannot
tell, and whether it is in view can only be seen. Somewhere else a machine may hum, or someone speak.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mm_edge.errors import needs
from mm_edge.sim.sensors import EAR_DISTANCE_M, SOUND_MPS, camera_rays

with needs("the simulator", "mujoco", "sim"):
    import mujoco

MOTIONS = ("falls", "rolls", "knocks")
MATERIALS = ("wood", "metal", "glass")
UNSEEN, QUIET = "out of view", "quiet"
LABELS = (*(f"{material} {motion}" for motion in MOTIONS for material in MATERIALS), UNSEEN, QUIET)
KINDS = (*LABELS[:9], UNSEEN, UNSEEN, QUIET)  # as often as each is drawn

FRAMES, FRAME_HZ, HEIGHT, WIDTH = 24, 8, 48, 64
SAMPLE_RATE_HZ = 16000
DURATION_S = FRAMES / FRAME_HZ
STEP_S = 0.001
RING_S = 0.6
HEARD = 0.02  # of a sound's peak: what is softer counts as nothing
# Of each material: pitch (Hz) of a body 10 cm wide, what its overtones are of that, and how fast they die (1/s).
MODES = {
    "wood": (420.0, (1.0, 2.6, 4.9), (55.0, 90.0, 140.0)),
    "metal": (900.0, (1.0, 1.7, 2.8, 4.2, 5.9), (6.0, 8.0, 10.0, 14.0, 20.0)),
    "glass": (1900.0, (1.0, 1.5, 2.3, 3.3), (28.0, 34.0, 45.0, 60.0)),
}
BLOCK = '<geom type="box" size=".12 .04 .3" pos="{x:.3f} {y:.3f} .3" rgba=".5 .45 .4 1"/>'
BOUNCE = {"wood": -60.0, "metal": -25.0, "glass": -35.0}  # damping of contacts: less of it bounces more


class Clip(NamedTuple):
    """What happened in DURATION_S."""

    frames: np.ndarray  # uint8 (FRAMES, HEIGHT, WIDTH, 3); frame k is of (k + 1) / FRAME_HZ s
    sound: np.ndarray  # int16 (n, 2), at SAMPLE_RATE_HZ
    label: str  # one of LABELS
    onset_s: float  # of the sound; of a quiet clip its end
    end_s: float  # of the sound
    direction_rad: float  # where the sound came from, left positive
    noises: tuple[str, ...]  # what else was to be heard
    motion: str  # what moved in view, one of MOTIONS, "" if nothing did; since when:
    begins_s: float
    sound_of: str  # material and motion of what was heard, "" if nothing was


def make_clip(seed: int) -> Clip:
    """The same seed gives the same clip on the same machine."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7]))
    label = str(rng.choice(KINDS))
    motion, material = str(rng.choice(MOTIONS)), str(rng.choice(MATERIALS))
    if label not in (UNSEEN, QUIET):
        material, motion = label.split()
    seen, silent = label != UNSEEN, label == QUIET
    away = rng.uniform(0.6, 1.2)
    direction = rng.uniform(-0.5, 0.5)
    direction = direction if seen else math.copysign(math.pi, direction) - direction
    moves = bool(not silent or rng.random() < 0.5)  # what is soft makes no sound
    scene = _Scene(rng, motion, material, away, direction, moves)
    frames, struck = scene.run(rng)
    heard = np.zeros(len(struck)) if silent else _ring(struck, material, scene.size_m)
    sound = _ears(heard, direction, away)
    noises = []
    if rng.random() < 0.3:
        noises.append("hum")
        sound += _ears(_hum(rng, len(heard)), rng.uniform(-math.pi, math.pi), rng.uniform(1.5, 3))
    if rng.random() < 0.3:
        noises.append("speech")
        sound += _ears(_speech(rng, len(heard)), rng.uniform(-math.pi, math.pi), rng.uniform(1.5, 3))
    sound += rng.normal(0, rng.uniform(0.001, 0.004), sound.shape)
    loud = np.flatnonzero(np.abs(heard) > HEARD * max(np.abs(heard).max(), 1e-9))
    onset_s, end_s = loud[[0, -1]] / SAMPLE_RATE_HZ if len(loud) else (DURATION_S, DURATION_S)
    if not silent and not heard.any():
        label = QUIET  # it missed what it was to hit
    return Clip(
        frames, np.int16(np.clip(sound, -1, 1) * 32767), label, float(onset_s), float(end_s), float(direction),
        tuple(noises), motion if seen and moves else "", scene.begins_s, f"{material} {motion}" if heard.any() else "",
    )  # fmt: skip


class _Scene:
    """A floor, a wall, a few things that stand, and one that moves."""

    def __init__(
        self, rng: np.random.Generator, motion: str, material: str, away: float, direction: float, moves: bool
    ):
        self.size_m = float(rng.uniform(0.07, 0.14))
        x, y = away * math.cos(direction), away * math.sin(direction)
        side = float(rng.choice([-1, 1]))
        shape = "sphere" if motion == "rolls" else str(rng.choice(["box", "sphere", "cylinder"]))
        damping, size = BOUNCE[material], self.size_m
        grey = rng.uniform(0.25, 0.85)
        extent = {"sphere": f"{size}", "box": f"{size} {size * 0.8} {size * 0.9}", "cylinder": f"{size * 0.8} {size}"}
        start_z, velocity = size, (0.0, 0.0, 0.0)
        target = ""
        if motion == "falls":
            start_z = float(rng.uniform(0.5, 0.9))
        elif motion == "rolls":
            velocity = (0.0, side * float(rng.uniform(0.5, 1.1)), 0.0)
            y -= side * 0.5
        else:  # it is thrown against a block that stands
            velocity = (0.0, side * float(rng.uniform(1.2, 2.0)), 0.6)
            start_z = 0.25
            target = BLOCK.format(x=x, y=y + side * 0.3)
            y -= side * 0.25
        if rng.random() < 0.5:  # one that nothing is thrown against
            target += BLOCK.format(x=rng.uniform(1.5, 2.5), y=rng.uniform(-1, 1))
        others = "".join(
            f'<geom type="{kind}" size=".08 .08 .1" pos="{px:.3f} {py:.3f} .1" rgba="{g:.2f} {g:.2f} {g:.2f} 1"/>'
            for kind, px, py, g in (
                (rng.choice(["box", "cylinder"]), rng.uniform(2.3, 3), rng.uniform(-1.5, 1.5), rng.uniform(0.2, 0.8))
                for _ in range(rng.integers(1, 5))
            )
        )
        self.begins_s = float(rng.uniform(0.25, 0.8))
        self._moves, self._velocity = moves, velocity
        floor, wall = rng.uniform(0.25, 0.5), rng.uniform(0.5, 0.9)
        self.model = mujoco.MjModel.from_xml_string(f"""<mujoco>
<option timestep="{STEP_S}" integrator="implicitfast"/>
<default><geom solref="{-9e4} {damping}" friction=".6 .003 .0005"/></default>
<worldbody>
<geom name="floor" type="plane" size="5 5 .1" rgba="{floor:.2f} {floor:.2f} {floor:.2f} 1"/>
<geom type="box" size=".05 5 1" pos="3.4 0 1" rgba="{wall:.2f} {wall:.2f} {wall * 0.93:.2f} 1"/>
{others}{target}
<body name="thing" pos="{x:.3f} {y:.3f} {start_z:.3f}"><freejoint/>
<geom name="thing" type="{shape}" size="{extent[shape]}" mass=".3" rgba="{grey:.2f} {grey:.2f} {grey:.2f} 1"/></body>
<camera name="front" pos="0 0 .4" xyaxes="0 -1 0 .17 0 .98"/>
</worldbody></mujoco>""")
        self.data = mujoco.MjData(self.model)
        self._thing, self._floor = self.model.geom("thing").id, self.model.geom("floor").id
        self._rays = camera_rays(HEIGHT, WIDTH)

    def run(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Frames, and what struck the thing, (n,) at SAMPLE_RATE_HZ."""
        model, data = self.model, self.data
        every, samples = round(1 / FRAME_HZ / STEP_S), round(STEP_S * SAMPLE_RATE_HZ)
        frames, struck = list[np.ndarray](), np.zeros(round(DURATION_S * SAMPLE_RATE_HZ))
        begun, force, before = False, np.zeros(6), 0.0
        start = data.qpos.copy()
        grain, light = rng.normal(0, 3.0, (FRAMES, HEIGHT * WIDTH, 1)), rng.uniform(0.85, 1.15)
        for step in range(round(DURATION_S / STEP_S)):
            if step * STEP_S < self.begins_s or not self._moves:
                data.qpos[:], data.qvel[:] = start, 0  # somebody holds it
                mujoco.mj_forward(model, data)
            else:
                if not begun:
                    begun = True
                    data.qvel[:3] = self._velocity
                    data.qvel[3] = -self._velocity[1] / self.size_m if self._velocity[2] == 0 else 0.0
                mujoco.mj_step(model, data)
                now = 0.0
                for i in range(data.ncon):
                    if self._thing in (data.contact[i].geom1, data.contact[i].geom2):
                        mujoco.mj_contactForce(model, data, i, force)
                        now += abs(force[0])
                at = step * samples
                if now > before + 2.0:  # newtons: a blow, not what lies
                    struck[at] += (now - before) * STEP_S
                if now > 0:
                    speed = float(np.linalg.norm(data.qvel[:3]))
                    struck[at : at + samples] += 1e-3 * speed * rng.normal(size=samples)
                before = now
            if (step + 1) % every == 0:
                frames.append(self._look(grain[len(frames)], light))
        return np.stack(frames), struck

    def _look(self, grain: np.ndarray, light: float) -> np.ndarray:
        model, data = self.model, self.data
        camera, n = model.camera("front").id, len(self._rays)
        rays = np.ascontiguousarray(self._rays @ data.cam_xmat[camera].reshape(3, 3).T)
        ids, distances, normals = np.zeros(n, np.int32), np.zeros(n), np.zeros((n, 3))
        mujoco.mj_multiRay(
            model, data, data.cam_xpos[camera], rays.ravel(), None, 1, -1, ids, distances, normals.ravel(), n, 20.0
        )
        shade = 0.5 + 0.5 * np.abs(np.einsum("ij,ij->i", normals, rays))
        rgb = np.take(model.geom_rgba[:, :3], ids, axis=0) * shade[:, None] * 255 * light
        rgb[ids < 0] = 25
        return np.clip(rgb + grain, 0, 255).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)


def _ring(struck: np.ndarray, material: str, size_m: float) -> np.ndarray:
    """What a body sounds like that is struck so, (n,): its modes, each a sine that dies."""
    pitch, ratios, decays = MODES[material]
    t = np.arange(round(RING_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    pitch *= 0.1 / (2 * size_m)
    ring = sum(
        np.exp(-d * t) * np.sin(2 * math.pi * pitch * r * t) / (k + 1)
        for k, (r, d) in enumerate(zip(ratios, decays))
        if pitch * r < 0.45 * SAMPLE_RATE_HZ
    )
    n = len(struck) + len(t)
    return np.fft.irfft(np.fft.rfft(struck, n) * np.fft.rfft(ring, n), n)[: len(struck)] * 2.0


def _hum(rng: np.random.Generator, n: int) -> np.ndarray:
    """A machine."""
    t, hz = np.arange(n) / SAMPLE_RATE_HZ, rng.uniform(80, 240)
    beat = 1 + 0.3 * np.sin(2 * math.pi * rng.uniform(1, 6) * t)
    return 0.05 * beat * sum(np.sin(2 * math.pi * hz * k * t + k) / k for k in range(1, 8))


def _speech(rng: np.random.Generator, n: int) -> np.ndarray:
    """A voice, as far as a robot cares: syllables of a gliding pitch through two moving formants."""
    t = np.arange(n) / SAMPLE_RATE_HZ
    pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * math.pi * rng.uniform(0.5, 2) * t))
    phase = 2 * math.pi * np.cumsum(pitch) / SAMPLE_RATE_HZ
    loud = np.clip(np.sin(2 * math.pi * rng.uniform(2, 4) * t + rng.uniform(0, 6)), 0, 1)
    formants = [rng.uniform(400, 800) + 150 * np.sin(2 * math.pi * 1.7 * t), np.full(n, rng.uniform(1100, 2200))]
    voice = sum(
        np.sin(k * phase) * sum(np.exp(-(((k * pitch - f) / 150) ** 2)) for f in formants) for k in range(1, 26)
    )
    return 0.12 * loud * voice


def _ears(sound: np.ndarray, direction_rad: float, away_m: float) -> np.ndarray:
    """(n,) -> (n, 2): left and right, earlier and louder on its side."""
    side = math.sin(direction_rad)
    ears = []
    for sign in (1, -1):
        late = round((EAR_DISTANCE_M / 2 * (1 - sign * side)) / SOUND_MPS * SAMPLE_RATE_HZ)
        gain = math.sqrt(0.5 * (1 + 0.8 * sign * side)) / max(away_m, 0.3)
        ears.append(gain * np.concatenate([np.zeros(late), sound[: len(sound) - late]]))
    return np.stack(ears, 1)
