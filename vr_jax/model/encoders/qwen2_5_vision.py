"""`qwen2_5_vision`: Qwen2.5-VL's vision tower, whose tiles are the attention windows of images of any size.

    x = W_patch pixels                                       a patch as (row, column, channel), without bias
    x = x + out(attention(rotate(q), rotate(k), v)),  q, k, v of RMS(x)
    x = x + down(silu(gate(y)) * up(y)),  y = RMS(x)

Most layers attend within a window. Those of `full_attention_layers` attend within the whole image. Patches are rotated
by their row and column in the image.

The released kernel of the patch embedding has two temporal slices. A still image is two equal frames, so the slices act
as their sum, which is what `patch_embed` holds. Conversion adds the slices on import and stores half of the sum in each
of them on export; halving is exact in floating point, so that the exported model computes the same function.

Source: transformers 5.23 `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`Qwen2_5_VisionTransformerPretrainedModel`);
docs/design/methods.md#qwen2-5-vl.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from vr_jax.errors import ConfigError
from vr_jax.fields import Distinct, NonNegativeInt, PositiveFloat, PositiveInt, check
from vr_jax.kernels.attention import attention, full_attention
from vr_jax.model.batch import TilePlaces
from vr_jax.model.layers import (
    RMSNorm,
    grid_angles,
    linear,
    merge_heads,
    normal,
    rotate,
    split_heads,
    stack_layers,
)
from vr_jax.model.registry import EncoderConfig, Layout
from vr_jax.model.spec import ModelSpec
from vr_jax.model.windows import patch_places, patchify
from vr_jax.sharding import Rules, constrain

EPS = 1e-6
INITIALIZER_RANGE = 0.02

Rotary = tuple[Float[Array, "B N 1 K"], Float[Array, "B N 1 K"]]
# The attention of a layer: it maps queries, keys and values (B, N, heads, K) to the attended values.
Attend = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Qwen25VisionConfig(EncoderConfig, name="qwen2_5_vision"):
    """Qwen2.5-VL's vision tower; the defaults are those of the released models of 3B and 7B.

    Attributes:
        intermediate_size: Channels of the feed-forward layers.
        num_heads: Attention heads.
        image_size: Pixels per side of an attention window.
        patch_size: Pixels per side of a patch.
        full_attention_layers: Numbers of the layers that attend within the whole image, counted from 0. All others
            attend within a window.
        rope_theta: Base of the rotary frequencies.
    """

    layout: ClassVar[Layout] = "windows"
    # The inputs of the patch embedding, 588, are no multiple of 8, so they stay whole.
    sharding_rules: ClassVar[Rules] = ((r"patch_embed\.kernel", P(None, "fsdp")),)

    hidden_size: PositiveInt = 1280
    intermediate_size: PositiveInt = 3420
    num_layers: PositiveInt = 32
    num_heads: PositiveInt = 16
    image_size: PositiveInt = 112
    patch_size: PositiveInt = 14
    full_attention_layers: Annotated[tuple[NonNegativeInt, ...], Distinct()] = (7, 15, 23, 31)
    rope_theta: PositiveFloat = 10_000.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"Qwen25VisionConfig.hidden_size = {self.hidden_size} with num_heads = {self.num_heads}: the rotary angles "
            "of rows and columns need a head of a multiple of 4 channels",
        )
        check(
            self.image_size % self.patch_size == 0,
            f"Qwen25VisionConfig.image_size = {self.image_size}: expected a window of whole patches, a multiple of "
            f"patch_size = {self.patch_size}",
        )
        outside = [layer for layer in self.full_attention_layers if layer >= self.num_layers]
        check(
            not outside,
            f"Qwen25VisionConfig.full_attention_layers = {self.full_attention_layers}: {outside} outside the encoder; "
            f"expected values in 0..{self.num_layers - 1}",
        )

    @property
    def grid(self) -> int:
        """See `EncoderConfig.grid`."""
        return self.image_size // self.patch_size

    @property
    def extra_bounds(self) -> tuple[int, ...]:
        """See `EncoderConfig.extra_bounds`: each layer of full attention is a stage of its own."""
        return tuple(bound for layer in self.full_attention_layers for bound in (layer, layer + 1))

    def flops_per_tile(self, layers: int, image_tiles: int = 1) -> float:
        """See `EncoderConfig.flops_per_tile`.

        Args:
            layers: The number of layers that run.
            image_tiles: The number of tiles of the tile's image, all of which a patch attends to in the layers of full
                attention. The default counts the least, an image of one window; in an image of 1344 x 896 pixels, which
                has 96 windows, the true number is 10 % higher.
        """
        patches, width = self.grid**2, self.hidden_size
        embed = 2 * patches * width * 3 * self.patch_size**2
        layer = 2 * patches * width * (4 * width + 3 * self.intermediate_size)
        full = sum(number < layers for number in self.full_attention_layers)
        pairs = patches**2 * (layers - full + full * image_tiles)
        return embed + layers * layer + 4 * width * pairs

    def flops_per_image(self, layers: int, tiles: int) -> float:
        """See `EncoderConfig.flops_per_image`."""
        return tiles * self.flops_per_tile(layers, tiles)

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> Qwen25Vision:
        """See `EncoderConfig.build`."""
        return Qwen25Vision(self, spec, bounds=bounds, rngs=rngs)


class Attention(nnx.Module):
    """Bidirectional attention with rotated queries and keys; the layer's kind chooses the keys."""

    def __init__(self, config: Qwen25VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the projections."""
        width = config.hidden_size
        make = functools.partial(linear, width, width, dtype=dtype, rngs=rngs, init=normal(INITIALIZER_RANGE))
        self.q, self.k, self.v, self.out = make(), make(), make(), make()
        self.heads = config.num_heads

    def __call__(self, x: Float[Array, "B N D"], rotary: Rotary, attend: Attend) -> Float[Array, "B N D"]:
        """The update of the N patches of the tiles of each row."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        return self.out(merge_heads(attend(rotate(q, *rotary), rotate(k, *rotary), v)))


class Mlp(nnx.Module):
    """The feed-forward layer, a SwiGLU with biases."""

    def __init__(self, config: Qwen25VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the three projections."""
        width, inner = config.hidden_size, config.intermediate_size
        make = functools.partial(linear, dtype=dtype, rngs=rngs, init=normal(INITIALIZER_RANGE))
        self.gate, self.up, self.down = make(width, inner), make(width, inner), make(inner, width)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """The update of each patch."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention and feed-forward layer, each with an RMSNorm before it."""

    def __init__(self, config: Qwen25VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the sub-layers."""
        self.norm1 = RMSNorm(config.hidden_size, eps=EPS)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(config.hidden_size, eps=EPS)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], rotary: Rotary, attend: Attend) -> Float[Array, "B N D"]:
        """Runs the layer on the N patches of the tiles of each row."""
        x = x + self.attn(self.norm1(x), rotary, attend)
        return constrain(x + self.mlp(self.norm2(x)), "batch", "seq", "embed")


def _run_block(rotary: Rotary, attend: Attend, x: Float[Array, "B N D"], block: Block) -> tuple[Array, None]:
    """One step of the scan over the layers of a stage."""
    return block(x, rotary, attend), None


class Qwen25Vision(nnx.Module):
    """The vision tower without its merger, which is the projector `merger`; `EncoderModule` documents its methods."""

    def __init__(self, config: Qwen25VisionConfig, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Initialises the tower.

        Args:
            config: Its sizes.
            spec: The model that it belongs to.
            bounds: Stage k holds the layers bounds[k] .. bounds[k + 1] - 1. Every level that is read is a bound, and so
                are both ends of a layer of full attention.
            rngs: Random state of the initial values.
        """
        inputs = config.patch_size**2 * 3
        self.patch_embed = linear(inputs, config.hidden_size, dtype=spec.dtype, rngs=rngs, use_bias=False)
        self.stages = nnx.List(
            [
                stack_layers(lambda r: Block(config, dtype=spec.dtype, rngs=r), stop - start, rngs)
                for start, stop in itertools.pairwise(bounds)
            ]
        )
        self.config, self.stride, self.bounds, self.dtype = config, spec.stride, bounds, spec.dtype
        self.backend = spec.attention
        self.pixel_scale, self.pixel_shift = spec.pixel_scale, spec.pixel_shift

    def __call__(
        self, pixels: UInt8[Array, "B T H W 3"], levels: tuple[int, ...], places: TilePlaces | None = None
    ) -> tuple[Float[Array, "B T cells patches D"], ...]:
        """See `EncoderModule.__call__`. Hidden state i is the output of i layers; none is normalised at the end.

        Layers beyond the deepest level do not run. The hidden states of patches that no image has are unspecified
        finite numbers, and no other hidden state depends on their pixels.

        Raises:
            ValueError: A level is no bound of a stage, or `places` or their origins are absent.
        """
        scale, shift = (jnp.asarray(rgb, jnp.float32) for rgb in (self.pixel_scale, self.pixel_shift))
        x = pixels.astype(jnp.float32) * scale - shift
        return self.states(patchify(x, self.config.patch_size, self.stride), levels, places)

    def states(
        self,
        patches: Float[Array, "B T cells patches values"],
        levels: tuple[int, ...],
        places: TilePlaces | None = None,
    ) -> tuple[Float[Array, "B T cells patches D"], ...]:
        """Does what `__call__` does, from the normalised values of patches on.

        Args:
            patches: The values of each patch in the order (row, column, channel).
            levels: As in `__call__`.
            places: As in `__call__`.
        """
        if places is None or places.origin is None:
            raise ValueError("the encoder 'qwen2_5_vision' needs the places of tiles: extents and origins")
        missing = [level for level in levels if level not in self.bounds]
        if missing:
            raise ValueError(f"hidden states {missing} of 'qwen2_5_vision' are not stage bounds {self.bounds}")
        rows, tiles, cells, window, _ = patches.shape
        x = self.patch_embed(patches.astype(self.dtype)).reshape(rows, tiles * cells * window, -1)
        x = constrain(x, "batch", "seq", "embed")
        real, at = self._places(places)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = grid_angles(at, head_dim, self.config.rope_theta)
        kinds = self._within_windows(real), self._within_images(real, places)
        taken = {0: x}
        for stage, (start, stop) in zip(self.stages, itertools.pairwise(self.bounds), strict=True):
            if stop > max(levels):
                break
            attend = kinds[start in self.config.full_attention_layers]
            x, _ = jax.lax.scan(functools.partial(_run_block, rotary, attend), x, stage)
            taken[stop] = x
        return tuple(taken[level].reshape(rows, tiles, cells, window, -1) for level in levels)

    def _places(self, places: TilePlaces) -> tuple[Bool[Array, "B T P"], Int[Array, "B N 2"]]:
        """The mask of the patches that images have, and the row and column of every patch in its image."""
        assert places.origin is not None
        within = patch_places(self.config.grid, self.stride)
        real = jnp.all(within < places.extent[:, :, None], axis=-1)
        at = places.origin[:, :, None] + within
        return real, at.reshape(at.shape[0], -1, 2)

    def _within_windows(self, real: Bool[Array, "B T P"]) -> Attend:
        """The attention of the patches of a tile among themselves."""
        segments = real.reshape(-1, real.shape[-1]).astype(jnp.int32)

        def attend(q: Array, k: Array, v: Array) -> Array:
            query, key, value = (x.reshape(*segments.shape, *x.shape[2:]) for x in (q, k, v))
            return full_attention(query, key, value, self.backend, segments).reshape(q.shape)

        return attend

    def _within_images(self, real: Bool[Array, "B T P"], places: TilePlaces) -> Attend:
        """The attention of the patches of all tiles of an image."""
        segments = jnp.where(real, places.image[..., None], 0).reshape(real.shape[0], -1)
        return functools.partial(
            attention, query_segments=segments, key_segments=segments, causal=False, backend=self.backend
        )

    def received_attention(self, hidden: Float[Array, "*B cells patches D"]) -> Float[Array, "*B heads cells patches"]:
        """Refuses what only pruners of square tiles ask for.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "the encoder 'qwen2_5_vision' does not give the attention that patches receive: its last layer attends "
            "within whole images and not within tiles; use a pruner that does not rank by it, or the encoder 'siglip'"
        )
