"""`merger` is Qwen2.5-VL's projector: the normalised patches of a cell side by side on the channel axis, and an MLP.

Source: transformers 5.23 `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`Qwen2_5_VLPatchMerger`);
docs/design/methods.md#qwen2-5-vl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from vr_jax.fields import PositiveInt
from vr_jax.model.layers import RMSNorm, linear
from vr_jax.model.registry import Layout, ProjectorConfig
from vr_jax.model.spec import ModelSpec

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MergerConfig(ProjectorConfig, name="merger"):
    """Qwen2.5-VL's patch merger.

    Attributes:
        stride: Patches per side of a cell, which becomes one vision token.
    """

    layouts: ClassVar[tuple[Layout, ...]] = ("square", "windows")

    stride: PositiveInt = 2

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`."""
        inner = self.stride**2 * spec.encoder_width
        return 2 * spec.cells_per_tile * inner * (inner + spec.decoder_width)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> Merger:
        """See `ProjectorConfig.build`."""
        return Merger(self, spec, rngs=rngs)


class Merger(nnx.Module):
    """RMSNorm of each patch, and Linear, exact GELU, Linear on the joined patches of a cell."""

    def __init__(self, config: MergerConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the layers for the widths of `spec`."""
        inner = config.stride**2 * spec.encoder_width
        self.norm = RMSNorm(spec.encoder_width, eps=EPS)
        self.fc1 = linear(inner, inner, dtype=spec.dtype, rngs=rngs)
        self.fc2 = linear(inner, spec.decoder_width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        """Maps the patches of each cell to its vision token."""
        joined = self.norm(features).reshape(*features.shape[:-2], -1)
        return self.fc2(jax.nn.gelu(self.fc1(joined), approximate=False))
