"""Logits of each family against transformers; stages, cache and rematerialisation change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests import torch_weights
from tests.tiny import tiny_decoder
from vr_jax.convert.tables import HEAD, TEXT
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.decoders.transformer import Decoder, TransformerConfig

CONFIGS = {
    "grouped, tied": tiny_decoder(),
    "grouped, untied": tiny_decoder(tie_word_embeddings=False, rope_theta=1e4),
    "multi-head, untied": tiny_decoder(num_kv_heads=4, tie_word_embeddings=False),
    "one key head, tied": tiny_decoder(num_kv_heads=1, rms_norm_eps=1e-5),
    "qwen3": tiny_decoder(attention_bias=False, query_key_norm=True, head_width=16),
    "llama": tiny_decoder(attention_bias=False, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=5e5),
    "mistral": tiny_decoder(attention_bias=False, tie_word_embeddings=False, head_width=8),
    "scales": tiny_decoder(attention_bias=False, embedding_scale=12.0, residual_scale=1.4 / 2, logit_scale=0.25),
}
# The class of transformers that computes each, Qwen2 unless named, and fields that only this class has. MiniCPM's own
# code is not part of transformers: Granite's scales are the same, where its softmax has the usual scale.
FAMILIES = {
    "qwen3": (Qwen3Config, {"head_dim": 16, "attention_bias": False}),
    "llama": (LlamaConfig, {"attention_bias": False, "mlp_bias": False}),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": None}),
    "scales": (
        GraniteConfig,
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 2,
            "logits_scaling": 4.0,
            "attention_multiplier": (24 / 4) ** -0.5,
        },
    ),
}
LENGTH = 17


@functools.cache
def reference(name: str):
    """Our config, their weights, token ids (2, LENGTH) and logits."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    config_class, fields = FAMILIES.get(name, (Qwen2Config, {}))
    model = AutoModelForCausalLM.from_config(
        config_class(
            **fields,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    torch_weights.randomize(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    weights = torch_weights.state_dict(model)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return config, weights, tokens.astype(np.int32), logits


def build(config: TransformerConfig, weights, bounds: tuple[int, ...], remat: str = "none") -> Decoder:
    decoder = nnx.eval_shape(
        lambda: Decoder(
            config,
            bounds=bounds,
            attention_backend="xla",
            remat=remat,
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    return torch_weights.load(decoder, TEXT + HEAD, weights, "decoder.")


def stream_of(decoder: Decoder, tokens) -> DecoderInputs:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return DecoderInputs(hidden=decoder.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))


def head(decoder: Decoder):
    return decoder.embed.embedding[...].T if decoder.config.tie_word_embeddings else decoder.lm_head.kernel[...]


@jax.jit
def logits_of(decoder: Decoder, tokens):
    return decoder(stream_of(decoder, tokens))[0] @ head(decoder)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str):
    config, weights, tokens, logits = reference(name)
    found = logits_of(build(config, weights, (0, config.num_layers)), tokens)
    np.testing.assert_allclose(found, logits, atol=5e-5, rtol=1e-5)


def test_stages_do_not_change_the_result():
    config, weights, tokens, logits = reference("grouped, tied")
    found = logits_of(build(config, weights, (0, 1, 3, 4)), tokens)
    np.testing.assert_allclose(found, logits, atol=5e-5, rtol=1e-5)


def test_prefill_and_decode_with_cache():
    config, weights, tokens, logits = reference("grouped, untied")
    decoder = build(config, weights, (0, 1, 4))
    prompt = 9

    @jax.jit
    def prefill(decoder, tokens):
        return decoder(stream_of(decoder, tokens), decoder.init_cache(2, LENGTH))

    @jax.jit
    def step(decoder, token, position, cache):
        hidden, cache = decoder.decode(decoder.embed(token), position, cache)
        return hidden @ head(decoder), cache

    hidden, cache = prefill(decoder, tokens[:, :prompt])
    np.testing.assert_allclose(np.asarray(hidden) @ head(decoder), logits[:, :prompt], atol=5e-5, rtol=1e-5)
    for i in range(prompt, LENGTH):
        found, cache = step(decoder, tokens[:, i : i + 1], np.full((2, 1), i, np.int32), cache)
        np.testing.assert_allclose(found[:, 0], logits[:, i], atol=5e-5, rtol=1e-5)


def loss(decoder: Decoder, tokens):
    return jnp.sum(jnp.sin(logits_of(decoder, tokens)))


@functools.cache
def plain_gradient():
    config, weights, tokens, _ = reference("grouped, tied")
    return jax.jit(jax.grad(loss))(build(config, weights, (0, 2, 4)), tokens)


@pytest.mark.slow  # Gradients of the decoder are compiled with each form of rematerialisation.
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_keeps_gradients(remat: str):
    config, weights, tokens, _ = reference("grouped, tied")
    decoder = build(config, weights, (0, 2, 4), remat)
    assert "remat" in str(jax.make_jaxpr(loss)(decoder, tokens))
    found = jax.jit(jax.grad(loss))(decoder, tokens)
    for a, b in zip(jax.tree.leaves(plain_gradient()), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
