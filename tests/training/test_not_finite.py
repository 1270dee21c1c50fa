"""What a run says about a number that is not finite: the step, likely causes, and the way back, all of it true."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import tiny_run
from vr_jax import sharding
from vr_jax.errors import EXIT_NOT_FINITE
from vr_jax.training.not_finite import FiniteWatch, NotFinite


def watch(tmp_path, *, start=0, newest=None, **changes):
    return FiniteWatch(
        tiny_run(**changes), tmp_path, sharding.make_mesh(fsdp=8), start=start, newest_checkpoint=lambda: newest
    )


def message(call):
    with pytest.raises(NotFinite) as error:
        call()
    assert error.value.exit_code == EXIT_NOT_FINITE == 3
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_first_step_of_a_run_clears_the_learning_rate(tmp_path):
    text = message(lambda: watch(tmp_path).step(1, math.nan, math.nan, ["a", "b"]))
    assert text.startswith("step 1: loss nan, gradient norm nan; nothing of this step is saved or exported. ")
    assert "no update has been made, so the learning rate is not the cause" in text
    assert "There is no checkpoint" in text
    assert "config.optimizer" not in text
    assert text.endswith(": a, b")
    found = json.loads((tmp_path / "non_finite_batch.json").read_text())
    assert found == {"step": 1, "loss": "nan", "grad_norm": "nan", "record_ids": ["a", "b"]}


def test_the_first_step_after_a_checkpoint_clears_it_too(tmp_path):
    text = message(lambda: watch(tmp_path, start=8, newest=8).step(9, 2.0, math.inf, ["a"]))
    assert "step 9: loss 2.0, gradient norm inf" in text
    assert "the parameters of step 8 were finite, so the learning rate is not the cause" in text
    assert "continues from the checkpoint of step 8" in text


def test_a_loss_that_had_risen_points_to_the_settings(tmp_path):
    one = watch(tmp_path, newest=4, **{"optimizer.lr": 0.5})
    for step, loss in enumerate((5.0, 4.0, 9.0, 800.0), start=1):
        one.step(step, loss, 1.0, [])
    text = message(lambda: one.step(5, math.nan, 1.0, ["a"]))
    assert "The loss had risen from 4 in step 2 to 800 in step 4, so suspect the settings first" in text
    assert "lr 0.5" in text
    assert "continues from the checkpoint of step 4" in text


def test_a_loss_that_had_not_risen_points_to_the_samples(tmp_path):
    one = watch(tmp_path)
    for step in (1, 2, 3):
        one.step(step, 5.0 - step / 10, 1.0, [])
    text = message(lambda: one.step(4, math.nan, math.nan, [f"sample {i}" for i in range(30)]))
    assert "The loss had not risen (steps 1..3: 4.7 at the end), so suspect the samples first" in text
    assert "sample 19 and 10 more" in text
    assert "sample 20" not in text


def test_a_single_step_before_leaves_both_open(tmp_path):
    one = watch(tmp_path)
    one.step(1, 5.0, 1.0, [])
    text = message(lambda: one.step(2, math.nan, math.nan, ["a"]))
    assert "Step 1 had loss 5: suspect its update (config.optimizer with lr 0.003" in text
    assert "as much as the samples" in text


def params(**values):
    return {name: jnp.asarray(np.float32(value)) for name, value in values.items()}


def test_parameters_that_an_update_broke_are_named_and_the_settings_are_the_cause(tmp_path):
    one = watch(tmp_path)
    one.parameters(0, params(a=[1, 2], b=0), "trained")
    one.step(1, 5.0, 1.0, [])
    text = message(lambda: one.parameters(1, params(a=[1, math.inf], b=0, c=math.nan), "saved or exported"))
    assert text.startswith("step 1: the parameters a, c are not finite; nothing is saved or exported. ")
    assert "the settings are the cause, not the samples: config.optimizer with lr 0.003" in text
    assert "There is no checkpoint" in text


def test_initial_parameters_that_are_not_finite_are_blamed_on_where_they_come_from(tmp_path):
    one = watch(tmp_path, init_from="/weights/siglip")
    text = message(lambda: one.parameters(0, params(a=math.nan), "trained"))
    assert "the parameters a are not finite; nothing is trained" in text
    assert "They come from config.init_from = '/weights/siglip'" in text
