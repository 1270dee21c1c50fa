"""The two sides of an update learn alike, and a side that learns otherwise is noticed."""

import numpy as np
import pytest
import torch

from benchmarks.speed import training_sides, training_step, training_work


@pytest.fixture(scope="module")
def tiny():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads that wait for each other are slow beside other tests.
    yield training_work.work("tiny", "float32")
    torch.set_num_threads(threads)


@pytest.mark.slow  # Both sides compile a model.
def test_losses_of_both_sides_agree(tiny, monkeypatch):
    ours = training_sides.run_vr_jax(tiny, rounds=1)
    theirs = training_sides.run_torch(tiny, rounds=1)
    assert len(ours["losses"]) == len(theirs["losses"]) == training_work.COMPARED
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-6)
    assert ours["losses"][2] < ours["losses"][0]

    monkeypatch.setattr(training_sides, "LEARNING_RATE", training_work.LEARNING_RATE * 2)
    others = training_sides.run_torch(tiny, rounds=1)
    sides = {"vr_jax": ours | {"samples": 4}, "torch": theirs | {"samples": 4}}
    monkeypatch.setattr(training_step, "_in_a_process", lambda side, *rest: sides[side])
    assert training_step.training_report("tiny", dtype="float32")["agree"]
    sides["torch"] = others | {"samples": 4}
    report = training_step.training_report("tiny", dtype="float32")
    assert not report["agree"]
    assert "DIFFER" in training_step.text_of(report)


def test_a_row_holds_what_its_samples_are(tiny):
    batch = training_sides.packed(tiny)
    vision = batch.vision_cell >= 0
    assert vision.sum() == tiny.samples * tiny.cells
    # Each cell of the row's tiles stands in exactly one token, in order.
    np.testing.assert_array_equal(batch.vision_cell[vision].reshape(tiny.rows, -1)[0], np.arange(2 * tiny.cells))
    assert batch.loss_mask.sum() == tiny.samples * tiny.targets
    np.testing.assert_array_equal(batch.tokens.reshape(tiny.samples, -1), tiny.tokens())


@pytest.mark.slow
def test_script(plain_children, capsys):
    """It is slow because both sides are processes that import their frameworks."""
    assert training_step.main(["--size=tiny", "--rounds=1", "--dtype=float32"]) == 0
    printed = capsys.readouterr().out
    assert "one update, tiny, float32, remat full, 4 samples: " in printed
    assert "losses agree" in printed
