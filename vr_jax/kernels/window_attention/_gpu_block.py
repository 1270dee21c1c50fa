"""What the warpgroups of a block share: its memory and barriers, and its view of a call (`_gpu_absorbed.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from vr_jax.kernels.window_attention._gpu_plan import Plan

# A reference to memory. Pallas has no public name for its type.
Ref = Any


@dataclass(frozen=True)
class Shared:
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
class Block:
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


def each(barriers: Ref, count: int, act: Callable[[Ref], None]) -> None:
    """Calls a function with each barrier of an array."""
    pl.loop(0, count)(lambda n: act(barriers.at[n]))
