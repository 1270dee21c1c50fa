"""`c_abstractor`: RegNet bottlenecks on the map of patches, average pooling, bottlenecks again, then an MLP.

Source: khanrc/honeybee `projectors.py` (`CAbstractor`) with timm's `RegStage` (group size 1, LayerNorm2d, SiLU);
methods.md 2.6."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import LayerNorm, linear, normal
from vr_jax.model.projectors.depthwise import DepthwiseConv
from vr_jax.model.registry import ProjectorConfig, check
from vr_jax.model.windows import to_raster, to_windows

EPS = 1e-5  # timm turns LayerNorm2d (1e-6) into LayerNormAct2d, whose own default this is; recorded outputs agree
_init = normal(0.02)  # of every matrix and convolution; biases start at zero


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(ProjectorConfig):
    """Honeybee's C-Abstractor, as wide as the encoder."""

    name: str = "c_abstractor"
    depth: int = 3  # bottlenecks before, and as many after the pooling

    def __post_init__(self):
        super().__post_init__()
        check(self.depth >= 1, f"CAbstractorConfig.depth = {self.depth}: expected an integer >= 1")

    def flops_per_tile(self, model: VlmConfig) -> float:
        width = model.encoder.hidden_size
        positions = model.encoder.grid**2 + model.cells_per_tile
        per_position = 2 * width**2
        gates = 2 * 2 * width * squeezed(width)
        return 2 * self.depth * (positions * per_position + gates) + super().flops_per_tile(model)


def squeezed(width: int) -> int:
    """Channels inside the squeeze-and-excitation."""
    return round(width / 4)


class SqueezeExcitation(nnx.Module):
    """A gate in 0..1 for each channel, from the map's mean."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = linear(width, squeezed(width), dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(squeezed(width), width, dtype=dtype, rngs=rngs, init=_init)

    def __call__(self, x: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.silu(self.fc1(mean))))


class Bottleneck(nnx.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1 convolutions around the identity; convolutions of 1 x 1 are matrices."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.norm1 = LayerNorm(width, eps=EPS)
        self.conv = DepthwiseConv(width, init=_init, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=EPS)
        self.se = SqueezeExcitation(width, dtype=dtype, rngs=rngs)
        self.fc2 = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs, init=_init)
        self.norm3 = LayerNorm(width, eps=EPS)

    def __call__(self, x: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        y = jax.nn.silu(self.norm1(self.fc1(x)))
        y = jax.nn.silu(self.norm2(self.conv(y)))
        return jax.nn.silu(x + self.norm3(self.fc2(self.se(y))))


class Stage(nnx.Module):
    """Bottlenecks b1, b2, ... in a row, by timm's names."""

    def __init__(self, depth: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        for number in range(1, depth + 1):
            setattr(self, f"b{number}", Bottleneck(width, dtype=dtype, rngs=rngs))
        self.depth = depth

    def __call__(self, x: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        for number in range(1, self.depth + 1):
            x = getattr(self, f"b{number}")(x)
        return x


class CAbstractor(nnx.Module):
    def __init__(self, config: CAbstractorConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = model.encoder.hidden_size, model.decoder.hidden_size
        # In raster order. torch's trunc_normal_ cuts at -2 and 2, a hundred standard deviations away.
        self.position_embedding = nnx.Param(_init(rngs.params(), (model.encoder.grid**2, width)))
        self.before = Stage(config.depth, width, dtype=dtype, rngs=rngs)
        self.after = Stage(config.depth, width, dtype=dtype, rngs=rngs)
        self.fc1 = linear(width, hidden, dtype=dtype, rngs=rngs, init=_init)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs, init=_init)
        self.stride = config.stride

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        *batch, cells, _, width = features.shape
        tokens = self.after(self.pool(self.before(self.map(features)))).reshape(*batch, cells, width)
        return self.fc2(jax.nn.silu(self.fc1(tokens)))

    def map(self, features: Float[Array, "*B cells patches D"]) -> Float[Array, "M G G D"]:
        """All patches of a tile where they are in the image, with the position embeddings."""
        raster = to_raster(features) + self.position_embedding[...].astype(features.dtype)
        side = round(raster.shape[-2] ** 0.5)
        return raster.reshape(-1, side, side, raster.shape[-1])

    def pool(self, x: Float[Array, "M G G D"]) -> Float[Array, "M N N D"]:
        count, side, _, width = x.shape
        pooled = jnp.mean(to_windows(x.reshape(count, side * side, width), self.stride), axis=-2)
        return pooled.reshape(count, side // self.stride, side // self.stride, width)
