"""Cambrian-1's spatial vision aggregator inside the decoder: each vision token attends to its window.

Source: cambrian-mllm/cambrian `cambrian/model/vision_sampler.py` (`VisionCrossAttentionLayer`, "joint"),
`cambrian_arch.py` (auxiliary projection, global context), `language_model/cambrian_llama.py` (in-LLM samplers);
methods.md 3.1. No gate, no zero init: it perturbs the decoder from the first step, as the original does."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.kernels.window_attention import window_attention
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.qwen2 import DecoderInputs
from vr_jax.model.layers import LayerNorm, linear, merge_heads, normal, split_heads, stack_layers
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.registry import RefusionConfig, check
from vr_jax.sharding import constrain

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SvaConfig(RefusionConfig):
    """After layers 1 and 4, as Vision Remember; Cambrian's default (start 0, stride 3) in a decoder of L layers is
    insert_after = tuple(range(1, L, 3)): 1, 4, 7, ...

    Raises ConfigError unless there is exactly one level."""

    name: str = "sva"
    levels: tuple[int, ...] = (23,)
    width: int = 1024  # of the auxiliary features and of the attention
    heads: int = 16
    depth: int = 1  # layers of one insertion

    def __post_init__(self):
        super().__post_init__()
        check(len(self.levels) == 1, f"SvaConfig.levels = {self.levels}: expected exactly one level")
        check(self.depth >= 1, f"SvaConfig.depth = {self.depth}: expected an integer >= 1")
        check(
            self.heads >= 1 and self.width % self.heads == 0,
            f"SvaConfig.heads = {self.heads} does not divide width = {self.width}; set a divisor",
        )

    def flops_per_tile(self, model: VlmConfig) -> float:
        queries, patches, width = model.cells_per_tile, model.encoder.grid**2, self.width
        features = patches * width * (model.encoder.hidden_size + width)
        per_query = 2 * width * (model.decoder.hidden_size + 2 * width)  # in and out, query and output, two of the MLP
        layer = width**2 + queries * per_query + 2 * patches * width * (width + 1)
        return 2 * (features + len(self.insert_after) * self.depth * layer)


class SvaFeatures(NamedTuple):
    """What all insertions share."""

    windows: Float[Array, "B T C S E"]
    context: Float[Array, "B T E"]  # mean over the tile
    valid: Bool[Array, "B T C S"] | None = None  # patches of the image, where a tile is padded; None: all of them


class Features(nnx.Module):
    """Auxiliary projection of the level, and each tile's global context. The encoder gets no gradient."""

    def __init__(self, config: SvaConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = linear(model.encoder.hidden_size, config.width, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.width, config.width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config.width, eps=EPS)

    def __call__(self, levels: tuple[Float[Array, "B T C S Dv"]]) -> SvaFeatures:
        (level,) = jax.lax.stop_gradient(levels)
        windows = self.norm(self.fc2(jax.nn.gelu(self.fc1(level), approximate=False)))
        windows = constrain(windows, "batch", "tiles", "cells", None, "embed")
        return SvaFeatures(windows, jnp.mean(windows, axis=(2, 3)))


class WindowAttention(nnx.Module):
    """One query against the keys of its window; a LayerNorm before each of the bias-free projections."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(linear, width, width, dtype=dtype, rngs=rngs, use_bias=False)
        self.ln_q, self.ln_k, self.ln_v = (LayerNorm(width, eps=EPS) for _ in range(3))
        self.q, self.k, self.v, self.out = make(), make(), make(), make()
        self.heads = heads

    def __call__(
        self,
        query: Float[Array, "B C E"],
        windows: Float[Array, "B C S E"],
        valid: Bool[Array, "B C S"] | None,
    ) -> Float[Array, "B C E"]:
        q = split_heads(self.q(self.ln_q(query)), self.heads)
        k = split_heads(self.k(self.ln_k(windows)), self.heads)
        v = split_heads(self.v(self.ln_v(windows)), self.heads)
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        attended = window_attention(q, k, v, None if valid is None else valid.reshape(-1, valid.shape[-1]))
        return self.out(merge_heads(attended).reshape(query.shape))


class VisionCrossAttentionLayer(nnx.Module):
    """Cambrian's "joint" layer of one encoder. patches: keys of a window."""

    def __init__(self, query_width: int, width: int, patches: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(linear, dtype=dtype, rngs=rngs, use_bias=False)
        self.proj_context = make(width, width)
        self.proj_in = make(query_width + width, width)
        if patches > 1:
            self.pos_embed = nnx.Param(normal(1.0)(rngs.params(), (patches, width)))
        self.cross_attn = WindowAttention(width, heads, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = make(width, width)
        self.fc2 = make(width, query_width)

    def __call__(
        self,
        query: Float[Array, "B C D"],
        context: Float[Array, "B G E"],
        windows: Float[Array, "B C S E"],
        valid: Bool[Array, "B C S"] | None,
    ) -> Float[Array, "B C D"]:
        """C queries with a window each, of G groups (tiles) with a context each, in order: C / G queries per group."""
        context = jnp.repeat(self.proj_context(context), query.shape[1] // context.shape[1], axis=1)
        x = self.proj_in(constrain(jnp.concatenate([query, context], axis=-1), "batch", "cells", "embed"))
        if windows.shape[2] > 1:
            windows = windows + self.pos_embed[...].astype(windows.dtype)
        x = constrain(x, "batch", "cells", "embed")
        x = x + constrain(self.cross_attn(x, windows, valid), "batch", "cells", "embed")
        return query + self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=False))


class Block(nnx.Module):
    """One insertion: `config.depth` layers (VisionTokenSampler)."""

    def __init__(self, config: SvaConfig, model: VlmConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        del index  # all insertions are alike
        patches = model.projector.stride**2
        self.layers = stack_layers(
            lambda r: VisionCrossAttentionLayer(
                model.decoder.hidden_size, config.width, patches, config.heads, dtype=dtype, rngs=r
            ),
            config.depth,
            rngs,
        )

    def __call__(self, inputs: DecoderInputs, vision: VisionContext) -> DecoderInputs:
        """Updates the states at vision tokens; every other state passes through untouched."""
        features: SvaFeatures = vision.features
        cells = constrain(vision.gather_cells(inputs.hidden), "batch", "cells", "embed")
        rows = cells.shape[0]
        windows = features.windows.reshape(rows, -1, *features.windows.shape[3:])
        valid = None if features.valid is None else features.valid.reshape(rows, -1, features.valid.shape[-1])
        read = self.read(cells, features.context, windows, valid)
        hidden = jnp.where(vision.is_vision[..., None], vision.scatter_cells(read), inputs.hidden)
        return inputs.replace(hidden=hidden)

    def read(
        self,
        query: Float[Array, "B C D"],
        context: Float[Array, "B G E"],
        windows: Float[Array, "B C S E"],
        valid: Bool[Array, "B C S"] | None = None,
    ) -> Float[Array, "B C D"]:
        """The queries after all layers; shapes as in `VisionCrossAttentionLayer`."""

        def layer(x, layer):
            return constrain(layer(x, context, windows, valid), "batch", "cells", "embed"), None

        return jax.lax.scan(layer, query, self.layers)[0]
