"""Windowed cross-attention on NVIDIA GPUs where the heads share the keys, and the keys are the values.

The kernel is bound by memory traffic, so it reads everything once. A persistent block keeps the features of its G
windows in shared memory between the two products (55 KB per window at width 3072). Queries and results stream past
them.

    producer warpgroup     It copies queries by TMA, 64 columns at a time, into a ring of stages, and features into the
                           buffer. It runs ahead into the next group of windows while results of this one are written.
    consumer warpgroups    They compute logits = queries . features, the softmax in registers, and
                           results = weights . features, which are written by TMA.

On tensor cores (bfloat16, Hopper) 64 rows (window, head) are multiplied with 64 keys. Each row owns S of these keys,
and the others are masked. The buffer holds `stride` < 64 keys per chunk of columns, one chunk behind the other, so an
operand of 64 keys extends into the next chunks. What it reads there are finite numbers, whose weights are zero or whose
logits are masked. For float32 and on other chips the products are vector arithmetic: a group is one window, and the
heads are divided over the consumers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention import _gpu_vectors as vectors
from vr_jax.kernels.window_attention._gpu_plan import SWIZZLED_ROWS, TILE, Plan

# Accumulators of tensor cores.
ACC: Any = plgpu.ACC
# A reference to memory. Pallas has no public name for its type.
Ref = Any


@dataclass(frozen=True)
class _Shared:
    """The shared memory and the barriers of a block's warpgroups.

    Attributes:
        ring: Queries, a chunk of columns in each of the stages.
        buffer: Features, chunk behind chunk.
        results: Results on their way to device memory.
        ring_full: The copy engine arrives here when a stage of the ring is filled.
        ring_free: The consumers arrive here when they have read a stage of the ring.
        buffer_full: The copy engine arrives here when a part of the buffer is filled.
        buffer_free: The consumers arrive here when they have read a part of the buffer.
        factors: The factors of the second product, on tensor cores.
        factors_done: The consumers arrive here when the factors are written.
        weights: In the backward pass, the weights and the gradient by the products.
    """

    ring: Ref
    buffer: Ref
    results: Ref
    ring_full: Ref
    ring_free: Ref
    buffer_full: Ref
    buffer_free: Ref
    factors: Ref = None
    factors_done: Ref = None
    weights: Ref = None


@dataclass(frozen=True)
class _Block:
    """One block's view of a call: the arrays in device memory, and the groups that it takes one after the other.

    Attributes:
        plan: The sizes of the call.
        scale: The factor of the logits.
        streams: The arrays of rows: queries, and in the backward pass the output's gradient.
        features: The keys, which are the values.
        mask_logits: For each group and key 0, or -inf for a key that is not valid; None if all keys are valid.
        out: The output, or the gradient by the queries.
        weights: In the backward pass, the outputs for the weights and for the gradient by the products.
        warpgroup: The number of this warpgroup.
        first: The first group of this block.
        step: The number of blocks, which is the distance between the groups of a block.
    """

    plan: Plan
    scale: float
    streams: list[Ref]
    features: Ref
    mask_logits: Ref | None
    out: Ref
    weights: list[Ref]
    warpgroup: Array
    first: Array
    step: int

    @property
    def turns(self) -> Array:
        """The number of groups that this block takes."""
        return lax.div(self.plan.groups - 1 - self.first, self.step) + 1

    def group(self, turn: Array) -> Array:
        """Returns the group of a turn."""
        return self.first + turn * self.step

    def slot(self, turn: Array, chunk: Array | int) -> Array:
        """Returns the stage of the ring that holds a chunk of queries."""
        return lax.rem(turn * self.plan.chunks + chunk, self.plan.stages)

    def columns(self, chunk: Array) -> pl.Slice:
        """Returns the columns of a chunk."""
        return pl.ds(chunk * self.plan.chunk, self.plan.chunk)


def call(
    plan: Plan,
    query: Float[Array, "W H d"],
    features: Float[Array, "W S 1 d"],
    valid: Bool[Array, "W S"] | None,
    grad: Float[Array, "W H d"] | None,
    scale: float,
    blocks: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs the kernel on one device.

    Args:
        plan: The sizes of the call.
        query: The queries.
        features: The keys, which are the values.
        valid: The keys that take part, or None if all do.
        grad: The gradient by the output, or None in the forward pass.
        scale: The factor of the logits.
        blocks: The blocks that run on the device at the same time.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The output alone; or with `grad` the three results of `pallas_gpu.query_gradient`.
    """
    shape, dtype = query.shape, query.dtype
    flat = features.reshape(-1, plan.width)
    # This copies nothing if the rows are whole tiles, as they are for any number of windows that is a multiple of 8.
    flat = jnp.pad(flat, ((0, -flat.shape[0] % plan.align), (0, 0)))
    streams = [x.reshape(-1, plan.width) for x in (query, grad) if x is not None]
    mask_logits = [] if valid is None else [_mask_logits(plan, valid)]

    out_type = [jax.ShapeDtypeStruct(streams[0].shape, dtype)]
    if plan.backward:
        out_type += [jax.ShapeDtypeStruct((plan.groups, *plan.weights), jnp.float32)] * 2

    tiles: tuple[Any, ...] = ()
    if plan.tensor_cores:
        # The type is Any because mypy takes methods that the base class leaves empty for abstract ones.
        tiling: Any = plgpu.TilingTransform
        swizzle: Any = plgpu.SwizzleTransform
        tiles = tiling((SWIZZLED_ROWS, TILE)), swizzle(128)
    results = (plan.consumers, TILE) if plan.tensor_cores else (1, plan.heads)
    scratch: dict[str, Any] = {
        "ring": plgpu.SMEM((plan.streams, plan.ring_rows, plan.chunk), dtype, transforms=tiles),
        "buffer": plgpu.SMEM((plan.buffer_rows(), plan.chunk), dtype, transforms=tiles),
        "results": plgpu.SMEM((*results, plan.chunk), dtype, transforms=tiles),
        "ring_full": plgpu.Barrier(num_arrivals=plan.streams, num_barriers=plan.stages),
        "ring_free": plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
        "buffer_full": plgpu.Barrier(num_arrivals=plan.per_part, num_barriers=plan.parts),
        "buffer_free": plgpu.Barrier(num_arrivals=1 if plan.tensor_cores else plan.consumers, num_barriers=plan.parts),
    }
    if plan.tensor_cores:
        scratch["factors"] = plgpu.SMEM((TILE, TILE), dtype, transforms=tiles)
        scratch["factors_done"] = plgpu.Barrier(num_arrivals=plan.consumers)
    if plan.backward:
        scratch["weights"] = plgpu.SMEM((2, *plan.weights), jnp.float32)

    # Mosaic's search for layouts does not end for vector arithmetic, which states all its layouts itself.
    semantics = plgpu.LoweringSemantics.Warpgroup if plan.tensor_cores else plgpu.LoweringSemantics.Lane
    outs = plgpu.kernel(
        functools.partial(_body, plan, valid is not None, scale),
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(blocks, plan.groups),),
        grid_names=("block",),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=semantics),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="window_attention_absorbed_" + ("gradient" if plan.backward else "forward"),
    )(*streams, flat, *mask_logits)
    out, *weights = outs
    return out.reshape(shape), *(_by_window(plan, w) for w in weights)


def _mask_logits(plan: Plan, valid: Bool[Array, "W S"]) -> Float[Array, "groups keys"]:
    """Returns 0 or -inf for each row of features that a group loads; rows of other groups are masked elsewhere."""
    mask_logits = jnp.where(valid, 0.0, -jnp.inf).astype(jnp.float32).reshape(-1)
    if not plan.tensor_cores:
        return mask_logits.reshape(-1, plan.keys)
    first = np.arange(plan.groups) * plan.group * plan.keys // plan.align * plan.align
    index = np.minimum(first[:, None] + np.arange(TILE), mask_logits.size - 1)
    return mask_logits[index]


def _by_window(plan: Plan, weights: Float[Array, "groups parts S rows"]) -> Float[Array, "W H S"]:
    """Returns the weights of all groups by window."""
    weights = weights.swapaxes(1, 2).reshape(plan.groups, plan.keys, -1)[..., : plan.rows]
    weights = weights.reshape(plan.groups, plan.keys, plan.group, plan.heads)
    return weights.transpose(0, 2, 3, 1).reshape(-1, plan.heads, plan.keys)[: plan.windows]


def _body(plan: Plan, masked: bool, scale: float, *refs: Ref, **scratch: Ref) -> None:
    """Runs one warpgroup of a block: the last one produces, the others consume."""
    left = list(refs)
    streams = [left.pop(0) for _ in range(plan.streams)]
    features = left.pop(0)
    mask_logits = left.pop(0) if masked else None
    out, *weights = left
    warpgroup, first, step = lax.axis_index("warpgroup"), lax.axis_index("block"), lax.axis_size("block")
    block = _Block(plan, scale, streams, features, mask_logits, out, weights, warpgroup, first, step)
    shared = _Shared(**scratch)

    @pl.when(warpgroup == plan.consumers)
    def _produces() -> None:
        _produce(block, shared)

    @pl.when(warpgroup < plan.consumers)
    def _consumes() -> None:
        consume = _consume_on_tensor_cores if plan.tensor_cores else _consume_by_vectors
        consume(block, shared)
        plgpu.wait_smem_to_gmem(0)


def _each(barriers: Ref, count: int, act: Callable[[Ref], None]) -> None:
    """Calls a function with each barrier of an array."""
    pl.loop(0, count)(lambda n: act(barriers.at[n]))


def _produce(block: _Block, shared: _Shared) -> None:
    """Copies queries and features into shared memory as their places become free."""
    plan = block.plan

    def load_queries(turn: Array, chunk: Array) -> None:
        slot = block.slot(turn, chunk)
        plgpu.barrier_wait(shared.ring_free.at[slot])
        rows = pl.ds(block.group(turn) * plan.rows, plan.rows)
        for n, stream in enumerate(block.streams):
            plgpu.copy_gmem_to_smem(
                stream.at[rows, block.columns(chunk)],
                shared.ring.at[n, pl.ds(slot * plan.rows, plan.rows)],
                shared.ring_full.at[slot],
            )

    def load_features(turn: Array, part: Array) -> None:
        plgpu.barrier_wait(shared.buffer_free.at[part])
        row = lax.div(block.group(turn) * (plan.group * plan.keys), plan.align) * plan.align
        for n in range(plan.per_part):
            chunk = part * plan.per_part + n
            plgpu.copy_gmem_to_smem(
                block.features.at[pl.ds(row, plan.stride()), block.columns(chunk)],
                shared.buffer.at[pl.ds(chunk * plan.stride(), plan.stride())],
                shared.buffer_full.at[part],
            )

    ahead = min(plan.stages, plan.chunks)

    @pl.loop(0, block.turns)
    def _turn(turn: Array) -> None:
        # First come as many queries as the ring holds, then the features as their buffer empties, then the rest of the
        # queries as they are read. So the next group is copied while the consumers write results.
        pl.loop(0, ahead)(functools.partial(load_queries, turn))
        pl.loop(0, plan.parts)(functools.partial(load_features, turn))
        pl.loop(ahead, plan.chunks)(functools.partial(load_queries, turn))

    _each(shared.ring_free, plan.stages, plgpu.barrier_wait)
    _each(shared.buffer_free, plan.parts, plgpu.barrier_wait)


def _consume_on_tensor_cores(block: _Block, shared: _Shared) -> None:
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

    _each(shared.ring_free, plan.stages, plgpu.barrier_arrive)
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


def _consume_by_vectors(block: _Block, shared: _Shared) -> None:
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

    _each(shared.ring_free, plan.stages, plgpu.barrier_arrive)
    _each(shared.buffer_free, plan.parts, plgpu.barrier_arrive)

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
