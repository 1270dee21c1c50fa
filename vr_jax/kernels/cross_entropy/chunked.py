"""Cross-entropy in chunks of positions, with its gradients, on one device or on a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vr_jax.sharding import activation_spec, batch_axes, batch_shards, constrain, mesh_in_context

# The loss, that of each position, and the gradients by hidden states and by kernel, the last three where they are asked
# for.
_Gradients = tuple[Float[Array, "B N D"] | None, Float[Array, "D V"] | None]
_Losses = tuple[Float[Array, ""], Float[Array, "B N"] | None]
_LossesAndGradients = tuple[
    Float[Array, ""], Float[Array, "B N"] | None, Float[Array, "B N D"] | None, Float[Array, "D V"] | None
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    mask: Bool[Array, "B N"],
    chunk: int,
    each: bool,
) -> _Losses:
    """Computes `reference.cross_entropy` in chunks, and the loss of each position if asked; see `api`."""
    return _loss_and_gradients(hidden, kernel, targets, mask, chunk, each, for_hidden=False, for_kernel=False)[:2]


def _forward(
    hidden: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    mask: CustomVJPPrimal,
    chunk: int,
    each: bool,
) -> tuple[_Losses, _Gradients]:
    """Computes the loss, and the gradients of the arguments that are differentiated."""
    loss, losses, d_hidden, d_kernel = _loss_and_gradients(
        hidden.value,
        kernel.value,
        targets.value,
        mask.value,
        chunk,
        each,
        for_hidden=hidden.perturbed,
        for_kernel=kernel.perturbed,
    )
    return (loss, losses), (d_hidden, None if d_kernel is None else d_kernel.astype(kernel.value.dtype))


def _backward(
    chunk: int, each: bool, gradients: _Gradients, cotangents: tuple[Array, Any]
) -> tuple[Array | None, Array | None, None, None]:
    del chunk, each
    # What the losses of single positions are used for has no gradient.
    d_hidden, d_kernel = (None if x is None else (x * cotangents[0]).astype(x.dtype) for x in gradients)
    return d_hidden, d_kernel, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    mask: Bool[Array, "B N"],
    chunk: int,
    each: bool,
    *,
    for_hidden: bool,
    for_kernel: bool,
) -> _LossesAndGradients:
    """Computes the loss and the requested gradients; on a mesh each device does so for its own rows."""
    # The kernel is gathered over `fsdp` here, once, and not in every chunk.
    kernel = constrain(kernel.astype(hidden.dtype), None, "vocab")
    chunks = functools.partial(_chunks, chunk=chunk, each=each, for_hidden=for_hidden, for_kernel=for_kernel)
    mesh = mesh_in_context()
    if mesh is None or hidden.shape[0] % batch_shards(mesh):
        return chunks(hidden, kernel, targets, mask, jnp.sum(mask))
    over = batch_axes(mesh)
    rows, (_, vocab) = P(over), activation_spec(kernel.shape, None, "vocab", mesh=mesh)
    scattered = mesh.shape["fsdp"] > 1 and kernel.shape[0] % mesh.shape["fsdp"] == 0

    def own_rows(
        hidden: Array, kernel: Array, targets: Array, mask: Array
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        most = jax.lax.pmax(jnp.sum(mask), over)
        loss, losses, d_hidden, d_kernel = chunks(hidden, kernel, targets, mask, most, vocab_axis=vocab)
        if d_kernel is not None:
            # The gradient leaves a device once, not once per chunk, and goes at once to the device that updates this
            # piece of the kernel.
            if scattered:
                d_kernel = jax.lax.psum_scatter(d_kernel, "fsdp", scatter_dimension=0, tiled=True)
            left = tuple(axis for axis in over if axis != "fsdp" or not scattered)
            d_kernel = jax.lax.psum(d_kernel, tuple(axis for axis in left if mesh.shape[axis] > 1))
        return jax.lax.psum(loss, over), losses, d_hidden, d_kernel

    found: _LossesAndGradients = jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(rows, P(None, vocab), rows, rows),
        out_specs=(P(), rows, rows, P("fsdp" if scattered else None, vocab)),
        check_vma=False,
    )(hidden, kernel, targets, mask)
    return found


def _chunks(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B N"],
    mask: Bool[Array, "B N"],
    most: Int[Array, ""],
    *,
    chunk: int,
    each: bool,
    for_hidden: bool,
    for_kernel: bool,
    vocab_axis: str | None = None,
) -> _LossesAndGradients:
    """Computes the loss and the requested gradients of one device's rows, chunk after chunk.

    Args:
        hidden: The hidden states of the device's rows.
        kernel: The device's columns of the language model head.
        targets: The token that each position predicts, numbered in the whole vocabulary.
        mask: The positions that enter the loss.
        most: The masked positions of the device that has most of them. All devices skip the same chunks, because a
            chunk communicates over `vocab_axis`.
        chunk: Positions per chunk.
        each: Whether the loss of each position is returned.
        for_hidden: Whether the gradient by `hidden` is computed.
        for_kernel: Whether the gradient by `kernel` is computed.
        vocab_axis: The mesh axis over which the vocabulary is divided, if any.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    chunk = min(chunk, mask.size)
    padding = -mask.size % chunk
    order = jnp.argsort(~mask, stable=True)

    def in_chunks(x: Array) -> Array:
        return jnp.pad(x, (0, padding)).reshape(-1, chunk)

    def over_vocabulary(x: Array) -> Array:
        total: Array = x if vocab_axis is None else jax.lax.psum(x, vocab_axis)
        return total

    words = jnp.arange(kernel.shape[1])
    if vocab_axis is not None:
        words += jax.lax.axis_index(vocab_axis) * kernel.shape[1]

    def compute(
        kernel: Array, d_kernel: Array | None, index: Array, target: Array, counted: Array
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        x = flat[index]
        logits = jnp.einsum("td,dv->tv", x, kernel, preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        if vocab_axis is not None:
            largest = jax.lax.pmax(lse, vocab_axis)
            lse = largest + jnp.log(over_vocabulary(jnp.exp(lse - largest)))
        hit = words == target[:, None]
        target_logit = over_vocabulary(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        losses = jnp.where(counted, lse - target_logit, 0.0)
        d_x = None
        if for_hidden or for_kernel:
            d_logits = jnp.where(counted[:, None], jnp.exp(logits - lse[:, None]) - hit, 0.0).astype(x.dtype)
        if for_hidden:
            d_x = jnp.einsum("tv,dv->td", d_logits, kernel, preferred_element_type=jnp.float32)
            d_x = over_vocabulary(d_x).astype(x.dtype)
        if d_kernel is not None:
            d_kernel += jnp.einsum("td,tv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return jnp.sum(losses), losses if each else None, d_kernel, d_x

    def skip(
        kernel: Array, d_kernel: Array | None, index: Array, target: Array, counted: Array
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        losses = jnp.zeros(chunk, jnp.float32) if each else None
        d_x = jnp.zeros((chunk, flat.shape[-1]), flat.dtype) if for_hidden else None
        return jnp.zeros((), jnp.float32), losses, d_kernel, d_x

    def body(
        carry: tuple[Array, Array | None], part: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array | None], tuple[Array | None, Array | None]]:
        total, d_kernel = carry
        start, *arrays = part
        loss, losses, d_kernel, d_x = jax.lax.cond(start < most, compute, skip, kernel, d_kernel, *arrays)
        return (total + loss, d_kernel), (losses, d_x)

    starts = jnp.arange(0, mask.size + padding, chunk)
    parts = (starts, *(in_chunks(x) for x in (order, targets[order], mask[order])))
    zero = jnp.zeros(kernel.shape, jnp.float32) if for_kernel else None
    (total, d_kernel), (losses, d_x) = jax.lax.scan(body, (jnp.zeros((), jnp.float32), zero), parts)

    def at_positions(x: Array | None, *inner: int) -> Array | None:
        """Undoes the reordering, where there is something."""
        return None if x is None else x.reshape(-1, *inner)[jnp.argsort(order)].reshape(*hidden.shape[:2], *inner)

    return total, at_positions(losses), at_positions(d_x, flat.shape[-1]), d_kernel
