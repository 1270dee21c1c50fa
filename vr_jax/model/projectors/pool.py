"""`mlp` (LLaVA's mlp2x_gelu, no compression) and `pool` (DeCo: average pooling, then the same MLP).

Sources: LLaVA-NeXT `multimodal_projector/builder.py`; yaolinli/DeCo README `AvgPoolProjector`; methods.md 1.5, 2.1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.layers import linear
from vr_jax.model.registry import ProjectorConfig


class PoolProjector(nnx.Module):
    """Window mean, Linear, exact GELU, Linear. For s dividing the grid the mean equals adaptive average pooling."""

    def __init__(self, config: ProjectorConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        del config  # the stride is the patch axis of the features
        vision_width, text_width = model.encoder.hidden_size, model.decoder.hidden_size
        self.fc1 = linear(vision_width, text_width, dtype=dtype, rngs=rngs)
        self.fc2 = linear(text_width, text_width, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "*B cells patches Dv"]) -> Float[Array, "*B cells Dt"]:
        pooled = jnp.mean(features, axis=-2)
        return self.fc2(jax.nn.gelu(self.fc1(pooled), approximate=False))


class MlpProjector(PoolProjector):
    """The same with windows of one patch (ProjectorConfig requires stride 1): every patch becomes a vision token."""
