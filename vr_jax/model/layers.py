"""Building blocks shared by the encoder, the decoder, the projectors and the re-fusion blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vr_jax.model.linear import Linear
from vr_jax.sharding import constrain, take_rows

normal = nnx.initializers.normal
xavier = nnx.initializers.xavier_uniform()


def torch_init(fan_in: int) -> Initializer:
    """The initialiser of torch.nn.Linear for kernels and biases: uniform between -1 and 1 over sqrt(fan_in)."""
    return _uniform(1.0 / math.sqrt(fan_in))


def _uniform(bound: float) -> Initializer:
    """An initialiser that draws uniformly between -bound and bound."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Linear:
    """A linear layer, whose kernel is (in, out).

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        dtype: Type of the computation.
        rngs: Random state of the initial values.
        use_bias: Whether there is a bias.
        init: Initialiser of the kernel; None is torch's default.
        bias_init: Initialiser of the bias; None is zero where `init` is given, and otherwise torch's default.
    """
    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=init or torch_init(in_features),
        bias_init=bias_init or (nnx.initializers.zeros if init else torch_init(in_features)),
        rngs=rngs,
    )


class Embedding(nnx.Module):
    """A table of vectors.

    Unlike nnx.Embed it looks up first and casts afterwards. So the table is never converted as a whole, and the
    gradients of a token's many occurrences add up in the parameter's precision.
    """

    def __init__(
        self, count: int, features: int, *, init: Initializer, dtype: DTypeLike, rngs: nnx.Rngs, scale: float = 1.0
    ) -> None:
        """Initialises `count` vectors of `features` channels.

        Args:
            count: The number of tokens.
            features: The channels of a vector.
            init: Makes the random values.
            dtype: Type of the result.
            rngs: Random state of the initial values.
            scale: What the vectors are multiplied by when they are looked up.
        """
        self.embedding = nnx.Param(init(rngs.params(), (count, features)))
        self.dtype, self.scale = dtype, scale

    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """The vectors of tokens."""
        x = take_rows(self.embedding[...], tokens).astype(self.dtype)
        if self.scale != 1:
            x = x * self.scale
        return constrain(x, "batch", "seq", "embed")


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis, x / rms(x) * scale, computed in float32."""

    def __init__(self, features: int, *, eps: float) -> None:
        """Initialises the scale of `features` channels with ones."""
        self.scale = nnx.Param(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises every vector."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        # The result is rounded before the scale is applied, as in transformers' Qwen2RMSNorm.
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


def normalize(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """LayerNorm over the last axis without its affine part, computed and returned in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """torch.nn.LayerNorm over the last axis, computed in float32."""

    def __init__(self, features: int, *, eps: float) -> None:
        """Initialises the affine part of `features` channels with the identity."""
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises every vector."""
        y = normalize(x, self.eps) * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def split_heads(x: Float[Array, "*B D"], heads: int) -> Float[Array, "*B H K"]:
    """Cuts the channels into heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "*B H K"]) -> Float[Array, "*B D"]:
    """Joins the channels of all heads."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


class MultiHeadAttention(nnx.Module):
    """The four projections of torch.nn.MultiheadAttention; subclasses and users compute the attention."""

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        *,
        out_init: Initializer | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the projections as torch does, whose in-projection is one packed (3 width, width) matrix.

        Args:
            width: Channels of queries, keys and values.
            out_width: Channels of the output.
            heads: Attention heads.
            out_init: Initialiser of the output's kernel; None is torch's default of a linear layer.
            dtype: Type of the computation.
            rngs: Random state of the initial values.
        """
        make = functools.partial(linear, width, width, dtype=dtype, rngs=rngs, init=_packed_xavier(width))
        self.q, self.k, self.v = make(), make(), make()
        self.out = linear(width, out_width, dtype=dtype, rngs=rngs, init=out_init, bias_init=nnx.initializers.zeros)
        self.heads = heads


def _packed_xavier(width: int) -> Initializer:
    """Xavier-uniform of torch's packed in-projection, whose fan-in is the width and fan-out three times that."""
    return _uniform((6.0 / (width + 3 * width)) ** 0.5)


def rotary_angles(
    positions: Int[Array, "B N"], head_dim: int, theta: float
) -> tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]:
    """Cosine and sine of the rotary angles, float32.

    Both halves of the channels are alike, as in transformers.
    """
    return _turns(positions.astype(jnp.float32)[..., None] * _frequencies(head_dim, theta))


def multi_axis_angles(
    positions: Int[Array, "B N A"], sections: tuple[int, ...], head_dim: int, theta: float
) -> tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]:
    """Cosine and sine of rotary angles whose frequencies read A axes of positions, float32.

    Source: transformers `models/qwen2_5_vl/modeling_qwen2_5_vl.py`, `apply_multimodal_rotary_pos_emb`.

    Args:
        positions: The positions of each token on every axis.
        sections: The number of frequencies that read each axis, in the order of the frequencies.
        head_dim: Channels of a head.
        theta: Base of the frequencies.
    """
    axis = np.repeat(np.arange(len(sections)), sections)
    return _turns(positions.astype(jnp.float32)[..., axis] * _frequencies(head_dim, theta))


def grid_angles(
    places: Int[Array, "B N 2"], head_dim: int, theta: float
) -> tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]:
    """Cosine and sine of the rotary angles of places in a grid, float32.

    Rows and columns have the same frequencies: those of rows turn the first quarter of the channels, those of columns
    the second, and both halves are alike.

    Source: transformers `models/qwen2_5_vl/modeling_qwen2_5_vl.py`, `Qwen2_5_VLVisionRotaryEmbedding`.

    Args:
        places: The row and column of each patch.
        head_dim: Channels of a head.
        theta: Base of the frequencies.
    """
    angle = places.astype(jnp.float32)[..., None] * _frequencies(head_dim // 2, theta)
    return _turns(angle.reshape(*angle.shape[:2], -1))


def _frequencies(head_dim: int, theta: float) -> Float[Array, " F"]:
    frequencies: Array = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return frequencies


def _turns(angle: Float[Array, "B N F"]) -> tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]:
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B N H K"], cos: Float[Array, "B N 1 K"], sin: Float[Array, "B N 1 K"]
) -> Float[Array, "B N H K"]:
    """Rotates the pairs (i, i + K / 2) of channels, as `apply_rotary_pos_emb` of transformers does."""
    low, high = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-high, low], axis=-1)
    return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def stack_layers[Layer: nnx.Module](make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """A module whose parameters have a leading axis of `count` layers, to be run by `lax.scan`."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def maybe_remat[**P, T](function: Callable[P, T], mode: str, *, in_scan: bool = False) -> Callable[P, T]:
    """The function, whose intermediate values the backward pass computes again.

    Args:
        function: A pure function of arrays.
        mode: "none" changes nothing, "full" recomputes everything, "dots" keeps the results of matrix products.
        in_scan: Whether the function is the body of a `lax.scan`, which already keeps XLA from merging the two
            computations.
    """
    if mode == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[mode], prevent_cse=not in_scan)
