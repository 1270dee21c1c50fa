"""`token_packer`: each cell's bilinearly shrunk feature attends to the multi-level features of its own window.

Source: CircleRadon/TokenPacker `multimodal_projector/builder.py`; methods.md 2.5."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.kernels.window_attention import window_attention
from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import LayerNorm, MultiHeadAttention, linear, merge_heads, normal, split_heads
from vr_jax.model.registry import ProjectorConfig, check, check_increasing

EPS = 1e-6
# timm's trunc_normal_ cuts at -2 and 2, a hundred standard deviations away.
_init = normal(0.02)


@dataclass(frozen=True, kw_only=True)
class TokenPackerConfig(ProjectorConfig):
    """TokenPacker; its query is the model's `vision_feature_layer`."""

    name: str = "token_packer"
    levels: tuple[int, ...] = (12, 16, 22, 23)  # keys and values: indices into the encoder's hidden states
    width: int | None = None  # of the attention; None: the encoder's
    heads: int = 8

    def __post_init__(self):
        super().__post_init__()
        check_increasing("TokenPackerConfig", "levels", self.levels)

    def inner_width(self, model: VlmConfig) -> int:
        return self.width or model.encoder.hidden_size

    def feature_levels(self, model: VlmConfig) -> tuple[int, ...]:
        return (model.vision_feature_layer, *self.levels)

    def check_model(self, model: VlmConfig) -> None:
        width = self.inner_width(model)
        check(width % self.heads == 0, f"projector.heads = {self.heads} does not divide the width {width}; set another")

    def flops_per_tile(self, model: VlmConfig) -> float:
        cells, patches = model.cells_per_tile, model.encoder.grid**2
        vision, width, hidden = model.encoder.hidden_size, self.inner_width(model), model.decoder.hidden_size
        query = cells * (vision * width + width**2)
        keys_values = 2 * patches * (len(self.levels) * vision * width + 2 * width**2)
        attention = 2 * patches * width + cells * width**2
        return 2 * (query + keys_values + attention + cells * (width * hidden + hidden**2))


class Features(nnx.Module):
    """Keys or values: all levels to the inner width."""

    def __init__(self, inputs: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = linear(inputs, width, dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(width, width, dtype=dtype, rngs=rngs, init=_init)
        self.norm = LayerNorm(width, eps=EPS)

    def __call__(self, features: Float[Array, "*B LDv"]) -> Float[Array, "*B E"]:
        return self.norm(self.fc2(jax.nn.gelu(self.fc1(features), approximate=False)))


class TokenPacker(nnx.Module):
    """No residual and no gate: a token is what its query reads."""

    def __init__(self, config: TokenPackerConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vision, hidden, width = model.encoder.hidden_size, model.decoder.hidden_size, config.inner_width(model)
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
        stacked = jnp.concatenate(levels, axis=-1)
        tokens = self.attend(self.query(features), self.keys(stacked), self.values(stacked))
        return self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))

    def query(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells E"]:
        return self.ln_q(self.q_proj(shrink(features)))

    def attend(
        self,
        query: Float[Array, "*B cells E"],
        keys: Float[Array, "*B cells patches E"],
        values: Float[Array, "*B cells patches E"],
    ) -> Float[Array, "*B cells E"]:
        heads, (*_, patches, width) = self.attn.heads, keys.shape
        q, k, v = (split_heads(x, heads) for x in (self.attn.q(query), self.attn.k(keys), self.attn.v(values)))
        windows = (q.reshape(-1, *q.shape[-2:]), *(x.reshape(-1, patches, *x.shape[-2:]) for x in (k, v)))
        read = merge_heads(window_attention(*windows))
        return self.attn.out(read.reshape(*query.shape[:-1], width))


def shrink(features: Float[Array, "*B cells patches D"]) -> Float[Array, "*B cells D"]:
    """The map of patches resized bilinearly to that of the cells, without antialias (torch's `interpolate`).

    Cell i of a row samples at (i + 1/2) s - 1/2, which is (s - 1)/2 patches into its own window: the centre patch
    where s is odd, halfway between the two middle ones where it is even. So a cell is the mean of the window's middle
    one, or middle 2 x 2, patches."""
    *batch, patches, width = features.shape
    s = round(patches**0.5)
    middle = slice((s - 1) // 2, s // 2 + 1)
    window = features.reshape(*batch, s, s, width)[..., middle, middle, :]
    return jnp.mean(window, axis=(-3, -2), dtype=jnp.float32).astype(features.dtype)
