"""The `mm-edge` command: only parses; each command has a file in `commands/`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable

import mm_edge
from mm_edge.errors import EdgeError

# Before a command imports numpy: a second thread for products this small doubles what hearing costs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

COMMANDS = {
    "demo": "a simulated robot driven by the shipped model, over real ROS 2 where there is one",
    "run": "a model at work on this machine's camera and microphone, without ROS",
    "record": "write recordings",
    "replay": "run a recording through a bundle as fast as it goes; outputs as JSON lines",
    "view": "what a robot sees, hears, thinks and does, in a browser: of a recording, or live",
    "search": "find moments in what robots saw, by words or by a picture",
    "bench": "what a tick costs beside the bare engine",
    "doctor": "what works on this machine, and what to install for the rest",
}


def main(argv: list[str] | None = None) -> int:
    try:
        return _run(_parsed(argv))
    except KeyboardInterrupt:
        return 130


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mm-edge", description=mm_edge.__doc__)
    parser.add_argument("--version", action="version", version=mm_edge.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = importlib.import_module(f"mm_edge.commands.{name}")
        command.add_arguments(commands.add_parser(name, help=text, description=command.__doc__))
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    try:
        return importlib.import_module(f"mm_edge.commands.{args.command}").run(args)
    except BrokenPipeError:  # `mm-edge replay ... | head` is no error
        sys.stderr.close()
        return 0
    except (EdgeError, OSError) as error:
        print(f"mm-edge {args.command}: {error}", file=sys.stderr)
        return 1


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, not below `least`."""

    def whole_number(text: str) -> int:
        try:
            if (value := int(text)) >= least:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text}")

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
