"""`perceiver` is Flamingo's resampler: learned latents attend to all patches of a tile, layer by layer; then an MLP.

Source: LLaVA-VL/LLaVA-NeXT `llava/model/multimodal_resampler/perceiver.py`; docs/design/methods.md#perceiver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.fields import PositiveInt, check
from vr_jax.model.layers import LayerNorm, linear, merge_heads, normal, split_heads, stack_layers
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import Rules

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(ProjectorConfig, name="perceiver"):
    """LLaVA-NeXT's Perceiver. Latent k is the vision token at row k // n and column k % n of the tile.

    Attributes:
        depth: Number of layers.
        latents: Number of latents, a square number, or None for one for each window of stride x stride patches.
            LLaVA-NeXT's default is 32.
        ff_multiplier: Width of the feed-forward layers, in widths of the encoder.
        heads: Attention heads.
        head_dim: Channels of a head.
    """

    sharding_rules: ClassVar[Rules] = ((r"latents", P(None, "fsdp")),)

    depth: PositiveInt = 3
    latents: PositiveInt | None = None
    ff_multiplier: PositiveInt = 4
    heads: PositiveInt = 8
    head_dim: PositiveInt = 64

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        if self.latents is not None:
            side = math.isqrt(self.latents)
            check(
                side**2 == self.latents,
                f"PerceiverConfig.latents = {self.latents}: expected a square number, because the latents are the "
                "n x n vision tokens of a tile, which unpad, the newline vectors and Vision Remember lay out as a "
                f"grid; nearest: {side**2} or {(side + 1) ** 2}; or None for one per window",
            )

    def cells_per_side(self, grid: int) -> int:
        """See `ProjectorConfig.cells_per_side`."""
        return grid // self.stride if self.latents is None else math.isqrt(self.latents)

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`."""
        patches, latents, width = spec.patches_per_tile, spec.cells_per_tile, spec.encoder_width
        inner, keys = self.heads * self.head_dim, patches + latents
        attention = 2 * latents * width * inner + 2 * keys * width * inner + 2 * latents * keys * inner
        feed_forward = 2 * latents * self.ff_multiplier * width**2
        return 2 * self.depth * (attention + feed_forward) + super().flops_per_tile(spec)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> PerceiverProjector:
        """See `ProjectorConfig.build`."""
        return PerceiverProjector(self, spec, rngs=rngs)


class Attention(nnx.Module):
    """Attention of the latents to the patches and to themselves, without biases."""

    def __init__(self, width: int, config: PerceiverConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the four projections; `width` is that of latents and patches."""
        inner = config.heads * config.head_dim
        self.q = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.k = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.v = linear(width, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = linear(inner, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, latents: Float[Array, "M L D"], patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        """The update of L latents from P patches."""
        keys = jnp.concatenate([patches, latents], axis=1)
        q, k, v = (split_heads(x, self.heads) for x in (self.q(latents), self.k(keys), self.v(keys)))
        return self.out(merge_heads(jax.nn.dot_product_attention(q, k, v)))


class Layer(nnx.Module):
    """One layer of the resampler: attention, then a feed-forward layer, each added to the latents."""

    def __init__(self, width: int, config: PerceiverConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the sub-layers; `width` is that of latents and patches."""
        self.ln_media = LayerNorm(width, eps=EPS)
        self.ln_latents = LayerNorm(width, eps=EPS)
        self.attn = Attention(width, config, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = linear(width, config.ff_multiplier * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.ff_multiplier * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "M L D"], patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        """The latents after this layer."""
        latents = latents + self.attend(latents, patches)
        return latents + self.feed_forward(latents)

    def attend(self, latents: Float[Array, "M L D"], patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        """The update of the attention."""
        return self.attn(self.ln_latents(latents), self.ln_media(patches))

    def feed_forward(self, latents: Float[Array, "M L D"]) -> Float[Array, "M L D"]:
        """The update of the feed-forward layer."""
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(latents)), approximate=False))


class PerceiverProjector(nnx.Module):
    """The resampler, then Linear, exact GELU, Linear.

    It does not depend on the order of the patches; positions are known only from the features themselves.
    """

    def __init__(self, config: PerceiverConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises latents and layers for the widths of `spec`."""
        width, hidden, dtype = spec.encoder_width, spec.decoder_width, spec.dtype
        self.latents = nnx.Param(normal(1.0)(rngs.params(), (spec.cells_per_tile, width)))
        self.layers = stack_layers(lambda r: Layer(width, config, dtype=dtype, rngs=r), config.depth, rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B L Dt"]:
        """Maps the patches of a tile to its vision tokens."""
        *batch, cells, patches, width = features.shape
        tokens = self.resample(features.reshape(-1, cells * patches, width))
        tokens = self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))
        return tokens.reshape(*batch, *tokens.shape[1:])

    def resample(self, patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        """The latents after the last layer, before the MLP."""

        def run(x: Float[Array, "M L D"], layer: Layer) -> tuple[Float[Array, "M L D"], None]:
            return layer(x, patches), None

        latents, _ = jax.lax.scan(run, self.first_latents(patches), self.layers)
        return self.norm(latents)

    def first_latents(self, patches: Float[Array, "M P D"]) -> Float[Array, "M L D"]:
        """The learned latents, once for each tile."""
        latents = self.latents[...].astype(patches.dtype)
        return jnp.broadcast_to(latents, (patches.shape[0], *latents.shape))
