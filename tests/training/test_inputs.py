"""The tokenizer of a run is that of the decoder, whatever the order of the directories."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from tests.training.tiny import tiny_config
from vr_jax.errors import UserError
from vr_jax.model_directory import save_params
from vr_jax.settings import TrainConfig
from vr_jax.training.inputs import tokenizer_directory


@pytest.fixture
def directories(tmp_path):
    """An encoder and a decoder, both with the files of a tokenizer."""
    for role in ("encoder", "decoder"):
        files = tmp_path / f"{role} files"
        files.mkdir()
        (files / "tokenizer.json").write_text("{}")
        save_params(tmp_path / role, {role: {}}, {f"{role}.x": jnp.zeros(2)}, files)
    return tmp_path / "encoder", tmp_path / "decoder"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_tokenizer_is_that_of_the_decoder(order, directories, tmp_path):
    names = ",".join(str(directories[index]) for index in order)
    config = TrainConfig(model=tiny_config(), init_from=names)
    assert tokenizer_directory(config, tmp_path) == directories[1]


def test_an_encoder_alone_brings_no_tokenizer(directories, tmp_path):
    config = TrainConfig(model=tiny_config(), init_from=str(directories[0]))
    with pytest.raises(UserError, match=r"no directory of config.init_from = .* holds a decoder"):
        tokenizer_directory(config, tmp_path)
    config = TrainConfig(model=tiny_config(), init_from=str(directories[0]), tokenizer=str(directories[1]))
    assert tokenizer_directory(config, tmp_path) == directories[1]
