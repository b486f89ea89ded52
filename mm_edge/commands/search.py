"""`mm-edge search RECORDINGS... "a red ball"`: the moments in which robots saw it, and a sheet of what they saw.

RECORDINGS are recordings, or folders with recordings at any depth. The first search reads them, one frame a second, and
keeps an index beside them, in `.mm_edge-index`; later ones read only what is new or changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from mm_edge.bundle import SHIPPED_VLM
from mm_edge.cli import at_least
from mm_edge.errors import EdgeError, RecordingError, SampleError
from mm_edge.language import Language
from mm_edge.search import APART_S, RATE_HZ, Index, clock, found, picture, write_sheet
from mm_edge.types import Sample

SHEET = Path("runs/search.jpg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recordings", nargs="+", metavar="RECORDINGS", help="one or more, and last, without --image, the words"
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="look for what is like this picture, not for words")
    parser.add_argument("--bundle", type=Path, default=SHIPPED_VLM, help="the model (default: the shipped one)")
    parser.add_argument("--top", type=at_least(1), default=10, help="how many moments at most (default 10)")
    parser.add_argument(
        "--apart-s", type=_positive, default=APART_S, help=f"between moments of one camera (default {APART_S:g})"
    )
    parser.add_argument(
        "--rate-hz", type=_positive, default=RATE_HZ, help=f"frames a second that are read (default {RATE_HZ:g})"
    )
    parser.add_argument("--sheet", type=Path, default=SHEET, metavar="FILE.jpg", help=f"of what was seen ({SHEET})")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Raises EdgeError for words or a picture that cannot be read, or if there is nothing to search in."""
    paths, text = (args.recordings, "") if args.image else (args.recordings[:-1], args.recordings[-1])
    if not paths:
        raise EdgeError("expected recordings and then what to look for: words, or --image FILE")
    folders = found(paths)
    language = Language(args.bundle)
    if args.image:
        language.look(picture(args.image))
        query = language.seen()
    else:
        query = language.embed(text, lenient=True)
        if unknown := language.unknown(text):
            print(f"words that the model does not know are left out: {', '.join(unknown)}", file=sys.stderr)
    moments = []
    for folder, recordings in folders.items():
        index = Index(folder, language, args.rate_hz)
        if new := index.outdated(recordings):
            print(f"{index.path}: reading {len(new)} of {len(recordings)} recordings", file=sys.stderr)
        for trouble in index.update(recordings, _bar):
            print(trouble, file=sys.stderr)
        moments += index.search(query, recordings, args.top, args.apart_s)
    if not moments:
        raise RecordingError(f"{', '.join(map(str, paths))}: no frame could be read, there is nothing to search in")
    moments = sorted(set(moments), key=lambda moment: (-moment.score, moment))[: args.top]
    write_sheet(args.sheet, moments, language, str(args.image or text))
    print(f"{'score':>6} {'at':>10}  recording, stream")
    for moment in moments:
        print(f"{moment.score:6.3f} {clock(moment.at_s):>10}  {moment.recording}  {moment.stream}")
    print(args.sheet)
    if args.json:
        print(json.dumps({"sheet": str(args.sheet), "moments": [moment._asdict() for moment in moments]}))
    return 0


def _bar(frames: Iterator[Sample | SampleError], name: str, n: int) -> Iterable[Sample | SampleError]:
    return tqdm(frames, name, n, unit=" frames", leave=False, disable=not sys.stderr.isatty())


def _positive(text: str) -> float:
    if not (value := float(text)) > 0 or value == float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
