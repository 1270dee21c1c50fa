"""Failures at random moments lose nothing; the table of the page is replaced row by row."""

from __future__ import annotations

import json

import pytest

from benchmarks.hosts import recovery
from benchmarks.hosts.recovery import Measured, Size, row, write_page


@pytest.mark.slow  # four processes train twelve times: minutes
def test_ten_failures_at_random_moments_lose_nothing(tmp_path):
    """kill -9, SIGTERM and SIGSTOP of random processes (seed 0): metrics and parameters are those without failures."""
    size = Size(processes=4, steps=200, every=10, heartbeat=5.0, failures=10, seed=0)
    found = recovery.random_failures(tmp_path, size, recovery.run_whole(tmp_path, size))
    assert set(found) == {"kill", "terminate", "stop"}
    assert {one.lost for one in found.values()} == {"nothing"}
    assert sum(len(one.ended) for one in found.values()) == 10
    assert max(second for one in found.values() for second in one.ended) < 60
    assert "is lost" in found["kill"].said
    assert "gave no sign of life for 5 s" in found["stop"].said


@pytest.mark.slow  # two processes train six times: minutes
def test_the_script_measures_each_kind_at_a_tiny_size(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{recovery.BEGIN}\n\n| what |\n|---|\n\n{recovery.END}\nbelow\n")
    flags = ["--processes=2", "--steps=12", "--every=4", "--failures=1", f"--page={page}"]
    found = recovery.main(["--only=random,never_starts,clocks", *flags])
    assert {one.lost for one in found.values()} == {"nothing"}
    assert capsys.readouterr().out.count("| nothing |") == 3
    assert page.read_text().count("| nothing |") == 3


def test_rows_are_replaced_by_their_kind(tmp_path):
    page = tmp_path / "page.md"
    other = "| the store answers 503 | 3 | nothing | 0 | - | - |"
    page.write_text(f"above\n{recovery.BEGIN}\n\n{other}\n\n{recovery.END}\nbelow\n")
    for lost in ("the metrics differ", "nothing"):
        found = Measured(lost=lost, ended=[1.0, 3.0], recovered=[10.0, 12.0], redone=[2, 4])
        write_page(page, {"kill": row("kill", found)})
    new = "| `kill -9` of a random process | 2 | nothing | 3 | 2.0 s (1.0 to 3.0) | 11.0 s (10.0 to 12.0) |"
    assert page.read_text() == f"above\n{recovery.BEGIN}\n\n{other}\n{new}\n\n{recovery.END}\nbelow\n"


def test_other_metrics_are_a_loss(tmp_path):
    for name, loss in (("whole", 1.0), ("other", 1.0 + 2**-40)):
        (tmp_path / name).mkdir()
        record = {"step": 1, "loss": loss, "grad_norm": 1.0, "lr": 0.1}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert recovery.compare(tmp_path / "whole", tmp_path / "other") == "the metrics differ"
