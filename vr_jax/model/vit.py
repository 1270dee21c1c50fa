"""The layers that the vision transformers of SigLIP and CLIP share.

Source: transformers `models/siglip/modeling_siglip.py` and `models/clip/modeling_clip.py`, and timm 0.9.10
`vision_transformer.py` as MiniCPM-V uses it, whose layers differ in the activation alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vr_jax.kernels.attention import attention, full_attention
from vr_jax.model.layers import LayerNorm, linear, merge_heads, split_heads, xavier

Activation = Literal["gelu_tanh", "gelu", "quick_gelu"]


def quick_gelu(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """OpenAI's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
}


class BlockConfig(Protocol):
    """The sizes that a layer needs of an encoder's config."""

    @property
    def hidden_size(self) -> int:
        """Channels of the hidden states."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Channels of the feed-forward layers."""
        ...

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        ...

    @property
    def layer_norm_eps(self) -> float:
        """Epsilon of the norms."""
        ...


class Attention(nnx.Module):
    """Bidirectional attention over all tokens of a tile."""

    def __init__(self, config: BlockConfig, *, backend: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the projections; `backend` is that of `vr_jax.kernels.attention`."""
        make = functools.partial(linear, config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs, init=xavier)
        self.q, self.k, self.v, self.out = make(), make(), make(), make()
        self.heads, self.backend = config.num_heads, backend

    def received(self, x: Float[Array, "M P D"]) -> Float[Array, "M H P"]:
        """The attention that each token receives, averaged over the tokens that attend; float32."""
        q, k = (split_heads(layer(x), self.heads) for layer in (self.q, self.k))
        logits = jnp.einsum("mqhk,mphk->mhqp", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2)

    def __call__(self, x: Float[Array, "M P D"], segments: Int[Array, "M P"] | None = None) -> Float[Array, "M P D"]:
        """The update of the P tokens of M tiles; see `Block.__call__`."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        if segments is None:
            return self.out(merge_heads(full_attention(q, k, v, self.backend)))
        attended = attention(
            q, k, v, query_segments=segments, key_segments=segments, causal=False, backend=self.backend
        )
        return self.out(merge_heads(attended))


class Mlp(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: BlockConfig, *, activation: Activation, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the two layers."""
        self.fc1 = linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs, init=xavier)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs, init=xavier)
        self.activation: Activation = activation

    def __call__(self, x: Float[Array, "M P D"]) -> Float[Array, "M P D"]:
        """The update of each token."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """One layer: attention and MLP, each with a LayerNorm before it."""

    def __init__(
        self, config: BlockConfig, *, activation: Activation, backend: str, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Initialises the sub-layers; `backend` is that of `vr_jax.kernels.attention`."""
        self.norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config, backend=backend, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "M P D"], segments: Int[Array, "M P"] | None = None) -> Float[Array, "M P D"]:
        """Runs the layer.

        Args:
            x: The P tokens of M tiles.
            segments: The segment of each token, whose tokens attend to each other; 0 is padding, which gets finite
                numbers. None if all tokens of a tile attend to each other.

        Returns:
            The tokens after the layer.
        """
        x = x + self.attn(self.norm1(x), segments)
        return x + self.mlp(self.norm2(x))


def block_flops(config: BlockConfig, tokens: int) -> float:
    """Operations of the forward pass of one layer on the tokens of one tile, two per multiply-add."""
    width = config.hidden_size
    return 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * tokens**2 * width
