"""Deformable attention against the recorded outputs of Deformable-DETR's own module, and against transformers'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from tests import torch_weights
from tests.golden.discovery import Case, cases
from vr_jax.convert.tables import VISION_REMEMBER
from vr_jax.model.layers import split_heads
from vr_jax.model.refusion.deformable import DeformableAttention, sample, sampling_locations

POINTS = 4


def shapes_of(case: Case) -> tuple[tuple[int, int], ...]:
    shapes = case.inputs["spatial_shapes"]
    sizes = shapes[:, 0] * shapes[:, 1]
    np.testing.assert_array_equal(case.inputs["level_start_index"], np.cumsum(sizes) - sizes)
    return tuple((int(rows), int(columns)) for rows, columns in shapes)


def new(case: Case) -> DeformableAttention:
    width = case.config["d_model"]
    levels = len(case.inputs["spatial_shapes"])
    return DeformableAttention(width, width, case.config["heads"], levels, POINTS, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", cases("deformable", known=("msdeformattn",)))
def test_matches_official_output(case: Case):
    shapes, x = shapes_of(case), case.inputs
    named = {f"0.cross_attn.{name}": value for name, value in case.weights.items()}
    prefix = "refusion.blocks.0.cross_attn."
    attention = torch_weights.load(nnx.eval_shape(lambda: new(case)), VISION_REMEMBER, named, prefix)

    @jax.jit
    def run(attention, query, reference, features, padding):
        value = attention.value(features)
        if padding is not None:
            value = jnp.where(padding[..., None], 0, value)
        value = split_heads(value, attention.heads)
        locations, weights = attention.points_of(query, reference, shapes)
        sampled = sample(value, shapes, locations, weights)
        return {
            "sampling_locations": locations,
            "attention_weights": weights,
            "value": value,
            "sampled": sampled.reshape(query.shape),
            "y": attention.attend(query, reference, features, shapes, padding),
        }

    found = run(attention, x["query"], x["reference_points"], x["input_flatten"], x.get("padding_mask"))
    assert {"sampling_locations", "attention_weights", "sampled", "y"} <= case.outputs.keys() <= found.keys()
    for name, expected in case.outputs.items():
        np.testing.assert_allclose(found[name], expected, **case.tolerance(), err_msg=name)


@pytest.mark.parametrize("case", [p for p in cases("deformable") if p.values[0] and p.values[0].config.get("init")])
def test_initial_values_are_the_official_ones(case: Case):
    fresh = new(case)
    np.testing.assert_allclose(fresh.offsets.bias[...], case.weights["sampling_offsets.bias"], **case.tolerance())
    for layer in (fresh.offsets, fresh.weights):
        assert not layer.kernel[...].any()
    for bias in (fresh.weights.bias, fresh.value.bias, fresh.output.bias):
        assert not bias[...].any()
    bound = (6 / (2 * case.config["d_model"])) ** 0.5  # Xavier, uniform
    for layer in (fresh.value, fresh.output):
        assert 0.98 * bound < np.abs(layer.kernel[...]).max() <= bound


@pytest.mark.parametrize("box", [False, True], ids=["points", "boxes"])
def test_matches_transformers(box: bool):
    """Values and gradients, with points far outside of the maps, on levels of different sizes."""
    rng = np.random.default_rng(0)
    shapes, heads, queries = ((5, 7), (3, 4), (1, 2)), 2, 6
    value = rng.normal(size=(2, sum(a * b for a, b in shapes), heads, 3)).astype(np.float32)
    offsets = rng.normal(size=(2, queries, heads, len(shapes), POINTS, 2)).astype(np.float32) * 3
    weights = rng.uniform(size=offsets.shape[:-1]).astype(np.float32)
    reference = rng.uniform(size=(2, queries, len(shapes), 4 if box else 2)).astype(np.float32)
    direction = rng.normal(size=(2, queries, heads * 3)).astype(np.float32)

    def ours(value, offsets, weights):
        found = sample(value, shapes, sampling_locations(reference, offsets, shapes), weights)
        found = found.reshape(direction.shape)
        return jnp.sum(found * direction), found

    (_, found), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(value, offsets, weights)

    inputs = [torch.tensor(x, requires_grad=True) for x in (value, offsets, weights)]
    centre = torch.tensor(reference)[:, :, None, :, None]
    if box:  # DeformableDetrMultiscaleDeformableAttention.forward
        locations = centre[..., :2] + inputs[1] / POINTS * centre[..., 2:] * 0.5
    else:
        locations = centre + inputs[1] / torch.tensor([(b, a) for a, b in shapes])[:, None]
    theirs = MultiScaleDeformableAttention()(
        inputs[0], torch.tensor(shapes), list(shapes), None, locations, inputs[2], 64
    )
    (theirs * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(found, theirs.detach(), atol=1e-5, rtol=1e-5)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, atol=2e-5, rtol=1e-5)
