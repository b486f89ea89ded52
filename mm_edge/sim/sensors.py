"""The robot's senses in the simulator: each with its own rate, jitter, latency, noise and loss.

for sample in sensors.capture():      # once after every world.step()
    ...                               # sample.arrival_ns lies in the future by the sensor's latency
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from mm_edge.sim.world import CAMERA_FOV_DEG, STEP_NS, World
from mm_edge.types import Audio, Sample, Scan

SAMPLE_RATE_HZ, CHUNK = 16000, 320  # 20 ms
WIDTH, HEIGHT = 128, 96
BEAMS, RANGE_MAX_M = 180, 6.0
# What a LaserScan holds exactly: float32.
ANGLE_MIN, ANGLE_INCREMENT, RANGE_MIN_M = (float(np.float32(x)) for x in (-math.pi, 2 * math.pi / BEAMS, 0.05))
EAR_DISTANCE_M, SOUND_MPS = 0.18, 343.0
_SEEN = np.array([1, 0, 0, 0, 0, 0], np.uint8)  # geoms of group 0: everything but the robot itself


@dataclass(frozen=True)
class Timing:
    """How a sensor's samples come. Milliseconds."""

    period_ms: float
    jitter_ms: float
    latency_ms: tuple[float, float]
    loss: float


TIMING = {
    "camera": Timing(1000 / 15, 3.0, (20.0, 50.0), 0.02),
    "scan": Timing(100.0, 3.0, (8.0, 25.0), 0.02),
    "imu": Timing(5.0, 0.0, (1.0, 4.0), 0.005),
    "audio": Timing(20.0, 0.0, (8.0, 18.0), 0.002),
}


KINDS = {"camera": "image", "scan": "scan", "imu": "imu", "audio": "audio", "text": "text"}


class Sensors:
    """All senses of the robot in `world`. Noise has a random stream of its own: it does not change with the driving.

    Attributes: next_ns, when each of them is captured next; voice, what somebody in the room says and was not to be
    heard yet, float (n,) within [-1, 1]; seen maps the stamp of each recent camera frame to int8 (h, w), the index of
    the object that a pixel shows, -1 for anything else.
    """

    def __init__(self, world: World):
        self.world = world
        self._rng = np.random.default_rng(np.random.SeedSequence([world.seed, 1]))
        self.next_ns = {name: world.now_ns + int(self._rng.uniform(0, t.period_ms) * 1e6) for name, t in TIMING.items()}
        self.next_ns["imu"] = world.now_ns
        self.next_ns["audio"] = world.now_ns + CHUNK * 1_000_000_000 // SAMPLE_RATE_HZ  # when the first chunk is full
        self._told = False
        self._rays = camera_rays(HEIGHT, WIDTH)
        self._ids, self._dist = np.zeros(len(self._rays), np.int32), np.zeros(len(self._rays))
        self._normals = np.zeros((len(self._rays), 3))
        self._exposure = self._rng.uniform(0.85, 1.15) * self._rng.uniform(0.95, 1.05, 3)
        self._grain = np.float32(self._rng.normal(0, 3.0, (2 * len(self._rays), 3)))
        self._imu_bias = self._rng.normal(0, [0.05, 0.05, 0.05, 0.005, 0.005, 0.005])
        self._hiss = self._rng.uniform(0.002, 0.006)
        self._heard = 0  # audio samples so far
        self.voice = np.zeros(0)
        angles = ANGLE_MIN + ANGLE_INCREMENT * np.arange(BEAMS)
        self._beams = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
        self._scan_ids, self._scan_dist = np.zeros(BEAMS, np.int32), np.zeros(BEAMS)
        self.seen: dict[int, np.ndarray] = {}
        self._object_of = np.full(world.model.ngeom + 1, -1, np.int8)  # by geom; the last for a ray that met none
        self._object_of[world.object_geoms] = range(len(world.object_geoms))

    def capture(self) -> list[Sample]:
        """The samples captured in the last 5 ms. Lost ones are made all the same, so that noise stays in step."""
        now_ns, samples = self.world.now_ns, []
        if not self._told:
            self._told = True
            samples.append(Sample("text", now_ns, now_ns, self.world.room.text))
        for name, timing in TIMING.items():
            if now_ns < self.next_ns[name]:
                continue
            period_ns = round(timing.period_ms * 1e6)
            # A sample's time jitters around a steady beat; it does not drift.
            self.next_ns[name] += period_ns
            stamp_ns = now_ns + round(self._rng.uniform(-1, 0) * min(timing.jitter_ms * 1e6, STEP_NS))
            data = getattr(self, f"_{name}")(stamp_ns)
            arrival_ns = now_ns + round(self._rng.uniform(*timing.latency_ms) * 1e6)
            if name == "audio":
                stamp_ns = now_ns - period_ns
            if self._rng.random() >= timing.loss:
                samples.append(Sample(name, stamp_ns, arrival_ns, data))
        return samples

    def _camera(self, stamp_ns: int) -> np.ndarray:
        """One ray a pixel, no OpenGL: colour by the angle between ray and surface, a checked floor, grain."""
        model, data = self.world.model, self.world.data
        camera = model.camera("front").id
        origin = data.cam_xpos[camera]
        rays = np.ascontiguousarray(self._rays @ data.cam_xmat[camera].reshape(3, 3).T)
        mujoco.mj_multiRay(
            model, data, origin, rays.ravel(), _SEEN, 1, self.world.base, self._ids, self._dist, self._normals.ravel(),
            len(rays), 20.0,
        )  # fmt: skip
        ids = self._ids
        shade = 0.5 + 0.5 * np.abs(np.einsum("ij,ij->i", self._normals, rays))
        rgb = np.take(np.float32(model.geom_rgba[:, :3]), ids, axis=0) * np.float32(shade)[:, None]
        floor = np.flatnonzero(ids == self.world.floor_geom)
        x, y = (origin[:2] + rays[floor, :2] * self._dist[floor, None]).T
        rgb[floor] *= np.where((np.floor(2 * x) + np.floor(2 * y)) % 2, 0.95, 1.05)[:, None]
        for a, b, r in self.world.room.patches:
            rgb[floor[(x - a) ** 2 + (y - b) ** 2 < r * r]] *= 1.12
        rgb[ids < 0] = 0.1
        at = self._rng.integers(len(self._grain) - len(rays))
        pixels = rgb * np.float32(255 * self._exposure) + self._grain[at : at + len(rays)]
        self.seen[stamp_ns] = self._object_of[ids].reshape(HEIGHT, WIDTH)
        while len(self.seen) > 8:
            self.seen.pop(next(iter(self.seen)))
        return np.clip(pixels, 0, 255).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)

    def _scan(self, stamp_ns: int) -> Scan:
        model, data = self.world.model, self.world.data
        site = model.site("lidar").id
        rays = np.ascontiguousarray(self._beams @ data.site_xmat[site].reshape(3, 3).T)
        mujoco.mj_multiRay(
            model, data, data.site_xpos[site], rays.ravel(), _SEEN, 1, self.world.base, self._scan_ids, self._scan_dist,
            None, BEAMS, RANGE_MAX_M,
        )  # fmt: skip
        ranges = self._scan_dist + self._rng.normal(0, 0.01, BEAMS)
        nothing = (self._scan_ids < 0) | (ranges > RANGE_MAX_M) | (self._rng.random(BEAMS) < 0.01)
        ranges = np.where(nothing, np.inf, np.maximum(ranges, RANGE_MIN_M))
        return Scan(ranges.astype(np.float32), ANGLE_MIN, ANGLE_INCREMENT, RANGE_MIN_M, RANGE_MAX_M)

    def _imu(self, stamp_ns: int) -> np.ndarray:
        noise = self._rng.normal(0, [0.15, 0.15, 0.15, 0.01, 0.01, 0.01])
        return np.float32(self.world.data.sensordata[:6] + self._imu_bias + noise)

    def _audio(self, stamp_ns: int) -> Audio:
        """Left and right ear: the beacon (louder and earlier on its side), the alarm and a voice (everywhere), wheels,
        hiss."""
        t = (self._heard + np.arange(CHUNK)) / SAMPLE_RATE_HZ
        ears = self._rng.normal(0, self._hiss, (CHUNK, 2))
        room, world = self.world.room, self.world
        if room.beacon is not None:
            distance, bearing = world.bearing(room.beacon)
            side = math.sin(bearing)
            level = 0.5 / max(distance, 0.3) * (0.7 + 0.3 * math.cos(bearing))  # ears point ahead a little
            beeps = (t % 0.4) < 0.2
            for ear, sign in ((0, 1), (1, -1)):
                delay = -sign * EAR_DISTANCE_M / 2 * side / SOUND_MPS
                gain = level * math.sqrt(0.5 * (1 + 0.8 * sign * side))
                ears[:, ear] += gain * beeps * np.sin(2 * math.pi * room.beacon_hz * (t - delay))
        if world.alarm_on():
            high = (t % 0.3) < 0.15
            ears += 0.25 * np.sin(2 * math.pi * np.where(high, 2800.0, 2200.0) * t)[:, None]
        rolling = abs(world.command[0]) + 0.1 * abs(world.command[1])
        ears += 0.02 * rolling * np.sin(2 * math.pi * 150 * t)[:, None]
        said, self.voice = self.voice[:CHUNK], self.voice[CHUNK:]
        ears[: len(said)] += said[:, None]
        first, self._heard = self._heard, self._heard + CHUNK
        return Audio(np.int16(np.clip(ears, -1, 1) * 32767), first, SAMPLE_RATE_HZ)


def camera_rays(height: int, width: int) -> np.ndarray:
    """Unit vectors (height * width, 3), row by row, in the camera's frame: x right, y up, looking along -z."""
    scale = math.tan(math.radians(CAMERA_FOV_DEG / 2)) / width
    x, y = np.meshgrid((2 * np.arange(width) + 1 - width) * scale, -(2 * np.arange(height) + 1 - height) * scale)
    rays = np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)
