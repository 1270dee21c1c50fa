"""Building blocks shared by the encoder, the decoder, the projectors and the re-fusion blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vr_jax.sharding import constrain

normal = nnx.initializers.normal
xavier = nnx.initializers.xavier_uniform()


def torch_init(fan_in: int) -> Callable:
    """torch.nn.Linear's default: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for kernels and biases alike."""
    bound = 1.0 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    init: Callable | None = None,
    bias_init: Callable | None = None,
) -> nnx.Linear:
    """A Linear with torch's default initialisation unless told otherwise. Kernels are (in, out)."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=init or torch_init(in_features),
        bias_init=bias_init or (nnx.initializers.zeros if init else torch_init(in_features)),
        rngs=rngs,
    )


class Embedding(nnx.Module):
    """A table of vectors. Looked up first and cast afterwards, unlike nnx.Embed: the table is never converted as a
    whole, and the gradients of a token's many occurrences add up in the parameter's precision."""

    def __init__(self, count: int, features: int, *, init: Callable, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (count, features)))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        x = jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)
        return constrain(x, "batch", "seq", "embed")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        # Rounded before the scale is applied, as transformers' Qwen2RMSNorm does.
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


def normalize(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """LayerNorm without its affine part, computed in float32, returned in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """torch.nn.LayerNorm over the last axis, computed in float32."""

    def __init__(self, features: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = normalize(x, self.eps) * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def split_heads(x: Float[Array, "*B D"], heads: int) -> Float[Array, "*B H K"]:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "*B H K"]) -> Float[Array, "*B D"]:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


class MultiHeadAttention(nnx.Module):
    """The four projections of torch.nn.MultiheadAttention, initialised as its packed (3E, E) in-projection is.

    out_init: of the output's kernel; None is torch's default of a Linear. Biases start at zero."""

    def __init__(
        self,
        width: int,
        out_width: int,
        heads: int,
        *,
        out_init: Callable | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(linear, width, width, dtype=dtype, rngs=rngs, init=_packed_xavier)
        self.q, self.k, self.v = make(), make(), make()
        self.out = linear(width, out_width, dtype=dtype, rngs=rngs, init=out_init, bias_init=nnx.initializers.zeros)
        self.heads = heads


def _packed_xavier(key, shape, dtype=jnp.float32):
    """Xavier-uniform of torch's packed in-projection: fan_in E, fan_out 3E."""
    bound = (6.0 / (shape[0] + 3 * shape[1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def rotary_angles(
    positions: Int[Array, "B N"], head_dim: int, theta: float
) -> tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]:
    """Cosine and sine of the rotary angles, float32; halves repeated (transformers' layout)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B N H K"], cos: Float[Array, "B N 1 K"], sin: Float[Array, "B N 1 K"]
) -> Float[Array, "B N H K"]:
    """Rotary position embedding on half-split channels (transformers: `apply_rotary_pos_emb`)."""
    low, high = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-high, low], axis=-1)
    return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def stack_layers[Layer: nnx.Module](make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """One module whose every parameter has a leading axis of `count` layers, to be run by `lax.scan`."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


REMAT_POLICIES: dict[str, Callable | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def maybe_remat(function: Callable, mode: str, *, in_scan: bool = False) -> Callable:
    """`function` under jax.checkpoint: 'full' recomputes everything, 'dots' keeps matrix products, 'none' is a no-op.

    in_scan: it is the body of a `lax.scan`, which already keeps XLA from merging the two computations."""
    if mode == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[mode], prevent_cse=not in_scan)
