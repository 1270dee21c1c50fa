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
