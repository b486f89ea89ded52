"""`mm-edge doctor`: what works on this machine, and the one line that installs each thing that does not.

Ends with status 0 if the default path works: the demo, with or without ROS.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mm_edge import engine as engines
from mm_edge.bundle import SHIPPED, Bundle
from mm_edge.commands.ros import PROFILE_VARIABLES, Ros, RosMissing, find_ros
from mm_edge.errors import EdgeError, install
from mm_edge.sources import microphones

WHEEL_TIMEOUT = (
    "give the base a wheel time-out of its own, e.g. cmd_vel_timeout: 0.3 of ros2_control's diff_drive_controller; a"
    " watchdog on this computer starves when the computer does. Try it with the wheels off the ground: while they turn,"
    " pkill -STOP -f watchdog_node must stop them; pkill -CONT -f watchdog_node ends the trial"
)


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    fix: str = ""  # one line to run or to do
    needed: bool = False  # the default path does not work without it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--bundle", type=Path, default=SHIPPED, help="bundle to try (default: the shipped one)")


def run(args: argparse.Namespace) -> int:
    checks = []
    for check in _checks(args.bundle):
        checks.append(check)
        if not args.json:
            mark = "ok  " if check.ok else "FAIL" if check.needed else "-   "
            print(f"{mark} {check.name:<15} {check.found}", flush=True)
            if check.fix:
                print(f"{'':20} -> {check.fix}")
    ok = all(check.ok for check in checks if check.needed)
    if args.json:
        found = [asdict(check) for check in checks]
        print(json.dumps({"ok": ok, "checks": found, "before_real_wheels": WHEEL_TIMEOUT}))
    else:
        print("\nThe default path works: mm-edge demo" if ok else "\nThe default path does not work yet: see FAIL")
        print(f"Before real wheels: {WHEEL_TIMEOUT}")
    return 0 if ok else 1


def _checks(bundle: Path) -> Iterator[Check]:
    python = f"{platform.python_version()} on {platform.machine()} {platform.system()}"
    yield Check("python", sys.version_info >= (3, 10), python, needed=True)
    yield _library("numpy", "numpy", f"{sys.executable} -m pip install numpy", needed=True)
    yield _library("OpenCV", "cv2", install("camera"), needed=True)
    yield _library("simulator", "mujoco", install("sim"), needed=True)
    yield from _engines(bundle)
    yield from _gpu()
    yield from _ros()
    yield _library("recording", "rosbags", install("record"))
    yield _library("viewer", "rerun", install("viewer"))
    yield _library("search", "lancedb", install("search"))
    yield _library("pretrained", "tokenizers", install("language"))
    yield _library("training", "torch", install("train"))
    yield _microphone()


def _library(name: str, module: str, fix: str, needed: bool = False) -> Check:
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        return Check(name, False, str(error), fix, needed)
    except Exception as error:  # installed, but a system library of its own is missing or does not fit
        return Check(name, False, f"{module} does not load: {error}", fix, needed)
    return Check(name, True, f"{module} {getattr(library, '__version__', '')}".rstrip(), needed=needed)


def _microphone() -> Check:
    library = _library("microphone", "sounddevice", install("audio"))
    if "PortAudio library not found" in library.found:
        return replace(library, fix="sudo apt install libportaudio2")
    if not library.ok:
        return library
    try:
        found, why = microphones(), "no device"
    except EdgeError as error:
        found, why = [], str(error)
    if not found:
        return Check("microphone", False, f"{library.found}, but {why}", "plug one in, or start the sound server")
    return Check("microphone", True, f"{library.found}: {'; '.join(found)}")


def _engines(folder: Path) -> Iterator[Check]:
    """The bundle, and every engine tried with it on its golden trace."""
    try:
        bundle = Bundle.read(folder)
    except EdgeError as error:
        yield Check("bundle", False, str(error), "reinstall mm-edge, or name a bundle with --bundle", needed=True)
        return
    size_mb = sum(map(len, bundle.contents.values())) / 1e6
    yield Check("bundle", True, f"{bundle.task}, {size_mb:.1f} MB, {bundle.id[:12]}, {folder}", needed=True)
    fixes = {"tensorrt": install("tensorrt"), "cuda": install("gpu"), "cpu": install("ort")}
    for name in engines.ENGINES:
        needed = name == engines.ENGINES[-1]
        if not needed and not engines.has_gpu():
            yield Check(f"engine {name}", False, "no NVIDIA driver with a GPU here")
            continue
        try:
            model = engines.load(bundle, name)
        except EdgeError as error:
            yield Check(f"engine {name}", False, str(error), fixes[name], needed)
        else:
            yield Check(f"engine {name}", True, f"{model.engine}, reproduces the golden trace", needed=needed)


def _gpu() -> Iterator[Check]:
    """GPU, and on a Jetson its power mode: the slow default is the usual reason for a slow robot."""
    for name, program, arguments in (("GPU", "nvidia-smi", ["-L"]), ("power mode", "nvpmodel", ["-q"])):
        if shutil.which(program):
            done = _run([program, *arguments])
            lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
            fix = "sudo nvpmodel -m 0 && sudo jetson_clocks" if program == "nvpmodel" else ""
            yield Check(name, done.returncode == 0, "; ".join(lines[:2]), fix)


def _ros() -> Iterator[Check]:
    try:
        ros = find_ros()
    except RosMissing as missing:
        yield Check("ROS 2", False, f"{missing}", "source /opt/ros/<distribution>/setup.bash, or " + install("ros"))
        return
    done = _run([sys.executable, "-c", _ASK_RCLPY], ros.env)
    yield Check("ROS 2", done.returncode == 0, f"{ros.name}; {(done.stdout or done.stderr).strip()[-300:]}")
    yield _dds_profile(ros)
    if importlib.util.find_spec("launch_ros") is None:
        fix = "" if "sourced" not in ros.name else f"apt install ros-{os.environ['ROS_DISTRO']}-launch-ros"
        yield Check("ros2 launch", False, "not part of the pip wheels; mm-edge demo needs none", fix)
    else:
        yield Check("ros2 launch", True, "launch_ros is here")


_ASK_RCLPY = "import rclpy; print('rmw:', rclpy.get_rmw_implementation_identifier())"


def _dds_profile(ros: Ros) -> Check:
    if ros.profile is None or not ros.profile.is_file():
        return Check("DDS profile", False, "none: large frames may be lost", "build ros2_ws with colcon and source it")
    own = "set by you" if str(ros.profile) in map(os.environ.get, PROFILE_VARIABLES) else "ours"
    return Check("DDS profile", True, f"{ros.profile} ({own})")


def _run(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
