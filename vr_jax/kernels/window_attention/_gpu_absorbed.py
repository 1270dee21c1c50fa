"""Windowed cross-attention on NVIDIA GPUs where the heads share the keys, and the keys are the values.

Bound by memory, so everything is read once: a persistent block keeps the features of its G windows in shared memory
between the two products (55 KB a window at width 3072), and queries and results stream past them.

    producer warpgroup     TMA: queries by 64 columns into a ring of stages, features into the buffer that stays. It
                           runs ahead into the next group of windows while the results of this one are written.
    consumer warpgroups    logits = queries . features, softmax in registers, results = weights . features, by TMA.

On tensor cores (bfloat16, Hopper) 64 rows (window, head) meet 64 keys, of which each row owns S; the others are masked.
The buffer holds `stride` < 64 keys a chunk of columns, one chunk behind the other, so a 64-key operand runs into the
next chunks: finite numbers that meet weights of zero, or logits that are masked. Elsewhere (float32, other chips) the
products are vector arithmetic, one window a group, the heads split over the consumers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention import _gpu_vectors as vectors

TILE = 64  # rows and keys of a tensor core product, and (bfloat16) columns of a 128 byte swizzled tile
SWIZZLED_ROWS = 8  # TMA fills swizzled tiles from row numbers that are multiples of this
MAX_BARRIERS = 32  # in one array of them, Mosaic GPU's limit
SMEM_BYTES = (227 - 2 - 1) * 1024  # of a block on Hopper, less what Mosaic keeps for reductions, and the barriers
GOOD_STAGES, MAX_STAGES = 3, 8


@dataclass(frozen=True)
class Plan:
    """Sizes of one call. A group is the G windows that a block holds at a time."""

    windows: int
    heads: int
    keys: int  # S
    width: int
    dtype: jnp.dtype
    backward: bool
    tensor_cores: bool

    @property
    def chunk(self) -> int:
        """Columns that are moved and multiplied at a time."""
        return TILE if self.tensor_cores else 256 // self.dtype.itemsize

    @property
    def chunks(self) -> int:
        return self.width // self.chunk

    @functools.cached_property
    def group(self) -> int:
        """G: as many windows as the rows of a product and shared memory take; 0 where not even one fits."""
        sizes = range(TILE // self.heads, 0, -1) if self.tensor_cores else (1,)
        return next((g for stages in (GOOD_STAGES, 1) for g in sizes if self._stages(g) >= stages), 0)

    @property
    def groups(self) -> int:
        return pl.cdiv(self.windows, self.group)

    @property
    def rows(self) -> int:
        """Of queries in a group."""
        return self.group * self.heads

    @property
    def align(self) -> int:
        return SWIZZLED_ROWS if self.tensor_cores else 1

    def stride(self, group: int | None = None) -> int:
        """Rows of features that are loaded for a group: its keys, from the aligned row before them."""
        keys = (group or self.group) * self.keys
        return pl.cdiv(keys + self.align - math.gcd(keys, self.align), self.align) * self.align

    @property
    def streams(self) -> int:
        """Row arrays that flow past the features: queries, and going backward the gradient of the results."""
        return 1 + self.backward

    @property
    def consumers(self) -> int:
        if self.tensor_cores:  # they share the rows, and take turns in the columns of the results
            return 1 + (self.blocks % 2 == 0)
        return next(n for n in (3, 2, 1) if self.heads // SWIZZLED_ROWS % n == 0)

    @property
    def row_parts(self) -> int:
        """Into which the consumers cut the rows."""
        return 1 if self.tensor_cores else self.consumers

    @property
    def per_block(self) -> int:
        """Chunks of features that share a barrier."""
        return next(m for m in range(1, self.chunks + 1) if self.chunks % m == 0 and self.chunks // m <= MAX_BARRIERS)

    @property
    def blocks(self) -> int:
        return self.chunks // self.per_block

    @property
    def product_rows(self) -> int:
        return TILE if self.tensor_cores else self.heads

    def buffer_rows(self, group: int | None = None) -> int:
        tail = TILE if self.tensor_cores and self.stride(group) < TILE else 0
        return self.chunks * self.stride(group) + tail

    @property
    def ring_rows(self) -> int:
        return (self.stages - 1) * self.rows + self.product_rows

    @property
    def stages(self) -> int:
        return self._stages(self.group)

    def _stages(self, group: int) -> int:
        """Of the ring of queries: what shared memory leaves beside features, results and weights."""
        if self.tensor_cores and self.stride(group) > TILE:
            return 0
        row = self.chunk * self.dtype.itemsize
        product = self.product_rows * row
        used = self.buffer_rows(group) * row
        used += product * (self.consumers + 1 if self.tensor_cores else 1)  # results, factors of the second product
        used += pl.cdiv(2 * self.keys * self.product_rows * 4, 1024) * 1024 if self.backward else 0  # weights
        slot = group * self.heads * row
        used += self.streams * (product - slot)  # a product of the last slot reads on
        return min(MAX_STAGES, (SMEM_BYTES - used) // (slot * self.streams))


def unsupported(plan: Plan) -> str | None:
    if plan.heads % SWIZZLED_ROWS or (plan.tensor_cores and plan.heads > TILE):
        return f"{plan.heads} heads with shared keys, expected a multiple of {SWIZZLED_ROWS}, at most {TILE}"
    if plan.width % plan.chunk:
        return f"width {plan.width} of shared keys is not a multiple of {plan.chunk} ({plan.dtype.name})"
    if not plan.group:
        return (
            f"{plan.keys} keys of width {plan.width} ({plan.dtype.name}) a window do not fit into a block's "
            f"{SMEM_BYTES} bytes of shared memory"
        )
    return None


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
    """(out,), or with `grad` (dquery, weights, dlogits) as in pallas_gpu.query_gradient. `blocks`: on the device."""
    shape, dtype = query.shape, query.dtype
    flat = features.reshape(-1, plan.width)
    # A copy, but only where the windows of one device are an odd number: a tiled view of an array has whole tiles.
    flat = jnp.pad(flat, ((0, -flat.shape[0] % plan.align), (0, 0)))
    streams = [x.reshape(-1, plan.width) for x in (query, grad) if x is not None]
    hidden = [] if valid is None else [_hidden(plan, valid)]

    out_type = [jax.ShapeDtypeStruct(streams[0].shape, dtype)]
    if plan.backward:
        weights = (plan.row_parts, plan.keys, plan.product_rows // plan.row_parts)
        out_type += [jax.ShapeDtypeStruct((plan.groups, *weights), jnp.float32)] * 2

    tiles = (plgpu.TilingTransform((SWIZZLED_ROWS, TILE)), plgpu.SwizzleTransform(128)) if plan.tensor_cores else ()
    results = (plan.consumers, TILE) if plan.tensor_cores else (1, plan.heads)
    scratch = {
        "ring": plgpu.SMEM((plan.streams, plan.ring_rows, plan.chunk), dtype, transforms=tiles),
        "buffer": plgpu.SMEM((plan.buffer_rows(), plan.chunk), dtype, transforms=tiles),
        "results": plgpu.SMEM((*results, plan.chunk), dtype, transforms=tiles),
        "ring_full": plgpu.Barrier(num_arrivals=plan.streams, num_barriers=plan.stages),
        "ring_free": plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
        "buffer_full": plgpu.Barrier(num_arrivals=plan.per_block, num_barriers=plan.blocks),
        "buffer_free": plgpu.Barrier(
            num_arrivals=1 if plan.tensor_cores else plan.consumers, num_barriers=plan.blocks
        ),
    }
    if plan.tensor_cores:
        scratch["factors"] = plgpu.SMEM((TILE, TILE), dtype, transforms=tiles)
        scratch["factors_done"] = plgpu.Barrier(num_arrivals=plan.consumers)
    if plan.backward:
        scratch["weights"] = plgpu.SMEM((2, *weights), jnp.float32)

    outs = plgpu.kernel(
        functools.partial(_body, plan, valid is not None, scale),
        out_type=out_type,
        scratch_types=scratch,
        grid=(min(blocks, plan.groups),),
        grid_names=("block",),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=(
            plgpu.LoweringSemantics.Warpgroup if plan.tensor_cores else plgpu.LoweringSemantics.Lane
        )),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="window_attention_absorbed_" + ("gradient" if plan.backward else "forward"),
    )(*streams, flat, *hidden)
    out, *weights = outs
    return out.reshape(shape), *(_by_window(plan, w) for w in weights)


def _hidden(plan: Plan, valid: Bool[Array, "W S"]) -> Float[Array, "groups keys"]:
    """0 or -inf for each row of features that a group loads; what is not a key of the group is masked elsewhere."""
    hidden = jnp.where(valid, 0.0, -jnp.inf).astype(jnp.float32).reshape(-1)
    if not plan.tensor_cores:
        return hidden.reshape(-1, plan.keys)
    first = np.arange(plan.groups) * plan.group * plan.keys // plan.align * plan.align
    index = np.minimum(first[:, None] + np.arange(TILE), hidden.size - 1)
    return hidden[index]


def _by_window(plan: Plan, weights: Float[Array, "groups parts S rows"]) -> Float[Array, "W H S"]:
    weights = weights.swapaxes(1, 2).reshape(plan.groups, plan.keys, -1)[..., : plan.rows]
    weights = weights.reshape(plan.groups, plan.keys, plan.group, plan.heads)
    return weights.transpose(0, 2, 3, 1).reshape(-1, plan.heads, plan.keys)[: plan.windows]


def _body(plan: Plan, masked: bool, scale: float, *refs, **scratch) -> None:
    refs = list(refs)
    streams = [refs.pop(0) for _ in range(plan.streams)]
    features = refs.pop(0)
    hidden = refs.pop(0) if masked else None
    out, *weights = refs
    warpgroup = lax.axis_index("warpgroup")
    first, step = lax.axis_index("block"), lax.axis_size("block")
    turns = lax.div(plan.groups - 1 - first, step) + 1

    @pl.when(warpgroup == plan.consumers)
    def _():
        _produce(plan, streams, features, turns, lambda turn: first + turn * step, **scratch)

    @pl.when(warpgroup < plan.consumers)
    def _():
        consume = _consume_on_tensor_cores if plan.tensor_cores else _consume_by_vectors
        consume(plan, scale, hidden, out, weights, turns, lambda turn: first + turn * step, warpgroup, **scratch)
        plgpu.wait_smem_to_gmem(0)


def _produce(
    plan, streams, features, turns, group_of, *, ring, buffer, ring_full, ring_free, buffer_full, buffer_free, **_
):
    def load_queries(turn, chunk):
        slot = lax.rem(turn * plan.chunks + chunk, plan.stages)
        plgpu.barrier_wait(ring_free.at[slot])
        for n, stream in enumerate(streams):
            plgpu.copy_gmem_to_smem(
                stream.at[pl.ds(group_of(turn) * plan.rows, plan.rows), pl.ds(chunk * plan.chunk, plan.chunk)],
                ring.at[n, pl.ds(slot * plan.rows, plan.rows)],
                ring_full.at[slot],
            )

    def load_features(turn, block):
        plgpu.barrier_wait(buffer_free.at[block])
        row = lax.div(group_of(turn) * (plan.group * plan.keys), plan.align) * plan.align
        for n in range(plan.per_block):
            chunk = block * plan.per_block + n
            plgpu.copy_gmem_to_smem(
                features.at[pl.ds(row, plan.stride()), pl.ds(chunk * plan.chunk, plan.chunk)],
                buffer.at[pl.ds(chunk * plan.stride(), plan.stride())],
                buffer_full.at[block],
            )

    ahead = min(plan.stages, plan.chunks)

    @pl.loop(0, turns)
    def _(turn):
        # Queries as far as the ring goes, then features as their buffer empties, then the rest of the queries as they
        # are read: while the consumers write results, the next group is on its way.
        pl.loop(0, ahead)(functools.partial(load_queries, turn))
        pl.loop(0, plan.blocks)(functools.partial(load_features, turn))
        pl.loop(ahead, plan.chunks)(functools.partial(load_queries, turn))

    @pl.loop(0, plan.stages)
    def _(slot):
        plgpu.barrier_wait(ring_free.at[slot])

    @pl.loop(0, plan.blocks)
    def _(block):
        plgpu.barrier_wait(buffer_free.at[block])


def _release(barriers, count: int) -> None:
    pl.loop(0, count)(lambda n: plgpu.barrier_arrive(barriers.at[n]))


def _consume_on_tensor_cores(
    plan, scale, hidden, out, weights_out, turns, group_of, warpgroup,
    *, ring, buffer, results, ring_full, ring_free, buffer_full, buffer_free, factors, factors_done, weights=None,
):  # fmt: skip
    mine = plan.blocks // plan.consumers

    @pl.when(warpgroup == 0)
    def _():
        if plan.stride() < TILE:  # a product of the last chunk reads on into these rows
            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), plan.dtype), plgpu.Layout.WGMMA)
            buffer[pl.ds(plan.chunks * plan.stride(), TILE)] = zeros
            plgpu.commit_smem()

    _release(ring_free, plan.stages)
    pl.loop(0, mine)(lambda n: plgpu.barrier_arrive(buffer_free.at[n * plan.consumers + warpgroup]))

    def keys_of(chunk):
        return buffer.at[pl.ds(chunk * plan.stride(), TILE)]

    @pl.loop(0, turns)
    def _(turn):
        group = group_of(turn)

        def products(*accumulators):
            @pl.loop(0, plan.blocks)
            def _(block):
                plgpu.barrier_wait(buffer_full.at[block])
                for n in range(plan.per_block):
                    chunk = block * plan.per_block + n
                    serial = turn * plan.chunks + chunk
                    slot = lax.rem(serial, plan.stages)
                    plgpu.barrier_wait(ring_full.at[slot])
                    for stream, accumulator in enumerate(accumulators):
                        rows = ring.at[stream, pl.ds(slot * plan.rows, TILE)]
                        plgpu.wgmma(accumulator, rows, keys_of(chunk).transpose((1, 0)))
                    plgpu.wgmma_wait(plan.streams)  # all but this chunk's

                    def release(serial=serial):
                        plgpu.barrier_arrive(ring_free.at[lax.rem(serial - 1, plan.stages)])

                    pl.when(block > 0)(release) if n == 0 else release()

            values = [accumulator[...] for accumulator in accumulators]
            plgpu.barrier_arrive(ring_free.at[lax.rem(turn * plan.chunks + plan.chunks - 1, plan.stages)])
            return values

        logits, *rest = pl.run_scoped(products, *[plgpu.ACC((TILE, TILE), jnp.float32)] * plan.streams)
        own, place = _ownership(plan, group)
        logits = logits * (scale * vectors.LOG2_E)
        if hidden is not None:
            row = plgpu.load(hidden.at[group], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            logits = logits + lax.broadcast_in_dim(row, logits.shape, [1])
        logits = jnp.where(own, logits, -jnp.inf)
        highest = jnp.maximum(logits.max(axis=1), vectors.LOWEST)
        probabilities = jnp.exp2(logits - lax.broadcast_in_dim(highest, logits.shape, [0]))
        total = probabilities.sum(axis=1)
        probabilities *= lax.broadcast_in_dim(vectors.reciprocal(total), logits.shape, [0])
        factor = probabilities
        if plan.backward:
            weights_grad = jnp.where(own, rest[0], 0.0)
            mean = (probabilities * weights_grad).sum(axis=1)
            factor = probabilities * (weights_grad - lax.broadcast_in_dim(mean, logits.shape, [0])) * scale

            @pl.when(warpgroup == 0)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for key in range(plan.keys):
                    here = place == key
                    weights[0, 0, key] = jnp.where(here, probabilities, 0.0).sum(axis=1)
                    weights[1, 0, key] = jnp.where(here, factor, 0.0).sum(axis=1)
                plgpu.commit_smem()
                for n, ref in enumerate(weights_out):
                    plgpu.copy_smem_to_gmem(weights.at[n, 0], ref.at[group, 0])

        @pl.when(warpgroup == 0)
        def _():
            # The other consumer is done with the last turn's: it has released all features since, or this turn's
            # would not be here.
            factors[...] = factor.astype(plan.dtype)
            plgpu.commit_smem()

        # From here on nobody reads another's features for its logits: each may release its own.
        plgpu.barrier_arrive(factors_done)
        plgpu.barrier_wait(factors_done)

        @pl.loop(0, mine)
        def _(n):
            block = n * plan.consumers + warpgroup
            for k in range(plan.per_block):
                chunk = block * plan.per_block + k

                def product(accumulator, chunk=chunk):
                    plgpu.wgmma(accumulator, factors, keys_of(chunk))
                    return accumulator[...]

                result = pl.run_scoped(product, plgpu.ACC((TILE, TILE), jnp.float32)).astype(plan.dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                results[warpgroup] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    results.at[warpgroup, pl.ds(0, plan.rows)],
                    out.at[pl.ds(group * plan.rows, plan.rows), pl.ds(chunk * plan.chunk, plan.chunk)],
                )
            plgpu.barrier_arrive(buffer_free.at[block])


def _ownership(plan: Plan, group) -> tuple[Array, Array]:
    """For each row (window, head) and row of features: whether it is a key of the window, and which of the S."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    first = group * (plan.group * plan.keys)
    key = column - (first - lax.div(first, plan.align) * plan.align)
    window = lax.div(key, plan.keys)
    own = (key >= 0) & (key < plan.group * plan.keys) & (window == lax.div(row, plan.heads))
    return own, key - window * plan.keys


def _reciprocal(total: Array) -> Array:
    """0 where there is nothing to divide."""
    return jnp.where(total > 0, 1 / total, 0.0)


def _consume_by_vectors(
    plan, scale, hidden, out, weights_out, turns, group_of, warpgroup,
    *, ring, buffer, results, ring_full, ring_free, buffer_full, buffer_free, weights=None, **_,
):  # fmt: skip
    layout = vectors.row_layout(plan.chunk, plan.dtype)
    count = plan.heads // plan.consumers
    first = warpgroup * count
    rows = pl.ds(first, count)
    shape = (count, plan.chunk)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout).astype(jnp.float32)

    def key_of(chunk, key):
        """One row of features under every head."""
        row = load(buffer.at[chunk * plan.keys + key], layout.reduce(0))
        return vectors.spread(row, shape, 1, layout)

    _release(ring_free, plan.stages)
    _release(buffer_free, plan.blocks)

    @pl.loop(0, turns)
    def _(turn):
        group = group_of(turn)

        def block_products(block, sums):
            plgpu.barrier_wait(buffer_full.at[block])
            for n in range(plan.per_block):
                chunk = block * plan.per_block + n
                slot = lax.rem(turn * plan.chunks + chunk, plan.stages)
                plgpu.barrier_wait(ring_full.at[slot])
                streams = [load(ring.at[stream, pl.ds(slot * plan.heads + first, count)], layout) for stream in range(plan.streams)]
                products = [(x * key_of(chunk, key)).sum(axis=1) for x in streams for key in range(plan.keys)]
                sums = [total + product for total, product in zip(sums, products, strict=True)]
                plgpu.barrier_arrive(ring_free.at[slot])
            return sums

        zero = plgpu.layout_cast(jnp.zeros((count,), jnp.float32), layout.reduce(1))
        sums = lax.fori_loop(0, plan.blocks, block_products, [zero] * (plan.streams * plan.keys))
        shifts = None if hidden is None else [hidden[group, key] for key in range(plan.keys)]
        probabilities = vectors.softmax(sums[: plan.keys], shifts, scale)
        factors = probabilities
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if plan.backward:
            factors = vectors.logits_gradient(probabilities, sums[plan.keys :], scale)
            for n, columns in enumerate((probabilities, factors)):
                for key, column in enumerate(columns):
                    weights[n, warpgroup, key] = column
            plgpu.commit_smem()
            for n, ref in enumerate(weights_out):
                plgpu.copy_smem_to_gmem(weights.at[n, warpgroup], ref.at[group, warpgroup])

        @pl.loop(0, plan.blocks)
        def _(block):
            for n in range(plan.per_block):
                chunk = block * plan.per_block + n
                terms = [vectors.spread(f, shape, 0, layout) * key_of(chunk, key) for key, f in enumerate(factors)]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                results[0, rows] = sum(terms[1:], terms[0]).astype(plan.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    results.at[0, rows],
                    out.at[pl.ds(group * plan.heads + first, count), pl.ds(chunk * plan.chunk, plan.chunk)],
                )
            plgpu.barrier_arrive(buffer_free.at[block])
