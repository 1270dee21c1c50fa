"""Attention in blocks of keys that stay in the cache of a core, for long rows on one CPU device.

The softmax is accumulated block by block, and blocks that no query of the block attends to are skipped. The plain form
writes and reads (heads, N, N) float32 logits several times. For a row of 3,760 positions, 14 heads and causal attention
on one core of an AMD EPYC (Zen 4), the plain form takes 2.0 s and this one 0.47 s. The nearest library, tokamax
0.0.17's `xla_chunked`, takes 1.3 s because it skips no block (docs/results/speed.md).

Source of the algorithm: Dao, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Keys per block, at most. With QUERY_ROWS they make half a megabyte of logits, which a core's L2 cache holds.
KEY_BLOCK = 256
# Rows per block of queries, about: positions times the query heads that share a key head.
QUERY_ROWS = 448

# The logit of a masked key. It is finite, because the difference of two infinities is not a number.
_MASKED = -1e30
# The segments of padding positions. They differ, so that padding matches nothing.
_QUERY_PADDING, _KEY_PADDING = -1, -2


@dataclass(frozen=True)
class _Blocks:
    """How the work of one key head is divided into blocks; positions are padded to whole blocks.

    Attributes:
        queries: Number of query positions, without padding.
        keys: Number of key positions, without padding.
        shared: Number of query heads that share a key head.
        query_block: Query positions per block.
        key_block: Key positions per block.
        causal: Whether a query attends only to keys whose index is at most its own.
        segments: Whether a query attends only to keys of its own segment.
    """

    queries: int
    keys: int
    shared: int
    query_block: int
    key_block: int
    causal: bool
    segments: bool

    @property
    def query_count(self) -> int:
        """The number of blocks of queries."""
        return -(-self.queries // self.query_block)

    @property
    def key_count(self) -> int:
        """The number of blocks of keys."""
        return -(-self.keys // self.key_block)

    @property
    def masked(self) -> bool:
        """Whether some logits have to be masked."""
        return self.causal or self.segments or self.keys % self.key_block != 0

    @property
    def rows(self) -> int:
        """The rows of a block of queries; each position has `shared` of them."""
        return self.query_block * self.shared

    def end_of_keys(self, index: Int[Array, ""]) -> Int[Array, ""] | int:
        """Returns the index behind the last block of keys that block `index` of the queries may attend to."""
        if not self.causal:
            return self.key_count
        return jnp.minimum(((index + 1) * self.query_block - 1) // self.key_block + 1, self.key_count)


def attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"] | None,
    key_segments: Int[Array, "B M"] | None,
    causal: bool,
) -> Float[Array, "B N H K"]:
    """Computes `reference.attention` in blocks, for rows of any length.

    A query that attends to no key gets unspecified finite numbers and passes no gradient.
    """
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    shared = heads // groups
    blocks = _Blocks(
        queries=queries,
        keys=keys,
        shared=shared,
        query_block=_equal_block(queries, max(1, QUERY_ROWS // shared)),
        key_block=_equal_block(keys, KEY_BLOCK),
        causal=causal,
        segments=query_segments is not None,
    )
    q_length, k_length = blocks.query_count * blocks.query_block, blocks.key_count * blocks.key_block

    def key_blocks(x: Float[Array, "B M G K"]) -> Float[Array, "BG blocks keys K"]:
        x = _pad(x, k_length).swapaxes(1, 2)
        return x.reshape(batch * groups, blocks.key_count, blocks.key_block, width)

    q = _pad(query * width**-0.5, q_length).reshape(batch, q_length, groups, shared, width)
    q = q.swapaxes(1, 2).reshape(batch * groups, blocks.query_count, blocks.rows, width)
    if query_segments is None or key_segments is None:
        query_segments, key_segments = jnp.zeros((batch, queries), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
    q_segments = _pad(query_segments, q_length, _QUERY_PADDING).reshape(batch, blocks.query_count, -1)
    k_segments = _pad(key_segments, k_length, _KEY_PADDING).reshape(batch, blocks.key_count, -1)
    q_segments, k_segments = (jnp.repeat(x, groups, axis=0) for x in (q_segments, k_segments))
    out = _attend(blocks, q, key_blocks(key), key_blocks(value), q_segments, k_segments)
    out = out.reshape(batch, groups, q_length, shared, width).swapaxes(1, 2)
    return out.reshape(batch, q_length, heads, width)[:, :queries]


def _pad(x: Array, length: int, fill: int = 0) -> Array:
    """Pads the second axis to `length` positions."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2), constant_values=fill)


def _equal_block(length: int, most: int) -> int:
    """Returns the size of equal blocks of at most `most` positions, as few blocks as possible."""
    return math.ceil(length / math.ceil(length / most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    blocks: _Blocks,
    q: Float[Array, "BG blocks rows K"],
    k: Float[Array, "BG key_blocks keys K"],
    v: Float[Array, "BG key_blocks keys K"],
    q_segments: Int[Array, "BG blocks queries"],
    k_segments: Int[Array, "BG key_blocks keys"],
) -> Float[Array, "BG blocks rows K"]:
    return _forward(blocks, q, k, v, q_segments, k_segments)[0]


def _logits(
    blocks: _Blocks,
    i: Int[Array, ""] | int,
    j: Int[Array, ""] | int,
    q: Float[Array, "rows K"],
    k: Float[Array, "keys K"],
    q_segments: Int[Array, " queries"],
    k_segments: Int[Array, " keys"],
) -> tuple[Float[Array, "rows keys"], Bool[Array, "rows keys"] | None]:
    """Returns the logits of block i of the queries and block j of the keys, and their mask, or None without one."""
    logits = jnp.einsum("rk,nk->rn", q, k, preferred_element_type=jnp.float32)
    if not blocks.masked:
        return logits, None
    mask = q_segments[:, None] == k_segments[None, :]
    if not blocks.segments:
        mask = jnp.broadcast_to(k_segments[None, :] >= 0, mask.shape)
    if blocks.causal:
        q_index = i * blocks.query_block + jnp.arange(blocks.query_block)
        k_index = j * blocks.key_block + jnp.arange(blocks.key_block)
        mask &= q_index[:, None] >= k_index[None, :]
    mask = jnp.broadcast_to(mask[:, None], (blocks.query_block, blocks.shared, blocks.key_block))
    mask = mask.reshape(blocks.rows, blocks.key_block)
    return jnp.where(mask, logits, _MASKED), mask


def _may_share_segments(
    blocks: _Blocks, q_segments: Int[Array, " queries"], k_segments: Int[Array, " keys"]
) -> Bool[Array, ""] | bool:
    """Returns False if the segments of the two blocks lie in ranges that do not overlap."""
    if not blocks.segments:
        return True
    return (jnp.min(q_segments) <= jnp.max(k_segments)) & (jnp.min(k_segments) <= jnp.max(q_segments))


def _apply_if[Carry](condition: Array | bool, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Returns `function(carry)` if the condition holds, else the carry; without a branch if it always holds."""
    if condition is True:
        return function(carry)
    chosen: Carry = jax.lax.cond(condition, function, lambda carry: carry, carry)
    return chosen


def _forward(
    blocks: _Blocks,
    q: Float[Array, "BG blocks rows K"],
    k: Float[Array, "BG key_blocks keys K"],
    v: Float[Array, "BG key_blocks keys K"],
    q_segments: Int[Array, "BG blocks queries"],
    k_segments: Int[Array, "BG key_blocks keys"],
) -> tuple[Float[Array, "BG blocks rows K"], Float[Array, "BG blocks rows"]]:
    """Returns the attended values, and the logarithm of each row's softmax denominator for the backward pass."""
    width = q.shape[-1]

    def one_head(args: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, q_segments, k_segments = args

        def one_block(args: tuple[Array, ...]) -> tuple[Array, Array]:
            i, q, q_segments = args

            def add(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                def attend(carry: tuple[Array, ...]) -> tuple[Array, ...]:
                    highest, total, out = carry
                    logits, _ = _logits(blocks, i, j, q, k[j], q_segments, k_segments[j])
                    higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
                    weights = jnp.exp(logits - higher[:, None])
                    decay = jnp.exp(highest - higher)
                    part = jnp.einsum("rn,nk->rk", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
                    return higher, total * decay + jnp.sum(weights, axis=-1), out * decay[:, None] + part

                return _apply_if(_may_share_segments(blocks, q_segments, k_segments[j]), attend, carry)

            start = (
                jnp.full(blocks.rows, _MASKED),
                jnp.zeros(blocks.rows),
                jnp.zeros((blocks.rows, width), jnp.float32),
            )
            highest, total, out = jax.lax.fori_loop(0, blocks.end_of_keys(i), add, start)
            # The total is zero for rows whose blocks were all skipped.
            total = jnp.maximum(total, 1e-30)
            return (out / total[:, None]).astype(q.dtype), highest + jnp.log(total)

        outputs: tuple[Array, Array] = jax.lax.map(one_block, (jnp.arange(blocks.query_count), q, q_segments))
        return outputs

    outputs: tuple[Array, Array] = jax.lax.map(one_head, (q, k, v, q_segments, k_segments))
    return outputs


_Saved = tuple[Array, Array, Array, Array, Array, Array, Array]


def _attend_forward(
    blocks: _Blocks, q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array
) -> tuple[Array, _Saved]:
    out, log_total = _forward(blocks, q, k, v, q_segments, k_segments)
    return out, (q, k, v, q_segments, k_segments, out, log_total)


def _attend_backward(blocks: _Blocks, saved: _Saved, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    """Returns the gradients of queries, keys and values; the softmax is recomputed block by block."""

    def one_head(args: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, q_segments, k_segments, out, log_total, d_out = args

        def one_block(sums: tuple[Array, Array], args: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            i, q, q_segments, out, log_total, d_out = args
            d_out = d_out.astype(jnp.float32)
            delta = jnp.sum(d_out * out.astype(jnp.float32), axis=-1)

            def add(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                def attend(carry: tuple[Array, ...]) -> tuple[Array, ...]:
                    d_q, d_k, d_v = carry
                    logits, mask = _logits(blocks, i, j, q, k[j], q_segments, k_segments[j])
                    weights = jnp.exp(logits - log_total[:, None])
                    if mask is not None:
                        # Every weight of a row that attends to no key would be one.
                        weights = jnp.where(mask, weights, 0.0)
                    d_weights = jnp.einsum("rk,nk->rn", d_out, v[j].astype(jnp.float32))
                    d_logits = weights * (d_weights - delta[:, None])
                    d_q += jnp.einsum("rn,nk->rk", d_logits, k[j].astype(jnp.float32))
                    d_k = d_k.at[j].add(jnp.einsum("rn,rk->nk", d_logits, q.astype(jnp.float32)))
                    d_v = d_v.at[j].add(jnp.einsum("rn,rk->nk", weights, d_out))
                    return d_q, d_k, d_v

                return _apply_if(_may_share_segments(blocks, q_segments, k_segments[j]), attend, carry)

            start = (jnp.zeros(q.shape, jnp.float32), *sums)
            d_q, d_k, d_v = jax.lax.fori_loop(0, blocks.end_of_keys(i), add, start)
            return (d_k, d_v), d_q

        zero = jnp.zeros(k.shape, jnp.float32)
        rows = (jnp.arange(blocks.query_count), q, q_segments, out, log_total, d_out)
        (d_k, d_v), d_q = jax.lax.scan(one_block, (zero, zero), rows)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    d_q, d_k, d_v = jax.lax.map(one_head, (*saved, d_out))
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_forward, _attend_backward)
