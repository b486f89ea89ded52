"""The physical world: a differential-drive robot in a random room, stepped 5 ms at a time.

world = World(seed)
world.drive(0.3, 0.0)       # m/s, rad/s; the base stops by itself if this is not repeated within WHEEL_TIMEOUT_S
world.step()
world.status()              # None | "success" | "wrong" | "timeout"
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mm_edge.errors import needs
from mm_edge.sim.rooms import REACH_M, Room, Thing, make_room

with needs("the simulator", "mujoco", "sim"):
    import mujoco

STEP_S = 0.005
STEP_NS = 5_000_000
START_NS = 1_000_000_000_000  # the robot's clock when an episode starts: no sane stamp is near zero
TIME_LIMIT_S = 40.0
WHEEL_TIMEOUT_S = 0.3
V_MAX, V_MIN, W_MAX = 0.6, -0.2, 1.8  # m/s, m/s, rad/s
ACCELERATION = np.array([2.0, 8.0])  # m/s^2, rad/s^2, of the base's own controller
BRAKING = np.array([4.0, 12.0])
WHEEL_RADIUS_M, TRACK_M = 0.06, 0.28
CAMERA_FOV_DEG = 90.0
ALARM_GRACE_S, ALARM_STOPPED_MPS, ALARM_RESUME_S = 0.7, 0.05, 1.0
APART_S = 0.5  # between two collisions with the same thing
GRIP, SLIPPERY = 1.2, 0.15
_SHOVE_S = 0.15


@dataclass
class Alarm:
    """Was the alarm obeyed? Below 0.05 m/s from 0.7 s after its onset until its end; driving or turning again within
    1 s after."""

    onset_s: float
    end_s: float
    heard: bool = False  # the episode lasted long enough to judge
    moved: bool = False
    resumed: bool | None = None

    def observe(self, t_s: float, speed_mps: float, yaw_rate: float) -> None:
        if self.onset_s + ALARM_GRACE_S <= t_s < self.end_s:
            self.heard = True
            self.moved |= speed_mps >= ALARM_STOPPED_MPS
        elif self.heard and t_s >= self.end_s and self.resumed is not True:
            if speed_mps > ALARM_STOPPED_MPS or abs(yaw_rate) > 0.1:
                self.resumed = t_s <= self.end_s + ALARM_RESUME_S
            elif t_s > self.end_s + ALARM_RESUME_S:
                self.resumed = False

    @property
    def obeyed(self) -> bool | None:
        return None if not self.heard else not self.moved and self.resumed is not False


class World:
    """A room, the robot in it and the task. `seed` decides everything; the same seed and drive commands give the same
    world on the same machine.

    Attributes: room, t_s (since the start), now_ns, collisions (distinct contacts with anything but the floor), alarm.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.room: Room = make_room(np.random.default_rng(np.random.SeedSequence([seed, 0])))
        self.model = mujoco.MjModel.from_xml_string(_xml(self.room))
        self.data = mujoco.MjData(self.model)
        self.base = self.model.body("base").id
        self.object_geoms = [self.model.geom(f"object{i}").id for i in range(len(self.room.objects))]
        self._objects = np.array([(thing.x, thing.y) for thing in self.room.objects]).T
        self.floor_geom = self.model.geom("floor").id
        self._wheels = [self.model.geom("left").id, self.model.geom("right").id]
        self._wanted = np.zeros(2)
        self._driven_s = -math.inf
        self.command = np.zeros(2)  # what the base is doing now, after its own acceleration limits
        self.collisions = 0
        self._touched_s: dict[int, float] = {}  # when each thing was touched last
        self.alarm = Alarm(*self.room.alarm_s) if self.room.alarm_s else None
        self.steps = 0
        self.time_limit_s = TIME_LIMIT_S
        self.linger_s = 0.0  # how long it goes on after the target was reached
        self._reached_s: float | None = None
        for _ in range(40):
            mujoco.mj_step(self.model, self.data)  # settle on the wheels

    @property
    def t_s(self) -> float:
        return self.steps * STEP_S

    @property
    def now_ns(self) -> int:
        return START_NS + self.steps * STEP_NS

    def drive(self, v: float, w: float) -> None:
        """Command the base: m/s, rad/s. Not finite means stop."""
        wanted = np.array([v, w], float)
        self._wanted = np.clip(wanted, [V_MIN, -W_MAX], [V_MAX, W_MAX]) if np.isfinite(wanted).all() else np.zeros(2)
        self._driven_s = self.t_s

    def step(self) -> None:
        """Advance 5 ms."""
        wanted = self._wanted if self.t_s - self._driven_s <= WHEEL_TIMEOUT_S else np.zeros(2)
        braking = wanted * self.command <= 0
        braking |= np.abs(wanted) < np.abs(self.command)
        change = np.where(braking, BRAKING, ACCELERATION) * STEP_S
        self.command += np.clip(wanted - self.command, -change, change)
        v, w = self.command
        self.data.ctrl[:] = (v - w * TRACK_M / 2) / WHEEL_RADIUS_M, (v + w * TRACK_M / 2) / WHEEL_RADIUS_M
        x, y, yaw = self.pose()
        slips = any(math.hypot(x - a, y - b) < r for a, b, r in self.room.patches)
        self.model.geom_friction[self._wheels, 0] = SLIPPERY if slips else GRIP
        self._shove(yaw)
        mujoco.mj_step(self.model, self.data)
        self.steps += 1
        self._count_collisions()
        if self.alarm:
            self.alarm.observe(self.t_s, self.speed(), self.turning())

    def pose(self) -> tuple[float, float, float]:
        """x, y (m), yaw (rad) of the base in the room."""
        x, y, _, qw, qx, qy, qz = self.data.qpos[:7]
        return float(x), float(y), math.atan2(2 * (qw * qz + qx * qy), 1 - 2 * (qy * qy + qz * qz))

    def speed(self) -> float:
        return math.hypot(*self.data.qvel[:2])

    def turning(self) -> float:
        """rad/s, left positive."""
        return float(self.data.qvel[5])

    def bearing(self, i: int) -> tuple[float, float]:
        """Distance (m) and direction (rad, left positive) from the robot to object `i`."""
        x, y, yaw = self.pose()
        dx, dy = self.room.objects[i].x - x, self.room.objects[i].y - y
        return math.hypot(dx, dy), (math.atan2(dy, dx) - yaw + math.pi) % (2 * math.pi) - math.pi

    def alarm_on(self) -> bool:
        return self.room.alarm_s is not None and self.room.alarm_s[0] <= self.t_s < self.room.alarm_s[1]

    def status(self) -> str | None:
        if self._reached_s is not None:
            return "success" if self.t_s - self._reached_s >= self.linger_s else None
        distances = np.hypot(*(self._objects - self.data.qpos[:2, None]))
        nearest = int(distances.argmin())
        if distances[nearest] < REACH_M:
            if nearest != self.room.target:
                return "wrong"
            self._reached_s = self.t_s
            return self.status()
        return "timeout" if self.t_s >= self.time_limit_s else None

    def _shove(self, yaw: float) -> None:
        self.data.xfrc_applied[self.base] = 0
        for at, fx, fy, torque in self.room.shoves:
            if at <= self.t_s < at + _SHOVE_S:
                c, s = math.cos(yaw), math.sin(yaw)
                self.data.xfrc_applied[self.base] = (c * fx - s * fy, s * fx + c * fy, 0, 0, 0, torque)

    def _count_collisions(self) -> None:
        """A collision is the begin of a contact. Scraping along one thing, on and off, counts once."""
        pairs = self.data.contact.geom
        touching = set()
        for a, b in pairs:
            if self.floor_geom not in (a, b):
                touching.add(int(a if self.model.geom_group[a] == 0 else b))
        for thing in touching:
            self.collisions += self.t_s - self._touched_s.get(thing, -math.inf) > APART_S
            self._touched_s[thing] = self.t_s


def _xml(room: Room) -> str:
    hx, hy = room.half
    floor = round(room.floor, 3)
    geoms = [_geom(thing, f'name="object{i}"') for i, thing in enumerate(room.objects)]
    geoms += [_geom(thing, "") for thing in room.obstacles]
    wall = f'rgba="{room.wall:.3f} {room.wall:.3f} {room.wall * 0.93:.3f} 1"'
    for x, y, sx, sy in ((0, hy, hx, 0.05), (0, -hy, hx, 0.05), (hx, 0, 0.05, hy), (-hx, 0, 0.05, hy)):
        geoms.append(f'<geom type="box" size="{sx:.3f} {sy:.3f} .5" pos="{x:.3f} {y:.3f} .5" {wall}/>')
    tilt = math.radians(10)  # the camera looks down a little
    # Ellipsoid wheels touch in one point: cylinders scrub and chatter. The wheel's friction rules by its priority.
    wheel = (
        '<body pos="0 {y} 0"><joint name="{name}" type="hinge" axis="0 1 0" damping=".01" armature=".002"/>'
        '<geom name="{name}" type="ellipsoid" size="{r} .03 {r}" mass=".2" friction="{grip} .01 .001" priority="1"'
        ' group="1"/></body>'
    )
    wheels = "".join(
        wheel.format(name=name, y=y, r=WHEEL_RADIUS_M, grip=GRIP)
        for name, y in (("left", TRACK_M / 2), ("right", -TRACK_M / 2))
    )
    caster = (
        '<geom type="sphere" size=".03" pos="{} 0 -.03" mass=".05" friction=".001 0 0" condim="1" priority="2"'
        ' group="1"/>'
    )
    return f"""<mujoco>
<compiler angle="radian"/>
<option timestep="{STEP_S}" integrator="implicitfast" cone="elliptic"/>
<worldbody>
<geom name="floor" type="plane" size="{hx:.3f} {hy:.3f} .1" rgba="{floor} {floor} {floor * 1.05:.3f} 1"/>
{"".join(geoms)}
<body name="base" pos="0 0 .062" euler="0 0 {room.yaw:.4f}"><freejoint/>
<geom type="cylinder" size=".17 .05" pos="0 0 .03" mass="4" friction=".2" group="1"/>
<geom type="cylinder" size=".03 .12" pos="0 0 .2" mass=".2" group="1" contype="0" conaffinity="0"/>
{caster.format(0.13)}{caster.format(-0.13)}
<site name="imu" pos="0 0 .05"/><site name="lidar" pos="0 0 .06"/>
<camera name="front" pos=".1 0 .33" xyaxes="0 -1 0 {math.sin(tilt):.4f} 0 {math.cos(tilt):.4f}"/>
{wheels}</body></worldbody>
<actuator><velocity joint="left" kv="3" forcerange="-3 3"/><velocity joint="right" kv="3" forcerange="-3 3"/></actuator>
<sensor><accelerometer site="imu"/><gyro site="imu"/></sensor>
</mujoco>"""


def _geom(thing: Thing, name: str) -> str:
    r, h = thing.radius, thing.height
    kind, size = {
        "ball": ("sphere", f"{r:.3f}"),
        "box": ("box", f"{r * 0.8:.3f} {r * 0.8:.3f} {h / 2:.3f}"),
        "pillar": ("cylinder", f"{r:.3f} {h / 2:.3f}"),
    }[thing.shape]
    rgba = " ".join(f"{c:.3f}" for c in thing.rgb)
    place = f'pos="{thing.x:.3f} {thing.y:.3f} {h / 2:.3f}" euler="0 0 {thing.yaw:.3f}"'
    return f'<geom {name} type="{kind}" size="{size}" {place} rgba="{rgba} 1"/>'
