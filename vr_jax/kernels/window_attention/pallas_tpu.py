"""Windowed cross-attention on TPUs, a Pallas kernel that reads queries, keys and values once.

A TPU's matrix unit is efficient for wide products, and a window has few keys. So a grid step takes G windows at once
and multiplies all their rows with all their keys, (H G, d) x (d, G S). Only the G diagonal blocks are needed; the
others are masked before the softmax and contribute zero after it. Their products cost less than the memory traffic.

No layout pads an axis, for any S and H. Heads are the outermost axis where the keys are shared, because the projections
around the attention are products per head, and XLA writes and reads them in that order. Heads lie side by side in a row
where each head has its own keys. A row of keys is a (window, key).

    absorbed, K = 1    query, output (H, W, d)    keys (W S, d)
    plain, K = H       query, output (W, H d)     keys (W S, H d)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention.vjp import ArrayOrShape, dtype_refusal

# Elements along the last axis of a vector register.
LANES = 128
# Bytes that blocks and temporaries may take. v5e and v6e have 128 MiB of VMEM, v5p and tpu7x have 64 MiB.
VMEM_BUDGET = 48 * 2**20
# G, the windows per grid step. It is the number of sublanes of a register; more windows compute more masked products.
GROUP = 8

# A reference to a block in VMEM. Pallas has no public name for its type.
Ref = Any


def unsupported(query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape) -> str | None:
    """Returns why this kernel cannot run on these arrays (or shapes and types) of one device, or None if it can."""
    if (reason := dtype_refusal(query, key, value)) is not None:
        return reason
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if width % LANES:
            return f"{name} width {width} is not a multiple of {LANES}"
    needed = _Problem.of(query, key, value, None, 1.0).vmem_bytes(query, key, value)
    if needed > VMEM_BUDGET:
        return f"{GROUP} windows need {needed / 2**20:.0f} MiB of VMEM, more than {VMEM_BUDGET / 2**20:.0f}"
    return None


def forward(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K dv"],
    valid: Bool[Array, "W S"] | None,
    scale: float,
    *,
    interpret: bool,
) -> Float[Array, "W H dv"]:
    """Computes windowed cross-attention on one device.

    Args:
        query: One query for each of W windows, in H heads.
        key: The keys, with K = H or K = 1.
        value: The values; the same array as `key` if the keys are the values.
        valid: The keys that take part, or None if all do.
        scale: The factor of the logits.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The attended values.
    """
    problem = _Problem.of(query, key, value, valid, scale)
    (out,) = problem.call(
        functools.partial(_forward_kernel, problem),
        [problem.rows(query), *problem.keys(key, value), *problem.validity(valid)],
        [problem.rows_out(value.shape[-1], query.dtype)],
        interpret,
    )
    return problem.unrows(out)


def query_gradient(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S K d"],
    value: Float[Array, "W S K dv"],
    valid: Bool[Array, "W S"] | None,
    grad: Float[Array, "W H dv"],
    scale: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "W H d"], Float[Array, "W H S"], Float[Array, "W H S"]]:
    """Computes the gradient by the query, and what the gradients of keys and values need.

    Args:
        query: One query for each of W windows, in H heads.
        key: The keys, with K = H or K = 1.
        value: The values; the same array as `key` if the keys are the values.
        valid: The keys that take part, or None if all do.
        grad: The gradient by the output.
        scale: The factor of the logits.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The gradient by the query; the weights; and the gradient by the products query . key, before `scale`.
    """
    problem = _Problem.of(query, key, value, valid, scale)
    out, weights, logits_grad = problem.call(
        functools.partial(_gradient_kernel, problem),
        [problem.rows(query), problem.rows(grad), *problem.keys(key, value), *problem.validity(valid)],
        [problem.rows_out(query.shape[-1], query.dtype), *[problem.weights_out()] * 2],
        interpret,
    )
    return problem.unrows(out), problem.unweights(weights), problem.unweights(logits_grad)


def gradients(
    query: Float[Array, "W H d"],
    key: Float[Array, "W S H d"],
    value: Float[Array, "W S H dv"],
    valid: Bool[Array, "W S"] | None,
    grad: Float[Array, "W H dv"],
    scale: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "W H d"], Float[Array, "W S H d"], Float[Array, "W S H dv"]]:
    """Computes all three gradients of the plain form (K = H) in one pass.

    Computed by XLA from the weights, the gradients of keys and values would be laid out twice.

    Args:
        query: One query for each of W windows, in H heads.
        key: The keys, one set per head.
        value: The values; the same array as `key` if the keys are the values.
        valid: The keys that take part, or None if all do.
        grad: The gradient by the output.
        scale: The factor of the logits.
        interpret: Whether the kernel runs in Pallas' interpreter.

    Returns:
        The gradients by query, key and value.
    """
    # With a single head K = H = 1, and the arrays would be taken for the absorbed form.
    problem = dataclasses.replace(_Problem.of(query, key, value, valid, scale), absorbed=False)
    by_query, by_key, by_value = problem.call(
        functools.partial(_gradients_kernel, problem),
        [problem.rows(query), problem.rows(grad), *problem.keys(key, value), *problem.validity(valid)],
        [problem.rows_out(query.shape[-1], query.dtype), problem.keys_out(key), problem.keys_out(value)],
        interpret,
    )
    return problem.unrows(by_query), by_key.reshape(key.shape), by_value.reshape(value.shape)


# An array, and the block of it that a grid step takes.
Blocked = tuple[Array, pl.BlockSpec]
# The shape and type of a result, and the block of it that a grid step writes.
BlockedShape = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


@dataclass(frozen=True)
class _Problem:
    """The sizes and the form of one call, the views of its arrays, and the computations that all kernels share.

    Attributes:
        windows: W, the windows of the device.
        per_window: S, the keys of a window.
        heads: H.
        absorbed: Whether the heads share the keys.
        shared: Whether the keys are the values.
        masked: Whether some keys are not valid; the mask is then the last input.
        scale: The factor of the logits.
    """

    windows: int
    per_window: int
    heads: int
    absorbed: bool
    shared: bool
    masked: bool
    scale: float

    @classmethod
    def of(
        cls, query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape, valid: ArrayOrShape | None, scale: float
    ) -> _Problem:
        """Returns the problem of these arrays, or shapes and types."""
        windows, heads, _ = query.shape
        return cls(windows, key.shape[1], heads, key.shape[2] == 1, key is value, valid is not None, scale)

    @property
    def steps(self) -> int:
        """The number of grid steps."""
        return pl.cdiv(self.windows, GROUP)

    @property
    def columns(self) -> int:
        """The keys of a grid step."""
        return GROUP * self.per_window

    def rows(self, x: Float[Array, "W H d"]) -> Blocked:
        """Returns the kernel's view of an array with one row per window and head."""
        view = x.swapaxes(0, 1) if self.absorbed else x.reshape(self.windows, -1)
        return view, self._rows_block(x.shape[-1])

    def rows_out(self, width: int, dtype: DTypeLike) -> BlockedShape:
        """Returns the shape of a result with one row per window and head."""
        w, h = self.windows, self.heads
        return jax.ShapeDtypeStruct((h, w, width) if self.absorbed else (w, h * width), dtype), self._rows_block(width)

    def unrows(self, x: Array) -> Float[Array, "W H d"]:
        """Undoes `rows` for a result."""
        return x.swapaxes(0, 1) if self.absorbed else x.reshape(self.windows, self.heads, -1)

    def _rows_block(self, width: int) -> pl.BlockSpec:
        if self.absorbed:
            return pl.BlockSpec((self.heads, GROUP, width), lambda i: (0, i, 0))
        return pl.BlockSpec((GROUP, self.heads * width), lambda i: (i, 0))

    def keys(self, key: Float[Array, "W S K d"], value: Float[Array, "W S K dv"]) -> list[Blocked]:
        """Returns the kernel's views of keys and values, or of the keys alone if they are the values."""
        views = [x.reshape(self.windows * self.per_window, -1) for x in ((key,) if self.shared else (key, value))]
        return [(x, self._keys_block(x.shape[1])) for x in views]

    def keys_out(self, x: Float[Array, "W S K d"]) -> BlockedShape:
        """Returns the shape of a gradient by keys or values."""
        width = x.shape[2] * x.shape[3]
        return jax.ShapeDtypeStruct((self.windows * self.per_window, width), x.dtype), self._keys_block(width)

    def _keys_block(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.columns, width), lambda i: (i, 0))

    def validity(self, valid: Bool[Array, "W S"] | None) -> list[Blocked]:
        """Returns the mask of each step's keys as one row, in the order of the columns of the products."""
        if valid is None:
            return []
        padded = jnp.pad(valid, ((0, self.steps * GROUP - self.windows), (0, 0)))
        block = pl.BlockSpec((1, 1, self.columns), lambda i: (i, 0, 0))
        return [(padded.reshape(self.steps, 1, self.columns).astype(jnp.int32), block)]

    def weights_out(self) -> BlockedShape:
        """Returns the shape of the weights, with the keys of a step along the lanes.

        An array (..., S) would have S alone along the lanes, padded to 128.
        """
        shape = jax.ShapeDtypeStruct((self.steps, self.heads, self.columns), jnp.float32)
        return shape, pl.BlockSpec((1, self.heads, self.columns), lambda i: (i, 0, 0))

    def unweights(self, x: Float[Array, "steps H GS"]) -> Float[Array, "W H S"]:
        """Returns the weights by window."""
        by_window = x.reshape(self.steps, self.heads, GROUP, self.per_window).swapaxes(1, 2)
        return by_window.reshape(-1, self.heads, self.per_window)[: self.windows]

    def call(
        self, kernel: Callable[..., None], operands: list[Blocked], outputs: list[BlockedShape], interpret: bool
    ) -> list[Array]:
        """Runs a kernel over all grid steps."""
        results: list[Array] = pl.pallas_call(
            kernel,
            out_shape=[shape for shape, _ in outputs],
            grid=(self.steps,),
            in_specs=[block for _, block in operands],
            out_specs=[block for _, block in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BUDGET),
            interpret=interpret,
        )(*(x for x, _ in operands))
        return results

    def vmem_bytes(self, query: ArrayOrShape, key: ArrayOrShape, value: ArrayOrShape) -> int:
        """Returns the bytes that the gradient needs: two buffers per block, and float32 results of the products."""
        size, rows = jnp.dtype(query.dtype).itemsize, GROUP * self.heads
        keys_width = sum(x.shape[2] * x.shape[3] for x in ((key,) if self.shared else (key, value)))
        blocks = size * (rows * (2 * query.shape[-1] + value.shape[-1]) + self.columns * keys_width)
        blocks += 0 if self.absorbed else size * self.columns * keys_width
        products = 4 * rows * (max(query.shape[-1], value.shape[-1]) + 6 * _up(self.columns, LANES))
        return 2 * blocks + products

    # The methods below compute within a grid step. Rows are (head, window) and columns are (window, key).

    def load(self, ref: Ref, per_window: int) -> Array:
        """Loads the rows of a step, `per_window` for each window.

        The last step may reach beyond the arrays, where it reads arbitrary numbers. These may be NaN, which a weight of
        zero would not remove, so they are replaced by zeros.
        """
        rows: Array = ref[...]
        if self.windows % GROUP == 0:
            return rows
        left = (self.windows - pl.program_id(0) * GROUP) * per_window
        row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where(row < left, rows, jnp.zeros_like(rows))

    def load_keys(self, key: Ref, refs: tuple[Ref, ...]) -> tuple[Array, Array]:
        """Loads keys and values."""
        keys = self.load(key, self.per_window)
        return keys, keys if self.shared else self.load(refs[0], self.per_window)

    def products(self, rows: Ref | Array, keys: Array) -> Float[Array, "HG GS"]:
        """Computes the products of every row of a head with every key of that head."""
        if self.absorbed:
            return _dot(rows[...].reshape(self.heads * GROUP, -1), keys, 1)
        width = keys.shape[1] // self.heads
        parts = [slice(h * width, (h + 1) * width) for h in range(self.heads)]
        return jnp.concatenate([_dot(rows[:, part], keys[:, part], 1) for part in parts])

    def write_rows(self, weights: Float[Array, "HG GS"], keys: Array, out: Ref) -> None:
        """Writes for each row the weighted sum of its head's keys."""
        if self.absorbed:
            out[...] = _dot(weights.astype(keys.dtype), keys, 0).astype(out.dtype).reshape(out.shape)
            return
        width = keys.shape[1] // self.heads
        for h in range(self.heads):
            part = slice(h * width, (h + 1) * width)
            rows = weights[h * GROUP : (h + 1) * GROUP].astype(keys.dtype)
            out[:, part] = _dot(rows, keys[:, part], 0).astype(out.dtype)

    def write_keys(self, weights: Float[Array, "HG GS"], rows: Array, out: Ref) -> None:
        """Writes for each key of the plain form the weighted sum of its head's rows."""
        width = rows.shape[1] // self.heads
        for h in range(self.heads):
            part = slice(h * width, (h + 1) * width)
            by_key = weights[h * GROUP : (h + 1) * GROUP].T.astype(rows.dtype)
            out[:, part] = _dot(by_key, rows[:, part], 0).astype(out.dtype)

    def mask(self, inputs: tuple[Ref, ...]) -> Bool[Array, "HG GS"]:
        """Returns which columns hold a valid key of the row's window."""
        shape = (self.heads * GROUP, self.columns)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) % GROUP
        column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // self.per_window
        own = row == column
        return own & (inputs[-1][0] != 0) if self.masked else own

    def softmax(self, products: Float[Array, "HG GS"], mask: Bool[Array, "HG GS"]) -> Float[Array, "HG GS"]:
        """Computes the weights from the products; a row without a valid key gets zeros."""
        logits = jnp.where(mask, products * self.scale, jnp.finfo(jnp.float32).min)
        weights = jnp.where(mask, jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)), 0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        return weights / jnp.where(total == 0, 1, total)

    def diagonal_blocks(self, x: Float[Array, "HG GS"], mask: Bool[Array, "HG GS"]) -> Float[Array, "1 H GS"]:
        """Returns the diagonal blocks side by side."""
        return jnp.sum(jnp.where(mask, x, 0).reshape(self.heads, GROUP, self.columns), axis=1)[None]


def _forward_kernel(problem: _Problem, query: Ref, key: Ref, *refs: Ref) -> None:
    out = refs[-1]
    mask = problem.mask(refs[:-1])
    keys, values = problem.load_keys(key, refs)
    problem.write_rows(problem.softmax(problem.products(query, keys), mask), values, out)


def _gradient_kernel(problem: _Problem, query: Ref, grad: Ref, key: Ref, *refs: Ref) -> None:
    query_grad, weights_out, logits_out = refs[-3:]
    mask = problem.mask(refs[:-3])
    keys, values = problem.load_keys(key, refs)
    weights, logits_grad = _weights_and_logits_grad(problem, query, grad, keys, values, mask)
    problem.write_rows(logits_grad, keys, query_grad)
    weights_out[...] = problem.diagonal_blocks(weights, mask)
    logits_out[...] = problem.diagonal_blocks(logits_grad, mask)


def _gradients_kernel(problem: _Problem, query: Ref, grad: Ref, key: Ref, *refs: Ref) -> None:
    query_grad, key_grad, value_grad = refs[-3:]
    keys, values = problem.load_keys(key, refs)
    query, grad = problem.load(query, 1), problem.load(grad, 1)
    weights, logits_grad = _weights_and_logits_grad(problem, query, grad, keys, values, problem.mask(refs[:-3]))
    problem.write_rows(logits_grad, keys, query_grad)
    problem.write_keys(logits_grad, query, key_grad)
    problem.write_keys(weights, grad, value_grad)


def _weights_and_logits_grad(
    problem: _Problem, query: Ref | Array, grad: Ref | Array, keys: Array, values: Array, mask: Array
) -> tuple[Float[Array, "HG GS"], Float[Array, "HG GS"]]:
    """Computes the weights, and the gradient by the products query . key."""
    weights = problem.softmax(problem.products(query, keys), mask)
    weights_grad = problem.products(grad, values)
    delta = jnp.sum(weights * weights_grad, axis=1, keepdims=True)
    return weights, weights * (weights_grad - delta) * problem.scale


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Contracts the last axis of a with axis `axis` of b; float32 inputs are multiplied in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product: Array = jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return product


def _up(n: int, multiple: int) -> int:
    """Rounds up to a multiple."""
    return -(-n // multiple) * multiple
