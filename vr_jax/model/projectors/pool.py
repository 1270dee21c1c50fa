"""`pool` is DeCo's projector: the mean of every window, then the two-layer MLP of LLaVA.

Source: `AvgPoolProjector` in yaolinli/DeCo, README; docs/design/methods.md#pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vr_jax.model.layers import linear
from vr_jax.model.registry import Layout, ProjectorConfig
from vr_jax.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class PoolConfig(ProjectorConfig, name="pool"):
    """Average pooling over windows of stride x stride patches; the paper's default projector."""

    layouts: ClassVar[tuple[Layout, ...]] = ("square", "windows")

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> PoolProjector:
        """See `ProjectorConfig.build`."""
        return PoolProjector(spec, rngs=rngs)


class PoolProjector(nnx.Module):
    """The mean over the window, Linear, exact GELU, Linear.

    Where the stride divides the grid, the window mean equals torch's adaptive average pooling.
    """

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the two layers for the widths of `spec`."""
        self.fc1 = linear(spec.encoder_width, spec.decoder_width, dtype=spec.dtype, rngs=rngs)
        self.fc2 = linear(spec.decoder_width, spec.decoder_width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        """Maps the patches of each cell to its vision token."""
        pooled = jnp.mean(features, axis=-2)
        return self.fc2(jax.nn.gelu(self.fc1(pooled), approximate=False))
