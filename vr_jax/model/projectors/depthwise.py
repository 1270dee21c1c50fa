"""The depthwise 3 x 3 convolution of LDPv2 and C-Abstractor."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class DepthwiseConv(nnx.Module):
    """One 3 x 3 filter per channel, stride 1, edges padded with zeros: nine shifted products.

    Not a grouped convolution: partitioned over `tensor`, XLA (jax 0.12) adds its kernel gradient up twice."""

    def __init__(self, width: int, *, init: Callable, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, width)))
        if use_bias:
            self.bias = nnx.Param(init(rngs.params(), (width,)))
        self.dtype = dtype

    def __call__(self, maps: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        _, height, width, _ = maps.shape
        kernel = self.kernel[...].astype(self.dtype)
        padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        total = jnp.zeros((), self.dtype)
        for y in range(3):
            for x in range(3):
                total = total + padded[:, y : y + height, x : x + width] * kernel[y, x]
        return total + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else total
