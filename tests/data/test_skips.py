"""Skipped samples are counted by reason, logged in bounded lines, and stop a run once they are surely too many."""

import json
import logging

import numpy as np
import pytest

from vr_jax.data.collate import collate
from vr_jax.data.images import MAX_PIXELS
from vr_jax.data.skips import (
    MAX_DETAIL,
    MAX_ID,
    REASONS,
    REMEDIES,
    SkipRecord,
    SkipStatistics,
    TooManySkips,
    one_line,
    probably_above,
    surely_above,
)
from vr_jax.data.types import HostBatch, Skip
from vr_jax.model.batch import BatchShape
from vr_jax.settings import DataSettings

EMPTY = collate([], BatchShape(rows=1, tokens=1, tiles=1, tile_size=1)).batch


def batch(used: int, *skips: Skip) -> HostBatch:
    """A batch of `used` samples before which the others were skipped."""
    return HostBatch(EMPTY, (tuple(str(k) for k in range(used)),), skips)


BROKEN, LONG = Skip("a", "broken_image", "a.png: cut off"), Skip("b", "too_long", "900 tokens, a row holds 800")


def gone(count: int) -> list[Skip]:
    return [Skip(f"s{k}", "missing_image", "gone") for k in range(count)]


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


def test_many_skips_of_one_reason_are_logged_in_few_lines_and_kept_in_little_space(caplog):
    statistics = SkipStatistics(max_fraction=1)
    with caplog.at_level(logging.WARNING, "vr_jax.data"):
        statistics.update(batch(0, *gone(1000), LONG))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 20 + len([32, 64, 128, 256, 512]) + 1
    assert "Skipped 512 samples (missing_image) so far; set data.images to the folder" in messages[-2]
    assert statistics.counts == {"missing_image": 1000, "too_long": 1}
    assert len(statistics.get_state()["examples"]) == 21


def test_too_many_skips_stop_the_run_with_a_list_of_counts_and_remedies():
    statistics = SkipStatistics(max_fraction=0.01)
    statistics.update(batch(20, BROKEN, *gone(29)))
    with pytest.raises(TooManySkips) as caught:
        statistics.check()
    message = str(caught.value)
    assert message.startswith("30 of 50 samples could not be used (60.00%, but at most 1.00% are allowed, max_skipped)")
    assert "`vr-jax prepare --check`" in message
    assert "broken_image (1); fetch or convert these images anew:\n  a: a.png: cut off\nmissing_image (29)" in message
    assert message.endswith("  ... and 9 more")


@pytest.mark.parametrize(
    ("max_fraction", "needed"), [(0.0, 1), (0.001, 20), (0.01, 20), (0.1, 20), (0.5, 35), (0.9, 256), (1.0, None)]
)
def test_unusable_samples_in_a_row_stop_a_run_after_a_few_dozen(max_fraction, needed):
    stops = [count for count in range(1, 1000) if surely_above(count, 0, max_fraction)]
    assert (stops[0] if stops else None) == needed


def test_healthy_data_go_on_and_bad_data_stop_soon():
    """A thousand orders of data at the limit never stop; data with five times as many skips stop within an epoch."""
    rng = np.random.default_rng(0)

    def first_stop(share: float) -> int | None:
        skipped = np.cumsum(rng.random(20_000) < share)
        count = np.arange(1, 20_001)
        above = skipped * np.log(2) + (count - skipped) * np.log(0.98 / 0.99) >= np.log(1e6)
        stop = int(np.argmax(above)) if above.any() else None
        if stop is not None:  # The arrays of this test say what the function says.
            assert surely_above(int(skipped[stop]), int(count[stop] - skipped[stop]), 0.01)
            assert not surely_above(int(skipped[stop - 1]), int(count[stop - 1] - skipped[stop - 1]), 0.01)
        return stop

    assert [first_stop(0.01) for _ in range(1000)] == [None] * 1000
    assert max(first_stop(0.05) or 20_000 for _ in range(100)) < 2000
    assert max(first_stop(0.5) or 20_000 for _ in range(100)) < 100


def test_few_early_skips_do_not_stop_a_run():
    statistics = SkipStatistics()
    statistics.update(batch(1, *gone(19)))
    statistics.check()
    statistics.update(batch(1900))
    statistics.check(final=True)


@pytest.mark.parametrize(
    ("skipped", "used", "max_fraction", "stops"),
    [
        (2, 64, 0.01, False),
        (5, 61, 0.01, True),
        (1, 9, 0.01, False),
        (3, 7, 0.01, True),
        (10, 0, 0.01, True),
        (0, 5, 0.0, False),
        (1, 10**6, 0.0, True),
        (10, 990, 0.01, False),
        (5, 0, 1.0, False),
        (0, 0, 0.01, False),
    ],
)
def test_the_end_of_a_run_before_an_epoch_is_over(skipped, used, max_fraction, stops):
    assert probably_above(skipped, used, max_fraction) == stops
    statistics = SkipStatistics(max_fraction)
    statistics.update(batch(used if used < 1000 else 1000, *gone(skipped)))
    if stops:
        with pytest.raises(TooManySkips):
            statistics.check(final=True)
    else:
        statistics.check(final=True)


def test_what_a_record_holds_is_cut_to_a_line():
    """A base64 image in the place of a file name would fill the log and every checkpoint."""
    detail = f"The image path {'QUJD' * 50_000!r}\nleads out of the image folder; set images to another one."
    skip = SkipRecord("outside_folder", detail).as_skip("an id\x1b[31m\n" + "x" * 1000)
    assert len(skip.detail) <= MAX_DETAIL
    assert skip.detail.startswith("The image path 'QUJDQUJD")
    assert skip.detail.endswith("leads out of the image folder; set images to another one.")
    assert len(skip.id) <= MAX_ID
    assert skip.id.isprintable()
    assert one_line("a\ud800b", 9) == "a\ufffdb", "a lone surrogate cannot be written to a log"


def test_every_reason_says_what_helps():
    assert set(REMEDIES) == set(REASONS)
    named = "batch.tokens", "batch.tiles", "data.follow_links", "data.max_pixels", "data.images"
    assert all(any(name in remedy for remedy in REMEDIES.values()) for name in named)
    assert DataSettings().max_pixels == MAX_PIXELS


def test_the_counts_of_several_processes_are_added_and_continued_by_one():
    parts = [SkipStatistics(max_fraction=0.1) for _ in range(3)]
    for number, one in enumerate(parts):
        one.update(batch(10, Skip(f"s{number}", "missing_image", "gone"), Skip("both", "broken_image", "torn")))
    total = SkipStatistics(max_fraction=0.1)
    for one in parts:
        total.add_state(json.loads(json.dumps(one.get_state())))
    assert (total.used, total.counts) == (30, {"missing_image": 3, "broken_image": 3})
    assert sorted(total.examples) == ["both", "s0", "s1", "s2"]
    first, other = SkipStatistics(max_fraction=0.1), SkipStatistics(max_fraction=0.1)
    first.set_state(total.get_state())
    other.set_state(total.get_state(), counts=False)
    assert (first.used, first.skipped, other.used, other.skipped) == (30, 6, 0, 0)
    assert other.examples == total.examples, "they are not logged again"


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
