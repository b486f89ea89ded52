"""`make test` runs test files beside each other; a test that is marked `real_time` has the machine for itself."""

import fcntl
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    alone = item.get_closest_marker("real_time")
    with open(__file__) as lock:  # all runs from this clone have it in common
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)
