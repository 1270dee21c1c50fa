"""Attention for CPUs: blocks of keys that stay in the cache of a core, softmax on the fly, blocks nobody sees skipped.

The plain form writes and reads (heads, N, N) float32 logits several times. For a row of 3,760 positions, 14 heads and
causal attention on one core of an AMD EPYC (Zen 4) it takes 2.0 s, this one 0.47 s, and the nearest library, tokamax
0.0.17's `xla_chunked`, 1.3 s: it skips no block (docs/results/speed.md).
Source of the algorithm: Dao et al., FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KEY_BLOCK = 256  # keys at a time, at most: with QUERY_ROWS, logits of half a megabyte, which a core's L2 cache holds
QUERY_ROWS = 448  # query rows at a time, about: positions times the query heads that share a key head

_MASKED = -1e30  # finite: an infinity minus itself is no number


@dataclass(frozen=True)
class _Blocks:
    """How one key head's work is cut. Positions are padded to whole blocks; padding belongs to no segment."""

    queries: int  # positions
    keys: int
    shared: int  # query heads per key head
    query_block: int
    key_block: int
    causal: bool
    segments: bool

    @property
    def query_count(self) -> int:
        return -(-self.queries // self.query_block)

    @property
    def key_count(self) -> int:
        return -(-self.keys // self.key_block)

    @property
    def masked(self) -> bool:
        return self.causal or self.segments or self.keys % self.key_block != 0

    @property
    def rows(self) -> int:
        """Of a block of queries: each position has `shared` of them."""
        return self.query_block * self.shared

    def last_key_block(self, index: Int[Array, ""]) -> Int[Array, ""] | int:
        """One beyond the last block of keys that block `index` of the queries may see."""
        if not self.causal:
            return self.key_count
        return jnp.minimum(((index + 1) * self.query_block - 1) // self.key_block + 1, self.key_count)


def blocked_attention(
    query: Float[Array, "B N H K"],
    key: Float[Array, "B M G K"],
    value: Float[Array, "B M G K"],
    *,
    query_segments: Int[Array, "B N"] | None = None,
    key_segments: Int[Array, "B M"] | None = None,
    causal: bool = False,
) -> Float[Array, "B N H K"]:
    """As `vr_jax.kernels.attention.api.attention`: a query sees the keys of its own segment (all keys without segments), and
    if causal those of its own index or before. Any lengths; H is a multiple of G. Softmax in float32. A row that sees
    nothing holds unspecified finite numbers and passes no gradient."""
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    shared = heads // groups
    blocks = _Blocks(
        queries=queries,
        keys=keys,
        shared=shared,
        query_block=_even(queries, max(1, QUERY_ROWS // shared)),
        key_block=_even(keys, KEY_BLOCK),
        causal=causal,
        segments=query_segments is not None,
    )
    q_length, k_length = blocks.query_count * blocks.query_block, blocks.key_count * blocks.key_block

    def padded(x, to, fill=0):
        return jnp.pad(x, ((0, 0), (0, to - x.shape[1])) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    def key_blocks(x):
        x = padded(x, k_length).swapaxes(1, 2)
        return x.reshape(batch * groups, blocks.key_count, blocks.key_block, width)

    q = padded(query * width**-0.5, q_length).reshape(batch, q_length, groups, shared, width)
    q = q.swapaxes(1, 2).reshape(batch * groups, blocks.query_count, blocks.rows, width)
    if query_segments is None or key_segments is None:
        query_segments, key_segments = jnp.zeros((batch, queries), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
    # Padding of keys has a segment that no query has.
    q_segments = padded(query_segments, q_length, -1).reshape(batch, blocks.query_count, -1)
    k_segments = padded(key_segments, k_length, -2).reshape(batch, blocks.key_count, -1)
    q_segments, k_segments = (jnp.repeat(x, groups, axis=0) for x in (q_segments, k_segments))
    out = _attend(blocks, q, key_blocks(key), key_blocks(value), q_segments, k_segments)
    out = out.reshape(batch, groups, q_length, shared, width).swapaxes(1, 2)
    return out.reshape(batch, q_length, heads, width)[:, :queries]


def _even(length: int, most: int) -> int:
    """The size of equal blocks of at most `most` positions, as few as possible."""
    return math.ceil(length / math.ceil(length / most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks, q, k, v, q_segments, k_segments):
    return _forward(blocks, q, k, v, q_segments, k_segments)[0]


def _logits(
    blocks: _Blocks,
    i: Int[Array, ""],
    j: Int[Array, ""],
    q: Float[Array, "rows K"],
    k: Float[Array, "keys K"],
    q_segments: Int[Array, " queries"],
    k_segments: Int[Array, " keys"],
) -> tuple[Float[Array, "rows keys"], Bool[Array, "rows keys"] | None]:
    """Block i of the queries (rows, K) against block j of the keys, and what is visible of it (None: everything)."""
    logits = jnp.einsum("rk,nk->rn", q, k, preferred_element_type=jnp.float32)
    if not blocks.masked:
        return logits, None
    visible = q_segments[:, None] == k_segments[None, :]
    if not blocks.segments:
        visible = jnp.broadcast_to(k_segments[None, :] >= 0, visible.shape)
    if blocks.causal:
        q_index = i * blocks.query_block + jnp.arange(blocks.query_block)
        k_index = j * blocks.key_block + jnp.arange(blocks.key_block)
        visible &= q_index[:, None] >= k_index[None, :]
    visible = jnp.broadcast_to(visible[:, None], (blocks.query_block, blocks.shared, blocks.key_block))
    visible = visible.reshape(blocks.rows, blocks.key_block)
    return jnp.where(visible, logits, _MASKED), visible


def _meet(
    blocks: _Blocks, q_segments: Int[Array, " queries"], k_segments: Int[Array, " keys"]
) -> Bool[Array, ""] | bool:
    """Whether a query of the one block may see a key of the other: their ranges of segments overlap."""
    if not blocks.segments:
        return True
    return (jnp.min(q_segments) <= jnp.max(k_segments)) & (jnp.min(k_segments) <= jnp.max(q_segments))


def _when(condition, function, carry):
    return function(carry) if condition is True else jax.lax.cond(condition, function, lambda carry: carry, carry)


def _forward(blocks, q, k, v, q_segments, k_segments):
    """Outputs (M, blocks, rows, K), and the log of each row's softmax denominator, for the backward pass."""
    width = q.shape[-1]

    def one_head(args):
        q, k, v, q_segments, k_segments = args

        def one_block(args):
            i, q, q_segments = args

            def add(j, carry):
                def attend(carry):
                    highest, total, out = carry
                    logits, _ = _logits(blocks, i, j, q, k[j], q_segments, k_segments[j])
                    higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
                    weights = jnp.exp(logits - higher[:, None])
                    decay = jnp.exp(highest - higher)
                    read = jnp.einsum("rn,nk->rk", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
                    return higher, total * decay + jnp.sum(weights, axis=-1), out * decay[:, None] + read

                return _when(_meet(blocks, q_segments, k_segments[j]), attend, carry)

            start = (
                jnp.full(blocks.rows, _MASKED),
                jnp.zeros(blocks.rows),
                jnp.zeros((blocks.rows, width), jnp.float32),
            )
            highest, total, out = jax.lax.fori_loop(0, blocks.last_key_block(i), add, start)
            total = jnp.maximum(total, 1e-30)  # rows whose blocks were all skipped
            return (out / total[:, None]).astype(q.dtype), highest + jnp.log(total)

        return jax.lax.map(one_block, (jnp.arange(blocks.query_count), q, q_segments))

    return jax.lax.map(one_head, (q, k, v, q_segments, k_segments))


def _attend_forward(blocks, q, k, v, q_segments, k_segments):
    out, log_total = _forward(blocks, q, k, v, q_segments, k_segments)
    return out, (q, k, v, q_segments, k_segments, out, log_total)


def _attend_backward(blocks, saved, d_out):
    def one_head(args):
        q, k, v, q_segments, k_segments, out, log_total, d_out = args

        def one_block(sums, args):
            i, q, q_segments, out, log_total, d_out = args
            d_out = d_out.astype(jnp.float32)
            mean = jnp.sum(d_out * out.astype(jnp.float32), axis=-1)

            def add(j, carry):
                def attend(carry):
                    d_q, d_k, d_v = carry
                    logits, visible = _logits(blocks, i, j, q, k[j], q_segments, k_segments[j])
                    weights = jnp.exp(logits - log_total[:, None])
                    if visible is not None:  # of a row that sees nothing every weight would be one
                        weights = jnp.where(visible, weights, 0.0)
                    d_weights = jnp.einsum("rk,nk->rn", d_out, v[j].astype(jnp.float32))
                    d_logits = weights * (d_weights - mean[:, None])
                    d_q += jnp.einsum("rn,nk->rk", d_logits, k[j].astype(jnp.float32))
                    d_k = d_k.at[j].add(jnp.einsum("rn,rk->nk", d_logits, q.astype(jnp.float32)))
                    d_v = d_v.at[j].add(jnp.einsum("rn,rk->nk", weights, d_out))
                    return d_q, d_k, d_v

                return _when(_meet(blocks, q_segments, k_segments[j]), attend, carry)

            start = (jnp.zeros(q.shape, jnp.float32), *sums)
            d_q, *sums = jax.lax.fori_loop(0, blocks.last_key_block(i), add, start)
            return tuple(sums), d_q

        zero = jnp.zeros(k.shape, jnp.float32)
        rows = (jnp.arange(blocks.query_count), q, q_segments, out, log_total, d_out)
        (d_k, d_v), d_q = jax.lax.scan(one_block, (zero, zero), rows)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    return (*jax.lax.map(one_head, (*saved, d_out)), None, None)


_attend.defvjp(_attend_forward, _attend_backward)
