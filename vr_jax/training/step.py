"""One optimizer update as one jitted function: micro-batches, gradients, clipping, AdamW, the step's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vr_jax.kernels.cross_entropy.api import chunked_cross_entropy, next_token_targets
from vr_jax.model.batch import Batch
from vr_jax.sharding import constrain
from vr_jax.training.optimizer import Schedule
from vr_jax.training.state import ModelTree, Params, TrainState, shardings_of

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def batch_counts(batch: Batch) -> Metrics:
    """How much work a batch holds, padding left out. `pairs` are the query-key pairs causal attention sees."""
    used = batch.segment_ids > 0
    counts = {
        "samples": jnp.max(batch.segment_ids, axis=1),
        "tokens": used,
        "targets": next_token_targets(batch)[1],
        "tiles": batch.tile_segment > 0,
        "pairs": jnp.where(used, batch.positions + 1, 0),
    }
    return {name: jnp.sum(values, dtype=jnp.float32) for name, values in counts.items()}


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...). Micro-batch i takes rows i, i + count, ..., so no row changes its device."""

    def split(x):
        x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


def make_train_step(
    tree: ModelTree,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    abstract: TrainState,
    *,
    accumulation: int = 1,
    loss_chunk: int = 1024,
) -> TrainStep:
    """The jitted update, to be called under `jax.set_mesh`; it takes over (donates) the state it is given.

    The loss is the mean cross-entropy over all targets of the global batch, in nats, however the batch is cut into
    devices and micro-batches (LLaVA averages per device and micro-batch; methods.md 1.6)."""

    def mean_loss(params: Params, frozen: Params, batch: Batch, targets_in_step: Array) -> Float[Array, ""]:
        model = tree.build({**frozen, **params})
        hidden, _ = model(batch)
        targets, counts = next_token_targets(batch)
        total = chunked_cross_entropy(hidden, model.head_kernel(), targets, counts, chunk=loss_chunk)
        return total / targets_in_step

    def gradients(state: TrainState, batch: Batch, targets_in_step: Array) -> tuple[Float[Array, ""], Params]:
        value_and_grad = jax.value_and_grad(mean_loss)
        if accumulation == 1:
            return value_and_grad(state.params, state.frozen, batch, targets_in_step)

        def add(carry, micro):
            part = value_and_grad(state.params, state.frozen, micro, targets_in_step)
            return jax.tree.map(jnp.add, carry, part), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = jax.lax.scan(add, zero, split_micro_batches(batch, accumulation))
        return total

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = batch_counts(batch)
        # A batch without any target has loss 0 and no gradient.
        loss, grads = gradients(state, batch, jnp.maximum(counts["targets"], 1.0))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss, "lr": schedule(state.step), "grad_norm": optax.global_norm(grads), **counts}
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(abstract), None))
