"""A tiny model, and its model directory, shared by the tests of a folder."""

from __future__ import annotations

import pytest

from tests.tiny import randomized, tiny_config
from vr_jax.model.vlm import abstract_model
from vr_jax.model_directory import save_model


def abstract(config):
    """The model of a config with shapes in place of arrays."""
    return abstract_model(config)


@pytest.fixture(scope="package")
def model():
    """A model with random values everywhere."""
    return randomized(abstract(tiny_config()))


@pytest.fixture(scope="package")
def saved(model, tmp_path_factory):
    """Its model directory, with a tokenizer."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "model.safetensors").write_text("not a side file")
    save_model(directory, model, tokenizer)
    return directory
