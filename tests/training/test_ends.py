"""What ends a run in this process before its last update, and what it has then saved."""

import json

import numpy as np
import pytest

from tests.training.tiny import VOCABULARY, NoiseIterator, noise_inputs, plain_run, series, twenty_steps
from vr_jax.data.skips import TooManySkips
from vr_jax.data.types import Skip
from vr_jax.errors import UserError
from vr_jax.training import loop
from vr_jax.training.checkpoint import Checkpoints
from vr_jax.training.inputs import Inputs
from vr_jax.training.not_finite import NotFinite

pytestmark = pytest.mark.usefixtures("shared_programs")


def nan_from(step):
    """Inputs whose batches from `step` on have tokens beyond the vocabulary, which make the loss NaN."""

    class Poisoned(NoiseIterator):
        def __next__(self):
            host = super().__next__()
            if self.number < step:
                return host
            return type(host)(host.batch.replace(tokens=host.batch.tokens + VOCABULARY), host.record_ids)

    return lambda config, mesh, workdir: Inputs(Poisoned(config.batch.rows), 1000, None)


@pytest.mark.slow  # A second program looks for the samples.
def test_nan_stops_the_run_names_the_samples_and_saves_nothing_bad(tmp_path):
    config = twenty_steps()
    with pytest.raises(NotFinite) as stop:
        loop.train(config, tmp_path, open_inputs=nan_from(6))
    assert stop.value.exit_code == 3
    message = str(stop.value)
    assert "step 6: loss nan" in message
    assert "continues from the checkpoint of step 4" in message
    ids = [f"6/{row}/{sample}" for row in range(8) for sample in (1, 2)]
    assert all(name in message for name in ids)
    assert "5/0/1" not in message
    assert json.loads((tmp_path / "non_finite_batch.json").read_text())["record_ids"] == ids
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps()[-1] == 4
    assert [s[0] for s in series(tmp_path)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "model").exists()


@pytest.mark.slow  # It trains until the rule is sure.
def test_too_many_unusable_samples_stop_the_run(tmp_path):
    class Skipping(NoiseIterator):
        def __next__(self):
            host = super().__next__()
            skips = tuple(Skip(f"bad/{self.number}/{i}", "broken_image", "cut off") for i in range(2))
            return type(host)(host.batch, host.record_ids, skips)

    def inputs(config, mesh, workdir):
        return Inputs(Skipping(config.batch.rows), 1000, None)

    with pytest.raises(TooManySkips) as stop:
        loop.train(twenty_steps(**{"checkpoint.every": 2}), tmp_path, open_inputs=inputs)
    message = str(stop.value)
    assert "bad/1/0: cut off" in message
    assert "at most 1.00% are allowed" in message


def test_a_run_without_targets_ends_and_saves_nothing(tmp_path):
    """One batch with targets is enough: the first save is after the fourth update."""

    class Untargeted(NoiseIterator):
        def __next__(self):
            host = super().__next__()
            if self.number in answered:
                return host
            return type(host)(host.batch.replace(loss_mask=np.zeros_like(host.batch.loss_mask)), host.record_ids)

    def inputs(config, mesh, workdir):
        return Inputs(Untargeted(config.batch.rows), 1000, None)

    answered, config = (), twenty_steps()
    with pytest.raises(UserError, match=r"^none of the first 4 batches holds a token that is a target"):
        loop.train(config, tmp_path / "none", open_inputs=inputs)
    assert not list((tmp_path / "none" / "checkpoints").glob("[0-9]*"))
    assert not (tmp_path / "none" / "model").exists()
    answered = (2,)
    loop.train(config, tmp_path / "one", open_inputs=inputs)
    assert (tmp_path / "one" / "model").is_dir()


def test_a_last_update_that_breaks_the_parameters_exports_nothing(tmp_path):
    """Loss and gradient of the only step are finite; the update overflows."""
    config = plain_run(**{"steps": 1, "optimizer.lr": 1e30, "optimizer.weight_decay": 1e30})
    with pytest.raises(
        NotFinite, match=r"^step 1: the parameters .* are not finite; nothing is saved or exported"
    ) as stop:
        loop.train(config, tmp_path, open_inputs=noise_inputs())
    assert stop.value.exit_code == 3
    assert "the settings are the cause, not the samples" in str(stop.value)
    assert "There is no checkpoint" in str(stop.value)
    assert not (tmp_path / "model").exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
