"""Next-token cross-entropy that never holds the (tokens, vocabulary) logits of a whole batch (design decision 7)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vr_jax.model.batch import Batch
from vr_jax.sharding import BATCH_AXES, activation_spec, batch_shards, constrain, mesh_in_context


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
    """Summed cross-entropy in nats, float32, of the positions in `counts`; logits of at most (chunk, V) at a time on
    each device.

    A device's positions are reordered so that the counted ones come first; chunks without one are skipped, so the
    vocabulary costs as much as the device with most targets needs. Gradients are computed beside the loss, from the
    same logits, only for what is differentiated. Products take `hidden.dtype` (the gradient of the logits included, as
    in torch's bfloat16) and accumulate in float32, the kernel's gradient also over the chunks."""
    return _cross_entropy(hidden, kernel, targets, counts, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, kernel, targets, counts, chunk):
    return _loss_and_gradients(hidden, kernel, targets, counts, chunk, for_hidden=False, for_kernel=False)[0]


def _forward(hidden, kernel, targets, counts, chunk):
    loss, d_hidden, d_kernel = _loss_and_gradients(
        hidden.value,
        kernel.value,
        targets.value,
        counts.value,
        chunk,
        for_hidden=hidden.perturbed,
        for_kernel=kernel.perturbed,
    )
    return loss, (d_hidden, None if d_kernel is None else d_kernel.astype(kernel.value.dtype))


def _backward(chunk, gradients, cotangent):
    del chunk
    scaled = (None if x is None else (x * cotangent).astype(x.dtype) for x in gradients)
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    counts: Bool[Array, "B N"],
    chunk: int,
    *,
    for_hidden: bool,
    for_kernel: bool,
) -> tuple[Float[Array, ""], Float[Array, "B N D"] | None, Float[Array, "D V"] | None]:
    # Gathered over fsdp here, once, and not in every chunk.
    kernel = constrain(kernel.astype(hidden.dtype), None, "vocab")
    chunks = functools.partial(_chunks, chunk=chunk, for_hidden=for_hidden, for_kernel=for_kernel)
    mesh = mesh_in_context()
    if mesh is None or hidden.shape[0] % batch_shards(mesh):
        return chunks(hidden, kernel, targets, counts, jnp.sum(counts))
    rows, (_, vocab) = P(BATCH_AXES), activation_spec(kernel.shape, None, "vocab", mesh=mesh)
    scattered = mesh.shape["fsdp"] > 1 and kernel.shape[0] % mesh.shape["fsdp"] == 0

    def own_rows(hidden, kernel, targets, counts):
        most = jax.lax.pmax(jnp.sum(counts), BATCH_AXES)
        loss, d_hidden, d_kernel = chunks(hidden, kernel, targets, counts, most, vocab_axis=vocab)
        if d_kernel is not None:
            # Once, not once per chunk, and at once to the device that updates this piece of the kernel.
            if scattered:
                d_kernel = jax.lax.psum_scatter(d_kernel, "fsdp", scatter_dimension=0, tiled=True)
            left = ("replica",) if scattered else BATCH_AXES
            d_kernel = jax.lax.psum(d_kernel, tuple(axis for axis in left if mesh.shape[axis] > 1))
        return jax.lax.psum(loss, BATCH_AXES), d_hidden, d_kernel

    return jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(rows, P(None, vocab), rows, rows),
        out_specs=(P(), rows, P("fsdp" if scattered else None, vocab)),
        check_vma=False,
    )(hidden, kernel, targets, counts)


def _chunks(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    counts: Bool[Array, "B N"],
    most: Int[Array, ""],
    *,
    chunk: int,
    for_hidden: bool,
    for_kernel: bool,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B N D"] | None, Float[Array, "D V"] | None]:
    """`most`: counted positions of the device that has most. All devices skip the same chunks, because a chunk
    communicates over `vocab_axis`, the mesh axis over which the vocabulary is cut, if any."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets, counts = targets.reshape(-1), counts.reshape(-1)
    chunk = min(chunk, counts.size)
    padding = -counts.size % chunk
    order = jnp.argsort(~counts, stable=True)

    def in_chunks(x):
        return jnp.pad(x, (0, padding)).reshape(-1, chunk)

    def over_vocabulary(x):
        return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)

    words = jnp.arange(kernel.shape[1])
    if vocab_axis is not None:
        words += jax.lax.axis_index(vocab_axis) * kernel.shape[1]

    def computed(kernel, d_kernel, index, target, counted):
        x = flat[index]
        logits = jnp.einsum("td,dv->tv", x, kernel, preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        if vocab_axis is not None:
            largest = jax.lax.pmax(lse, vocab_axis)
            lse = largest + jnp.log(over_vocabulary(jnp.exp(lse - largest)))
        hit = words == target[:, None]
        picked = over_vocabulary(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        loss = jnp.sum(jnp.where(counted, lse - picked, 0.0))
        d_x = None
        if for_hidden or for_kernel:
            d_logits = jnp.where(counted[:, None], jnp.exp(logits - lse[:, None]) - hit, 0.0).astype(x.dtype)
        if for_hidden:
            d_x = jnp.einsum("tv,dv->td", d_logits, kernel, preferred_element_type=jnp.float32)
            d_x = over_vocabulary(d_x).astype(x.dtype)
        if for_kernel:
            d_kernel += jnp.einsum("td,tv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return loss, d_kernel, d_x

    def skipped(kernel, d_kernel, index, target, counted):
        d_x = jnp.zeros((chunk, flat.shape[-1]), flat.dtype) if for_hidden else None
        return jnp.zeros((), jnp.float32), d_kernel, d_x

    def body(carry, part):
        total, d_kernel = carry
        start, *arrays = part
        loss, d_kernel, d_x = jax.lax.cond(start < most, computed, skipped, kernel, d_kernel, *arrays)
        return (total + loss, d_kernel), d_x

    starts = jnp.arange(0, counts.size + padding, chunk)
    parts = (starts, *(in_chunks(x) for x in (order, targets[order], counts[order])))
    zero = jnp.zeros(kernel.shape, jnp.float32) if for_kernel else None
    (total, d_kernel), d_x = jax.lax.scan(body, (jnp.zeros((), jnp.float32), zero), parts)
    if d_x is None:
        return total, None, d_kernel
    d_hidden = d_x.reshape(-1, flat.shape[-1])[jnp.argsort(order)]
    return total, d_hidden.reshape(hidden.shape), d_kernel
