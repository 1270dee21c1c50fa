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
    return HostBatch(EMPTY, (tuple(str(k) for k in range(used)),), skips)


BROKEN, LONG = Skip("a", "broken_image", "a.png: cut off"), Skip("b", "too_long", "900 tokens, a row holds 800")


def test_counts_by_reason_and_names_each_once(caplog):
    skip_statistics = SkipStatistics()
    with caplog.at_level(logging.WARNING, "vr_jax.data"):
        for _ in range(3):  # three epochs
            skip_statistics.update(batch(50, BROKEN, LONG))
    assert skip_statistics.counts == {"broken_image": 3, "too_long": 3}
    assert skip_statistics.used == 150
    assert [record.getMessage() for record in caplog.records] == [
        "skipped sample a (broken_image): a.png: cut off",
        "skipped sample b (too_long): 900 tokens, a row holds 800",
    ]


def test_stops_above_the_fraction_with_the_list():
    skip_statistics = SkipStatistics(max_fraction=0.01)
    skip_statistics.update(batch(99, BROKEN))
    skip_statistics.check()  # exactly one per cent is allowed
    skip_statistics.update(batch(0, LONG))
    with pytest.raises(TooManySkips) as caught:
        skip_statistics.check()
    message = str(caught.value)
    assert "2 of 101 samples could not be used (1.98%, allowed 1.00%)" in message
    assert "broken_image (1):\n  a: a.png: cut off\ntoo_long (1):\n  b: 900 tokens" in message


def test_says_nothing_before_the_minimum_unless_the_run_is_over():
    skip_statistics = SkipStatistics(min_samples=100)
    skip_statistics.update(batch(50, BROKEN, LONG))
    skip_statistics.check()
    with pytest.raises(TooManySkips):
        skip_statistics.check(final=True)


def test_long_lists_are_cut():
    skip_statistics = SkipStatistics()
    skip_statistics.update(batch(0, *(Skip(f"s{k}", "missing_image", "gone") for k in range(150))))
    with pytest.raises(TooManySkips, match=r"\.\.\. and 130 more"):
        skip_statistics.check()


def test_state_survives_json(caplog):
    skip_statistics = SkipStatistics()
    skip_statistics.update(batch(60, BROKEN))
    resumed = SkipStatistics()
    resumed.set_state(json.loads(json.dumps(skip_statistics.get_state())))
    assert resumed == skip_statistics
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vr_jax.data"):
        resumed.update(batch(60, BROKEN))
    assert not caplog.records  # named before
    assert resumed.skipped == 2
    np.testing.assert_allclose(resumed.fraction, 2 / 122)
