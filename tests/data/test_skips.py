"""Skipped samples are counted by reason, logged once, and stop a run when there are too many."""

import json
import logging

import numpy as np
import pytest

from vr_jax.data.collate import collate
from vr_jax.data.skips import SkipStatistics, TooManySkips
from vr_jax.data.types import HostBatch, Skip
from vr_jax.model.batch import BatchShape

EMPTY = collate([], BatchShape(rows=1, tokens=1, tiles=1, tile_size=1)).batch


def batch(used: int, *skips: Skip) -> HostBatch:
    """A batch of `used` samples before which the others were skipped."""
    return HostBatch(EMPTY, (tuple(str(k) for k in range(used)),), skips)


BROKEN, LONG = Skip("a", "broken_image", "a.png: cut off"), Skip("b", "too_long", "900 tokens, a row holds 800")


def test_skips_are_counted_by_reason_and_logged_once(caplog):
    statistics = SkipStatistics()
    with caplog.at_level(logging.WARNING, "vr_jax.data"):
        for _ in range(3):  # Each call stands for one epoch.
            statistics.update(batch(50, BROKEN, LONG))
    assert statistics.counts == {"broken_image": 3, "too_long": 3}
    assert statistics.used == 150
    assert [record.getMessage() for record in caplog.records] == [
        "Skipped sample a (broken_image): a.png: cut off",
        "Skipped sample b (too_long): 900 tokens, a row holds 800",
    ]


def test_too_many_skips_stop_the_run_with_a_list():
    statistics = SkipStatistics(max_fraction=0.01)
    statistics.update(batch(99, BROKEN))
    statistics.check()  # Exactly one per cent is allowed.
    statistics.update(batch(0, LONG))
    with pytest.raises(TooManySkips) as caught:
        statistics.check()
    message = str(caught.value)
    assert "2 of 101 samples could not be used (1.98%, but at most 1.00% are allowed)" in message
    assert "broken_image (1):\n  a: a.png: cut off\ntoo_long (1):\n  b: 900 tokens" in message


def test_few_samples_do_not_stop_a_run_unless_it_is_over():
    statistics = SkipStatistics(min_samples=100)
    statistics.update(batch(50, BROKEN, LONG))
    statistics.check()
    with pytest.raises(TooManySkips):
        statistics.check(final=True)


def test_long_lists_are_shortened():
    statistics = SkipStatistics()
    statistics.update(batch(0, *(Skip(f"s{k}", "missing_image", "gone") for k in range(150))))
    with pytest.raises(TooManySkips, match=r"\.\.\. and 130 more"):
        statistics.check()


def test_state_survives_json(caplog):
    statistics = SkipStatistics()
    statistics.update(batch(60, BROKEN))
    resumed = SkipStatistics()
    resumed.set_state(json.loads(json.dumps(statistics.get_state())))
    assert resumed == statistics
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vr_jax.data"):
        resumed.update(batch(60, BROKEN))
    assert not caplog.records, "the sample was logged before the checkpoint"
    assert resumed.skipped == 2
    np.testing.assert_allclose(resumed.fraction, 2 / 122)
