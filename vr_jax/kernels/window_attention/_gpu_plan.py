"""Sizes of the absorbed kernel on NVIDIA GPUs (_gpu_absorbed.py): how it divides arrays and shared memory."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental import pallas as pl

# Rows and keys of a product on tensor cores, and columns of a 128 byte swizzled tile in bfloat16.
TILE = 64
# TMA fills swizzled tiles from row numbers that are multiples of this.
SWIZZLED_ROWS = 8
# The limit of Mosaic GPU for barriers in one array.
MAX_BARRIERS = 32
# Shared memory of a block on Hopper, without what Mosaic keeps for reductions and what the barriers take.
SMEM_BYTES = (227 - 2 - 1) * 1024
# Stages of the ring of queries: the number that hides the latency, and the largest number.
GOOD_STAGES, MAX_STAGES = 3, 8


@dataclass(frozen=True)
class Plan:
    """The sizes of one call. A group is the G windows that a block holds at a time.

    Attributes:
        windows: W.
        heads: H.
        keys: S, the keys of a window.
        width: Channels of queries, keys and values.
        dtype: The type of the arrays.
        backward: Whether the gradient is computed.
        tensor_cores: Whether products run on tensor cores; otherwise they are vector arithmetic.
    """

    windows: int
    heads: int
    keys: int
    width: int
    dtype: jnp.dtype
    backward: bool
    tensor_cores: bool

    @property
    def chunk(self) -> int:
        """The columns that are moved and multiplied at a time."""
        return TILE if self.tensor_cores else 256 // self.dtype.itemsize

    @property
    def chunks(self) -> int:
        """The number of chunks of columns."""
        return self.width // self.chunk

    @functools.cached_property
    def group(self) -> int:
        """G, as many windows as the rows of a product and shared memory take; 0 if not even one fits."""
        sizes = range(TILE // self.heads, 0, -1) if self.tensor_cores else (1,)
        return next((g for stages in (GOOD_STAGES, 1) for g in sizes if self._stages(g) >= stages), 0)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return pl.cdiv(self.windows, self.group)

    @property
    def rows(self) -> int:
        """The rows of queries in a group."""
        return self.group * self.heads

    @property
    def align(self) -> int:
        """The row numbers of features from which a group may be loaded are multiples of this."""
        return SWIZZLED_ROWS if self.tensor_cores else 1

    def stride(self, group: int | None = None) -> int:
        """Returns the rows of features that are loaded for a group: its keys, from the aligned row before them."""
        keys = (group or self.group) * self.keys
        return pl.cdiv(keys + self.align - math.gcd(keys, self.align), self.align) * self.align

    @property
    def streams(self) -> int:
        """The arrays of rows that flow past the features: queries, and in the backward pass the output's gradient."""
        return 1 + self.backward

    @property
    def consumers(self) -> int:
        """The number of warpgroups that compute."""
        if self.tensor_cores:
            # They share the rows, and take turns in the columns of the results.
            return 1 + (self.parts % 2 == 0)
        return next(n for n in (3, 2, 1) if self.heads // SWIZZLED_ROWS % n == 0)

    @property
    def weights(self) -> tuple[int, int, int]:
        """The shape of a group's weights: consumers that have their own rows, keys, rows."""
        owners = 1 if self.tensor_cores else self.consumers
        return owners, self.keys, self.product_rows // owners

    @property
    def per_part(self) -> int:
        """The chunks of features that share a barrier."""
        return next(m for m in range(1, self.chunks + 1) if self.chunks % m == 0 and self.chunks // m <= MAX_BARRIERS)

    @property
    def parts(self) -> int:
        """The number of barriers for the features."""
        return self.chunks // self.per_part

    @property
    def product_rows(self) -> int:
        """The rows of a product, of which `rows` are used."""
        return TILE if self.tensor_cores else self.heads

    def buffer_rows(self, group: int | None = None) -> int:
        """Returns the rows of the buffer of features."""
        tail = TILE if self.tensor_cores and self.stride(group) < TILE else 0
        return self.chunks * self.stride(group) + tail

    @property
    def ring_rows(self) -> int:
        """The rows of the ring of queries."""
        return (self.stages - 1) * self.rows + self.product_rows

    @property
    def stages(self) -> int:
        """The stages of the ring of queries."""
        return self._stages(self.group)

    def _stages(self, group: int) -> int:
        """Returns the stages that shared memory has room for beside features, results and weights."""
        if self.tensor_cores and self.stride(group) > TILE:
            return 0
        row = self.chunk * self.dtype.itemsize
        product = self.product_rows * row
        used = self.buffer_rows(group) * row
        # The results, and on tensor cores the factors of the second product.
        used += product * (self.consumers + 1 if self.tensor_cores else 1)
        # The weights and their gradient.
        used += pl.cdiv(2 * self.keys * self.product_rows * 4, 1024) * 1024 if self.backward else 0
        slot = group * self.heads * row
        # A product of the last slot reads on behind it.
        used += self.streams * (product - slot)
        return min(MAX_STAGES, (SMEM_BYTES - used) // (slot * self.streams))


def unsupported(plan: Plan) -> str | None:
    """Returns why the kernel cannot run with these sizes, or None if it can."""
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
