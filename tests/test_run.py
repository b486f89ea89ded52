"""`mm-edge run` as a user runs it: a model on a video file, a sound file, a virtual microphone, without ROS."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="cv2 is not installed")
soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
pytest.importorskip("onnxruntime", reason="the toy bundle runs on onnxruntime")

from test_sources import RATE_HZ, hears, noise, sound_server, write_video
from test_view import free_port
from toy_bundle import write_toy_bundle
from toy_ear import GO_HZ, STOP_HZ, tone, write_toy_ear
from toy_language import write_toy_language

from mm_edge.bundle import SHIPPED
from mm_edge.cli import main
from mm_edge.overlay import GOOD

pytestmark = pytest.mark.real_time

ROOT = Path(__file__).parents[1]


@pytest.fixture
def toy(tmp_path):
    write_toy_bundle(tmp_path / "toy")
    return str(tmp_path / "toy")


@pytest.fixture
def video(tmp_path):
    """One second at 10 Hz: red, then blue."""
    return write_video(tmp_path / "video.avi", frames=10, fps=10)


def running(*arguments, env=None, stdin=subprocess.DEVNULL):
    command = [sys.executable, "-m", "mm_edge.cli", "run", *map(str, arguments), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdin=stdin, **pipes)


def report(process):
    """The lines that it printed, and the last one."""
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    *lines, last = out.splitlines()
    return lines, json.loads(last)


def test_a_video_and_a_command_become_actions_and_a_video_with_them(toy, video, tmp_path):
    lines, got = report(running(toy, "--camera", video, "--text", "go", "--save", tmp_path / "out.mp4"))
    assert lines[:3] == [f"camera      {video}", "imu         absent: no source was given for it", "text        'go'"]
    assert f"camera: {video} is at its end" in lines
    assert got["streams"] == {"camera": {"admitted": 10}, "imu": {}, "text": {"admitted": 1}}
    assert got["ticks"] - 3 <= got["actions"] <= got["ticks"] < 20
    assert got["notes"]["imu never seen"] == got["ticks"]
    assert set(got["reasons"]) <= {"warming up: no sensor seen yet", "text never seen"}
    assert 0 < got["latency_ms"]["p50"] < got["latency_ms"]["p99"] < 500
    shown = cv2.VideoCapture(got["files"][0])
    assert shown.get(cv2.CAP_PROP_FRAME_COUNT) / shown.get(cv2.CAP_PROP_FPS) == pytest.approx(got["seconds"], abs=0.35)


def test_a_model_hears_a_sound_file_and_does_without_what_is_not_there(tmp_path):
    soundfile.write(tmp_path / "sound.flac", noise(1), RATE_HZ)
    _, got = report(running(SHIPPED, "--microphone", tmp_path / "sound.flac", "--text", "drive to the red ball"))
    assert got["streams"]["audio"] == {"admitted": 50} and got["actions"] > 5
    assert 0 < got["cores"] < 2
    assert {"camera never seen", "scan never seen", "imu never seen"} <= set(got["notes"])


def test_a_model_hears_a_microphone_and_names_one_that_is_muted(tmp_path):
    """PulseAudio's monitor of a sink that plays nothing."""
    with sound_server(tmp_path, tone_hz=0) as (_, env):
        hears(env)
        # Its two channels come from one, as PulseAudio makes them.
        _, got = report(
            running(SHIPPED, "--microphone", "default", "--text", "drive to the red ball", "--seconds", 4, env=env)
        )
    assert got["streams"]["audio"]["admitted"] > 50
    assert any(note.startswith("audio muted: nothing but zeros for") for note in got["notes"])


def test_it_says_what_it_sees_where_a_bundle_has_words(tmp_path):
    write_toy_language(tmp_path / "toy")
    video = write_video(tmp_path / "video.avi", frames=25, fps=10)
    lines, got = report(running(tmp_path / "toy", "--camera", video))
    assert any(line.endswith("  a red ball") for line in lines) and any(
        line.endswith("  a blue ball") for line in lines
    )
    assert not got["actions"]


def test_a_line_that_is_typed_is_the_next_command(toy, tmp_path):
    ours, terminal = pty.openpty()
    try:
        long = write_video(tmp_path / "long.avi", frames=100, fps=10)
        process = running(toy, "--camera", long, "--seconds", 4, stdin=terminal)
        while "type a command" not in process.stdout.readline():
            pass
        os.write(ours, b"stop\nfly away\n")
        lines, got = report(process)
    finally:
        os.close(ours)
        os.close(terminal)
    refused = "text: expected words among the 3 the model knows (go, stop, crash), got unknown ['fly', 'away']"
    assert refused in lines and f"command refused: {refused}" in got["reasons"]
    assert got["streams"]["text"] == {"admitted": 1, "refused": 1}


def test_a_line_that_another_program_prints_is_the_next_command(toy, tmp_path):
    process = running(toy, "--camera", write_video(tmp_path / "long.avi", 100, 10), stdin=subprocess.PIPE)
    process.stdin.write("go\n")
    process.stdin.flush()
    while "  linear_x" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert report(process)[1]["streams"]["text"] == {"admitted": 1}


def test_ctrl_c_ends_it_with_its_report(toy, tmp_path):
    long = write_video(tmp_path / "long.avi", frames=600, fps=10)
    process = running(toy, "--camera", long, "--text", "go")
    while "ticks/s" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, got = report(process)
    assert 1 < got["seconds"] < 30 and got["actions"]


def test_it_is_seen_in_a_browser_or_kept_for_rerun(toy, video, tmp_path):
    pytest.importorskip("rerun", reason="rerun is not installed")
    _, got = report(running(toy, "--camera", video, "--text", "go", "--save", tmp_path / "out.rrd"))
    assert got["files"] == [str(tmp_path / "out.rrd")] and (tmp_path / "out.rrd").stat().st_size > 10_000
    port = free_port()
    process = running(toy, "--camera", write_video(tmp_path / "long.avi", 100, 10), "--view", port)
    assert process.stdout.readline().startswith(f"open http://127.0.0.1:{port}/")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
        assert page.status == 200
    while "ticks/s" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    report(process)


def test_a_camera_that_fails_ends_it_with_status_1(toy, tmp_path, capsys, monkeypatch):
    """One that is live and ends: here a file that is read as if it were."""
    monkeypatch.setattr("mm_edge.sources.isfile", lambda path: False)
    monkeypatch.setattr("sys.stdin", None)  # pytest's cannot be read
    video = write_video(tmp_path / "video.avi")
    begun_s = time.monotonic()
    assert main(["run", toy, "--camera", video, "--seconds", "30"]) == 1
    assert time.monotonic() - begun_s < 20
    assert f"camera: {video} sends no more frames: unplugged, stalled, or at its end" in capsys.readouterr().out


def test_what_cannot_be_run_is_told_in_a_line(toy, video, tmp_path, capsys):
    for arguments, said in {
        (): "nothing to sense: give --camera or --microphone, or both",
        ("--microphone", "default"): f"--microphone: {toy} has no stream of kind audio, only camera (image), imu (imu)",
        ("--camera", "97"): "camera: '97' cannot be opened",
        ("--camera", video, "--text", "dance"): "words among the 3 the model knows (go, stop, crash), got unknown",
        ("--camera", video, "--save", "a.gif"): "--save a.gif: expected a file .mp4 or .rrd",
        ("--camera", video, "--save", str(tmp_path / "no" / "a.mp4")): f"a.mp4: there is no folder {tmp_path / 'no'}",
    }.items():
        assert main(["run", toy, *arguments]) == 1
        assert said in capsys.readouterr().err


def test_what_happens_is_told_as_it_is_heard(tmp_path):
    write_toy_ear(tmp_path / "ear")
    still = np.zeros(RATE_HZ // 2, np.int16)
    said = np.concatenate([still, tone(GO_HZ, 0.5), still, tone(STOP_HZ, 0.5)])
    soundfile.write(tmp_path / "said.wav", said, RATE_HZ)
    save = ("--save", tmp_path / "said.mp4")
    lines, got = report(running(tmp_path / "ear", "--microphone", tmp_path / "said.wav", *save))
    told = [line.split()[2] for line in lines if re.fullmatch(r" +[\d.]+ s  \w+ \([01]\.\d+\)", line)]
    assert told == ["go", "stop"] and got["events"] == {"go": 1, "stop": 1}
    film = cv2.VideoCapture(got["files"][0])
    frames = [film.read()[1][:80, :, ::-1].astype(int) for _ in range(int(film.get(cv2.CAP_PROP_FRAME_COUNT)))]
    shown = [(abs(frame - GOOD).max(2) < 40).sum() > 50 for frame in frames]
    assert not any(shown[:3]) and sum(shown) > len(shown) / 3  # from the first on, as each stands for a while
