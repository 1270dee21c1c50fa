"""`token_packer`: the bilinearly shrunk feature of each cell attends to features of several levels in its window.

Source: CircleRadon/TokenPacker `llava/model/multimodal_projector/builder.py`; docs/design/methods.md#token-packer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.fields import NonNegativeInt, PositiveInt, check, check_increasing
from vr_jax.kernels.window_attention import window_attention
from vr_jax.model.layers import LayerNorm, MultiHeadAttention, linear, merge_heads, normal, split_heads
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import Rules

EPS = 1e-6
# timm's trunc_normal_ cuts at -2 and 2, a hundred standard deviations away.
_init = normal(0.02)


@dataclass(frozen=True, kw_only=True)
class TokenPackerConfig(ProjectorConfig, name="token_packer"):
    """TokenPacker. Its queries are the hidden state that the model gives its projector.

    Attributes:
        levels: The encoder's hidden states that make the keys and values.
        width: Channels of the attention, or None for those of the encoder.
        heads: Attention heads.
    """

    sharding_rules: ClassVar[Rules] = ((r"q_proj\.kernel", P("fsdp", "tensor")),)

    levels: tuple[NonNegativeInt, ...] = (12, 16, 22, 23)
    width: PositiveInt | None = None
    heads: PositiveInt = 8

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check_increasing("TokenPackerConfig.levels", self.levels)

    def inner_width(self, spec: ModelSpec) -> int:
        """Channels of the attention in a model."""
        return self.width or spec.encoder_width

    def feature_levels(self, spec: ModelSpec) -> tuple[int, ...]:
        """See `ProjectorConfig.feature_levels`."""
        return (spec.feature_level, *self.levels)

    def check_model(self, spec: ModelSpec) -> None:
        """See `ProjectorConfig.check_model`."""
        width = self.inner_width(spec)
        check(width % self.heads == 0, f"projector.heads = {self.heads} does not divide the width {width}; set another")

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`."""
        cells, patches = spec.cells_per_tile, spec.patches_per_tile
        vision, width, hidden = spec.encoder_width, self.inner_width(spec), spec.decoder_width
        query = cells * (vision * width + width**2)
        keys_values = 2 * patches * (len(self.levels) * vision * width + 2 * width**2)
        attention = 2 * patches * width + cells * width**2
        return 2 * (query + keys_values + attention + cells * (width * hidden + hidden**2))

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> TokenPacker:
        """See `ProjectorConfig.build`."""
        return TokenPacker(self, spec, rngs=rngs)


class Features(nnx.Module):
    """The keys or the values: Linear, exact GELU, Linear, LayerNorm on all levels of a patch."""

    def __init__(self, inputs: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the layers from `inputs` channels, those of all levels, to `width`."""
        self.fc1 = linear(inputs, width, dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(width, width, dtype=dtype, rngs=rngs, init=_init)
        self.norm = LayerNorm(width, eps=EPS)

    def __call__(self, features: Float[Array, "*B LDv"]) -> Float[Array, "*B E"]:
        """Maps the features of every patch."""
        return self.norm(self.fc2(jax.nn.gelu(self.fc1(features), approximate=False)))


class TokenPacker(nnx.Module):
    """Window attention, then Linear, exact GELU, Linear. There is no residual connection and no gate."""

    def __init__(self, config: TokenPackerConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the layers for the widths of `spec`."""
        dtype = spec.dtype
        vision, hidden, width = spec.encoder_width, spec.decoder_width, config.inner_width(spec)
        self.q_proj = linear(vision, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.ln_q = LayerNorm(width, eps=EPS)
        self.keys = Features(len(config.levels) * vision, width, dtype=dtype, rngs=rngs)
        self.values = Features(len(config.levels) * vision, width, dtype=dtype, rngs=rngs)
        self.attn = MultiHeadAttention(width, width, config.heads, out_init=_init, dtype=dtype, rngs=rngs)
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs, init=_init)

    def __call__(
        self, features: Float[Array, "*B cells patches Dv"], *levels: Float[Array, "*B cells patches Dv"]
    ) -> Float[Array, "*B cells Dt"]:
        """Maps the patches of each cell to its vision token.

        Args:
            features: The hidden state that makes the queries.
            *levels: The hidden states that make the keys and values.

        Returns:
            The vision tokens.
        """
        stacked = jnp.concatenate(levels, axis=-1)
        tokens = self.attend(self.query(features), self.keys(stacked), self.values(stacked))
        return self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))

    def query(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells E"]:
        """The query of each cell."""
        return self.ln_q(self.q_proj(shrink(features)))

    def attend(
        self,
        query: Float[Array, "*B cells E"],
        keys: Float[Array, "*B cells patches E"],
        values: Float[Array, "*B cells patches E"],
    ) -> Float[Array, "*B cells E"]:
        """The attention of each cell's query to the patches of its window."""
        heads, (*_, patches, width) = self.attn.heads, keys.shape
        q, k, v = (split_heads(x, heads) for x in (self.attn.q(query), self.attn.k(keys), self.attn.v(values)))
        windows = (q.reshape(-1, *q.shape[-2:]), *(x.reshape(-1, patches, *x.shape[-2:]) for x in (k, v)))
        read = merge_heads(window_attention(*windows))
        return self.attn.out(read.reshape(*query.shape[:-1], width))


def shrink(features: Float[Array, "*B cells patches D"]) -> Float[Array, "*B cells D"]:
    """The map of patches resized bilinearly to the map of cells, as torch's `interpolate` does without antialiasing.

    With windows of s x s patches, cell i of a row samples at (i + 1/2) s - 1/2, that is (s - 1)/2 patches into its
    window. This is the middle patch where s is odd, and halfway between the two middle patches where s is even. So the
    result is the middle patch of the window, or the mean of its 2 x 2 middle patches.
    """
    *batch, patches, width = features.shape
    s = round(patches**0.5)
    middle = slice((s - 1) // 2, s // 2 + 1)
    window = features.reshape(*batch, s, s, width)[..., middle, middle, :]
    return jnp.mean(window, axis=(-3, -2), dtype=jnp.float32).astype(features.dtype)
