"""The consumer warpgroups of the kernel in `_gpu_absorbed.py`: on tensor cores and by vector arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from vr_jax.kernels.window_attention import _gpu_vectors as vectors
from vr_jax.kernels.window_attention._gpu_block import Block, Ref, Shared, each
from vr_jax.kernels.window_attention._gpu_plan import TILE, Plan

# Accumulators of tensor cores.
ACC: Any = plgpu.ACC


def consume_on_tensor_cores(block: Block, shared: Shared) -> None:
    """Computes with tensor cores.

    All consumers compute the same logits and take turns in the columns of the results. For these each reads its own
    parts of the features, and releases them.
    """
    plan, warpgroup = block.plan, block.warpgroup
    mine = plan.parts // plan.consumers

    @pl.when(warpgroup == 0)
    def _clear() -> None:
        if plan.stride() < TILE:
            # A product of the last chunk extends into these rows.
            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), plan.dtype), plgpu.Layout.WGMMA)
            shared.buffer[pl.ds(plan.chunks * plan.stride(), TILE)] = zeros
            plgpu.commit_smem()

    each(shared.ring_free, plan.stages, plgpu.barrier_arrive)
    pl.loop(0, mine)(lambda n: plgpu.barrier_arrive(shared.buffer_free.at[n * plan.consumers + warpgroup]))

    def keys_of(chunk: Array) -> Ref:
        return shared.buffer.at[pl.ds(chunk * plan.stride(), TILE)]

    def first_products(turn: Array, *accumulators: Ref) -> list[Array]:
        @pl.loop(0, plan.parts)
        def _part(part: Array) -> None:
            plgpu.barrier_wait(shared.buffer_full.at[part])
            for n in range(plan.per_part):
                chunk = part * plan.per_part + n
                slot = block.slot(turn, chunk)
                plgpu.barrier_wait(shared.ring_full.at[slot])
                for stream, accumulator in enumerate(accumulators):
                    rows = shared.ring.at[stream, pl.ds(slot * plan.rows, TILE)]
                    plgpu.wgmma(accumulator, rows, keys_of(chunk).transpose((1, 0)))
                # This waits for all products but those of this chunk.
                plgpu.wgmma_wait(plan.streams)

                def release_last(chunk: Array = chunk) -> None:
                    plgpu.barrier_arrive(shared.ring_free.at[block.slot(turn, chunk - 1)])

                pl.when(part > 0)(release_last) if n == 0 else release_last()

        values = [accumulator[...] for accumulator in accumulators]
        plgpu.barrier_arrive(shared.ring_free.at[block.slot(turn, plan.chunks - 1)])
        return values

    def write_weights(group: Array, place: Array, values: list[Array]) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for key in range(plan.keys):
            for n, value in enumerate(values):
                shared.weights[n, 0, key] = jnp.where(place == key, value, 0.0).sum(axis=1)
        plgpu.commit_smem()
        for n, ref in enumerate(block.weights):
            plgpu.copy_smem_to_gmem(shared.weights.at[n, 0], ref.at[group, 0])

    def write_results(group: Array, chunk: Array) -> None:
        def product(accumulator: Ref) -> Array:
            plgpu.wgmma(accumulator, shared.factors, keys_of(chunk))
            values: Array = accumulator[...]
            return values

        result = pl.run_scoped(product, ACC((TILE, TILE), jnp.float32)).astype(plan.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.results[warpgroup] = result
        plgpu.commit_smem()
        rows = pl.ds(group * plan.rows, plan.rows)
        plgpu.copy_smem_to_gmem(
            shared.results.at[warpgroup, pl.ds(0, plan.rows)], block.out.at[rows, block.columns(chunk)]
        )

    @pl.loop(0, block.turns)
    def _turn(turn: Array) -> None:
        group = block.group(turn)
        accumulators = [ACC((TILE, TILE), jnp.float32)] * plan.streams
        logits, *rest = pl.run_scoped(functools.partial(first_products, turn), *accumulators)
        own, place = _ownership(plan, group)
        weights = _softmax(logits * (block.scale * vectors.LOG2_E), own, block.mask_logits, group)
        factors = weights
        if plan.backward:
            weights_grad = jnp.where(own, rest[0], 0.0)
            delta = (weights * weights_grad).sum(axis=1)
            factors = weights * (weights_grad - lax.broadcast_in_dim(delta, weights.shape, [0])) * block.scale
            pl.when(warpgroup == 0)(lambda: write_weights(group, place, [weights, factors]))

        @pl.when(warpgroup == 0)
        def _share() -> None:
            # The other consumer has read the factors of the last turn: since then it has released all its features, or
            # those of this turn could not have been loaded.
            shared.factors[...] = factors.astype(plan.dtype)
            plgpu.commit_smem()

        # From here on no consumer reads the features of the others for logits, so each may release its own.
        plgpu.barrier_arrive(shared.factors_done)
        plgpu.barrier_wait(shared.factors_done)

        @pl.loop(0, mine)
        def _part(n: Array) -> None:
            part = n * plan.consumers + warpgroup
            for k in range(plan.per_part):
                write_results(group, part * plan.per_part + k)
            plgpu.barrier_arrive(shared.buffer_free.at[part])


def _ownership(plan: Plan, group: Array) -> tuple[Array, Array]:
    """Returns for each row (window, head) and row of features whether it is a key of the window, and which of the S."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    first = group * (plan.group * plan.keys)
    key = column - (first - lax.div(first, plan.align) * plan.align)
    window = lax.div(key, plan.keys)
    own = (key >= 0) & (key < plan.group * plan.keys) & (window == lax.div(row, plan.heads))
    return own, key - window * plan.keys


def _softmax(logits: Array, own: Array, mask_logits: Ref | None, group: Array) -> Array:
    """Computes the softmax of logits in base 2, over the valid keys that each row owns."""
    if mask_logits is not None:
        shift = plgpu.load(mask_logits.at[group], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        logits = logits + lax.broadcast_in_dim(shift, logits.shape, [1])
    logits = jnp.where(own, logits, -jnp.inf)
    highest = jnp.maximum(logits.max(axis=1), vectors.LOWEST)
    weights = jnp.exp2(logits - lax.broadcast_in_dim(highest, logits.shape, [0]))
    return weights * lax.broadcast_in_dim(vectors.reciprocal(weights.sum(axis=1)), logits.shape, [0])


def consume_by_vectors(block: Block, shared: Shared) -> None:
    """Computes with vector arithmetic; each consumer has its own heads."""
    plan, warpgroup = block.plan, block.warpgroup
    layout = vectors.row_layout(plan.chunk, plan.dtype)
    count = plan.heads // plan.consumers
    first = warpgroup * count
    shape = (count, plan.chunk)

    def load(ref: Ref, layout: Any) -> Array:
        values: Array = plgpu.load(ref, layout=layout)
        return values.astype(jnp.float32)

    def key_of(chunk: Array, key: int) -> Array:
        """Returns one row of features, repeated for every head."""
        row = load(shared.buffer.at[chunk * plan.keys + key], layout.reduce(0))
        return vectors.broadcast(row, shape, 1, layout)

    def first_products(turn: Array, part: Array, sums: list[Array]) -> list[Array]:
        plgpu.barrier_wait(shared.buffer_full.at[part])
        for n in range(plan.per_part):
            chunk = part * plan.per_part + n
            slot = block.slot(turn, chunk)
            plgpu.barrier_wait(shared.ring_full.at[slot])
            rows = pl.ds(slot * plan.heads + first, count)
            streams = [load(shared.ring.at[stream, rows], layout) for stream in range(plan.streams)]
            products = [(x * key_of(chunk, key)).sum(axis=1) for x in streams for key in range(plan.keys)]
            sums = [total + product for total, product in zip(sums, products, strict=True)]
            # The reads have to be complete before the copy engine writes here again.
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.ring_free.at[slot])
        return sums

    def write_weights(group: Array, *values: list[Array]) -> None:
        for n, columns in enumerate(values):
            for key, column in enumerate(columns):
                shared.weights[n, warpgroup, key] = column
        plgpu.commit_smem()
        for n, ref in enumerate(block.weights):
            plgpu.copy_smem_to_gmem(shared.weights.at[n, warpgroup], ref.at[group, warpgroup])

    def write_results(group: Array, chunk: Array, factors: list[Array]) -> None:
        terms = [vectors.broadcast(f, shape, 0, layout) * key_of(chunk, key) for key, f in enumerate(factors)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        rows = pl.ds(first, count)
        shared.results[0, rows] = sum(terms[1:], terms[0]).astype(plan.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            shared.results.at[0, rows], block.out.at[pl.ds(group * plan.heads + first, count), block.columns(chunk)]
        )

    each(shared.ring_free, plan.stages, plgpu.barrier_arrive)
    each(shared.buffer_free, plan.parts, plgpu.barrier_arrive)

    @pl.loop(0, block.turns)
    def _turn(turn: Array) -> None:
        group = block.group(turn)
        zero = plgpu.layout_cast(jnp.zeros((count,), jnp.float32), layout.reduce(1))
        sums = [zero] * (plan.streams * plan.keys)
        sums = lax.fori_loop(0, plan.parts, functools.partial(first_products, turn), sums)
        shifts = None if block.mask_logits is None else [block.mask_logits[group, key] for key in range(plan.keys)]
        weights = vectors.softmax(sums[: plan.keys], shifts, block.scale)
        factors = weights
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if plan.backward:
            factors = vectors.logits_gradient(weights, sums[plan.keys :], block.scale)
            write_weights(group, weights, factors)

        @pl.loop(0, plan.parts)
        def _part(part: Array) -> None:
            for n in range(plan.per_part):
                write_results(group, part * plan.per_part + n, factors)
            plgpu.barrier_arrive(shared.buffer_free.at[part])
