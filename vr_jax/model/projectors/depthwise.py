"""The depthwise 3 x 3 convolution that LDPv2 and the C-Abstractor share."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class DepthwiseConv(nnx.Module):
    """A convolution with one 3 x 3 filter per channel, stride 1 and zero padding, as nine shifted products.

    It is no grouped convolution: partitioned over `tensor`, XLA (jax 0.12) adds up the gradient of that one's kernel
    twice.
    """

    def __init__(self, width: int, *, init: Initializer, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the filters.

        Args:
            width: Number of channels.
            init: Initialiser of the kernel and of the bias.
            use_bias: Whether there is a bias.
            dtype: Type of the computation.
            rngs: Random state of the initial values.
        """
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, width)))
        if use_bias:
            self.bias = nnx.Param(init(rngs.params(), (width,)))
        self.dtype = dtype

    def __call__(self, maps: Float[Array, "M H W D"]) -> Float[Array, "M H W D"]:
        """Convolves M maps of H x W positions."""
        _, height, width, _ = maps.shape
        kernel = self.kernel[...].astype(self.dtype)
        padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        total = jnp.zeros((), self.dtype)
        for y in range(3):
            for x in range(3):
                total = total + padded[:, y : y + height, x : x + width] * kernel[y, x]
        return total + self.bias[...].astype(self.dtype) if hasattr(self, "bias") else total
