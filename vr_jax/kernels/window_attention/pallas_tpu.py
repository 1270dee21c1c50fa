"""Windowed cross-attention on TPU (Mosaic): one pass over queries, keys and values.

The matrix unit wants wide products, a window has few keys. So a grid step takes G windows at once and multiplies all
their rows with all their keys, (H G, d) x (d, G S); only the G diagonal blocks are meant, the rest is masked before the
softmax, and contributes zero after it. The products that are thrown away cost less than the memory traffic.

Layouts (nothing is padded, whatever S and H): heads outermost where the keys are shared, because the projections
around the attention are products per head and XLA writes and reads those so; heads side by side in a row where each
has its own keys. Keys are rows (window, key).

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

from vr_jax.kernels.window_attention.vjp import Shaped, dtype_refusal

LANES = 128
VMEM_BUDGET = 48 * 2**20  # bytes that blocks and temporaries may take; v5e and v6e have 128 MiB, v5p and tpu7x 64
GROUP = 8  # G, windows per grid step: the sublanes of a register, and fewest products that are thrown away


def unsupported(query: Shaped, key: Shaped, value: Shaped) -> str | None:
    """Why this kernel cannot take these arrays (or ShapeDtypeStructs) of one device; None if it can."""
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
    """The query's gradient; the weights; the loss's gradient by the products query . key, before `scale`."""
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
    """All three gradients of the plain form in one pass, where XLA would lay out the products of a window's weights and
    rows twice. Only for K = H."""
    # One head is both forms.
    problem = dataclasses.replace(_Problem.of(query, key, value, valid, scale), absorbed=False)
    by_query, by_key, by_value = problem.call(
        functools.partial(_gradients_kernel, problem),
        [problem.rows(query), problem.rows(grad), *problem.keys(key, value), *problem.validity(valid)],
        [problem.rows_out(query.shape[-1], query.dtype), problem.keys_out(key), problem.keys_out(value)],
        interpret,
    )
    return problem.unrows(by_query), by_key.reshape(key.shape), by_value.reshape(value.shape)


Blocked = tuple[Array, pl.BlockSpec]  # an array, and its part in a step


@dataclass(frozen=True)
class _Problem:
    """Sizes and form of one call, the views of its arrays, and the steps of the computation that both kernels share."""

    windows: int
    per_window: int  # S
    heads: int
    absorbed: bool
    shared: bool  # the keys are the values
    masked: bool  # some keys are hidden: `valid` is the last input
    scale: float

    @classmethod
    def of(cls, query: Shaped, key: Shaped, value: Shaped, valid: Shaped | None, scale: float) -> _Problem:
        windows, heads, _ = query.shape
        return cls(windows, key.shape[1], heads, key.shape[2] == 1, key is value, valid is not None, scale)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.windows, GROUP)

    @property
    def columns(self) -> int:
        """Keys of a step."""
        return GROUP * self.per_window

    def rows(self, x: Float[Array, "W H d"]) -> Blocked:
        view = x.swapaxes(0, 1) if self.absorbed else x.reshape(self.windows, -1)
        return view, self._rows_block(x.shape[-1])

    def rows_out(self, width: int, dtype: DTypeLike) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        w, h = self.windows, self.heads
        return jax.ShapeDtypeStruct((h, w, width) if self.absorbed else (w, h * width), dtype), self._rows_block(width)

    def unrows(self, x: Array) -> Float[Array, "W H d"]:
        return x.swapaxes(0, 1) if self.absorbed else x.reshape(self.windows, self.heads, -1)

    def _rows_block(self, width: int) -> pl.BlockSpec:
        if self.absorbed:
            return pl.BlockSpec((self.heads, GROUP, width), lambda i: (0, i, 0))
        return pl.BlockSpec((GROUP, self.heads * width), lambda i: (i, 0))

    def keys(self, key: Float[Array, "W S K d"], value: Float[Array, "W S K dv"]) -> list[Blocked]:
        views = [x.reshape(self.windows * self.per_window, -1) for x in ((key,) if self.shared else (key, value))]
        return [(x, self._keys_block(x.shape[1])) for x in views]

    def keys_out(self, x: Float[Array, "W S K d"]) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        width = x.shape[2] * x.shape[3]
        return jax.ShapeDtypeStruct((self.windows * self.per_window, width), x.dtype), self._keys_block(width)

    def _keys_block(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.columns, width), lambda i: (i, 0))

    def validity(self, valid: Bool[Array, "W S"] | None) -> list[Blocked]:
        """Of a step's keys, as one row in the order of the products' columns."""
        if valid is None:
            return []
        padded = jnp.pad(valid, ((0, self.steps * GROUP - self.windows), (0, 0)))
        block = pl.BlockSpec((1, 1, self.columns), lambda i: (i, 0, 0))
        return [(padded.reshape(self.steps, 1, self.columns).astype(jnp.int32), block)]

    def weights_out(self) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """Heads are rows, keys columns: dense, where (.., S) alone in the lanes would be padded to 128."""
        shape = jax.ShapeDtypeStruct((self.steps, self.heads, self.columns), jnp.float32)
        return shape, pl.BlockSpec((1, self.heads, self.columns), lambda i: (i, 0, 0))

    def unweights(self, x: Float[Array, "steps H GS"]) -> Float[Array, "W H S"]:
        by_window = x.reshape(self.steps, self.heads, GROUP, self.per_window).swapaxes(1, 2)
        return by_window.reshape(-1, self.heads, self.per_window)[: self.windows]

    def call(self, kernel: Callable, operands: list[Blocked], outputs: list, interpret: bool) -> list[Array]:
        return pl.pallas_call(
            kernel,
            out_shape=[shape for shape, _ in outputs],
            grid=(self.steps,),
            in_specs=[block for _, block in operands],
            out_specs=[block for _, block in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BUDGET),
            interpret=interpret,
        )(*(x for x, _ in operands))

    def vmem_bytes(self, query: Shaped, key: Shaped, value: Shaped) -> int:
        """What the gradient takes: two buffers of every block, and float32 results of the products."""
        size, rows = jnp.dtype(query.dtype).itemsize, GROUP * self.heads
        keys_width = sum(x.shape[2] * x.shape[3] for x in ((key,) if self.shared else (key, value)))
        blocks = size * (rows * (2 * query.shape[-1] + value.shape[-1]) + self.columns * keys_width)
        blocks += 0 if self.absorbed else size * self.columns * keys_width
        products = 4 * rows * (max(query.shape[-1], value.shape[-1]) + 6 * _up(self.columns, LANES))
        return 2 * blocks + products

    # What happens inside a step; `rows` are (head, window), `columns` (window, key).

    def load(self, ref: Any, per_window: int) -> Array:
        """The rows of a step, `per_window` of each window. A last step beyond the end reads garbage, which may be NaN
        and must not be multiplied."""
        rows = ref[...]
        if self.windows % GROUP == 0:
            return rows
        left = (self.windows - pl.program_id(0) * GROUP) * per_window
        row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where(row < left, rows, jnp.zeros_like(rows))

    def load_keys(self, key: Any, refs: tuple) -> tuple[Array, Array]:
        """Keys and values."""
        keys = self.load(key, self.per_window)
        return keys, keys if self.shared else self.load(refs[0], self.per_window)

    def products(self, rows: Any, keys: Array) -> Float[Array, "HG GS"]:
        """Of every row of a head with every key of it."""
        if self.absorbed:
            return _dot(rows[...].reshape(self.heads * GROUP, -1), keys, 1)
        width = keys.shape[1] // self.heads
        parts = [slice(h * width, (h + 1) * width) for h in range(self.heads)]
        return jnp.concatenate([_dot(rows[:, part], keys[:, part], 1) for part in parts])

    def mix(self, weights: Float[Array, "HG GS"], keys: Array, out: Any) -> None:
        """Writes each row's weighted sum of its head's keys."""
        if self.absorbed:
            out[...] = _dot(weights.astype(keys.dtype), keys, 0).astype(out.dtype).reshape(out.shape)
            return
        width = keys.shape[1] // self.heads
        for h in range(self.heads):
            part = slice(h * width, (h + 1) * width)
            rows = weights[h * GROUP : (h + 1) * GROUP].astype(keys.dtype)
            out[:, part] = _dot(rows, keys[:, part], 0).astype(out.dtype)

    def spread(self, weights: Float[Array, "HG GS"], rows: Array, out: Any) -> None:
        """Writes for each key (plain form) the sum of its head's rows, weighted: `mix` from the other side."""
        width = rows.shape[1] // self.heads
        for h in range(self.heads):
            part = slice(h * width, (h + 1) * width)
            by_key = weights[h * GROUP : (h + 1) * GROUP].T.astype(rows.dtype)
            out[:, part] = _dot(by_key, rows[:, part], 0).astype(out.dtype)

    def seen(self, inputs: tuple) -> Bool[Array, "HG GS"]:
        """Where the key of a column is one of the row's window, and valid."""
        shape = (self.heads * GROUP, self.columns)
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) % GROUP
        column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // self.per_window
        own = row == column
        return own & (inputs[-1][0] != 0) if self.masked else own

    def softmax(self, products: Float[Array, "HG GS"], seen: Bool[Array, "HG GS"]) -> Float[Array, "HG GS"]:
        logits = jnp.where(seen, products * self.scale, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)), 0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        return weights / jnp.where(total == 0, 1, total)

    def per_key(self, x: Float[Array, "HG GS"], seen: Bool[Array, "HG GS"]) -> Float[Array, "1 H GS"]:
        """The diagonal blocks side by side."""
        return jnp.sum(jnp.where(seen, x, 0).reshape(self.heads, GROUP, self.columns), axis=1)[None]


def _forward_kernel(problem: _Problem, query: Any, key: Any, *refs: Any) -> None:
    out = refs[-1]
    seen = problem.seen(refs[:-1])
    keys, values = problem.load_keys(key, refs)
    problem.mix(problem.softmax(problem.products(query, keys), seen), values, out)


def _gradient_kernel(problem: _Problem, query: Any, grad: Any, key: Any, *refs: Any) -> None:
    query_grad, weights_out, logits_out = refs[-3:]
    seen = problem.seen(refs[:-3])
    keys, values = problem.load_keys(key, refs)
    weights, logits_grad = _changes(problem, query, grad, keys, values, seen)
    problem.mix(logits_grad, keys, query_grad)
    weights_out[...] = problem.per_key(weights, seen)
    logits_out[...] = problem.per_key(logits_grad, seen)


def _gradients_kernel(problem: _Problem, query: Any, grad: Any, key: Any, *refs: Any) -> None:
    query_grad, key_grad, value_grad = refs[-3:]
    keys, values = problem.load_keys(key, refs)
    query, grad = problem.load(query, 1), problem.load(grad, 1)
    weights, logits_grad = _changes(problem, query, grad, keys, values, problem.seen(refs[:-3]))
    problem.mix(logits_grad, keys, query_grad)
    problem.spread(logits_grad, query, key_grad)
    problem.spread(weights, grad, value_grad)


def _changes(
    problem: _Problem, query: Any, grad: Any, keys: Array, values: Array, seen: Array
) -> tuple[Float[Array, "HG GS"], Float[Array, "HG GS"]]:
    """The weights, and the loss's gradient by the products query . key."""
    weights = problem.softmax(problem.products(query, keys), seen)
    change = problem.products(grad, values)
    mean = jnp.sum(weights * change, axis=1, keepdims=True)
    return weights, weights * (change - mean) * problem.scale


def _dot(a: Array, b: Array, axis: int) -> Array:
    """a contracted with axis `axis` of b; float32 accumulation, and float32 products of float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
