"""Fitting the rows of an update to a mesh: refused with both numbers, or raised by a rule that is named."""

from __future__ import annotations

import pytest

from tests.training.tiny import tiny_run
from vr_jax.errors import ConfigError
from vr_jax.settings import load_config
from vr_jax.training import fit_batch

PHASE2 = "configs/llava_vr_qwen2_0_5b.py:phase2"


def test_rows_that_divide_are_kept_and_the_learning_rate_is_told():
    config = tiny_run()
    fit = fit_batch(config, 2, 4)
    assert fit.config == config
    assert fit.rule == "learning rate 0.003 as the config has it, for about 8 samples per update"


def test_the_papers_second_phase_on_256_chips_is_refused_with_both_numbers():
    with pytest.raises(ConfigError) as error:
        fit_batch(load_config(PHASE2), 1, 256)
    message = str(error.value)
    assert message.startswith("config.batch.rows = 8 is not divisible by 256 = replica 1 x fsdp 256 x accumulation 1: ")
    assert "needs 256 rows, about 1024 samples per update where config.samples_per_step = 32" in message
    assert "config.mesh.tensor" in message
    assert "config.batch.raise_rows=keep_lr, linear_lr or sqrt_lr" in message
    assert "\n" not in message


@pytest.mark.parametrize(("rule", "lr"), [("keep_lr", 2e-4), ("linear_lr", 2e-4 * 32), ("sqrt_lr", 2e-4 * 32**0.5)])
def test_a_named_rule_raises_the_rows_and_says_which_learning_rate_applies(rule, lr):
    overrides = [f"batch.raise_rows={rule}", "optimizer.lr_groups=(('decoder.*', 1e-4),)"]
    fit = fit_batch(load_config(PHASE2, overrides), 1, 256)
    assert (fit.config.batch.rows, fit.config.samples_per_step) == (256, 1024)
    assert fit.config.optimizer.lr == pytest.approx(lr)
    assert fit.config.optimizer.lr_groups == (("decoder.*", pytest.approx(lr / 2)),)
    assert fit.rule.startswith(f"learning rate 0.0002 for 32 samples per update is {lr:g} for 1024")
    assert f"config.batch.raise_rows = '{rule}'" in fit.rule


def test_micro_batches_count_as_pieces():
    with pytest.raises(ConfigError, match=r"divisible by 16 = replica 1 x fsdp 8 x accumulation 2: this mesh needs 16"):
        fit_batch(tiny_run(**{"batch.accumulation": 2}), 1, 8)
    fit = fit_batch(tiny_run(**{"batch.accumulation": 3, "batch.raise_rows": "keep_lr"}), 1, 8)
    assert (fit.config.batch.rows, fit.config.samples_per_step) == (24, 24)


def test_rows_alone_are_refused_where_the_samples_set_the_number_of_updates():
    with pytest.raises(ConfigError, match=r"rows = 256 without config\.samples_per_step: 8 rows held 32 "):
        load_config(PHASE2, ["batch.rows=256"])
    load_config(PHASE2, ["batch.rows=256", "samples_per_step=1024"])
    load_config(PHASE2, ["batch.rows=256", "steps=10"])
