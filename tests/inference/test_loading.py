"""A model directory is loaded with the settings and the types that it holds, and says in what it is computed."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import pytest

from tests.inference import tiny
from vr_jax.errors import UserError
from vr_jax.inference import load_for_inference, load_processor, with_penalty
from vr_jax.model_directory import GenerationSettings, save_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model whose parameters are bfloat16 and whose config computes in float32."""
    folder = tmp_path_factory.mktemp("loading")
    tiny.TOKENIZER.save_pretrained(folder / "tokenizer")
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.model(tiny.config()))
    save_model(folder / "model", model, folder / "tokenizer", generation={"repetition_penalty": 1.5, "eos_token_id": 3})
    return folder / "model"


def test_stored_types_are_kept_and_logged(directory, caplog):
    with caplog.at_level(logging.INFO, "vr_jax.inference"):
        loaded = load_for_inference(directory)
        assert "parameters in bfloat16, activations in float32" in caplog.text
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded.model)} == {jnp.dtype(jnp.bfloat16)}
        asked = load_for_inference(directory, dtype="float32")
    assert caplog.records[0].levelname == "WARNING"  # which every command shows
    assert caplog.records[-1].levelname == "INFO"
    assert {leaf.dtype for leaf in jax.tree.leaves(asked.model)} == {jnp.dtype(jnp.float32)}


def test_generation_settings_come_along(directory):
    loaded = load_for_inference(directory)
    assert loaded.generation == GenerationSettings(repetition_penalty=1.5, eos_token_ids=(3,))
    assert with_penalty(loaded.generation, 1.0).repetition_penalty == 1.0
    assert with_penalty(loaded.generation, None) == loaded.generation


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"tokenizer_class": "SiglipTokenizer"}},
        {"tokenizer_config.json": {"tokenizer_class": "NoSuchTokenizer"}},
        {},
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(files, tmp_path):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match="has no usable tokenizer") as error:
        load_processor(tmp_path, tiny.config())
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_truncated_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(UserError, match=r"tokenizer.json is not valid JSON"):
        load_processor(tmp_path, tiny.config())
