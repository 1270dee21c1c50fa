"""What the pruners share: a ranking by attention, the choice of the strongest, dropping by mask, closing the gaps.

Rows are independent and hold one segment each, as in generation. Every shape is static: a dropped token becomes padding
(segment 0), and rows are cut to a shorter length that the caller knows beforehand to hold what is kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vr_jax.model.batch import NEWLINE, Batch
from vr_jax.model.decoders.qwen2 import Decoder, DecoderInputs
from vr_jax.model.layers import rotary_angles, rotate, split_heads
from vr_jax.sharding import constrain

# Acts before stage k of the decoder. Called once per stage, in order: it may keep what an earlier call found.
StageHook = Callable[[int, DecoderInputs], DecoderInputs]


def vision_tokens(batch: Batch) -> Bool[Array, "B N"]:
    """The tokens that may be dropped: cells of images, and newlines, which compete like others."""
    return (batch.vision_cell >= 0) | (batch.vision_cell == NEWLINE)


def last_token_attention(decoder: Decoder, k: int, inputs: DecoderInputs) -> Float[Array, "B N"]:
    """What each row's last token attends to in the first layer of stage k, which is about to run: the softmax over its
    whole causal row, averaged over the query heads; float32. Padding gets 0."""
    layer = jax.tree.map(lambda leaf: leaf[0], decoder.stages[k])
    config, segments = decoder.config, inputs.segment_ids
    index = jnp.arange(segments.shape[1])
    last = jnp.max(jnp.where(segments > 0, index, 0), axis=1, keepdims=True)

    x = layer.input_norm(inputs.hidden)
    cos, sin = rotary_angles(inputs.positions, config.head_dim, config.rope_theta)
    key = rotate(split_heads(layer.attn.k(x), config.num_kv_heads), cos, sin)
    x, cos, sin = (_take(array, last) for array in (x, cos, sin))
    query = rotate(split_heads(layer.attn.q(x), config.num_heads), cos, sin)
    query = query.reshape(query.shape[0], config.num_kv_heads, -1, config.head_dim)
    logits = jnp.einsum("bgrk,bngk->bgrn", query, key, preferred_element_type=jnp.float32)
    seen = (segments > 0) & (index <= last)
    logits = jnp.where(seen[:, None, None], logits * config.head_dim**-0.5, jnp.finfo(jnp.float32).min)
    return jnp.where(seen, jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(1, 2)), 0.0)


def strongest(
    score: Float[Array, "B N"], candidates: Bool[Array, "B N"], count: Int[Array, " B"]
) -> Bool[Array, "B N"]:
    """The `count` candidates of each row with the highest score; of equals, the first."""
    order = jnp.argsort(jnp.where(candidates, -score, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    return candidates & (rank < count[:, None])


def counts(count: Callable[[int], int], total: Int[Array, " B"], largest: int) -> Int[Array, " B"]:
    """`count` of each row's total (0..largest). Tabulated, so that Python's float64 products and rounding decide."""
    return jnp.asarray(np.array([count(n) for n in range(largest + 1)], np.int32))[total]


def drop(inputs: DecoderInputs, keep: Bool[Array, "B N"], *, renumber: bool) -> DecoderInputs:
    """Tokens outside `keep` become padding. renumber: the others get the positions 0, 1, ...; else they keep theirs."""
    segments = jnp.where(keep, inputs.segment_ids, 0)
    if not renumber:
        return inputs.replace(segment_ids=segments)
    positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1, dtype=inputs.positions.dtype) - 1, 0)
    return inputs.replace(segment_ids=segments, positions=positions)


def compact[Tree](tree: Tree, used: Bool[Array, "B N"], length: int | None) -> Tree:
    """Rows of `length` slots with the used ones last, in order, for every (B, N, ...) array of the tree. None: as it
    is. `length` must hold every row's used slots."""
    if length is None or length == used.shape[1]:
        return tree
    order = jnp.argsort(used, axis=1, stable=True)[:, -length:]
    return jax.tree.map(lambda array: _take(array, order), tree)


def _take(array: Array, index: Int[Array, "B M"]) -> Array:
    """array[b, index[b]] of every row."""
    taken = jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), axis=1)
    return constrain(taken, "batch", *(None,) * (array.ndim - 1))
