"""Updates beside a save are timed against updates beside none, and both are told."""

from __future__ import annotations

import re

import pytest

from benchmarks.speed import saving


def test_the_report_has_the_ratio_of_the_medians():
    times = saving.Times(alone=[1.0, 2.0, 9.0], beside=[3.0, 4.0, 1.0], blocked=[0.5], saves=[5.0])
    text = saving.report(times, 3 * 2**20)
    assert "a state of 3 MiB, 1 saves" in text
    assert "3,000.0 ms (median of 3), x 1.50" in text


@pytest.mark.slow  # It compiles the training step of the demo.
def test_script(capsys):
    saving.main(["--tiny", "--rounds=2"])
    printed = capsys.readouterr().out
    alone, beside = map(int, re.findall(r"median of (\d+)", printed))
    assert alone == beside > 0
