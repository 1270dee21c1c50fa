"""Decoding with layers, and their caches, as arrays of their own: the fastest form on one CPU.

A decoder's layers lie stacked in one array per stage. On a CPU, XLA copies a layer out of it before it multiplies with
it, and the copy takes two thirds of a decode step, whose time is that of reading the parameters once. Layers as arrays
of their own are a second copy of the decoder's layers in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vr_jax.kernels.attention import cached_attention
from vr_jax.model.decoders.stages import KVCache, Rotary, write_slot
from vr_jax.model.vlm import VisionLanguageModel
from vr_jax.pytree import array_dataclass
from vr_jax.sharding import mesh_in_context, platform


@array_dataclass
class UnstackedCache:
    """A `StageCache` whose layers are arrays of their own.

    Attributes:
        keys: Keys of each layer.
        values: Values of each layer.
        valid: The slots that a new token may attend to.
        next: The first free slot.
        shift: How far the positions in this stage lie below those of the prompt.
    """

    keys: tuple[Float[Array, "B G S K"], ...]
    values: tuple[Float[Array, "B G S K"], ...]
    valid: Bool[Array, "B S"]
    next: Int[Array, ""]
    shift: Int[Array, " B"]


def unstacks() -> bool:
    """Whether decoding unstacks the layers: on one CPU it does."""
    return platform() == "cpu" and mesh_in_context() is None


def unstacked_cache(cache: KVCache) -> tuple[UnstackedCache, ...]:
    """The same cache with layers as arrays of their own."""
    return tuple(
        UnstackedCache(tuple(stage.keys), tuple(stage.values), stage.valid, stage.next, stage.shift) for stage in cache
    )


def unstacked_model(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model for `decode_unstacked` alone; all arrays but those of the decoder's layers are shared."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    decoder: Any = copy.decoder
    decoder.stages = nnx.List(
        [
            nnx.List([jax.tree.map(lambda leaf, i=i: leaf[i], stage) for i in range(stop - start)])
            for stage, (start, stop) in zip(model.decoder.stages, itertools.pairwise(model.decoder.bounds), strict=True)
        ]
    )
    return copy


def decode_unstacked(
    model: VisionLanguageModel,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    cache: tuple[UnstackedCache, ...],
) -> tuple[Float[Array, "B 1 D"], tuple[UnstackedCache, ...]]:
    """Does what `VisionLanguageModel.decode` does, for an unstacked model and cache."""
    decoder = model.decoder
    return decoder.decode(decoder.embed(tokens), positions, cache, _unrolled_stage)


def _unrolled_stage(
    stage: Sequence[Any], hidden: Float[Array, "B 1 D"], rotary: Rotary, cache: UnstackedCache
) -> tuple[Float[Array, "B 1 D"], UnstackedCache]:
    """Runs the layers of a stage one after another; see `DecodeStage`."""
    valid = cache.valid.at[:, cache.next].set(True)
    keys, values = [], []
    for layer, *slots in zip(stage, cache.keys, cache.values, strict=True):

        def attend(q: Array, k: Array, v: Array, slots: Sequence[Array] = slots) -> tuple[Array, tuple[Array, Array]]:
            written = write_slot(slots[0], k, cache.next), write_slot(slots[1], v, cache.next)
            return cached_attention(q, *written, valid), written

        hidden, (key, value) = layer(hidden, rotary, attend)
        keys.append(key)
        values.append(value)
    cache = dataclasses.replace(cache, keys=tuple(keys), values=tuple(values), valid=valid, next=cache.next + 1)
    return hidden, cache
