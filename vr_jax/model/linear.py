"""The linear layer of all models, whose kernel may be quantised and may have a LoRA adapter beside it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vr_jax.model.quantization import dequantise, quantised_product


class Linear(nnx.Linear):
    """A linear layer, whose kernel is (in, out).

    A layer is made plain. `vr_jax.model.adaptation` then gives some layers of a model other parameters:

    * `kernel_codes` and `kernel_scale` in place of `kernel` (`vr_jax.model.quantization`), and `kernel_axes`, how the
      kernel is cut while it is multiplied with;
    * `lora_a` (in, r) and `lora_b` (r, out) beside it: the layer computes x W + s (x A) B, with s = `lora_scale`
      (Hu et al. 2021, arXiv 2106.09685; peft `tuners/lora/layer.py`, `Linear.forward`).
    """

    kernel_codes: Any = None
    kernel_scale: Any = None
    lora_a: Any = None
    lora_b: Any = None
    lora_scale: float = 1.0
    kernel_axes: tuple[str | None, str | None] = (None, None)

    def __call__(self, inputs: Float[Array, "*B I"], out_sharding: Any = None) -> Float[Array, "*B O"]:
        """Maps vectors."""
        if self.kernel_codes is None and self.lora_a is None:
            plain: Array = super().__call__(inputs, out_sharding)
            return plain
        x = inputs.astype(self.dtype)
        if self.kernel_codes is None:
            y = x @ self.kernel[...].astype(x.dtype)
        else:
            y = quantised_product(x, self.kernel_codes[...], self.kernel_scale[...], self.kernel_axes)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            y = y + (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype) * self.lora_scale
        return y

    def weight(self) -> Float[Array, "I O"]:
        """Returns the matrix that the layer multiplies with, for code that does more with it than one product."""
        kernel: Array = (
            self.kernel[...]
            if self.kernel_codes is None
            else dequantise(self.kernel_codes[...], self.kernel_scale[...])
        )
        if self.lora_a is not None:
            kernel = kernel.astype(jnp.float32) + merged_update(self.lora_a[...], self.lora_b[...], self.lora_scale)
        return kernel


def merged_update(a: Float[Array, "*L I R"], b: Float[Array, "*L R O"], scale: float) -> Float[Array, "*L I O"]:
    """Returns what an adapter adds to the kernel, in float32 and with products of full precision."""
    update: Array = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest") * scale
    return update
