"""Hidden states after chosen layers against those of transformers, and against the layers run one by one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2Config as TorchConfig
from transformers import Qwen2ForCausalLM

from tests import torch_weights
from tests.model.decoders.test_transformer import LENGTH, build, stream_of
from tests.tiny import SampleImage, Text, example, pack, randomized, tiny_config, tiny_decoder, tiny_refusion
from vr_jax.model.pruning.fastv import FastVConfig
from vr_jax.model.vlm import abstract_model


@pytest.fixture(scope="module")
def reference():
    """A decoder of transformers, its weights and token ids, and its hidden states 1..3 (the last one is normed)."""
    config = tiny_decoder()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        TorchConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    torch_weights.randomize(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        states = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    weights = torch_weights.state_dict(model)
    weights.pop("lm_head.weight", None)
    return config, weights, tokens.astype(np.int32), [state.numpy() for state in states]


@pytest.mark.parametrize("bounds", [(0, 4), (0, 1, 3, 4)], ids=["one stage", "three stages"])
def test_equal_to_transformers(reference, bounds):
    """The layers need not be bounds of stages, and several lie in one stage; `select` chooses positions."""
    config, weights, tokens, states = reference
    decoder = build(config, weights, bounds)
    positions = jnp.array([2, 3, 11])
    found = jax.jit(
        lambda decoder, tokens: (
            decoder.hidden_states(
                stream_of(decoder, tokens), (1, 2, 4), select=lambda hidden: hidden[:, positions]
            ).after
        )
    )(decoder, tokens)
    assert list(found) == [1, 2, 4]
    for layer in (1, 2):
        np.testing.assert_allclose(found[layer], states[layer][:, positions], atol=2e-5)
    normed = decoder.norm(found[4])
    np.testing.assert_allclose(normed, states[4][:, positions], atol=2e-5)
    assert np.abs(found[4] - states[4][:, positions]).max() > 0.1, "ours is not final-normed, theirs is"


def test_layers_beyond_the_last_one_are_not_run(reference):
    config, weights, tokens, _ = reference
    decoder = build(config, weights, (0, 1, 4))
    program = jax.make_jaxpr(lambda d, t: d.hidden_states(stream_of(d, t), (1,)).after)(decoder, tokens)
    assert sum(equation.primitive.name == "scan" for equation in program.eqns) == 1


@pytest.mark.parametrize("layers", [(), (0, 1), (5,), (2, 1), (1, 1)])
def test_layers_that_do_not_exist(reference, layers):
    config, weights, tokens, _ = reference
    decoder = build(config, weights, (0, 4))
    with pytest.raises(ValueError, match=r"expected strictly increasing numbers in 1\.\.4"):
        decoder.hidden_states(stream_of(decoder, tokens), layers)


def by_hand(model, batch):
    """The hidden states after every decoder layer, run one at a time, and after every block."""
    config = model.config
    levels = model.encode_images(batch)
    context, inputs = model.vision_context(levels, batch), model.inputs(levels, batch)
    spec = config.spec
    one_layer = nnx.eval_shape(
        lambda: dataclasses.replace(config.decoder, num_layers=1).build(spec, bounds=(0, 1), rngs=nnx.Rngs(0))
    )
    after, resumed = {}, {}
    for k, (stage, (start, stop)) in enumerate(
        zip(model.decoder.stages, itertools.pairwise(config.decoder_bounds), strict=True)
    ):
        if k:
            inputs = model.refusion.blocks[k - 1](inputs, context)
            resumed[start] = inputs.hidden
        for i in range(stop - start):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stage)
            single = one_layer
            single.stages = nnx.List([layer])
            after[start + i + 1] = single.hidden_states(inputs, (1,)).after[1]
            inputs = inputs.replace(hidden=after[start + i + 1])
    return after, resumed


@pytest.mark.slow  # The whole model is compiled twice.
def test_vision_tokens_around_vision_remember():
    """The states agree with those of single layers and blocks, and the last one, normed, with the forward pass."""
    config = tiny_config(refusion=tiny_refusion(insert_after=(1, 3)))
    model = randomized(abstract_model(config))
    batch = pack(
        config, [[example(config, Text(3), SampleImage(), Text(4, text_token=True), seed=row)] for row in range(2)]
    )
    cells = np.asarray(batch.vision_cell)

    @jax.jit
    def everything(model):
        levels = model.encode_images(batch)
        found = model.hidden_states(levels, batch, (1, 2, 3, 4))
        final, _ = model.run(levels, batch)
        return found.after, found.resumed, by_hand(model, batch), final, model.decoder.norm(found.after[4])

    def agree(found, hidden):
        expected = np.stack([row[np.flatnonzero(cell >= 0)] for row, cell in zip(hidden, cells, strict=True)])
        assert np.abs(found - expected).max() < 4e-6 * np.abs(expected).max()  # float32's rounding, of states near 20

    after, resumed, (expected_after, expected_resumed), final, normed = jax.device_get(everything(model))
    assert (list(after), list(resumed)) == ([1, 2, 3, 4], [1, 3])
    for layer, hidden in expected_after.items():
        agree(after[layer], hidden)
    for layer, hidden in expected_resumed.items():
        agree(resumed[layer], hidden)
    agree(normed, final)
    assert np.abs(after[1] - resumed[1]).max() > 0.1


def test_a_pruner_is_refused():
    config = tiny_config(refusion=None, pruning=FastVConfig(layer=2))
    model = abstract_model(config)
    with pytest.raises(ValueError, match="pruner 'fastv' drops vision tokens"):
        model.hidden_states({}, None, (1,))
