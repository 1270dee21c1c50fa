"""The comparison of generation with transformers in miniature: both sides run and agree, and an error shows."""

import numpy as np
import pytest

from benchmarks.speed import generation


@pytest.mark.slow  # Both sides run in processes of their own; parity with transformers is tested in tests/model.
def test_both_sides_agree_and_an_error_shows(plain_children):
    """In float32 the logits and tokens are those of transformers, and with doubled value kernels they are not."""
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


@pytest.mark.slow
def test_script(plain_children, capsys):
    """It is slow because both sides start as processes and import their frameworks."""
    assert generation.main(["--size=tiny", "--rounds=1", "--new_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert "LLaVA-OneVision tiny, float32, batch 1" in printed
    assert "4 of 4 greedy tokens" in printed


def test_a_side_that_fails_is_named():
    found = generation.against_torch("tiny", dtype="float32", rounds=1, timeout=0)
    assert set(found["errors"]) == {"vr_jax", "torch"}
    assert "agreement" not in found
    assert generation.text_of(found).count("not measured") == 2


def test_agreement_in_bfloat16():
    """The distance to float32 decides: twice that of transformers is rounding, and more is an error."""
    rng = np.random.default_rng(0)
    exact, noise = rng.normal(size=(2, 50)), rng.normal(size=(2, 50)) * 1e-3
    tokens = np.zeros((2, 3), int)
    theirs = {"logits": exact + noise, "reference": exact, "tokens": tokens}
    assert generation.agreement({"logits": exact - 1.5 * noise, "tokens": tokens}, theirs)["agree"]
    assert not generation.agreement({"logits": exact - 3 * noise, "tokens": tokens}, theirs)["agree"]
