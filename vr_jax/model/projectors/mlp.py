"""`mlp` is LLaVA's projector `mlp2x_gelu`, which does not compress.

Source: LLaVA-VL/LLaVA-NeXT `llava/model/multimodal_projector/builder.py`; docs/design/methods.md#mlp-projector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from vr_jax.fields import Range
from vr_jax.model.layers import linear
from vr_jax.model.registry import Layout, ProjectorConfig
from vr_jax.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class MlpConfig(ProjectorConfig, name="mlp"):
    """Every patch becomes a vision token.

    Attributes:
        stride: Always 1.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ("square", "windows")

    stride: Annotated[int, Range(1, 1)] = 1

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> MlpProjector:
        """See `ProjectorConfig.build`."""
        return MlpProjector(spec, rngs=rngs)


class MlpProjector(nnx.Module):
    """Linear, exact GELU, Linear on every patch."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the two layers for the widths of `spec`."""
        self.fc1 = linear(spec.encoder_width, spec.decoder_width, dtype=spec.dtype, rngs=rngs)
        self.fc2 = linear(spec.decoder_width, spec.decoder_width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells 1 Dv"]) -> Float[Array, "*B cells Dt"]:
        """Maps the one patch of each cell to its vision token."""
        return self.fc2(jax.nn.gelu(self.fc1(features[..., 0, :]), approximate=False))
