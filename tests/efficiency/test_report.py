"""The table, the Markdown page and the plot show the measured numbers."""

import xml.etree.ElementTree as ElementTree

import pytest

from vr_jax.efficiency import JSON, MARKDOWN, PLOT, text
from vr_jax.efficiency.plot import draw


@pytest.mark.slow  # It measures three systems.
def test_the_files_of_a_run(run, found):
    output, _ = run
    page = (output / MARKDOWN).read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| baseline", "| uncompressed", "| fastv"]
    peak = found[1]["fastv"]["memory_bytes"]["compiled_peak"] - found[1]["baseline"]["memory_bytes"]["compiled_peak"]
    assert f"{peak / 2**20:+,.1f}" in lines[4]
    assert lines[4].endswith("| 40.0 |")
    assert "192 -> 48" in lines[4]
    assert "measured peak (peak_bytes_in_use) is not available" in page
    plot = ElementTree.fromstring((output / PLOT).read_text())
    assert plot.tag.endswith("svg")
    assert sorted(path.name for path in output.iterdir()) == sorted((JSON, MARKDOWN, PLOT))


@pytest.mark.slow  # It measures three systems.
def test_the_table_for_the_terminal(run):
    lines = text(run[1], [None] * 3).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["system", "baseline", "uncompressed", "fastv"]
    assert "Values are the median (lowest .. highest) of 3 repeats, in turns" in lines[6]


@pytest.mark.slow  # It measures three systems.
def test_the_plot_has_circles_with_scores_and_bars_without(run, tmp_path):
    draw(run[1], [42.9, 45.0, 40.0], tmp_path / "scores.svg")
    draw(run[1], [None] * 3, tmp_path / "bars.svg")
    with_scores, bars = ((tmp_path / name).read_text() for name in ("scores.svg", "bars.svg"))
    assert with_scores == (run[0] / PLOT).read_text(), "the same numbers give the same file"
    # Matplotlib writes each drawn text as a comment, too.
    for name in ("baseline", "uncompressed", "fastv", "time to first token (ms)"):
        assert name in with_scores
        assert name in bars
    assert "<!-- score -->" in with_scores
    assert "<!-- score -->" not in bars
