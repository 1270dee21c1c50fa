"""The comparisons with transformers in miniature, as a user starts them: both sides run, agree, and an error shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goals import Goal, lines_of
from benchmarks.speed import generation

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_both_sides_agree_and_an_error_shows(monkeypatch):
    """Float32: the same logits and tokens as transformers; with doubled value kernels not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = {"size": "tiny", "dtype": "float32", "batch_size": 2, "new_tokens": 4, "logits": True}
    sides = {
        "vr_jax": {"side": "vr_jax", **common},
        "wrong": {"side": "vr_jax", "wrong": True, **common},
        "torch": {"side": "torch", **common},
    }
    found = generation.measure(sides, rounds=1, warmup=0, timeout=120)
    assert not [side["error"] for side in found.values() if "error" in side]
    assert all(len(side[part]) == 1 for side in found.values() for part in ("first", "decode"))
    arrays = {name: side["arrays"] for name, side in found.items()}
    right = generation.agreement(arrays["vr_jax"], arrays["torch"])
    assert right["agree"]
    assert right["logits"] < 1e-5
    assert right["equal_tokens"] == right["tokens"] == 8
    wrong = generation.agreement(arrays["wrong"], arrays["torch"])
    assert not wrong["agree"]
    assert wrong["logits"] > 0.01


def test_a_side_that_fails_is_named():
    found = generation.against_torch("tiny", dtype="float32", rounds=1, timeout=0)
    assert set(found["errors"]) == {"vr_jax", "torch"}
    assert "agreement" not in found
    assert generation.text_of(found).count("not measured") == 2


@pytest.mark.slow
def test_gpu_script(tmp_path):
    done = start("-m", "benchmarks.speed.gpu", "--tiny", f"--output={tmp_path}")
    output, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["against_torch"]["batch 1, bfloat16"]["agreement"]["agree"]
    assert set(results["systems"]) == {"uncompressed", "baseline 1/9", "Vision Remember 1/9"}
    assert results["training"].keys() == {"0.5b", "0.5b, remat dots"}
    assert all(report["agree"] for report in results["training"].values())
    assert "outputs agree" in (tmp_path / "gpu.md").read_text()
    assert "outputs agree" in output


def test_no_time_left(tmp_path):
    """Parts without time are named, and the goals are not measured."""
    done = start("-m", "benchmarks.speed.gpu", "--minutes=0", f"--output={tmp_path}")
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 0, errors
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("skipped: 0 s left of 0 minutes") == 9
    assert {goal["reached"] for goal in json.loads((tmp_path / "gpu.json").read_text())["goals"]} == {None}


def test_agreement_in_bfloat16():
    """Judged by the distance to float32: twice theirs is rounding, more is not."""
    rng = np.random.default_rng(0)
    exact, noise = rng.normal(size=(2, 50)), rng.normal(size=(2, 50)) * 1e-3
    tokens = np.zeros((2, 3), int)
    theirs = {"logits": exact + noise, "reference": exact, "tokens": tokens}
    assert generation.agreement({"logits": exact - 1.5 * noise, "tokens": tokens}, theirs)["agree"]
    assert not generation.agreement({"logits": exact - 3 * noise, "tokens": tokens}, theirs)["agree"]


def test_goals():
    lines = lines_of([Goal("a", "<=", 6, 5.0), Goal("b", ">=", 2, 1.0), Goal("c", ">=", 2, None)])
    assert [line.split(": ")[1] for line in lines] == ["5.00, reached", "1.00, MISSED", "not measured"]
