"""Alternatives take turns, the calls before the timed ones do not count, and the table shows medians and ratios."""

import itertools

import pytest

from benchmarks import timing


@pytest.fixture
def timings(monkeypatch):
    """Two alternatives on a clock that they advance: `slow` takes 100 s at first, then 2, 8 and 4 s; `fast` 1 s."""
    now = 0.0
    durations = {"fast": itertools.repeat(1.0), "slow": iter([100.0, 2.0, 8.0, 4.0])}
    order = []

    def call(name):
        def advance():
            nonlocal now
            order.append(name)
            now += next(durations[name])

        return advance

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = timing.side_by_side({name: call(name) for name in durations}, rounds=3, warmup=1)
    assert order == ["fast", "slow"] * 4
    return found


def test_medians_and_spread_of_the_timed_calls(timings):
    assert timings == {"fast": timing.Timing(1.0, 1.0, 1.0), "slow": timing.Timing(4.0, 2.0, 8.0)}


def test_the_table_compares_with_the_base(timings):
    title, fast, slow = timing.report("both", timings, "fast").splitlines()
    assert title == "both"
    assert fast.endswith("1000.0 ms (1000.0 .. 1000.0)   x 1.00 of fast")
    assert slow.endswith("4000.0 ms (2000.0 .. 8000.0)   x 4.00 of fast")
