"""A model directory is loaded with the settings and the types that it holds, and says in what it is computed."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference import tiny
from vr_jax.errors import UserError
from vr_jax.inference import Generator, load_for_inference, load_processor, with_penalty
from vr_jax.model.adaptation import quantised_model
from vr_jax.model.parameters import flatten_params, unflatten_params
from vr_jax.model.quantization import dequantise
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


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_the_kernels_of_linear_layers_alone(directory, kind, caplog):
    pytest.importorskip("qwix")
    plain = flatten_params(load_for_inference(directory).model)
    with caplog.at_level(logging.INFO, "vr_jax.inference"):
        found = flatten_params(load_for_inference(directory, weights=kind).model)
    assert f"parameters in {kind} (kernels of linear layers) and bfloat16" in caplog.text
    kept = {path for path in found if path in plain}
    assert {path for path in plain if path not in kept} == {
        path
        for path in plain
        if path.endswith(".kernel") and not path.startswith(("decoder.lm_head", "encoder.patch_embed"))
    }
    assert all(np.array_equal(found[path], plain[path]) for path in kept)
    stem = "decoder.stages.1.mlp.down.kernel"
    value, exact = dequantise(found[f"{stem}_codes"], found[f"{stem}_scale"]), plain[stem].astype(jnp.float32)
    error = float(jnp.abs(value - exact).max() / jnp.abs(exact).max())
    assert 0 < error < (0.005 if kind == "int8" else 0.2)


@pytest.mark.slow  # Two models are compiled.
def test_answers_with_int8_weights_are_those_of_the_dequantised_model():
    """Also in decoding, which unstacks the layers on CPUs."""
    pytest.importorskip("qwix")
    config = tiny.config()
    prompts = list(tiny.prompts(config).values())[:2]
    quantised = quantised_model(tiny.model(config), "int8")
    stored = flatten_params(quantised)
    plain = {
        path: dequantise(stored[f"{path}_codes"], stored[f"{path}_scale"]) if f"{path}_codes" in stored else leaf
        for path, leaf in flatten_params(tiny.model(config)).items()
    }
    models = quantised, unflatten_params(tiny.model(config), plain)
    found, expected = (
        Generator(one, tiny.TOKENIZER, tiny.BUCKETS).generate(prompts, max_new_tokens=6, rows=2) for one in models
    )
    assert [reply.tokens for reply in found] == [reply.tokens for reply in expected]


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
