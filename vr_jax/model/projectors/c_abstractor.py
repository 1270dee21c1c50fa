"""`c_abstractor` is Honeybee's projector: RegNet bottlenecks on the map of patches, window means, bottlenecks, an MLP.

Source: khanrc/honeybee `projectors/projectors.py` (`CAbstractor`) with timm's `RegStage` (group size 1, LayerNorm2d,
SiLU); docs/design/methods.md#c-abstractor.
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

from vr_jax.fields import PositiveInt
from vr_jax.model.layers import LayerNorm, linear, normal
from vr_jax.model.projectors.depthwise import DepthwiseConv
from vr_jax.model.registry import ProjectorConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.model.windows import to_raster, to_windows
from vr_jax.sharding import Rules

# timm turns LayerNorm2d, whose epsilon is 1e-6, into LayerNormAct2d, whose epsilon is 1e-5; recorded outputs agree.
EPS = 1e-5
# Every matrix and convolution starts so, and every bias at zero. torch's trunc_normal_ also cuts at -2 and 2, a hundred
# standard deviations away.
_init = normal(0.02)


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(ProjectorConfig, name="c_abstractor"):
    """Honeybee's C-Abstractor, whose bottlenecks are as wide as the encoder.

    Attributes:
        depth: Number of bottlenecks before the pooling, and as many after it.
    """

    sharding_rules: ClassVar[Rules] = (
        (r"(.+\.)?conv\.(kernel|bias)", P()),
        (r"position_embedding", P(None, "fsdp")),
    )

    depth: PositiveInt = 3

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`. The depthwise convolutions are not counted."""
        width = spec.encoder_width
        positions = spec.patches_per_tile + spec.cells_per_tile
        per_position = 2 * width**2
        gates = 2 * 2 * width * squeezed(width)
        return 2 * self.depth * (positions * per_position + gates) + super().flops_per_tile(spec)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> CAbstractor:
        """See `ProjectorConfig.build`."""
        return CAbstractor(self, spec, rngs=rngs)


def squeezed(width: int) -> int:
    """The number of channels inside the squeeze-and-excitation."""
    return round(width / 4)


class SqueezeExcitation(nnx.Module):
    """Multiplies every channel by a gate in 0..1, which two layers compute from the map's mean."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the two layers for `width` channels."""
        self.fc1 = linear(width, squeezed(width), dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(squeezed(width), width, dtype=dtype, rngs=rngs, init=_init)

    def __call__(self, x: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        """Scales the channels of M maps of H x W positions."""
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.silu(self.fc1(mean))))


class Bottleneck(nnx.Module):
    """RegNet's bottleneck: a 1 x 1, a depthwise 3 x 3 and a 1 x 1 convolution, added to the input.

    The 1 x 1 convolutions are matrix products.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the layers for `width` channels."""
        self.fc1 = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.norm1 = LayerNorm(width, eps=EPS)
        self.conv = DepthwiseConv(width, init=_init, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=EPS)
        self.se = SqueezeExcitation(width, dtype=dtype, rngs=rngs)
        self.fc2 = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.norm3 = LayerNorm(width, eps=EPS)

    def __call__(self, x: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        """Maps M maps of H x W positions."""
        y = jax.nn.silu(self.norm1(self.fc1(x)))
        y = jax.nn.silu(self.norm2(self.conv(y)))
        return jax.nn.silu(x + self.norm3(self.fc2(self.se(y))))


class Stage(nnx.Module):
    """Bottlenecks in a row, called b1, b2, ... as in timm."""

    def __init__(self, depth: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises `depth` bottlenecks of `width` channels."""
        for number in range(1, depth + 1):
            setattr(self, f"b{number}", Bottleneck(width, dtype=dtype, rngs=rngs))
        self.depth = depth

    def __call__(self, x: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        """Maps M maps of H x W positions."""
        for number in range(1, self.depth + 1):
            x = getattr(self, f"b{number}")(x)
        return x


class CAbstractor(nnx.Module):
    """Learned positions, bottlenecks, window means, bottlenecks; then Linear, SiLU, Linear."""

    def __init__(self, config: CAbstractorConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the layers for the widths of `spec`."""
        width, hidden, dtype = spec.encoder_width, spec.decoder_width, spec.dtype
        # The positions are in raster order.
        self.position_embedding = nnx.Param(_init(rngs.params(), (spec.patches_per_tile, width)))
        self.before = Stage(config.depth, width, dtype=dtype, rngs=rngs)
        self.after = Stage(config.depth, width, dtype=dtype, rngs=rngs)
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs, init=_init)
        self.stride = config.stride

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        """Maps the patches of a tile to its vision tokens."""
        *batch, cells, _, width = features.shape
        tokens = self.after(self.pool(self.before(self.map(features)))).reshape(*batch, cells, width)
        return self.fc2(jax.nn.silu(self.fc1(tokens)))

    def map(self, features: Float[Array, "*B cells patches D"]) -> Float[Array, "M G G D"]:
        """The G x G map of all patches of a tile in raster order, with the position embeddings."""
        raster = to_raster(features) + self.position_embedding[...].astype(features.dtype)
        side = round(raster.shape[-2] ** 0.5)
        return raster.reshape(-1, side, side, raster.shape[-1])

    def pool(self, x: Float[Array, "M G G D"]) -> Float[Array, "M N N D"]:
        """The means over the windows of a map of G x G patches: one for each of N x N cells."""
        count, side, _, width = x.shape
        pooled = jnp.mean(to_windows(x.reshape(count, side * side, width), self.stride), axis=-2)
        return pooled.reshape(count, side // self.stride, side // self.stride, width)
