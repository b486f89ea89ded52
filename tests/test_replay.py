import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed")

from toy_bundle import STREAMS, write_toy_bundle

from mm_edge.align import Aligner
from mm_edge.errors import RecordingError, SampleError
from mm_edge.recording import RecordingWriter, Tick
from mm_edge.replay import events, replay
from mm_edge.types import Action, Sample

MS = 1_000_000
T0 = 1_000_000 * MS


class Rule(NamedTuple):
    anchor: str = "camera"
    max_period_ms: float = 100.0
    min_period_ms: float = 0.0


def frame(arrival_ms, latency_ms=30):
    data = np.full((8, 8, 3), arrival_ms % 255, np.uint8)
    return Sample("camera", T0 + (arrival_ms - latency_ms) * MS, T0 + arrival_ms * MS, data)


def imu(arrival_ms):
    return Sample("imu", T0 + arrival_ms * MS, T0 + arrival_ms * MS, np.float32([arrival_ms / 1e4, 0, 0, 0, 0, 0]))


def command(recording, topic, arrival_ms, speed):
    action = Action(("linear_x",), np.float32([[speed]]), 0.1)
    recording.command(topic, action, T0 + arrival_ms * MS, T0 + arrival_ms * MS)


def story(path, **kwargs):
    """One letter an event, with its milliseconds."""
    return [
        f"tick {(e.now_ns - T0) // MS}" if isinstance(e, Tick) else f"{e.stream} {(e.arrival_ns - T0) // MS}"
        for e in events(path, STREAMS, **kwargs)
    ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "episode"


def test_recorded_ticks_are_kept(path):
    """As the robot ticked, not as a rule would: `tick` 50 is late, `imu` 50 came in the same instant, but after it."""
    with RecordingWriter(path, STREAMS) as recording:
        recording.write(frame(40))
        recording.tick(T0 + 50 * MS)
        recording.write(imu(50))
        recording.write(imu(45))
    assert story(path, tick=Rule()) == ["camera 40", "imu 45", "tick 50", "imu 50"]


def test_without_ticks_the_rule_says_when(path):
    """At first data, with every frame, and each 100 ms without one; a tick comes after all that arrived by then."""
    with RecordingWriter(path, STREAMS) as recording:
        for sample in (imu(0), frame(60), imu(60), imu(160), imu(380), frame(390), imu(391)):
            recording.write(sample)
    assert story(path, tick=Rule()) == [
        "imu 0", "tick 0", "camera 60", "imu 60", "tick 60", "imu 160", "tick 160", "tick 260", "tick 360",
        "imu 380", "camera 390", "tick 390", "imu 391",
    ]  # fmt: skip
    with pytest.raises(RecordingError, match="episode: holds no ticks, and no rule was given"):
        events(path, STREAMS)


def test_a_clock_that_was_set_does_not_tick_through_the_years(path):
    """As of a robot that begins in 1970 and then hears what time it is. A pause of a minute is still ticked through."""
    with RecordingWriter(path, STREAMS) as recording:
        for arrival_ms in (-T0 // MS + 1, 0, 60_100):
            recording.write(imu(arrival_ms))
    told = story(path, tick=Rule())
    assert told[:5] == ["imu -999999", "tick -999999", "imu 0", "tick 0", "tick 100"]
    assert told[-3:] == ["tick 60000", "imu 60100", "tick 60100"] and len(told) == 606


def test_what_is_no_sample_comes_as_the_error_that_says_why(path):
    """And starts no clock: a robot that was told nothing has nothing to tick for."""
    with RecordingWriter(path, STREAMS) as recording:
        recording.write(frame(40))
    (error,) = events(path, STREAMS, Rule(), {"imu": "camera"})
    assert str(error) == "imu: expected a message with imu: sensor_msgs/msg/Imu, got sensor_msgs/msg/Image"


def test_a_tick_carries_its_labels_and_the_commands_in_force(path):
    with RecordingWriter(path, STREAMS) as recording:
        recording.write(frame(0))
        recording.tick(T0, {"alarm": False})
        command(recording, "expert/cmd_vel", 0, 1.0)  # the answer to this very tick
        command(recording, "cmd_vel", 15, 0.5)  # what was done about it
        recording.write(imu(20))
        recording.tick(T0 + 60 * MS, {"alarm": True})
        command(recording, "expert/cmd_vel", 60, 2.0)
        command(recording, "cmd_vel", 70, 0.75)

    def labels(latency_ms):
        found = [e.labels for e in events(path, STREAMS, latency_ns=latency_ms * MS) if isinstance(e, Tick)]
        return [{k: v if isinstance(v, bool) else v[0] for k, v in label.items()} for label in found]

    assert labels(0) == [
        {"alarm": False, "expert/cmd_vel": 1.0},  # nothing had been done yet
        {"alarm": True, "expert/cmd_vel": 2.0, "cmd_vel": 0.5},
    ]
    assert labels(15) == [
        {"alarm": False, "expert/cmd_vel": 1.0, "cmd_vel": 0.5},
        {"alarm": True, "expert/cmd_vel": 2.0, "cmd_vel": 0.75},
    ]
    assert [label["cmd_vel"] for label in labels(1000)] == [0.75, 0.75]
    assert story(path, latency_ns=1000 * MS) == ["camera 0", "tick 0", "imu 20", "tick 60"]


def test_events_are_read_as_they_are_asked_for(path):
    """The first frame of 40 MB is there before the rest has been read."""
    with RecordingWriter(path, STREAMS) as recording:
        for i in range(1, 41):
            data = np.random.default_rng(i).integers(0, 256, (600, 600, 3), np.uint8)
            recording.write(Sample("camera", T0 + i, T0 + i, data))
    timeline = events(path, STREAMS, Rule())
    next(timeline)
    mcap = path / "episode.mcap"
    with open(mcap, "r+b") as file:  # spoil the last frame's chunk: the first frames can't know
        file.seek(int(mcap.stat().st_size * 0.95))
        file.write(b"\0" * 1000)
    assert next(timeline).now_ns == T0 + 1
    with pytest.raises(RecordingError, match="episode: cannot be read"):
        list(timeline)


class Recorder:
    """A pipeline in the place of a model: what it is given, and what the aligner makes of it."""

    def __init__(self):
        self.aligner, self.refused = Aligner(STREAMS, 0.1), []

    def push(self, sample):
        self.aligner.push(sample)

    def refuse(self, error):
        self.refused.append(str(error))

    def tick(self, now_ns):
        views = self.aligner.window(now_ns).views
        return {name: (views[name].stamp_ns, views[name].age_s, views[name].present) for name in ("camera", "imu")}


def test_replay_takes_events_through_a_pipeline():
    pipeline = Recorder()
    refused = SampleError("imu", "a stamp", "0")
    outputs = replay(pipeline, [frame(50), Tick(T0 + 60 * MS, {}), refused, imu(70), Tick(T0 + 400 * MS, {})])
    assert next(outputs) == {"camera": (T0 + 20 * MS, 0.04, True), "imu": (0, float("inf"), False)}
    assert pipeline.refused == []  # nothing is taken before its time
    assert next(outputs) == {"camera": (T0 + 20 * MS, 0.38, False), "imu": (T0 + 70 * MS, 0.33, False)}
    assert pipeline.refused == ["imu: expected a stamp, got 0"]


def run_command(*arguments, hash_seed="1"):
    """`mm-edge replay` in a process of its own."""
    code = "import argparse, sys; from mm_edge.commands import replay; p = argparse.ArgumentParser();"
    code += "replay.add_arguments(p); sys.exit(replay.run(p.parse_args()))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_command_writes_json_lines_and_the_same_ones_twice(tmp_path, path):
    bundle = write_toy_bundle(tmp_path / "toy")
    with RecordingWriter(path, STREAMS) as recording:
        recording.write(Sample("text", T0, T0, "fly to the moon"))
        recording.write(Sample("text", T0 + 40 * MS, T0 + 40 * MS, "go"))
        for i in range(1, 21):
            recording.write(frame(100 * i))
            recording.write(imu(100 * i + 10))
    out, log = run_command(bundle.path, path)
    outputs = [json.loads(line) for line in out.splitlines()]
    assert [o["stamp_ns"] for o in outputs] == [T0 + 100 * i * MS for i in range(21)]
    assert [o["ages_s"]["camera"] for o in outputs] == [None] + [0.03] * 20
    assert outputs[0]["action"] is None  # a command alone is nothing to drive by
    assert len({o["action"]["values"][0][0] for o in outputs[1:]}) == 20  # it drives, and by what it sees
    assert log.splitlines()[0].startswith("camera: 20 admitted")
    assert "text: 1 admitted, 1 refused; 1 refused: text: expected words among the 3 the model knows (go," in log
    assert run_command(bundle.path, path, hash_seed="2") == (out, log)
    assert run_command(bundle.path, path, "--topic", "imu=/imu") == (out, log)  # the others stay as they are
    no_imu, _ = run_command(bundle.path, path, "--topic", "imu=/text")
    assert [json.loads(line)["mask"]["imu"] for line in no_imu.splitlines()] == [False] * 21


def test_the_command_replays_faults_and_tells_what_became_of_them(tmp_path, path):
    bundle = write_toy_bundle(tmp_path / "toy")
    with RecordingWriter(path, STREAMS) as recording:
        recording.write(Sample("text", T0, T0, "go"))
        for i in range(1, 401):
            recording.write(imu(10 * i))
            if i % 10 == 0:
                recording.write(frame(10 * i))
                recording.tick(T0 + 10 * i * MS)
    out, log = run_command(bundle.path, path, "--fault", "camera:die@1-2", "--fault", "imu:nan@3")
    outputs = [json.loads(line) for line in out.splitlines()]
    absent = [o["stamp_ns"] for o in outputs if not o["mask"]["camera"] and o["stamp_ns"] > T0 + 100 * MS]
    assert T0 + 1100 * MS < absent[0] < T0 + 1400 * MS and T0 + 1900 * MS <= absent[-1] < T0 + 2200 * MS
    assert "fault camera:die@1-2: detected after" in log and "(camera dead: silent for" in log
    assert "fault imu:nan@3: detected after" in log and "(imu refused: imu: expected finite values" in log
