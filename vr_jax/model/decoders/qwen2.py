"""Qwen2 decoder in stages: each stage is one `lax.scan` over stacked layers; re-fusion blocks act between stages.

Source: transformers `models/qwen2/modeling_qwen2.py`; design decision 1."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vr_jax.kernels.attention.api import attention, cached_attention
from vr_jax.model.config import Qwen2Config
from vr_jax.model.layers import (
    Embedding,
    RMSNorm,
    linear,
    maybe_remat,
    merge_heads,
    normal,
    rotary_angles,
    rotate,
    split_heads,
    stack_layers,
)
from vr_jax.sharding import constrain

Rotary = tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageCache:
    """Keys and values of one stage's layers. Slots are filled from the left; rows share the next free slot because
    prompts are right-aligned. Stages may have different lengths (pruning).

    Heads come before slots: what one head attends to lies together. For a decoder that is `unstacked`, layers are
    arrays of their own (`unstacked_cache`)."""

    keys: Float[Array, "L B G S K"] | tuple[Float[Array, "B G S K"], ...]
    values: Float[Array, "L B G S K"] | tuple[Float[Array, "B G S K"], ...]
    valid: Bool[Array, "B S"]  # slots a new token may attend to
    next: Int[Array, ""]  # first free slot
    shift: Int[Array, " B"]  # how far positions lie below those of the prompt (pruners that renumber)


KVCache = tuple[StageCache, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderInputs:
    """The packed rows as they travel through the stages; a re-fusion block maps one Stream to the next."""

    hidden: Float[Array, "B N D"]
    positions: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"]

    def replace(self, **changes: Any) -> DecoderInputs:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class HiddenStates:
    """Residual streams, never final-normed, of which M positions were selected.

    after: decoder layer (counted from 1) -> what leaves it, before the re-fusion block that acts there. resumed: layer after
    which a re-fusion block acts -> what the re-fusion block makes of it."""

    after: dict[int, Float[Array, "B M D"]]
    resumed: dict[int, Float[Array, "B M D"]]


class Attention(nnx.Module):
    """Grouped-query attention with biases on q, k, v and none on the output."""

    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        init = normal(config.initializer_range)
        self.q = linear(width, width, dtype=dtype, rngs=rngs, init=init)
        self.k = linear(width, kv_width, dtype=dtype, rngs=rngs, init=init)
        self.v = linear(width, kv_width, dtype=dtype, rngs=rngs, init=init)
        self.out = linear(width, width, dtype=dtype, rngs=rngs, init=init, use_bias=False)
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads

    def project(
        self, x: Float[Array, "B N D"], rotary: Rotary
    ) -> tuple[Float[Array, "B N H K"], Float[Array, "B N G K"], Float[Array, "B N G K"]]:
        q = rotate(split_heads(self.q(x), self.heads), *rotary)
        k = rotate(split_heads(self.k(x), self.kv_heads), *rotary)
        return q, k, split_heads(self.v(x), self.kv_heads)


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        init = normal(config.initializer_range)
        self.gate = linear(width, inner, dtype=dtype, rngs=rngs, init=init, use_bias=False)
        self.up = linear(width, inner, dtype=dtype, rngs=rngs, init=init, use_bias=False)
        self.down = linear(inner, width, dtype=dtype, rngs=rngs, init=init, use_bias=False)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        rotary: Rotary,
        attend: Callable[[Array, Array, Array], Float[Array, "B N H K"]],
    ) -> Float[Array, "B N D"]:
        """`attend` maps this layer's query, key and value to the attended values: over the row, or over a cache."""
        q, k, v = self.attn.project(self.input_norm(x), rotary)
        x = x + self.attn.out(merge_heads(attend(q, k, v)))
        x = x + self.mlp(self.post_attention_norm(x))
        return constrain(x, "batch", "seq", "embed")


class Decoder(nnx.Module):
    """Token embedding, stages, re-fusion blocks between them, final norm and head.

    bounds: stage k holds layers bounds[k] .. bounds[k + 1] - 1. re-fusion blocks: the blocks that act between stages, and
    what prepares the encoder's features for them; the decoder holds them, `VisionLanguageModel` applies them."""

    def __init__(
        self,
        config: Qwen2Config,
        *,
        bounds: tuple[int, ...],
        refusion: Sequence[nnx.Module],
        refusion_features: nnx.Module | None,
        attention_backend: str,
        remat: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        init = normal(config.initializer_range)
        self.embed = Embedding(config.vocab_size, config.hidden_size, init=init, dtype=dtype, rngs=rngs)
        self.stages = nnx.List(
            [
                stack_layers(lambda r: DecoderLayer(config, dtype=dtype, rngs=r), stop - start, rngs)
                for start, stop in itertools.pairwise(bounds)
            ]
        )
        self.refusion = nnx.List(refusion)
        if refusion_features is not None:
            self.refusion_features = refusion_features
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs, init=init, use_bias=False
            )
        self.config, self.bounds, self.dtype = config, bounds, dtype
        self.attention_backend, self.remat = attention_backend, remat

    def init_cache(self, rows: int, length: int | Sequence[int]) -> KVCache:
        """Empty caches of `length` slots per row (prompt plus new tokens), one number or one for each stage."""
        c = self.config
        layers = [stop - start for start, stop in itertools.pairwise(self.bounds)]
        lengths = [length] * len(layers) if isinstance(length, int) else length

        def stage(layers: int, length: int) -> StageCache:
            shape = (layers, rows, c.num_kv_heads, length, c.head_dim)
            return StageCache(
                keys=jnp.zeros(shape, self.dtype),
                values=jnp.zeros(shape, self.dtype),
                valid=jnp.zeros((rows, length), bool),
                next=jnp.zeros((), jnp.int32),
                shift=jnp.zeros(rows, jnp.int32),
            )

        return tuple(stage(*sizes) for sizes in zip(layers, lengths, strict=True))

    def __call__(
        self,
        inputs: DecoderInputs,
        cache: KVCache | None = None,
        stage_hook: Callable[[int, DecoderInputs], DecoderInputs] | None = None,
    ) -> tuple[Float[Array, "B N D"], KVCache | None]:
        """Whole rows: training, or prefill when `cache` (empty) is given. Returns hidden states after the final norm.

        between: maps the stream that enters stage k; None runs the plain decoder. It may change the row's length."""
        caches: list[StageCache] = []
        last_position = inputs.positions[:, -1]
        for k, stage in enumerate(self.stages):
            if stage_hook is not None:
                inputs = stage_hook(k, inputs)
            inputs, written = self._run_stage(stage, inputs, cache[k] if cache else None)
            if written is not None:
                caches.append(dataclasses.replace(written, shift=last_position - inputs.positions[:, -1]))
        return self.norm(inputs.hidden), (tuple(caches) if cache else None)

    def _run_stage(
        self, stage: DecoderLayer, inputs: DecoderInputs, cache: StageCache | None
    ) -> tuple[DecoderInputs, StageCache | None]:
        rotary = rotary_angles(inputs.positions, self.config.head_dim, self.config.rope_theta)

        def body(x, layer):
            kept = {}

            def attend(q, k, v):
                if cache is not None:
                    kept["keys"], kept["values"] = k.swapaxes(1, 2), v.swapaxes(1, 2)
                return self._attend(inputs, q, k, v)

            x = layer(x, rotary, attend)
            return x, kept

        hidden, written = jax.lax.scan(maybe_remat(body, self.remat, in_scan=True), inputs.hidden, stage)
        if cache is not None:
            length = hidden.shape[1]
            cache = dataclasses.replace(
                cache,
                keys=cache.keys.at[:, :, :, :length].set(written["keys"]),  # type: ignore[union-attr]  # stacked
                values=cache.values.at[:, :, :, :length].set(written["values"]),  # type: ignore[union-attr]
                valid=cache.valid.at[:, :length].set(inputs.segment_ids > 0),
                next=jnp.asarray(length, jnp.int32),
            )
        return inputs.replace(hidden=hidden), cache

    def _attend(self, inputs: DecoderInputs, q: Array, k: Array, v: Array) -> Float[Array, "B N H K"]:
        segments = inputs.segment_ids
        return attention(
            q, k, v, query_segments=segments, key_segments=segments, causal=True, backend=self.attention_backend
        )

    def hidden_states(
        self,
        inputs: DecoderInputs,
        layers: Sequence[int],
        stage_hook: Callable[[int, DecoderInputs], DecoderInputs] | None = None,
        select: Callable[[Float[Array, "B N D"]], Float[Array, "B M D"]] = lambda hidden: hidden,
    ) -> HiddenStates:
        """What `select` takes from the residual stream of whole rows at chosen depths; later layers are not run.

        layers: counted from 1, strictly increasing; any of them, stage bounds or not. between: as in `__call__`, but it
        must keep the rows' length. Raises ValueError for layers that do not exist."""
        depth = self.config.num_layers
        if list(layers) != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] > depth:
            raise ValueError(f"layers = {tuple(layers)}: expected strictly increasing numbers in 1..{depth}")
        like = jax.eval_shape(select, inputs.hidden)
        taken = jnp.zeros((len(layers), *like.shape), like.dtype)
        resumed: dict[int, Array] = {}
        for k, (stage, (start, stop)) in enumerate(zip(self.stages, itertools.pairwise(self.bounds), strict=True)):
            if start >= layers[-1]:
                break
            if stage_hook is not None:
                inputs = stage_hook(k, inputs)
                if k:
                    resumed[start] = select(inputs.hidden)
            # A layer that nobody asked for writes beyond the end, which drops it.
            slots = [layers.index(i) if i in layers else len(layers) for i in range(start + 1, stop + 1)]
            inputs, taken = self._run_tapped(stage, inputs, taken, jnp.asarray(slots), select)
        return HiddenStates(after=dict(zip(layers, taken, strict=True)), resumed=resumed)

    def _run_tapped(
        self,
        stage: DecoderLayer,
        inputs: DecoderInputs,
        taken: Float[Array, "K B M D"],
        slots: Int[Array, " L"],
        select: Callable[[Array], Array],
    ) -> tuple[DecoderInputs, Float[Array, "K B M D"]]:
        rotary = rotary_angles(inputs.positions, self.config.head_dim, self.config.rope_theta)

        def body(carry, layer_and_slot):
            # What is taken is carried, not scanned out: a scan would stack the states of every layer.
            x, taken = carry
            layer, slot = layer_and_slot
            x = layer(x, rotary, functools.partial(self._attend, inputs))
            return (x, taken.at[slot].set(select(x), mode="drop")), None

        (hidden, taken), _ = jax.lax.scan(body, (inputs.hidden, taken), (stage, slots))
        return inputs.replace(hidden=hidden), taken

    def decode(
        self, hidden: Float[Array, "B 1 D"], positions: Int[Array, "B 1"], cache: KVCache
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """One more token per row; re-fusion blocks never act here. positions: counted on from the prompt's last one."""
        caches = []
        for stage, stage_cache in zip(self.stages, cache, strict=True):
            shifted = positions - stage_cache.shift[:, None]
            rotary = rotary_angles(shifted, self.config.head_dim, self.config.rope_theta)
            hidden, stage_cache = _decode_stage(stage, hidden, rotary, stage_cache)
            caches.append(stage_cache)
        return self.norm(hidden), tuple(caches)


def _decode_stage(
    stage: DecoderLayer | nnx.List, hidden: Float[Array, "B 1 D"], rotary: Rotary, cache: StageCache
) -> tuple[Float[Array, "B 1 D"], StageCache]:
    valid = cache.valid.at[:, cache.next].set(True)

    def write(slots: Array, new: Float[Array, "B 1 G K"], *layer: Any) -> Array:
        new = new.swapaxes(1, 2)[(None,) * len(layer)]
        return jax.lax.dynamic_update_slice(slots, new, (*layer, 0, 0, cache.next, 0))

    if isinstance(stage, nnx.List):
        written = []
        for layer, *slots in zip(stage, cache.keys, cache.values, strict=True):

            def attend_own(q, k, v, slots=slots):
                slots[:] = write(slots[0], k), write(slots[1], v)
                return cached_attention(q, slots[0], slots[1], valid)

            hidden = layer(hidden, rotary, attend_own)
            written.append(slots)
        keys, values = zip(*written, strict=True)
    else:

        def body(carry, layer_and_index):
            # The cache is carried, not scanned over, so that each step writes one slot in place.
            x, keys, values = carry
            layer, index = layer_and_index

            def attend(q, k, v):
                nonlocal keys, values
                keys, values = write(keys, k, index), write(values, v, index)
                return cached_attention(q, keys[index], values[index], valid)

            x = layer(x, rotary, attend)
            return (x, keys, values), None

        layers = jnp.arange(len(cache.keys))
        (hidden, keys, values), _ = jax.lax.scan(body, (hidden, cache.keys, cache.values), (stage, layers))  # type: ignore[arg-type]
    return hidden, dataclasses.replace(cache, keys=keys, values=values, valid=valid, next=cache.next + 1)


def unstacked_cache(cache: KVCache) -> KVCache:
    """The same cache for an `unstacked` decoder."""
    return tuple(dataclasses.replace(stage, keys=tuple(stage.keys), values=tuple(stage.values)) for stage in cache)


def unstacked(decoder: Decoder) -> Decoder:
    """The same decoder for `decode` alone, with layers as arrays of their own (copies of the stages' parameters; all
    else is shared).

    For CPUs: XLA copies a layer out of the stacked arrays before it multiplies with it, which takes two thirds of a
    decode step whose time is that of reading the parameters once."""
    graph, state = nnx.split(decoder)
    split = nnx.merge(graph, state)
    split.stages = nnx.List(
        [
            nnx.List([jax.tree.map(lambda leaf, i=i: leaf[i], stage) for i in range(stop - start)])  # type: ignore[misc]
            for stage, (start, stop) in zip(decoder.stages, itertools.pairwise(decoder.bounds), strict=True)
        ]
    )
    return split
