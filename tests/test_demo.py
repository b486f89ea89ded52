"""The demo as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from toy_bundle import write_toy_bundle

from mm_edge.cli import main

pytestmark = pytest.mark.real_time

pytest.importorskip("mujoco", reason="the demo needs the simulator")


def start(out, *arguments):
    command = [sys.executable, "-m", "mm_edge.cli", "demo", "--out", str(out), "--seed", "900001", *arguments]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def report(demo, out):
    text, errors = demo.communicate(timeout=120)
    assert demo.returncode == 0, errors
    assert cv2.VideoCapture(str(out / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) > 10
    assert cv2.imread(str(out / "strip.png")).shape[1] == 5 * 320
    return json.loads(text.splitlines()[-1])


def test_one_process(tmp_path):
    got = report(start(tmp_path, "--no-ros", "--episodes", "1", "--json"), tmp_path)
    assert got.keys() == {"episodes", "success", "collisions", "action_latency_ms", "engine", "ros"}
    assert (got["episodes"], got["ros"]) == (1, False)
    assert 20 < got["action_latency_ms"]["p50"] <= got["action_latency_ms"]["p99"] < 200


def test_over_ros(tmp_path):
    import ros  # noqa: F401 - skips where there is no ROS 2

    got = report(start(tmp_path, "--bundle", "drive", "--episodes", "1", "--json"), tmp_path)  # by its name
    assert (got["episodes"], got["ros"]) == (1, True)
    assert 20 < got["action_latency_ms"]["p50"] <= got["action_latency_ms"]["p99"] < 500


@pytest.mark.parametrize("how", [("--no-ros",), ()])
def test_with_a_fault_it_tells_what_became_of_it(tmp_path, how):
    if not how:
        import ros  # noqa: F401

    faults = ("--fault", "scan:freeze@1", "--fault", "camera:truncate@1.5-2.5")
    got = report(start(tmp_path, *how, "--episodes", "1", "--json", *faults), tmp_path)
    scan, camera = got["faults"]
    assert scan["fault"] == "scan:freeze@1" and camera["fault"] == "camera:truncate@1.5-2.5"
    assert any(text.startswith("scan frozen: the same data for") for text in scan["words"])
    assert any(text.startswith("camera refused: camera: expected") for text in camera["words"])
    assert scan["detected_ms"] < 1000 and camera["detected_ms"] < 1000 and scan["acted_without_ms"] < 1000


def test_of_a_model_that_stood_still_it_tells_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mm_edge.sim.world.TIME_LIMIT_S", 2.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of this process are not the demo's
    write_toy_bundle(tmp_path / "toy")
    arguments = ["--bundle", str(tmp_path / "toy"), "--no-ros", "--episodes", "1", "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    text = capsys.readouterr().out
    assert (
        "timeout after 2.0 s" in text
        and "expected words among the 3 the model knows (go, stop, crash), got unknown" in text
    )


def test_a_fault_that_makes_no_sense_is_refused_before_anything_starts(tmp_path):
    for fault in ("camera:explode@1", "radar:die@1", "camera:nan@1"):
        demo = start(tmp_path, "--fault", fault)
        _, errors = demo.communicate(timeout=60)
        assert demo.returncode != 0 and fault in errors and "Traceback" not in errors
    write_toy_bundle(tmp_path / "deaf")
    demo = start(tmp_path, "--bundle", str(tmp_path / "deaf"), "--fault", "audio:die@1")
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode != 0 and "audio:die@1: expected one of the streams" in errors


def test_a_model_that_drives_no_wheels_is_refused_before_anything_starts(tmp_path):
    demo = start(tmp_path, "--bundle", "words")
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1 and errors.endswith(
        "words: expected a model whose actions are ['linear_x', 'angular_z'], got none: it is a model of words\n"
    )


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_it_leaves_no_process_behind(tmp_path, sign):
    import ros  # noqa: F401

    demo = start(tmp_path)
    children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children")
    end = time.monotonic() + 20
    while len(started := children.read_text().split()) < 4:
        assert time.monotonic() < end and demo.poll() is None, "the demo starts four nodes"
    demo.send_signal(sign)
    demo.communicate(timeout=20)
    while [pid for pid in started if _alive(pid)]:
        assert time.monotonic() < end + 20, f"still running: {started}"


def _alive(pid):
    try:  # an orphan that ended may wait, as a zombie, for a reaper that this machine lacks
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_missing_bundle_is_named(tmp_path):
    demo = start(tmp_path, "--no-ros", "--bundle", str(tmp_path / "nowhere"))
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert f"{os.sep}nowhere: expected the folder of a bundle" in errors and "Traceback" not in errors
