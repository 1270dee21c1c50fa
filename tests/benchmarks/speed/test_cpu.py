"""The script for a CPU runs all its parts with tiny shapes."""

import re

import pytest

from benchmarks.speed import cpu


@pytest.mark.slow
def test_script(plain_children, capsys):
    """It is slow because it compiles twelve programs, and four processes import their frameworks."""
    assert cpu.main(["--tiny", "--rounds=1"]) == 0
    printed = capsys.readouterr().out
    # The two forms of the cross-attention compute the same in float32, but for rounding.
    difference = re.search(r"relative difference ([\d.e+-]+)$", printed, re.MULTILINE)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    for title in ("forward and backward, 1 rows of 64 tokens", "prefill, 1 prompts", "decode, 1 rows"):
        assert re.search(rf"^{title}\n  baseline .* ms .*\n  vision remember .* ms ", printed, re.MULTILINE)
    assert "outputs agree" in printed
    assert "losses agree" in printed
