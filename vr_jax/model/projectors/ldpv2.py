"""`ldpv2`: an MLP on every patch, average pooling, and a depthwise convolution as position encoding.

Source: Meituan-AutoML/MobileVLM `vision_projector.py` (`LDPNetV2Projector`); methods.md 2.4."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import linear, torch_init
from vr_jax.model.projectors.depthwise import DepthwiseConv
from vr_jax.model.registry import ProjectorConfig


@dataclass(frozen=True, kw_only=True)
class Ldpv2Config(ProjectorConfig):
    """MobileVLM V2's projector for any stride (the official one makes 12 x 12 tokens)."""

    name: str = "ldpv2"

    def flops_per_tile(self, model: VlmConfig) -> float:
        patches, hidden = model.encoder.grid**2, model.decoder.hidden_size
        return 2 * patches * (model.encoder.hidden_size * hidden + hidden**2)


class Ldpv2Projector(nnx.Module):
    def __init__(self, config: Ldpv2Config, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        del config  # the stride is the patch axis of the features
        hidden = model.decoder.hidden_size
        self.fc1 = linear(model.encoder.hidden_size, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(hidden, init=torch_init(9), use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        return self.position_encoding(jnp.mean(self.mlp(features), axis=-2))

    def mlp(self, features: Float[Array, "*B Dv"]) -> Float[Array, "*B Dt"]:
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))

    def position_encoding(self, tokens: Float[Array, "*B cells Dt"]) -> Float[Array, "*B cells Dt"]:
        """Cells are in raster order, so their map is a reshape."""
        *batch, cells, width = tokens.shape
        side = round(cells**0.5)
        return tokens + self.conv(tokens.reshape(-1, side, side, width)).reshape(*batch, cells, width)
