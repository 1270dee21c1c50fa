"""Fixtures of the tests that run the training loop in this process."""

import dataclasses
import functools
import logging

import pytest

from vr_jax.settings import CheckpointSettings
from vr_jax.training import loop


@pytest.fixture(autouse=True)
def _log_messages(caplog):
    caplog.set_level(logging.INFO, "vr_jax")


@pytest.fixture(scope="module")
def shared_programs():
    """Runs whose updates are the same computation share one program, which is traced once."""
    build_program = functools.cache(loop.build_program)

    def shared(config, mesh, total, tree=None, sources=()):
        same = {"init_from": "", "allow_different": (), "seed": 0, "tokenizer": "", "tensorboard": False}
        return build_program(
            dataclasses.replace(config, checkpoint=CheckpointSettings(), **same), mesh, total, None, sources
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_program", shared)
        yield
