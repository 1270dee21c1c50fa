"""`ldpv2` is MobileVLM V2's projector: an MLP on every patch, window means, and a convolution that encodes positions.

Source: Meituan-AutoML/MobileVLM `mobilevlm/model/vision_projector.py` (`LDPNetV2Projector`);
docs/design/methods.md#ldpv2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vr_jax.model.layers import linear, torch_init
from vr_jax.model.projectors.depthwise import DepthwiseConv
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import Rules


@dataclass(frozen=True, kw_only=True)
class Ldpv2Config(ProjectorConfig, name="ldpv2"):
    """MobileVLM V2's projector for any stride; the official one always makes 12 x 12 tokens."""

    sharding_rules: ClassVar[Rules] = ((r"(.+\.)?conv\.(kernel|bias)", P()),)

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`. The MLP runs on every patch."""
        return 2 * spec.patches_per_tile * (spec.encoder_width * spec.decoder_width + spec.decoder_width**2)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Ldpv2Projector:
        """See `ProjectorConfig.build`."""
        return Ldpv2Projector(spec, rngs=rngs)


class Ldpv2Projector(nnx.Module):
    """Linear, exact GELU, Linear on every patch; the mean over each window; a depthwise convolution, added."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the layers for the widths of `spec`."""
        width = spec.decoder_width
        self.fc1 = linear(spec.encoder_width, width, dtype=spec.dtype, rngs=rngs)
        self.fc2 = linear(width, width, dtype=spec.dtype, rngs=rngs)
        # torch initialises a depthwise 3 x 3 filter, bias included, for a fan-in of 9.
        self.conv = DepthwiseConv(width, init=torch_init(9), use_bias=True, dtype=spec.dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        """Maps the patches of each cell to its vision token."""
        return self.position_encoding(jnp.mean(self.mlp(features), axis=-2))

    def mlp(self, features: Float[Array, "*B Dv"]) -> Float[Array, "*B Dt"]:
        """The two layers that run on every patch."""
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))

    def position_encoding(self, tokens: Float[Array, "*B cells Dt"]) -> Float[Array, "*B cells Dt"]:
        """Adds the convolution of the map of tokens. Cells are in raster order, so the map is a reshape."""
        *batch, cells, width = tokens.shape
        side = round(cells**0.5)
        return tokens + self.conv(tokens.reshape(-1, side, side, width)).reshape(*batch, cells, width)
