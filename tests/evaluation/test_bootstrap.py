"""Bootstrap intervals against scipy's bootstrap and against what theory says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from vr_jax.evaluation.bootstrap import Stratum, balanced, draws, interval, plain, plain_estimates, value

RNG = np.random.default_rng(0)


def test_interval_of_a_mean_is_scipys():
    scores = (RNG.random(400) < 0.3).astype(float)
    low, high = interval(draws(plain(scores), "a", resamples=20_000))
    expected = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert value(plain(scores)) == pytest.approx(100 * scores.mean())
    # Both are Monte Carlo; one item is a quarter of a point.
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.3)


def test_strata_are_drawn_apart_and_weighted():
    groups = [RNG.random(50), RNG.random(500) * 0.2, np.full(3, 0.5)]
    strata = balanced(groups)
    assert value(strata) == pytest.approx(100 * np.mean([group.mean() for group in groups]))
    drawn = draws(strata, "b", resamples=20_000)
    expected = np.sqrt(sum((100 * group.std()) ** 2 / len(group) for group in groups)) / 3
    assert drawn.std() == pytest.approx(expected, rel=0.03)
    assert drawn.mean() == pytest.approx(value(strata), abs=4 * expected / np.sqrt(20_000))
    constant = [Stratum(0.0, 100 * groups[0]), Stratum(1.0, np.full(7, 25.0))]
    assert interval(draws(constant, "c")) == (25.0, 25.0)


def test_draws_depend_on_the_name_alone():
    strata = plain(RNG.random(30))
    assert np.array_equal(draws(strata, "gqa"), draws(strata, "gqa"))
    assert not np.array_equal(draws(strata, "gqa"), draws(strata, "mme"))
    large = plain(RNG.random(3_000_000))  # drawn in pieces
    assert draws(large, "x", resamples=3).std() < 0.1


def test_categories_in_order_of_appearance():
    found = plain_estimates(["b", "a", "b"], [1.0, 0.0, 0.5])
    assert value(found.overall) == pytest.approx(50)
    assert {name: value(strata) for name, strata in found.categories.items()} == {"b": 75, "a": 0}
    assert list(found.categories) == ["b", "a"]
