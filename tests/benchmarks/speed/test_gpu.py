"""The script for a GPU writes a page and its numbers, at tiny size on any device."""

import json

import pytest

from benchmarks.speed import gpu


@pytest.mark.slow
def test_script(plain_children, tmp_path, capsys):
    """It is slow because its parts start ten processes, each of which imports a framework."""
    status = gpu.main(["--tiny", f"--output={tmp_path}"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["against_torch"]["batch 1, bfloat16"]["agreement"]["agree"]
    assert set(results["systems"]) == {"uncompressed", "baseline 1/9", "Vision Remember 1/9"}
    assert results["training"].keys() == {"0.5b", "0.5b, remat dots"}
    assert all(report["agree"] for report in results["training"].values())
    assert "outputs agree" in (tmp_path / "gpu.md").read_text()
    assert "outputs agree" in printed.out


def test_no_time_left(tmp_path):
    """Parts without time are named, and the goals are not measured."""
    assert gpu.main(["--minutes=0", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("skipped: 0 s left of 0 minutes") == len(gpu.PARTS) == 9
    assert {goal["reached"] for goal in json.loads((tmp_path / "gpu.json").read_text())["goals"]} == {None}
