"""The operations that Vision Remember adds are counted, and the compilation of a training step is timed."""

import re

import pytest

from benchmarks.speed import step_cost


@pytest.mark.slow
def test_script(capsys):
    """It is slow because it compiles the training step of the demo and nine smaller programs without a cache."""
    step_cost.main(["--size=tiny"])
    printed = capsys.readouterr().out
    seconds = re.search(r"compiled in ([\d.]+) s \(traced ([\d.]+), lowered ([\d.]+), compiled ([\d.]+);", printed)
    assert seconds is not None
    whole, *parts = map(float, seconds.groups())
    assert whole == pytest.approx(sum(parts), abs=0.21)  # Each of the four numbers is rounded to a tenth.
    shares = dict(re.findall(r"^  (absorbed|plain) .* GFLOP, +([\d.]+)% \(2 blocks", printed, re.MULTILINE))
    assert 0 < float(shares["absorbed"]) < float(shares["plain"])


@pytest.mark.parametrize(("size", "tiles", "tokens"), [("qwen2_5_vl", 96, 48 * 32 + 2), ("minicpm_v", 10, 10 * 66 + 4)])
def test_prompts_of_the_models_of_table_six(size, tiles, tokens):
    """12 x 8 attention windows of 16 tokens; ten slices of 64 tokens with their markers."""
    baseline, remember = step_cost.prefill_models(size)
    prompt = step_cost.abstract_prompt(remember, step_cost.TABLE6[size])
    assert prompt.tile_pixels.shape[:2] == (1, tiles)
    assert prompt.tokens.shape == (1, tokens + step_cost.TEXT_TOKENS)
    assert baseline.refusion is None
    assert remember.refusion is not None
