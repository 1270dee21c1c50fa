"""What the vision tokens re-read, against torch's own attention weights in float64, and where it must not depend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.model.refusion.test_vision_remember_options import Reference, inputs, samples
from tests.tiny import (
    SampleImage,
    Text,
    example,
    pack,
    params_of,
    randomized,
    tiny_config,
    tiny_refusion,
    with_params,
)
from vr_jax.errors import ConfigError
from vr_jax.model.decoders.stages import DecoderInputs, StageHook
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.vision_remember import Block, Features
from vr_jax.model.reread import reread, reread_refusal
from vr_jax.model.vlm import VisionLanguageModel, abstract_model
from vr_jax.sharding import batch_sharding, make_mesh, param_shardings

CONFIG = tiny_config()
OPTIONS = {
    "default": {},
    "plain, no feature norm": {"cross_attention": "plain", "feature_norm": "none"},
    "self before cross": {
        "order": "self_cross",
        "up": "mlp",
        "init": "torch_default",
        "feature_norm": "joint",
        "residual_gate": "tanh",
    },
}


def torch_weights(reference: Reference, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """torch.nn.MultiheadAttention's weights, averaged over its heads: (1, S)."""
    p, width = reference.p, query.shape[-1]
    attention = torch.nn.MultiheadAttention(width, reference.config.cross_heads, dtype=torch.float64)
    with torch.no_grad():
        for index, part in enumerate("qkv"):
            at = slice(index * width, (index + 1) * width)
            attention.in_proj_weight[at] = p[f"cross_attn.{part}.kernel"].T
            attention.in_proj_bias[at] = p[f"cross_attn.{part}.bias"]
        return attention(query, keys, keys, need_weights=True, average_attn_weights=True)[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_and_updates_match_torch(name: str):
    """A packed row with cropped cells, several images and a sample without any."""
    config = tiny_config(refusion=tiny_refusion(**OPTIONS[name]))
    block = randomized(nnx.eval_shape(lambda: Block(config.refusion, config.spec, rngs=nnx.Rngs(0))))
    batch, hidden, levels = inputs(config)

    @jax.jit
    def run(block, hidden, levels):
        features = Features(config.refusion)(levels)
        inputs = DecoderInputs(hidden=hidden, positions=batch.positions, segment_ids=batch.segment_ids)
        return block.reread(inputs, VisionContext.of(batch, features, config.cells_per_tile))

    found = run(block, hidden, levels)
    assert found.weights.dtype == found.update.dtype == jnp.float32
    weights, update = np.zeros(found.weights.shape[1:]), np.zeros(found.update.shape[1:])
    reference, begin, first = Reference(config, params_of(block), torch.float64), 0, 0
    for one in samples(config):
        at, tiles = slice(begin, begin + len(one.tokens)), slice(first, first + len(one.tile_image))
        x = torch.from_numpy(hidden[0, at]).double()
        memory = reference.memory([torch.from_numpy(level[0, tiles]).double() for level in levels])
        if config.refusion.order == "self_cross":
            text_token = x[one.text_token_mask].amax(0) if one.text_token_mask.any() else None
            x = reference.bidirectional(x, one.vision_cell, one.tile_image, text_token)
        after = reference.cross(x, one.vision_cell, memory)
        for token in np.flatnonzero(one.vision_cell >= 0):
            tile, cell = divmod(int(one.vision_cell[token]), config.cells_per_tile)
            query = reference.linear("up", reference.norm("ln_q", x[token][None]))
            if config.refusion.up == "mlp":
                query = reference.linear("up2", torch.nn.functional.gelu(query))
            weights[first + tile, cell] = torch_weights(reference, query, memory[tile, cell])[0]
            update[first + tile, cell] = (after[token] - x[token]).norm() / x[token].norm()
        begin, first = at.stop, tiles.stop
    assert (update > 0).sum() == (np.asarray(batch.vision_cell) >= 0).sum()
    np.testing.assert_allclose(found.weights[0], weights, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.update[0], update, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return randomized(abstract_model(CONFIG))


@pytest.fixture(scope="module")
def batch():
    rows = [
        [
            example(CONFIG, Text(3), SampleImage(3, crop=1), Text(4, text_token=True), seed=1),
            example(CONFIG, Text(5, text_token=True), seed=2),
        ],
        [example(CONFIG, Text(2), SampleImage(2), Text(3, text_token=True), seed=4)],
    ]
    return pack(CONFIG, rows, tokens=60, tiles=4)


@pytest.fixture(scope="module")
def found(model, batch):
    return jax.jit(reread)(model, batch)


def test_the_weights_of_a_token_sum_to_one_and_others_have_none(found, batch):
    cells = np.asarray(batch.vision_cell)
    assert len(found) == len(CONFIG.refusion.insert_after)
    for one in found:
        total = np.asarray(one.weights).sum(axis=-1)
        has_token = np.zeros((len(cells), total[0].size), bool)
        for row, of_row in zip(has_token, cells, strict=True):
            row[of_row[of_row >= 0]] = True
        np.testing.assert_allclose(total.reshape(len(cells), -1), has_token, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(one.update).reshape(len(cells), -1) > 0, has_token)


@pytest.mark.slow  # The model is compiled again.
def test_it_looks_at_the_ordinary_forward_pass(model, batch, found):
    """The states that every insertion meets when the whole decoder runs."""

    @jax.jit
    def whole(model, batch):
        levels, found = model.encode_images(batch), []
        context, hook = model.vision_context(levels, batch), model.stage_hook(levels, batch)

        def apply(k, inputs, state):
            if 0 < k < len(model.decoder.stages):
                found.append(model.refusion.block(k - 1).reread(inputs, context))
            return hook.apply(k, inputs, state)

        hidden, _ = model.decoder(model.inputs(levels, batch), None, StageHook(apply, hook.state))
        return hidden, found

    _, expected = whole(model, batch)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
        np.testing.assert_allclose(one.update, other.update, rtol=1e-5)
    assert np.abs(found[0].weights - found[1].weights).max() > 1e-3


def test_plain_equals_absorbed_and_later_layers_do_not_run(model, batch, found):
    plain = dataclasses.replace(CONFIG, refusion=tiny_refusion(cross_attention="plain"))
    params = params_of(model)
    for name, value in params.items():
        if name.startswith(f"decoder.stages.{len(found)}."):
            params[name] = np.full_like(value, np.nan)
    other = jax.jit(reread)(with_params(abstract_model(plain), params), batch)
    for one, two in zip(found, other, strict=True):
        np.testing.assert_allclose(one.weights, two.weights, atol=1e-5)
        np.testing.assert_allclose(one.update, two.update, rtol=1e-4)
    # An encoder's stage per level read, and the rest of it; the decoder's up to the last insertion.
    scans = str(jax.make_jaxpr(reread)(model, batch)).count(" scan[")
    assert scans == len(CONFIG.encoder_bounds) - 2 + len(CONFIG.refusion.insert_after)


def test_a_patch_moves_the_weights_of_its_own_cell_only(model, batch):
    block, hidden = model.refusion.blocks[0], jax.random.normal(jax.random.key(0), (2, 60, 24))

    @jax.jit
    def run(block, levels, patch):
        features = model.refusion.prepare(levels)
        features = features.at[patch].multiply(-2)
        inputs = DecoderInputs(hidden=hidden, positions=batch.positions, segment_ids=batch.segment_ids)
        return block.reread(inputs, VisionContext.of(batch, features, CONFIG.cells_per_tile)).weights

    shape = (2, 4, CONFIG.cells_per_tile, CONFIG.projector.stride**2, CONFIG.encoder.hidden_size)
    levels = tuple(jax.random.normal(jax.random.key(i), shape) for i in range(3))
    before = np.asarray(run(block, levels, (2, 0, 0, 0)))  # no such row: nothing changes
    for patch in ((0, 1, 4, 2), (1, 0, 8, 0)):
        changed = (np.asarray(run(block, levels, patch)) != before).any(axis=-1)
        assert [tuple(map(int, at)) for at in np.argwhere(changed)] == [patch[:3]]


@pytest.mark.slow  # It compiles again for a mesh.
def test_eight_devices_equal_one(model, batch, found):
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, param_shardings(model, mesh))
        four = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), batch)
        sharded = jax.jit(reread)(placed, jax.device_put(four, batch_sharding(mesh)))
    for one, two in zip(found, sharded, strict=True):
        assert two.weights.is_fully_replicated
        np.testing.assert_allclose(two.weights, np.concatenate([one.weights, one.weights[::-1]]), atol=1e-5)
        np.testing.assert_allclose(two.update, np.concatenate([one.update, one.update[::-1]]), rtol=1e-4)


@pytest.mark.parametrize(
    ("refusion", "reason"),
    [
        (None, "no re-fusion block"),
        (DeepStackConfig(insert_after=(1,), levels=(2,)), "'deepstack'"),
        (tiny_refusion(interaction="global"), "'global' has no weights"),
        (tiny_refusion(interaction="deformable"), "'deformable' has no weights"),
    ],
)
def test_others_are_refused(refusion, reason: str, batch):
    config = dataclasses.replace(CONFIG, refusion=refusion)
    assert reason in reread_refusal(config)
    with pytest.raises(ConfigError, match=reason):
        jax.eval_shape(reread, abstract_model(config), batch)
