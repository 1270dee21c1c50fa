"""The program of a run before there is data: the abstract batch is what the pipeline's batches are."""

import dataclasses

import jax
import pytest

from tests.training.tiny import tiny_config, tiny_run
from vr_jax import sharding
from vr_jax.data.collate import collate
from vr_jax.errors import ConfigError
from vr_jax.model.batch import BatchShape
from vr_jax.model.config import anyres9_all36
from vr_jax.training.inputs import put_batch
from vr_jax.training.program import abstract_batch, build_program, total_steps


@pytest.mark.parametrize("weighted", [False, True])
def test_the_abstract_batch_is_that_of_collate_and_put_batch(weighted):
    model = tiny_config(**({"image": anyres9_all36(16), "refusion": None} if weighted else {}))
    mesh = sharding.make_mesh()
    shape = BatchShape(rows=8, tokens=24, tiles=2, tile_size=16)
    real = put_batch(collate([], shape, optional=model.batch_fields).batch, mesh)
    config = dataclasses.replace(tiny_run(), model=model)
    planned = abstract_batch(config, mesh)
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert (ours.shape, ours.dtype, ours.sharding) == (theirs.shape, theirs.dtype, theirs.sharding)


def test_total_steps():
    config = tiny_run(steps=0, epochs=1.5, samples_per_step=32)
    assert total_steps(config, 1000) == 47  # 1500 / 32 = 46.9
    assert total_steps(tiny_run(steps=7), 1000) == 7


def test_the_schedule_ends_at_the_last_step():
    program = build_program(tiny_run(), sharding.make_mesh(), 10)
    assert float(program.schedule(10)) == 0.0
    assert float(program.schedule(1)) > 0.0


def test_a_loss_of_no_positions_is_refused():
    with pytest.raises(ConfigError, match=r"config\.loss_chunk = 0: expected an integer >= 1"):
        tiny_run(loss_chunk=0)
