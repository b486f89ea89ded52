"""Which ROS 2 this machine has, and its nodes as child processes that never outlive us. Imports no rclpy itself.

ros = find_ros()                       # raises RosMissing, saying why and what to do
with free_domain() as domain, Nodes(ros, domain, logs) as nodes:
    nodes.start("watchdog_node", {"deadline_ms": 150.0})
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mm_edge.errors import EdgeError, disk_is_full, install

PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")
_CHECKOUT = Path(__file__).parents[2] / "ros2_ws" / "src" / "mm_edge_ros"
# Not only the import: messages built for another numpy fail when they are first used.
_TRY = "from rclpy.serialization import serialize_message; from sensor_msgs.msg import Imu; serialize_message(Imu())"
TRY_TIMEOUT_S = 30
_GUARD = "_ROS_WHEELS_BOOTSTRAP_COMPLETE"
_PR_SET_PDEATHSIG = 1


class RosMissing(EdgeError):
    """There is no ROS 2 here, or no mm_edge_ros."""


class Ros(NamedTuple):
    name: str  # "ROS 2 jazzy, sourced" or "ROS 2 from pip wheels"
    env: dict[str, str]  # environment of a node's process
    profile: Path | None  # the Fast DDS profile in force


def find_ros() -> Ros:
    """A sourced ROS 2 goes before the pip wheels. Raises RosMissing."""
    package = _package()
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(package), str(Path(__file__).parents[2]), *_paths(env, "PYTHONPATH")])
    distribution = env.get("ROS_DISTRO")
    if distribution and env.get("AMENT_PREFIX_PATH"):
        # The wheels' bootstrapper would put their libraries before the distribution's.
        env["LD_LIBRARY_PATH"] = os.pathsep.join(
            p for p in _paths(env, "LD_LIBRARY_PATH") if not p.startswith(sys.prefix)
        )
        env[_GUARD] = "1"
        name = f"ROS 2 {distribution}, sourced"
    else:
        overlays = [path for path in _paths(env, "AMENT_PREFIX_PATH") if path != sys.prefix]
        env["AMENT_PREFIX_PATH"] = os.pathsep.join([*overlays, sys.prefix])
        env.pop(_GUARD, None)
        name = "ROS 2 from pip wheels"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _TRY], env=env, capture_output=True, text=True, timeout=TRY_TIMEOUT_S
        )
        reason = (tried.stderr.strip().splitlines() or ["?"])[-1] if tried.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"it did not start within {TRY_TIMEOUT_S} s"
    if reason:
        raise RosMissing(f"no ROS 2 for {sys.executable} ({reason}): source one, or on x86-64 {install('ros')}")
    profile = package / "config" / "fastdds.xml"
    if not profile.is_file():  # installed by colcon: share/mm_edge_ros of the prefix whose lib holds the package
        found = (Path(p) / "share/mm_edge_ros/config/fastdds.xml" for p in _paths(env, "AMENT_PREFIX_PATH"))
        profile = next((p for p in found if p.is_file()), profile)
    for variable in PROFILE_VARIABLES:
        if variable in os.environ:
            return Ros(name, env, Path(os.environ[variable]))
    if not profile.is_file():
        return Ros(name, env, None)
    return Ros(name, {**env, PROFILE_VARIABLES[0]: str(profile)}, profile)


@contextlib.contextmanager
def free_domain() -> Iterator[int]:
    """A ROS_DOMAIN_ID that nobody on this machine uses, held for as long as the context lasts.

    Whoever uses domain d has the UDP port 7400 + 250 d open; we hold the same number of TCP as a lock among ourselves.
    """
    for domain in range(1, 101):
        port = 7400 + 250 * domain
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as lock,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dds,
        ):
            try:
                lock.bind(("127.0.0.1", port))
                dds.bind(("", port))
            except OSError:
                continue
            dds.close()
            yield domain
            return
    raise EdgeError("no free ROS_DOMAIN_ID between 1 and 100: are there nodes left over?")


def parameter_arguments(parameters: Mapping[str, object]) -> list[str]:
    """As a node's command line takes them after --ros-args: in YAML, whatever signs are in a text."""
    said = {name: json.dumps(value, default=os.fspath, ensure_ascii=False) for name, value in parameters.items()}
    return [argument for name, value in said.items() for argument in ("-p", f"{name}:={value}")]


class Nodes:
    """Child processes of mm_edge_ros, their output in log files. Leaving the context ends them; so does our own death,
    however it comes (Linux)."""

    def __init__(self, ros: Ros, domain: int, logs: Path):
        # Only this machine is concerned. Iron and later obey the first, Humble the second.
        local = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        if ros.env.get("ROS_DISTRO") == "humble":
            local = {"ROS_LOCALHOST_ONLY": "1"}
        self.env = {**ros.env, **local, "ROS_DOMAIN_ID": str(domain), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.where = " ".join(f"{name}={value}" for name, value in {"ROS_DOMAIN_ID": domain, **local}.items())
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._children: dict[str, subprocess.Popen] = {}

    def start(
        self,
        module: str,
        parameters: Mapping[str, object] | None = None,
        remappings: Mapping[str, str] | None = None,
        params_file: Path | None = None,
        name: str = "",
        piped: bool = False,
    ) -> subprocess.Popen:
        """`python -m mm_edge_ros.<module>`; its stderr, and its stdout unless piped, go to `<name>.log`."""
        name = name or module
        args = parameter_arguments(parameters or {})
        args += [a for key, value in (remappings or {}).items() for a in ("-r", f"{key}:={value}")]
        args += ["--params-file", str(params_file)] if params_file else []
        with self.log(name).open("wb") as log, _signals_held() as before:
            child = subprocess.Popen(
                [sys.executable, "-m", f"mm_edge_ros.{module}", "--ros-args", *args],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is ours to handle
                preexec_fn=partial(_prepare_child, os.getpid(), before),
            )
        self._children[name] = child
        return child

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def check(self) -> None:
        """Raise EdgeError if a child has ended, with the end of its log."""
        for name, child in self._children.items():
            if child.poll() is not None:
                tail = self.log(name).read_text(errors="replace").strip().splitlines()[-8:]
                tail += ["(the disk is full)"] if disk_is_full(self._logs) else []
                text = "\n  ".join(tail)
                raise EdgeError(f"{name} ended with status {child.returncode}; the end of {self.log(name)}:\n  {text}")

    def stop(self, *names: str, sign: signal.Signals = signal.SIGINT) -> None:
        """End these, or all, by a signal, and those that do not heed it within 3 s by SIGKILL."""
        children = [self._children.pop(name) for name in names or tuple(self._children)]
        for child in children:
            if child.poll() is None:
                child.send_signal(sign)
        for child in children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _package() -> Path:
    """The folder to import mm_edge_ros from: a colcon workspace that was sourced, or this checkout."""
    spec = importlib.util.find_spec("mm_edge_ros")
    if spec and spec.origin:
        return Path(spec.origin).parents[1]
    if not _CHECKOUT.is_dir():
        raise RosMissing(
            f"the ROS package mm_edge_ros is neither sourced nor beside {Path(__file__).parents[1]}: a pip"
            " install has no ros2_ws; clone the repository, or build ros2_ws with colcon and source it"
        )
    return _CHECKOUT


def _paths(env: dict[str, str], variable: str) -> list[str]:
    return [path for path in env.get(variable, "").split(os.pathsep) if path]


@contextlib.contextmanager
def _signals_held() -> Iterator[set[int]]:
    """SIGINT and SIGTERM wait until the context is left. The fork runs Python's at-fork hooks, and what a handler
    raises in one of those is ignored: Ctrl-C would be lost. Yields the mask that was in force, for the child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_child(parent: int, mask: set[int]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it could be told of
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
