"""The demonstrator: it knows the whole room, but looks for a target it could not have seen, so that it can be imitated.

It makes straight for the farthest point of the cheapest path that it can reach in a straight line, so that what it does
follows from where the target and the nearest obstacles are; slows down for what is ahead, whatever the way around it;
stops for the alarm, and at the target; and, told to go to something it has not seen for a while, turns left until it
sees it.
"""

from __future__ import annotations

import heapq
import math

import mujoco
import numpy as np

from mm_edge.sim.rooms import REACH_M, Thing
from mm_edge.sim.world import CAMERA_FOV_DEG, V_MAX, World

CELL_M = 0.1
ROBOT_RADIUS_M = 0.18
MARGIN_M = 0.09  # kept beside the robot
SHORTCUT_M = 0.17  # kept beside the robot where it leaves the path for a straight line
WALL_M = 0.05  # half a wall's thickness
STAND_M = 0.47  # so near to the target's centre it stands; nearer than REACH_M, lest a student stop short of it
SLOW_M = 0.5  # with less than that free ahead it slows down
SEARCH = (0.0, 1.2)  # m/s, rad/s: always to the left, for a student cannot know which way is the shorter
MEMORY_S = 2.0  # how long it goes on toward a target out of sight
LOOK_S = 6.0  # then it turns, a little more than once around, before it goes on all the same
_NEIGHBOURS = [(a, b, math.hypot(a, b)) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
_SEEN = np.array([1, 0, 0, 0, 0, 0], np.uint8)


class Expert:
    """`action()` once a tick: (v m/s, w rad/s) for the world as it is."""

    def __init__(self, world: World):
        self.world = world
        self._seen_s = -math.inf
        room = world.room
        self._others = [*(o for i, o in enumerate(room.objects) if i != room.target), *room.obstacles]
        self._cost_to_go = self._plan()

    def action(self) -> np.ndarray:
        if self.world.alarm_on():
            return np.zeros(2)
        near = self.world.bearing(self.world.room.target)[0] - STAND_M
        if near < 0:
            return np.zeros(2)
        t = self.world.t_s
        if self.sees_target() or self.world.room.by_sound:
            self._seen_s = t
        since = t - max(self._seen_s, 0.0) if self._seen_s >= 0 else t + MEMORY_S
        if since > MEMORY_S and (since - MEMORY_S) % (LOOK_S + 2.0) < LOOK_S:
            return np.array(SEARCH)
        x, y, yaw = self.world.pose()
        ahead_x, ahead_y = self._look_ahead(x, y)
        error = (math.atan2(ahead_y - y, ahead_x - x) - yaw + math.pi) % (2 * math.pi) - math.pi
        turn = float(np.clip(2.5 * error, -1.5, 1.5))
        if abs(error) > 1.2:
            return np.array([0.0, turn])
        creep = 0.12 if abs(error) < 0.25 else 0.0  # otherwise it turns on the spot until the way is free
        pace = max(0.0, math.cos(error)) ** 3 * float(np.clip(self._free_ahead(x, y, yaw) / SLOW_M, creep, 1.0))
        return np.array([V_MAX * min(pace, 0.15 + near / 0.4), turn])

    def sees_target(self) -> bool:
        """The target's centre is in the camera's field of view and nothing is before it."""
        world, target = self.world, self.world.room.target
        if abs(world.bearing(target)[1]) > math.radians(CAMERA_FOV_DEG / 2 - 3):
            return False
        geom = world.object_geoms[target]
        camera = world.data.cam_xpos[0]
        ray = world.data.geom_xpos[geom] - camera
        hit = np.zeros(1, np.int32)
        mujoco.mj_ray(world.model, world.data, camera, ray / np.linalg.norm(ray), _SEEN, 1, world.base, hit, None)
        return bool(hit[0] == geom)

    def _free_ahead(self, x: float, y: float, yaw: float) -> float:
        """Metres to drive straight on before something is nearer than half the margin."""
        c, s = math.cos(yaw), math.sin(yaw)
        reach = ROBOT_RADIUS_M + MARGIN_M / 2
        hx, hy = self.world.room.half
        to_wall = min(
            (hx - math.copysign(x, c * x)) / max(abs(c), 1e-6), (hy - math.copysign(y, s * y)) / max(abs(s), 1e-6)
        )
        free = to_wall - WALL_M - reach
        for thing in self._others:
            dx, dy = thing.x - x, thing.y - y
            ahead, aside = dx * c + dy * s, abs(dy * c - dx * s)
            beside = reach + _outer(thing)
            if ahead > 0.3 * math.hypot(dx, dy) and aside < beside:
                free = min(free, ahead - math.sqrt(beside**2 - aside**2))
        return free

    def _look_ahead(self, x: float, y: float) -> tuple[float, float]:
        """The farthest point down the cheapest path with a clear straight line to it; at least 0.3 m down the path."""
        hx, hy = self.world.room.half
        n, m = self._cost_to_go.shape
        i = min(max(round((x + hx) / CELL_M), 0), n - 1)
        j = min(max(round((y + hy) / CELL_M), 0), m - 1)
        ahead = (i, j)
        for step in range(40):
            around = [(i + a, j + b) for a, b, _ in _NEIGHBOURS if 0 <= i + a < n and 0 <= j + b < m]
            best = min(around, key=lambda cell: self._cost_to_go[cell])
            if self._cost_to_go[best] >= self._cost_to_go[i, j]:
                break
            i, j = best
            if step >= 3 and not self._is_clear(x + hx, y + hy, i * CELL_M, j * CELL_M):
                break
            ahead = best
        return ahead[0] * CELL_M - hx, ahead[1] * CELL_M - hy

    def _is_clear(self, x0: float, y0: float, x1: float, y1: float) -> bool:
        along = np.linspace(0.0, 1.0, max(2, int(math.hypot(x1 - x0, y1 - y0) / CELL_M) + 1))[1:]
        i = np.rint((x0 + along * (x1 - x0)) / CELL_M).astype(int)
        j = np.rint((y0 + along * (y1 - y0)) / CELL_M).astype(int)
        return bool((self._clearance[i, j] > ROBOT_RADIUS_M + SHORTCUT_M).all())

    def _plan(self) -> np.ndarray:
        """Dijkstra's cost-to-go from every cell: clear of things, and out of reach of the wrong objects."""
        room = self.world.room
        hx, hy = room.half
        n, m = int(2 * hx / CELL_M) + 1, int(2 * hy / CELL_M) + 1
        x, y = np.meshgrid(CELL_M * np.arange(n) - hx, CELL_M * np.arange(m) - hy, indexing="ij")
        clearance = np.minimum(hx - np.abs(x), hy - np.abs(y)) - WALL_M
        for thing in self._others:
            radius = REACH_M - 0.05 if thing.colour else _outer(thing)
            clearance = np.minimum(clearance, np.hypot(x - thing.x, y - thing.y) - radius)
        self._clearance = clearance
        cost = 1 + 25 * np.clip(0.5 - clearance, 0, 0.5) ** 2 + 40 * (clearance < ROBOT_RADIUS_M + MARGIN_M)
        cost_to_go = np.full((n, m), np.inf)
        target = room.objects[room.target]
        start = (round((target.x + hx) / CELL_M), round((target.y + hy) / CELL_M))
        cost_to_go[start] = 0
        queue = [(0.0, start)]
        while queue:
            so_far, (i, j) = heapq.heappop(queue)
            if so_far > cost_to_go[i, j]:
                continue
            for a, b, length in _NEIGHBOURS:
                u, v = i + a, j + b
                if 0 <= u < n and 0 <= v < m and (total := so_far + length * cost[u, v]) < cost_to_go[u, v]:
                    cost_to_go[u, v] = total
                    heapq.heappush(queue, (total, (u, v)))
        return cost_to_go


def _outer(thing: Thing) -> float:
    """Radius of the circle around a thing's footprint."""
    return thing.radius * (0.8 * math.sqrt(2) if thing.shape == "box" else 1.0)
