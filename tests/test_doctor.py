"""doctor tells what works and how to get the rest, and fails only where the default path does."""

import argparse
import json
import sys
from types import ModuleType

import pytest
from toy_bundle import write_toy_bundle

from mm_edge.commands import doctor
from mm_edge.errors import install
from mm_edge.sources import microphones


@pytest.fixture
def toy(tmp_path):
    write_toy_bundle(tmp_path / "toy")
    return tmp_path / "toy"


def consult(capsys, bundle, *arguments):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    status = doctor.run(parser.parse_args(["--bundle", str(bundle), *arguments]))
    return status, capsys.readouterr().out


def test_what_it_finds_is_true(capsys, toy):
    status, out = consult(capsys, toy, "--json")
    report = json.loads(out)
    checks = {check["name"]: check for check in report["checks"]}
    assert (status, report["ok"]) == (0, True)
    assert checks["python"]["found"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert "CPUExecutionProvider, reproduces the golden trace" in checks["engine cpu"]["found"]
    assert checks["recording"]["ok"] or "[record]'" in checks["recording"]["fix"]
    assert "wheel time-out" in report["before_real_wheels"]


def test_the_table_ends_with_the_reminder_about_wheels(capsys, toy):
    _, out = consult(capsys, toy)
    assert out.splitlines()[-2] == "The default path works: mm-edge demo"
    assert "wheel time-out" in out.splitlines()[-1]


def test_what_the_default_path_needs_fails_it_with_the_line_that_installs_it(capsys, toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)  # import raises ModuleNotFoundError
    status, out = consult(capsys, toy)
    assert status == 1
    assert "FAIL simulator" in out and install("sim") in out


def test_what_it_does_not_need_does_not_fail_it(capsys, toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "rosbags", None)
    status, out = consult(capsys, toy)
    assert status == 0
    assert install("record") in out


def test_without_a_microphone_it_says_so(capsys, toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", ModuleType("sounddevice"))  # whether or not it is installed here
    monkeypatch.setattr(doctor, "microphones", list)
    status, out = consult(capsys, toy)
    assert status == 0 and "but no device" in out
    library = sys.modules["sounddevice"]
    library.PortAudioError, library.query_devices = type("PortAudioError", (Exception,), {}), fails
    monkeypatch.setattr(doctor, "microphones", microphones)
    status, out = consult(capsys, toy)
    assert status == 0 and "PortAudio does not tell which microphones there are: no host" in out
    monkeypatch.setattr(doctor, "microphones", lambda: ["0 Mic (2 channels, 48000 Hz)"])
    assert "0 Mic (2 channels, 48000 Hz)" in consult(capsys, toy)[1]


def test_a_microphone_that_lacks_portaudio_is_told_to_install_that(capsys, toy, monkeypatch):
    real = doctor.importlib.import_module

    def lacks_portaudio(name):
        if name == "sounddevice":
            raise OSError("PortAudio library not found")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", lacks_portaudio)
    status, out = consult(capsys, toy)
    assert status == 0 and "-> sudo apt install libportaudio2\n" in out


def fails():
    raise sys.modules["sounddevice"].PortAudioError("no host")


def test_a_damaged_bundle_is_named(capsys, toy):
    (toy / "imu.onnx").write_bytes(b"")
    status, out = consult(capsys, toy)
    assert status == 1
    assert "FAIL bundle" in out and "toy/imu.onnx" in out
