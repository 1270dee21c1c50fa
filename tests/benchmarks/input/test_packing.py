"""The mixture of the packing benchmark, and that phase 2's shapes are full on it."""

import statistics

import numpy as np
import pytest

import benchmarks.input.packing
from vr_jax.model.batch import BatchShape
from vr_jax.model.config import VlmConfig


@pytest.fixture(scope="module")
def packing():
    return benchmarks.input.packing


@pytest.fixture(scope="module")
def samples(packing):
    return packing.mixture(1500)


def test_the_mixture_is_as_large_as_llava_nexts(packing, samples):
    assert sum(part.thousands for part in packing.MIXTURE) == 779
    assert samples == packing.mixture(1500), "the same samples every time"
    text_only = [sample for sample in samples if sample.image is None]
    assert len(text_only) / len(samples) == pytest.approx(40 / 779, abs=0.02)
    assert max(sample.text for sample in text_only) <= packing.LONGEST_TEXT


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_rows_of_phase_2_are_full(packing, samples, stride):
    """The goal is 95 % of the token slots, and the number of updates fits the number of samples in one."""
    config = packing.config_of(stride, "0.5b", "phase2")
    model = VlmConfig.from_dict(config.model.to_dict())
    sizes = [sample.size(model) for sample in samples]
    assert {tiles for _, tiles in sizes} >= {0, 3, 5, 7, 10}
    shape = BatchShape(rows=config.batch.rows, tokens=config.batch.tokens, tiles=config.batch.tiles, tile_size=0)
    batches = packing.packed(sizes, shape)
    used = packing.use(sizes, [(row, shape.tokens, shape.tiles) for batch in batches for row in batch])
    shares = np.divide(used.used, used.slots)
    assert shares[0] >= 0.95
    assert shares[1] >= 0.85
    assert used.samples / len(batches) == pytest.approx(config.samples_per_step, rel=0.06)


def test_ways_to_pad(packing):
    sizes = [(10, 1), (20, 2), (30, 3), (40, 0)]
    one = packing.static(sizes, tokens=50)
    assert (one.slots, one.used, one.samples) == ((200, 12), (100, 6), 4)
    pairs = packing.dynamic(sizes, packing.shuffled_groups(4, device=2))
    assert pairs.slots == (20 + 20 + 40 + 40, 6)
    groups = packing.sampler_groups([(length, 1) for length in (1, 2, 3, 4, 5, 6, 7, 8)], devices=2, device=4)
    assert sorted(k for group in groups for k in group) == list(range(8))
    assert statistics.pstdev(sum(k + 1 for k in group) for group in groups) < 1, "balanced"
