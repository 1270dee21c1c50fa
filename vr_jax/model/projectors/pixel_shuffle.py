"""`pixel_shuffle` is InternVL's projector: a window's patches side by side on the channel axis, LayerNorm, an MLP.

Source: OpenGVLab/InternVL `modeling_internvl_chat.py` (`pixel_shuffle` with `ps_version` "v2", and `mlp1`);
docs/design/methods.md#pixel-shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from vr_jax.model.layers import LayerNorm, linear
from vr_jax.model.registry import Layout, ProjectorConfig
from vr_jax.model.spec import ModelSpec

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(ProjectorConfig, name="pixel_shuffle"):
    """InternVL's projector. The stride is an integer; the official ratio 1 / stride need not be an exact float."""

    layouts: ClassVar[tuple[Layout, ...]] = ("square", "windows")

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `ProjectorConfig.flops_per_tile`."""
        inputs, width = self.stride**2 * spec.encoder_width, spec.decoder_width
        return 2 * spec.cells_per_tile * (inputs * width + width**2)

    def build(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> PixelShuffleProjector:
        """See `ProjectorConfig.build`."""
        return PixelShuffleProjector(self, spec, rngs=rngs)


class PixelShuffleProjector(nnx.Module):
    """LayerNorm, Linear, exact GELU, Linear on whole windows.

    Window-major features are shuffled already: the official channel order (dy, dx, channel) is a reshape.
    """

    def __init__(self, config: PixelShuffleConfig, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        """Initialises the layers for the widths of `spec`."""
        inputs, width = config.stride**2 * spec.encoder_width, spec.decoder_width
        self.norm = LayerNorm(inputs, eps=EPS)
        self.fc1 = linear(inputs, width, dtype=spec.dtype, rngs=rngs)
        self.fc2 = linear(width, width, dtype=spec.dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        """Maps the patches of each cell to its vision token."""
        shuffled = features.reshape(*features.shape[:-2], -1)
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(shuffled)), approximate=False))
