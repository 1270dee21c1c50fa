"""Next-token cross-entropy that never holds the (tokens, vocabulary) logits of a whole batch (design decision 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vr_jax.model.batch import Batch
from vr_jax.sharding import BATCH_AXES, batch_shards, constrain, mesh_in_context


def next_token_targets(batch: Batch) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """The token that each position predicts, and whether it counts.

    `loss_mask` marks tokens as targets; a target is predicted from the position before it in the same segment, so the
    first token of a sample is never one (as in transformers, whose labels are shifted by one)."""
    same_sample = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    counts = batch.loss_mask[:, 1:] & same_sample & (batch.segment_ids[:, 1:] > 0)
    return jnp.roll(batch.tokens, -1, axis=1), jnp.pad(counts, ((0, 0), (0, 1)))


def chunked_cross_entropy(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    counts: Bool[Array, "B N"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Summed cross-entropy in nats, float32, of the positions in `counts`; logits of at most (B, chunk, V) at a time.

    Each row is reordered so that its counted positions come first. A chunk in which no row has one is skipped, so the
    vocabulary costs only as much as the row with most targets needs. The backward pass recomputes each chunk's logits.
    Logits are products in `hidden.dtype` accumulated in float32."""
    # Gathered over fsdp here, once, and not in every chunk. float32 so that its gradient, which the scan sums over the
    # chunks, is accumulated in float32.
    kernel = constrain(kernel.astype(jnp.float32), None, "vocab")
    most = jnp.max(jnp.sum(counts, axis=1))
    mesh = mesh_in_context()
    if mesh is None or batch_shards(mesh) == 1 or hidden.shape[0] % batch_shards(mesh):
        return _summed_chunks(hidden, kernel, targets, counts, most, chunk=chunk)

    def own_rows(*arrays):
        return _summed_chunks(*arrays, chunk=chunk)[None]

    # Each shard of the batch sums over its chunks by itself: the kernel's gradient leaves it once, not once per chunk.
    rows = P(BATCH_AXES)
    totals = jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(rows, P(), rows, rows, P()),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(hidden, kernel, targets, counts, most)
    return jnp.sum(totals)


def _summed_chunks(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    counts: Bool[Array, "B N"],
    most: Int[Array, ""],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """`most`: counted positions of the row, of all shards, that has most. All shards skip the same chunks, because a
    chunk may communicate over `tensor`."""
    rows, length, _ = hidden.shape
    order = jnp.argsort(~counts, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, counts = (jnp.take_along_axis(x, order, axis=1) for x in (targets, counts))

    chunk = min(chunk, length)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets, counts = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets, counts))

    def in_chunks(x):
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_loss(kernel, x, target, counted):
        logits = jnp.einsum("bnd,dv->bnv", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", None, "vocab")
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.sum(jnp.where(counted, losses, 0.0))

    def body(total, part):
        start, x, target, counted = part
        loss = jax.lax.cond(
            start < most,
            chunk_loss,
            lambda kernel, x, target, counted: jnp.zeros((), jnp.float32),
            kernel,
            x,
            target,
            counted,
        )
        return total + loss, None

    parts = (jnp.arange(0, length + padding, chunk), in_chunks(hidden), in_chunks(targets), in_chunks(counts))
    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)
    return total
