"""`perceiver`: learned latents attend to all patches of a tile, layer by layer (Flamingo's resampler), then an MLP.

Source: LLaVA-NeXT `multimodal_resampler/perceiver.py`; methods.md 2.3 (a)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import LayerNorm, linear, merge_heads, normal, split_heads, stack_layers
from vr_jax.model.registry import ProjectorConfig, check

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(ProjectorConfig):
    """LLaVA-NeXT's Perceiver; latent k is the vision token at row k // n, column k % n of the tile.

    Raises ConfigError for a number of latents that is no square."""

    name: str = "perceiver"
    depth: int = 3
    latents: int | None = None  # None: one for each window of stride x stride patches (LLaVA-NeXT: 32)
    ff_multiplier: int = 4
    heads: int = 8
    head_dim: int = 64

    def __post_init__(self):
        super().__post_init__()
        for name in ("depth", "ff_multiplier", "heads", "head_dim"):
            value = getattr(self, name)
            check(value >= 1, f"PerceiverConfig.{name} = {value}: expected an integer >= 1")
        if self.latents is not None:
            side = math.isqrt(max(self.latents, 0))
            check(
                self.latents >= 1 and side**2 == self.latents,
                f"PerceiverConfig.latents = {self.latents}: expected a square number, because the latents are the "
                "n x n vision tokens of a tile, which unpad, the newline vectors and Vision Remember lay out as a "
                f"grid; nearest: {max(side, 1) ** 2} or {(side + 1) ** 2}; or None for one per window",
            )

    def cells_per_side(self, grid: int) -> int:
        return grid // self.stride if self.latents is None else math.isqrt(self.latents)

    def flops_per_tile(self, model: VlmConfig) -> float:
        patches, latents, width = model.encoder.grid**2, model.cells_per_tile, model.encoder.hidden_size
        inner, keys = self.heads * self.head_dim, patches + latents
        attention = 2 * latents * width * inner + 2 * keys * width * inner + 2 * latents * keys * inner
        feed_forward = 2 * latents * self.ff_multiplier * width**2
        return 2 * self.depth * (attention + feed_forward) + super().flops_per_tile(model)


class Attention(nnx.Module):
    """Latents attend to the patches and to themselves."""

    def __init__(self, width: int, config: PerceiverConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = config.heads * config.head_dim
        self.q = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.k = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.v = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, latents: Float[Array, "M L D"], patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        keys = jnp.concatenate([patches, latents], axis=1)
        q, k, v = (split_heads(x, self.heads) for x in (self.q(latents), self.k(keys), self.v(keys)))
        return self.out(merge_heads(jax.nn.dot_product_attention(q, k, v)))


class Layer(nnx.Module):
    def __init__(self, width: int, config: PerceiverConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.ln_media = LayerNorm(width, eps=EPS)
        self.ln_latents = LayerNorm(width, eps=EPS)
        self.attn = Attention(width, config, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = linear(width, config.ff_multiplier * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.ff_multiplier * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "M L D"], patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        latents = latents + self.attend(latents, patches)
        return latents + self.feed_forward(latents)

    def attend(self, latents: Float[Array, "M L D"], patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        return self.attn(self.ln_latents(latents), self.ln_media(patches))

    def feed_forward(self, latents: Float[Array, "M L D"]) -> Float[Array, "M L D"]:
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(latents)), approximate=False))


class PerceiverProjector(nnx.Module):
    """Blind to the order of the patches; positions are whatever the features hold."""

    def __init__(self, config: PerceiverConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = model.encoder.hidden_size, model.decoder.hidden_size
        self.latents = nnx.Param(normal(1.0)(rngs.params(), (model.cells_per_tile, width)))
        self.layers = stack_layers(lambda r: Layer(width, config, dtype=dtype, rngs=r), config.depth, rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B L Dt"]:
        *batch, cells, patches, width = features.shape
        tokens = self.resample(features.reshape(-1, cells * patches, width))
        tokens = self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))
        return tokens.reshape(*batch, *tokens.shape[1:])

    def resample(self, patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        """The latents after the last layer, before the MLP."""
        latents, _ = jax.lax.scan(lambda x, layer: (layer(x, patches), None), self.first_latents(patches), self.layers)
        return self.norm(latents)

    def first_latents(self, patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        latents = self.latents[...].astype(patches.dtype)
        return jnp.broadcast_to(latents, (patches.shape[0], *latents.shape))
