"""The five examples of docs/methods.md work as they stand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.docs import DOCS, blocks
from tests.tiny import (
    SampleImage,
    Text,
    abstract_model,
    abstract_projector,
    example,
    pack,
    randomized,
    tiny_config,
    tiny_decoder,
    tiny_projector,
)
from vr_jax import sharding
from vr_jax.errors import ConfigError
from vr_jax.model import registry
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.parameters import flatten_params
from vr_jax.model.registry import ForwardPass, ProjectorConfig
from vr_jax.model.spec import PromptSize

KINDS = ("projector", "refusion", "pruning", "encoder", "decoder")
TINY_ENCODER = {"hidden_size": 16, "num_layers": 4, "image_size": 24, "patch_size": 4}
TINY_DECODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.fixture
def page():
    """The names of each example by kind; the methods are forgotten afterwards."""
    examples = blocks("methods.md", "python")
    assert len(examples) == len(KINDS)
    with registry.registered_temporarily():
        found: dict[str, dict[str, Any]] = {}
        for kind, code in zip(KINDS, examples, strict=True):
            found[kind] = {"__name__": "my_method"}
            exec(compile(code, str(DOCS / "methods.md"), "exec", dont_inherit=True), found[kind])
        yield found


def test_all_together_in_one_model(page):
    """The methods are chosen by name, survive JSON, are sharded, and run."""
    config = VlmConfig.from_dict(
        tiny_config().to_dict()
        | {
            "encoder": {"name": "patch_mlp", **TINY_ENCODER},
            "projector": {"name": "power_pool", "stride": 2},
            "decoder": {"name": "qk_norm", **TINY_DECODER},
            "refusion": {"name": "mean_add", "levels": [2], "insert_after": [1, 4]},
        }
    )
    assert isinstance(config.projector, page["projector"]["PowerPoolConfig"])
    assert VlmConfig.from_dict(config.to_dict()) == config
    assert config.projector.power == 3
    model = abstract_model(config)
    params = flatten_params(model)
    assert "decoder.stages.1.attn.q_norm.scale" in params
    assert "refusion.blocks.1.up.kernel" in params
    for path, leaf in params.items():
        sharding.param_spec(path, leaf.ndim)
    batch = pack(config, [[example(config, Text(2), SampleImage(), Text(3))]])
    hidden, _ = jax.eval_shape(lambda m, b: m(b), model, batch)
    assert hidden.shape == (*batch.tokens.shape, 24)


def test_the_projector_computes_a_mean_of_powers(page):
    config = tiny_config(projector=page["projector"]["PowerPoolConfig"](stride=2, power=1))
    features = jax.random.normal(jax.random.key(0), (1, 1, 9, 4, 16))
    mean = randomized(abstract_projector(tiny_config(projector=tiny_projector("pool"))))
    np.testing.assert_allclose(randomized(abstract_projector(config))(features), mean(features), atol=1e-6)


def test_the_decoder_normalises_queries_and_keys(page):
    """A larger query projection changes nothing but for the epsilon of the norm."""
    config = page["decoder"]["QkNormConfig"](**TINY_DECODER)
    spec = tiny_config(decoder=config).spec
    decoder = randomized(nnx.eval_shape(lambda: config.build(spec, bounds=(0, 4), rngs=nnx.Rngs(0))))
    hidden = jax.random.normal(jax.random.key(0), (1, 5, 24))
    positions = jnp.arange(5)[None]
    inputs = DecoderInputs(hidden=hidden, positions=positions, segment_ids=jnp.ones_like(positions))
    before = decoder.last_token_attention(0, inputs)
    for layer in (decoder.stages[0].attn.q, decoder.stages[0].attn.k):
        layer.kernel[...], layer.bias[...] = 10 * layer.kernel[...], 10 * layer.bias[...]
    np.testing.assert_allclose(decoder.last_token_attention(0, inputs), before, rtol=1e-3)


def test_the_pruner_keeps_every_second_token(page):
    pruning = page["pruning"]["ThinOutConfig"](layer=2)
    config = tiny_config(refusion=None, pruning=pruning, decoder=tiny_decoder())
    assert config.decoder_bounds == (0, 2, 4)
    batch = pack(config, [[example(config, Text(2), SampleImage(), Text(3))]])
    lengths = tuple(
        pruning.kept(config.spec, layer, PromptSize(text=5, cells=9, newlines=1, tiles=1)) for layer in (0, 2)
    )
    assert lengths == (15, 11)
    inputs = DecoderInputs(hidden=jnp.zeros((1, 15, 24)), positions=batch.positions, segment_ids=batch.segment_ids)
    decoder = abstract_model(config).decoder
    hook = pruning.build(
        config.spec, ForwardPass(encoder=None, decoder=decoder, levels={}, batch=batch, lengths=lengths)
    )
    state = hook.state
    for k, kept in enumerate((15, 11, 11)):
        inputs, state = hook.apply(k, inputs, state)
        assert inputs.hidden.shape[1] == int((inputs.segment_ids > 0).sum()) == kept
    assert inputs.positions[0].tolist() == [0, 1, 2, 4, 6, 8, 10, 11, 12, 13, 14]


def test_the_names_are_forgotten_afterwards():
    with pytest.raises(ConfigError, match=r"projector\.name = 'power_pool': known names are c_abstractor"):
        ProjectorConfig.from_dict({"name": "power_pool"})
