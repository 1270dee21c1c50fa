"""The packing benchmark draws the mixture, and the batches of phase 2 are full on it."""

import re
import statistics

import numpy as np
import pytest

from benchmarks.input import mixture, packed_step, packing
from vr_jax.model.batch import BatchShape
from vr_jax.model.config import VlmConfig


@pytest.fixture(scope="module")
def samples():
    return mixture.mixture(1500)


def test_the_mixture_is_as_large_as_that_of_llava_next(samples):
    assert sum(part.thousands for part in mixture.MIXTURE) == 779
    assert samples == mixture.mixture(1500), "the same samples every time"
    text_only = [sample for sample in samples if sample.image is None]
    assert len(text_only) / len(samples) == pytest.approx(40 / 779, abs=0.02)
    assert max(sample.text for sample in text_only) <= mixture.LONGEST_TEXT


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_rows_of_phase_2_are_full(samples, stride):
    """The goal is 95 % of the token slots, and an update has about the number of samples that the config states."""
    config = packing.config_of(stride, "0.5b", "phase2")
    model = VlmConfig.from_dict(config.model.to_dict())
    sizes = [sample.size(model) for sample in samples]
    assert {tiles for _, tiles in sizes} >= {0, 3, 5, 7, 10}
    shape = BatchShape(rows=config.batch.rows, tokens=config.batch.tokens, tiles=config.batch.tiles, tile_size=0)
    batches = packed_step.packed(sizes, shape)
    used = packing.use(sizes, [(row, shape.tokens, shape.tiles) for batch in batches for row in batch])
    shares = np.divide(used.used, used.slots)
    assert shares[0] >= 0.95
    assert shares[1] >= 0.85
    assert used.samples / len(batches) == pytest.approx(config.samples_per_step, rel=0.06)


def test_ways_to_pad():
    sizes = [(10, 1), (20, 2), (30, 3), (40, 0)]
    one = packing.static(sizes, tokens=50)
    assert (one.slots, one.used, one.samples) == ((200, 12), (100, 6), 4)
    pairs = packing.dynamic(sizes, packing.shuffled_groups(4, device=2))
    assert pairs.slots == (20 + 20 + 40 + 40, 6)
    groups = packing.sampler_groups([(length, 1) for length in (1, 2, 3, 4, 5, 6, 7, 8)], devices=2, device=4)
    assert sorted(k for group in groups for k in group) == list(range(8))
    assert statistics.pstdev(sum(k + 1 for k in group) for group in groups) < 1, "balanced"


def test_script_prints_both_phases(monkeypatch, capsys):
    """One ratio is enough here, because the other tests have all of them."""
    monkeypatch.setattr(packing, "STRIDES", (3,))
    packing.main(["--samples=500"])
    printed = capsys.readouterr().out
    assert re.findall(r"^phase (\d), 0.5b, 1/9: ", printed, re.MULTILINE) == ["2", "1"]
    assert printed.count(" of 500 samples do not fit") == 2
    used = [float(share) for share in re.findall(r"^  packed +([\d.]+) % ", printed, re.MULTILINE)]
    assert len(used) == 2
    assert min(used) > 95
    ratios = [float(ratio) for ratio in re.findall(r"x ([\d.]+)$", printed, re.MULTILINE)]
    assert len(ratios) == 6
    assert min(ratios[:3]) > 1  # In phase 1 the samples are about equally long, so there is little to gain.


def test_too_few_samples_are_named(monkeypatch):
    monkeypatch.setattr(packing, "STRIDES", (3,))
    with pytest.raises(SystemExit, match="20 samples do not fill one batch"):
        packing.main(["--samples=20"])


@pytest.mark.slow
def test_measured_step():
    """It is slow because it compiles two training steps.

    Four samples of 60 tokens and one tile fill a row. A row for each has four times the tokens and as many tiles.
    """
    text = packed_step.measured_step([(60, 1)] * 30, tokens=256, tiles=4, rounds=1)
    assert text.startswith("train step of a small model, 4 samples")
    packed, single = (float(ratio) for ratio in re.findall(r"\(x ([\d.]+)\)$", text, re.MULTILINE))
    assert packed == 1
    assert 1 < single < 4
