"""Tests of the evaluation of a checkpoint: incomplete settings, and how checkpoints are told apart."""

from __future__ import annotations

import pytest

from tests.inference import tiny
from vr_jax.errors import UserError
from vr_jax.evaluation import evaluate, fingerprint
from vr_jax.settings import EvaluationSettings


def test_incomplete_and_contradictory_settings_are_refused():
    with pytest.raises(UserError, match="missing: --checkpoint, --benchmark"):
        evaluate(EvaluationSettings())
    with pytest.raises(UserError, match="choose a split for one benchmark only"):
        evaluate(EvaluationSettings(checkpoint="a", benchmark="gqa,mme", split="val"))


def test_a_fingerprint_depends_on_the_checkpoint_and_on_nothing_else(tmp_path):
    model = tiny.save(tmp_path / "model")
    first = fingerprint(model)
    (model / "eval").mkdir()
    (model / "eval" / "more.txt").write_text("not part of the checkpoint")
    assert fingerprint(model) == first
    assert fingerprint(tiny.save(tmp_path / "saved again")) != first
    config = model / "config.json"
    config.write_text(config.read_text().replace("anyres", "pad", 1))
    assert fingerprint(model) != first
