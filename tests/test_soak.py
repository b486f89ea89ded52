"""A short day; the long one is `python -m tests.soak --hours 24`."""

from tests.soak import soak


def test_ten_minutes_with_something_always_wrong():
    result = soak(hours=1 / 6, seed=1)
    assert result["ticks"] > 8000 and result["faults"] > 30 and result["refused"] > 100
    assert 0.1 < result["acted"] / result["ticks"] < 1
    assert result["growth"] < 0.03  # a day allows 1 % after its first hour; here the first minute is hardly warm
