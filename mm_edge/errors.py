"""Everything mm_edge refuses, it refuses with one of these. The message names the stream or file, what was expected,
what came and, where there is something to do, what to do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EdgeError(Exception):
    """Base of all errors raised on purpose."""


class SampleError(EdgeError):
    """A sample, or the message it came in, cannot be used. Counted and reported; the robot drives on.

    Args:
        stream: name of the stream.
        expected: what a good sample has, in words.
        got: what this one has.
    """

    def __init__(self, stream: str, expected: str, got: object):
        said = str(got)
        if len(said) > 300:  # a message may hold a text of any length; this goes to every tick's reasons
            said = f"{said[:300]}... ({len(said)} characters)"
        super().__init__(f"{stream}: expected {expected}, got {said}")
        self.stream, self.expected, self.got = stream, expected, got


class BundleError(EdgeError):
    """A bundle is damaged, incomplete, of an unknown version, or does not fit this robot."""


class RecordingError(EdgeError):
    """A recording cannot be read or written."""


class EngineError(EdgeError):
    """An inference engine is missing, or refuses or fails to run a part."""


class MissingDependency(EdgeError):
    """An optional library is not installed.

    Args:
        what: what was wanted, e.g. "the simulator".
        library: import name, e.g. "mujoco".
        extra: extra of mm-edge that brings it, e.g. "sim".
    """

    def __init__(self, what: str, library: str, extra: str):
        super().__init__(f"{what} needs {library}: {install(extra)}")


@contextmanager
def needs(what: str, library: str, extra: str) -> Iterator[None]:
    """`with needs("the simulator", "mujoco", "sim"): import mujoco` imports it, or raises MissingDependency."""
    try:
        yield
    except ImportError:
        raise MissingDependency(what, library, extra) from None


def disk_is_full(folder: Path) -> bool:
    """Whether there is room for no more than a few words."""
    return shutil.disk_usage(folder).free < 2**16


def install(extra: str) -> str:
    """The command that installs an extra of mm-edge for the Python that runs."""
    clone = Path(__file__).parents[1]
    source = f"-e '{clone}[{extra}]'" if (clone / "pyproject.toml").is_file() else f"'mm-edge[{extra}]'"
    return f"{sys.executable} -m pip install {source}"
