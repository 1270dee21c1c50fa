"""`pixel_shuffle`: the patches of a window side by side on the channel axis, then LayerNorm and an MLP.

Source: OpenGVLab/InternVL `modeling_internvl_chat.py` (`pixel_shuffle`, ps_version v2, and `mlp1`); methods.md 2.2."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import LayerNorm, linear
from vr_jax.model.registry import ProjectorConfig

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(ProjectorConfig):
    """InternVL's projector; the stride is an integer, also where the official ratio 1/s is no exact float."""

    name: str = "pixel_shuffle"

    def flops_per_tile(self, model: VlmConfig) -> float:
        inputs, hidden = self.stride**2 * model.encoder.hidden_size, model.decoder.hidden_size
        return 2 * model.cells_per_tile * (inputs * hidden + hidden**2)


class PixelShuffleProjector(nnx.Module):
    """Window-major features are shuffled already: channel order (dy, dx, c) is a reshape."""

    def __init__(self, config: PixelShuffleConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inputs, hidden = config.stride**2 * model.encoder.hidden_size, model.decoder.hidden_size
        self.norm = LayerNorm(inputs, eps=EPS)
        self.fc1 = linear(inputs, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        shuffled = features.reshape(*features.shape[:-2], -1)
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(shuffled)), approximate=False))
