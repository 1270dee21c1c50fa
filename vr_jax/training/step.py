"""One update as one jitted function: micro-batches, gradients, clipping, AdamW and the numbers of the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vr_jax.kernels.cross_entropy import cross_entropy, cross_entropy_of_each, next_token_targets
from vr_jax.model.batch import Batch
from vr_jax.sharding import constrain, replicated, sum_over_replicas
from vr_jax.training.optimizer import Params, Schedule
from vr_jax.training.state import ModelTree, TrainState, shardings_of

Metrics = dict[str, Float[Array, ""]]
# A loss, and the sums of the losses of each source where several are told apart.
Losses = tuple[Float[Array, ""], Float[Array, " S"] | None]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
LossStep = Callable[[TrainState, Batch], Metrics]


def batch_counts(batch: Batch) -> Metrics:
    """Counts the work in a batch, without its padding.

    Args:
        batch: A global batch.

    Returns:
        `samples`; `tokens`; `targets`, the tokens with a loss; `tiles`, the image tiles; and `pairs`, the pairs of a
        query and a key that causal attention within samples sees.
    """
    used = batch.segment_ids > 0
    # The place of a token in its sample is counted, because multi-axis positions advance less than one for each token.
    index = jnp.arange(batch.segment_ids.shape[1])
    begins = jnp.diff(batch.segment_ids, axis=1, prepend=-1) != 0
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    counts = {
        "samples": jnp.max(batch.segment_ids, axis=1),
        "tokens": used,
        "targets": next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)[1],
        "tiles": batch.tile_segment > 0,
        "pairs": jnp.where(used, index - first + 1, 0),
    }
    return {name: jnp.sum(values, dtype=jnp.float32) for name, values in counts.items()}


def group_norms(name: str, params: Params) -> Metrics:
    """Returns the norm of each part of a model.

    Args:
        name: What the norms are called.
        params: Parameters, or arrays that belong to them, by path.

    Returns:
        The norms by `<name>/<part>`, e.g. "param_norm/decoder"; the part is the first name of the paths.
    """
    parts: dict[str, list[Array]] = {}
    for path, leaf in params.items():
        parts.setdefault(path.partition(".")[0], []).append(leaf)
    return {f"{name}/{part}": optax.global_norm(leaves) for part, leaves in parts.items()}


def source_counts(batch: Batch, count: int) -> dict[str, Float[Array, " S"]]:
    """Counts the `samples` and the `targets` of each source of a batch.

    Args:
        batch: A global batch with `token_source`.
        count: The number S of sources.
    """
    begins = jnp.diff(batch.segment_ids, axis=1, prepend=0) != 0
    marks = {
        "samples": begins & (batch.segment_ids > 0),
        "targets": next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)[1],
    }
    return {name: sums_by_source(values.astype(jnp.float32), batch, count) for name, values in marks.items()}


def sums_by_source(values: Float[Array, "B N"], batch: Batch, count: int) -> Float[Array, " S"]:
    """Returns the sums of numbers of the tokens of a batch over each of S sources."""
    assert batch.token_source is not None
    own = batch.token_source == jnp.arange(count)[:, None, None]
    return jnp.sum(jnp.where(own, values, 0.0), axis=(1, 2))


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """Adds a leading axis of micro-batches: (B, ...) becomes (count, B / count, ...).

    Micro-batch i takes the rows i, i + count, i + 2 count, ... A device holds consecutive rows, so that each keeps
    its rows and none has to be sent.
    """

    def split(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    batches: Batch = jax.tree.map(split, batch)
    return batches


def summed_losses(
    tree: ModelTree, params: Params, frozen: Params, batch: Batch, loss_chunk: int, sources: int = 0
) -> Losses:
    """Returns the cross-entropy of all targets of a batch together, in nats, and that of the targets of each source.

    Args:
        tree: The model's parameters.
        params: The trained parameters by path.
        frozen: The frozen parameters by path.
        batch: The samples.
        loss_chunk: Positions of one device whose logits exist at a time.
        sources: The number S of sources that are told apart; 0 if none are, and then there is no second part.
    """
    model = tree.build({**frozen, **params})
    hidden, _ = model(batch)
    targets, counts = next_token_targets(batch.tokens, batch.segment_ids, batch.loss_mask)
    if not sources:
        return cross_entropy(hidden, model.head_kernel(), targets, counts, chunk=loss_chunk), None
    total, each = cross_entropy_of_each(hidden, model.head_kernel(), targets, counts, chunk=loss_chunk)
    return total, sums_by_source(each, batch, sources)


def make_loss_step(tree: ModelTree, mesh: Mesh, *, loss_chunk: int = 1024) -> LossStep:
    """Builds the jitted loss of a batch that is not trained on.

    Args:
        tree: The model's parameters.
        mesh: The devices.
        loss_chunk: Positions of one device whose logits exist at a time.

    Returns:
        A function of a state and a global batch. It returns `loss`, the cross-entropy of all targets together in nats,
        and the counts of `batch_counts`. It is called under `jax.set_mesh` and leaves the state as it is.
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        total, _ = summed_losses(tree, state.params, state.frozen, batch, loss_chunk)
        return {"loss": total, **batch_counts(batch)}

    return jax.jit(step, out_shardings=replicated(mesh))


def make_train_step(
    tree: ModelTree,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    abstract: TrainState,
    *,
    accumulation: int = 1,
    loss_chunk: int = 1024,
    sources: Sequence[str] = (),
) -> TrainStep:
    """Builds the jitted update.

    The loss is the mean cross-entropy, in nats, over all targets of the global batch, however the batch is divided
    into devices and micro-batches. LLaVA averages per device and micro-batch
    (docs/design/methods.md#hyper-parameters).

    Args:
        tree: The model's parameters.
        optimizer: The optimizer of the trained parameters.
        schedule: The learning rate, for the numbers of the step.
        abstract: Shapes, types and shardings of the state.
        accumulation: Micro-batches of an update.
        loss_chunk: Positions of one device whose logits exist at a time.
        sources: The names of the sources of the samples, if several are told apart; batches then have `token_source`.
            The numbers of a step then have `samples/<name>`, `targets/<name>` and the mean loss `loss/<name>`, which is
            0 where a batch has no target of the source.

    Returns:
        A function of a state and a global batch that returns the next state and the numbers of the step. It is called
        under `jax.set_mesh`, and reuses (donates) the memory of the state that it is given.
    """

    def mean_loss(
        params: Params, frozen: Params, batch: Batch, targets_in_step: Array
    ) -> tuple[Float[Array, ""], Float[Array, " S"] | None]:
        total, of_sources = summed_losses(tree, params, frozen, batch, loss_chunk, len(sources))
        return total / targets_in_step, of_sources

    def gradients(batch: Batch, params: Params, frozen: Params, targets_in_step: Array) -> tuple[Losses, Params]:
        value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
        if accumulation == 1:
            return value_and_grad(params, frozen, batch, targets_in_step)

        def add(carry: tuple[Losses, Params], micro: Batch) -> tuple[tuple[Losses, Params], None]:
            part = value_and_grad(params, frozen, micro, targets_in_step)
            return jax.tree.map(jnp.add, carry, part), None

        of_sources = jnp.zeros(len(sources), jnp.float32) if sources else None
        zero = ((jnp.zeros((), jnp.float32), of_sources), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, split_micro_batches(batch, accumulation))
        return total

    all_gradients = sum_over_replicas(gradients)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = batch_counts(batch)
        # A batch without any target has loss 0 and no gradient.
        targets_in_step = jnp.maximum(counts["targets"], 1.0)
        (loss, of_sources), grads = all_gradients(batch, state.params, state.frozen, targets_in_step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **{"loss": loss, "lr": schedule(state.step), "grad_norm": optax.global_norm(grads), **counts},
            **group_norms("param_norm", params),
            **group_norms("update_norm", updates),
        }
        if of_sources is not None:
            own = source_counts(batch, len(sources))
            own["loss"] = of_sources / jnp.maximum(own["targets"], 1.0)
            metrics |= {f"{name}/{source}": one[k] for name, one in own.items() for k, source in enumerate(sources)}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(abstract), None))
