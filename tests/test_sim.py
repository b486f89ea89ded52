"""The simulated world: the same from the same seed, with the senses, tasks and trouble it promises."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("mujoco", reason="the simulator needs mujoco")

from mm_edge.sim.episode import Episode, ExpertDriver
from mm_edge.sim.rooms import COLOURS, SHAPES, Room, make_room, vocabulary
from mm_edge.sim.sensors import TIMING, Sensors
from mm_edge.sim.world import STEP_S, Alarm, World


def rooms(n: int) -> list[Room]:
    return [make_room(np.random.default_rng(seed)) for seed in range(n)]


def run(seed: int) -> tuple[list, object]:
    samples: list = []
    episode = Episode(seed)
    outcome = episode.run(ExpertDriver(episode, 0.03), samples.append)
    return samples, outcome


def test_same_seed_same_episode():
    (first, one), (again, two) = run(5), run(5)
    assert one == two
    assert len(first) == len(again)
    for a, b in zip(first, again):
        assert a[:3] == b[:3]
        for x, y in zip(*(s.data if isinstance(s.data, tuple) else (s.data,) for s in (a, b))):
            np.testing.assert_array_equal(x, y)


def test_rooms_are_furnished_as_promised():
    for room in rooms(100):
        assert len(room.objects) >= 4
        assert len({(o.colour, o.shape) for o in room.objects}) == len(room.objects)
        assert len(room.obstacles) >= 10
        assert any(o.height < 0.33 for o in room.obstacles)
        assert any(o.height > 0.5 for o in room.obstacles)
        assert room.patches
        assert set(room.text.split()) <= set(vocabulary())


def test_in_half_the_rooms_a_distractor_is_alike():
    def alike(room: Room) -> bool:
        target = room.objects[room.target]
        return any(o is not target and (o.colour == target.colour or o.shape == target.shape) for o in room.objects)

    assert 0.4 < np.mean([alike(room) for room in rooms(300)]) < 0.6


def test_tasks_are_mixed():
    sounding = [room.by_sound for room in rooms(300)]
    alarms = [room.alarm_s is not None for room in rooms(300)]
    assert 0.3 < np.mean(sounding) < 0.5
    assert 0.25 < np.mean(alarms) < 0.45


def test_each_sense_has_its_own_rate_latency_and_loss():
    world = World(1)
    sensors = Sensors(world)
    samples = []
    for _ in range(round(10 / STEP_S)):
        world.step()
        samples += sensors.capture()
    count = Counter(s.stream for s in samples)
    assert count["text"] == 1
    assert 140 <= count["camera"] <= 150
    assert 92 <= count["scan"] <= 100
    assert 1970 <= count["imu"] < 2000  # some are lost
    assert 490 <= count["audio"] <= 500
    for name, timing in TIMING.items():
        late_ms = [(s.arrival_ns - s.stamp_ns) / 1e6 for s in samples if s.stream == name]
        low, high = timing.latency_ms
        extra = 20.0 if name == "audio" else 5.0  # a chunk is stamped at its begin; other stamps jitter
        assert low <= min(late_ms)
        assert max(late_ms) <= high + extra
    camera = [s.stamp_ns for s in samples if s.stream == "camera"]
    assert np.std(np.diff(camera)) > 0


def test_the_robot_drives_as_told():
    world = World(0)
    start = np.array(world.pose()[:2])
    for _ in range(100):
        world.drive(0.2, 0.0)
        world.step()
    assert np.hypot(*(world.pose()[:2] - start)) == pytest.approx(0.09, abs=0.02)  # 0.1 s to get up to 0.2 m/s
    assert world.speed() == pytest.approx(0.2, abs=0.02)


def test_the_base_stops_when_nobody_speaks_to_it():
    world = World(0)
    for _ in range(60):
        world.drive(0.2, 0.0)
        world.step()
    for _ in range(100):
        world.step()
    assert world.speed() < 0.01


def test_not_a_number_is_a_stop():
    world = World(0)
    for _ in range(60):
        world.drive(0.2, 0.0)
        world.step()
    for _ in range(60):
        world.drive(float("nan"), 0.0)
        world.step()
    assert world.speed() < 0.01


def drive_blindly(seed: int) -> World:
    world = World(seed)
    while world.status() is None and not world.collisions and world.t_s < 20:
        world.drive(0.5, 0.0)
        world.step()
    return world


def test_driving_straight_on_ends_in_a_collision_or_at_an_object():
    worlds = [drive_blindly(seed) for seed in range(6)]
    assert any(w.collisions for w in worlds)
    assert all(w.collisions or w.status() for w in worlds)


def test_scraping_along_a_thing_on_and_off_is_one_collision():
    world = drive_blindly(next(s for s in range(20) if drive_blindly(s).collisions))
    assert world.collisions == 1
    for t in range(100):  # against it again and again, less than half a second apart
        world.drive(0.2 if t % 20 < 15 else -0.2, 0.0)
        for _ in range(4):
            world.step()
    assert world.collisions <= 2


def test_the_beacon_is_louder_on_its_side():
    seed = next(s for s in range(100) if World(s).room.by_sound)
    world = World(seed)
    sensors = Sensors(world)
    while abs(np.sin(world.bearing(world.room.target)[1])) < 0.7 or world.t_s < 0.5:
        world.drive(0.0, 1.5)
        world.step()
    samples = []
    for _ in range(90):
        world.step()
        samples += [s.data.samples for s in sensors.capture() if s.stream == "audio"]
    left, right = np.abs(np.concatenate(samples).astype(float)).mean(axis=0)
    assert (left > right) == (world.bearing(world.room.target)[1] > 0)


def test_alarm_judgement():
    def judge(speeds: list[tuple[float, float]]) -> bool | None:
        alarm = Alarm(onset_s=1.0, end_s=3.0)
        for t, speed in speeds:
            alarm.observe(t, speed, 0.0)
        return alarm.obeyed

    stopped = [(1.0, 0.5), (1.6, 0.3), (1.8, 0.01), (2.9, 0.01)]
    assert judge([(1.0, 0.5), (1.5, 0.4)]) is None  # over before it could be obeyed
    assert judge(stopped) is True
    assert judge([*stopped, (3.5, 0.3)]) is True
    assert judge([*stopped, (3.5, 0.0), (4.1, 0.3)]) is False  # moved again too late
    assert judge([(1.0, 0.5), (1.8, 0.2), (3.5, 0.3)]) is False


def test_labels_say_where_the_target_shows_and_what_fills_each_cell():
    episode = Episode(next(s for s in range(100) if not World(s).room.by_sound))
    driver = ExpertDriver(episode)
    labels: list[dict] = []
    episode.run(driver, on_tick=lambda now_ns: labels.append(episode.labels(driver.camera_ns)))
    near = labels[-1]  # right before the target
    target = episode.world.room.objects[episode.world.room.target]
    kind = [list(COLOURS).index(target.colour), SHAPES.index(target.shape)]
    assert sum(share for _, share in near["cells"]) == pytest.approx(1.0, abs=0.01)
    fullest = max(near["cells"], key=lambda cell: cell[1])[0]
    assert [fullest, *kind] in near["objects"]


def test_the_expert_arrives_and_touches_nothing_on_the_way():
    for seed in range(6):
        episode = Episode(seed)
        outcome = episode.run(ExpertDriver(episode))
        assert (outcome.status, outcome.collisions) == ("success", 0)
