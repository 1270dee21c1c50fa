"""`siglip`: SigLIP's vision tower, which gives hidden states at chosen depths with patches in window-major order.

Source: transformers `models/siglip/modeling_siglip.py`; docs/design/methods.md#vision-tower.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from vr_jax.fields import PositiveFloat, PositiveInt, check
from vr_jax.model.batch import TilePlaces
from vr_jax.model.layers import LayerNorm, linear, normal, stack_layers
from vr_jax.model.registry import EncoderConfig
from vr_jax.model.spec import SIGLIP_SCALE, SIGLIP_SHIFT, ModelSpec
from vr_jax.model.vit import Block, block_flops
from vr_jax.model.windows import patchify, raster_order
from vr_jax.sharding import Rules, constrain


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(EncoderConfig, name="siglip"):
    """SigLIP's vision tower; the defaults are those of `google/siglip-large-patch16-384`.

    Attributes:
        intermediate_size: Channels of the feed-forward layers.
        num_heads: Attention heads.
        patch_size: Pixels per side of a patch.
        layer_norm_eps: Epsilon of the norms.
    """

    # The inputs of the patch embedding are no multiple of 8 at patches of 14 pixels (588), so they stay whole.
    sharding_rules: ClassVar[Rules] = (
        (r"patch_embed\.kernel", P(None, "fsdp")),
        (r"patch_embed\.bias", P(None)),
        (r"position_embedding", P(None, "fsdp")),
    )

    hidden_size: PositiveInt = 1024
    intermediate_size: PositiveInt = 4096
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 16
    image_size: PositiveInt = 384
    patch_size: PositiveInt = 16
    layer_norm_eps: PositiveFloat = 1e-6

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            self.hidden_size % self.num_heads == 0,
            f"SiglipConfig.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )

    @property
    def grid(self) -> int:
        """See `EncoderConfig.grid`. A remainder of pixels is dropped at the right and bottom (so400m/14-384: 27)."""
        return self.image_size // self.patch_size

    def flops_per_tile(self, layers: int) -> float:
        """See `EncoderConfig.flops_per_tile`."""
        patches, width = self.grid**2, self.hidden_size
        embed = 2 * patches * width * 3 * self.patch_size**2
        return embed + layers * block_flops(self, patches)

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> Siglip:
        """See `EncoderConfig.build`."""
        return Siglip(
            self,
            stride=spec.stride,
            bounds=bounds,
            attention_backend=spec.attention,
            dtype=spec.dtype,
            pixel_scale=spec.pixel_scale,
            pixel_shift=spec.pixel_shift,
            rngs=rngs,
        )


class Siglip(nnx.Module):
    """The vision tower without its pooling head; `EncoderModule` documents its methods."""

    def __init__(
        self,
        config: SiglipConfig,
        *,
        stride: int,
        bounds: tuple[int, ...],
        attention_backend: str = "auto",
        dtype: DTypeLike,
        pixel_scale: tuple[float, float, float] = SIGLIP_SCALE,
        pixel_shift: tuple[float, float, float] = SIGLIP_SHIFT,
        rngs: nnx.Rngs,
    ) -> None:
        """Initialises the tower.

        Args:
            config: Its sizes.
            stride: Patches per side of a window.
            bounds: Stage k holds the layers bounds[k] .. bounds[k + 1] - 1; every level that is read must be a bound.
            attention_backend: Backend of `vr_jax.kernels.attention`.
            dtype: Type of the activations.
            pixel_scale: What the value 0..255 of a pixel is multiplied by, for red, green and blue.
            pixel_shift: What is then subtracted.
            rngs: Random state of the initial values.
        """
        width = config.hidden_size
        self.patch_embed = linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(normal(width**-0.5)(rngs.params(), (config.grid**2, width)))
        self.stages = nnx.List(
            [
                stack_layers(
                    lambda r: Block(config, activation="gelu_tanh", backend=attention_backend, dtype=dtype, rngs=r),
                    stop - start,
                    rngs,
                )
                for start, stop in itertools.pairwise(bounds)
            ]
        )
        self.post_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.config, self.stride, self.bounds, self.dtype = config, stride, bounds, dtype
        self.pixel_scale, self.pixel_shift = pixel_scale, pixel_shift

    def __call__(
        self, pixels: UInt8[Array, "*B H W 3"], levels: tuple[int, ...], places: TilePlaces | None = None
    ) -> tuple[Float[Array, "*B cells patches D"], ...]:
        """See `EncoderModule.__call__`. No level is normalised by the tower's last LayerNorm.

        Layers beyond the deepest level do not run.

        Raises:
            ValueError: A level is no bound of a stage.
        """
        del places  # Every tile is a full square.
        missing = [level for level in levels if level not in self.bounds]
        if missing:
            raise ValueError(f"SigLIP hidden states {missing} are not stage bounds {self.bounds}")
        scale, shift = (jnp.asarray(rgb, jnp.float32) for rgb in (self.pixel_scale, self.pixel_shift))
        x = pixels.astype(jnp.float32) * scale - shift
        x = patchify(x.astype(self.dtype), self.config.patch_size, self.stride)
        *batch, cells, patches, _ = x.shape
        order = raster_order(self.config.grid, self.stride)
        position = self.position_embedding[...][order].astype(self.dtype)
        x = self.patch_embed(x.reshape(-1, cells * patches, x.shape[-1])) + position
        x = constrain(x, "batch", None, None)
        taken = {0: x}
        for stage, stop in zip(self.stages, self.bounds[1:], strict=True):
            if stop > max(levels):
                break
            x, _ = jax.lax.scan(lambda h, block: (block(h), None), x, stage)
            taken[stop] = x
        return tuple(taken[level].reshape(*batch, cells, patches, -1) for level in levels)

    def received_attention(self, hidden: Float[Array, "*B cells patches D"]) -> Float[Array, "*B heads cells patches"]:
        """See `EncoderModule.received_attention`."""
        *batch, cells, patches, width = hidden.shape
        block: Block = jax.tree.map(lambda leaf: leaf[-1], self.stages[-1])
        received = block.attn.received(block.norm1(hidden.reshape(-1, cells * patches, width)))
        return received.reshape(*batch, -1, cells, patches)
