"""A short day; the long one is `python -m tests.soak --hours 24`."""

from tests.soak import soak


def test_five_minutes_with_something_always_wrong():
    result = soak(hours=1 / 12, seed=1)
    assert result["ticks"] > 4000 and result["faults"] > 15 and result["refused"] > 50
    assert 0.1 < result["acted"] / result["ticks"] < 1
    assert result["growth"] < 0.03  # a day allows 1 % after its first hour; here the first half minute is hardly warm
