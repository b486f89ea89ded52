"""A short run of the fuzzer, and that it finds what there is to find. The long one: python -m tests.fuzz."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

for library in ("cv2", "onnx", "onnxruntime", "rosbags", "tokenizers"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from mm_edge import recording
from tests.fuzz import fuzz

ROOT = Path(__file__).parents[1]


def test_hostile_input_ends_as_an_edge_error_or_a_clean_result():
    arguments = ["--messages", "3000", "--bundles", "200", "--recordings", "60", "--seed", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    result = json.loads(done.stdout)
    assert (result["findings"], done.returncode) == ([], 0)
    assert (result["messages"], result["bundles"], result["recordings"]) == (3000, 200, 60)
    for kind in ("messages", "bundles", "recordings"):  # neither is all of it refused at the door, nor all harmless
        ends = [counts for label, counts in result["ends"].items() if label.startswith(kind)]
        assert sum(counts.get("accepted", 0) for counts in ends) > 0
        assert sum(counts.get("refused", 0) for counts in ends) > 0


class Planted:
    """One case, and what it does."""

    def __init__(self, attempt: Callable[[], bool], folder: Path):
        self.attempt = attempt

    def cases(self, random):
        yield "planted", self.attempt.__name__, self.attempt


def fails() -> bool:
    raise ValueError("no EdgeError")


def fails_in_our_code_and_is_named() -> bool:
    with recording.named("run", "cannot be read"):
        recording._absolute(7)


def ends_the_process() -> bool:
    os.abort()


def hangs() -> bool:
    while True:
        pass


def takes_400_mb() -> bool:
    return bool(np.ones(400 * 2**20, np.uint8)[0])


KEPT = []


def keeps_40_mb() -> bool:
    KEPT.append(np.ones(40 * 2**20, np.uint8))
    return True


def is_well() -> bool:
    return True


def test_whatever_goes_wrong_is_found_and_the_rest_is_still_tried():
    kinds = {
        a.__name__: partial(Planted, a)
        for a in (fails, fails_in_our_code_and_is_named, ends_the_process, hangs, is_well)
    }
    report = fuzz([(name, "the seed") for name in kinds], kinds)
    found = {finding["what"].split(":")[0]: finding["exception"].split("\n")[0] for finding in report.findings}
    assert found == {
        "fails": "ValueError: no EdgeError",
        "fails_in_our_code_and_is_named": "AttributeError: 'int' object has no attribute 'lstrip'",
        "ends_the_process": "the process ended with -6",
        "hangs": "took longer than 1 s",
    }
    assert {finding["seed"] for finding in report.findings} == {"the seed"}
    assert report.tried["is_well: planted", "accepted"] == 1


def test_a_leak_is_found_however_few_jobs_a_worker_gets(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    report = fuzz([("planted", "the seed")] * 10, {"planted": partial(Planted, keeps_40_mb)})
    (finding,) = report.findings
    grew = re.fullmatch(r"resident memory grew by (\d+) MB", finding["exception"])
    assert grew and 200 <= int(grew[1]) < 300, finding


def test_a_jump_in_memory_is_found(monkeypatch):
    monkeypatch.setattr("tests.fuzz.SLOW_S", 60)  # some machines take long to hand out so much
    larger_before = np.ones(500 * 2**20, np.uint8)  # than the worker gets: of no account, it is another process
    report = fuzz([("planted", "the seed")], {"planted": partial(Planted, takes_400_mb)})
    del larger_before
    (finding,) = report.findings
    jumped = re.fullmatch(r"memory jumped by (\d+) MB", finding["exception"])
    assert jumped and int(jumped[1]) > 300, finding
