"""Which steps are traced, also where a run starts or ends within the chosen ones; no program is run."""

from __future__ import annotations

import jax
import pytest

from vr_jax.errors import ConfigError
from vr_jax.settings import ProfileSettings
from vr_jax.training.profiling import Profiler


@pytest.fixture
def traced(monkeypatch):
    """The profiler's calls."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(traced, tmp_path, *, first_step, steps, start=0, total=10, end=None):
    """The steps that are traced in a run that ends after step `end`."""
    settings = ProfileSettings(first_step=first_step, steps=steps)
    with Profiler(settings, tmp_path, start=start, total=total) as profiler:
        for step in range(start + 1, (end or total) + 1):
            profiler.before(step)
            traced.append(step)
            profiler.after(step, None)
    if "start" not in traced:
        return []
    assert traced.count("start") == traced.count("stop") == 1
    return traced[traced.index("start") + 1 : traced.index("stop")]


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({"first_step": 2, "steps": 3}, [2, 3, 4]),
        ({"first_step": 0, "steps": 3}, [1, 2, 3]),
        ({"first_step": 0, "steps": 2, "start": 4}, [5, 6]),
        ({"first_step": 2, "steps": 4, "start": 3}, [4, 5]),
        ({"first_step": 9, "steps": 4}, [9, 10]),
        ({"first_step": 3, "steps": 4, "end": 4}, [3, 4]),
        ({"first_step": 2, "steps": 2, "start": 5}, []),
        ({"first_step": 0, "steps": 0}, []),
    ],
)
def test_the_chosen_steps_are_traced_as_far_as_the_run_computes_them(traced, tmp_path, chosen, steps):
    assert run(traced, tmp_path, **chosen) == steps


def test_an_error_within_the_chosen_steps_keeps_the_trace_and_is_the_one_that_is_raised(traced, tmp_path):
    def fail():
        with Profiler(ProfileSettings(first_step=0, steps=5), tmp_path, start=0, total=9) as profiler:
            profiler.before(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert traced == ["start", "stop"]


def test_steps_behind_the_last_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.profile\.first_step = 11 lies behind the last update: .* 10"):
        Profiler(ProfileSettings(first_step=11, steps=1), tmp_path, start=0, total=10)
