"""`clip`: CLIP's vision tower, which gives hidden states of the patches at chosen depths in window-major order.

A class token runs through the layers beside the patches and is not returned.

Source: transformers `models/clip/modeling_clip.py`; LLaVA `llava/model/multimodal_encoder/clip_encoder.py`;
docs/design/methods.md#vision-tower.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

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
from vr_jax.model.spec import ModelSpec
from vr_jax.model.vit import Block, block_flops
from vr_jax.model.windows import patchify, raster_order
from vr_jax.sharding import Rules, constrain


@dataclass(frozen=True, kw_only=True)
class ClipConfig(EncoderConfig, name="clip"):
    """CLIP's vision tower; the defaults are those of `openai/clip-vit-large-patch14-336`.

    Attributes:
        intermediate_size: Channels of the feed-forward layers.
        num_heads: Attention heads.
        patch_size: Pixels per side of a patch.
        activation: The activation of the feed-forward layers: OpenAI's "quick_gelu", or the exact "gelu" of others.
        layer_norm_eps: Epsilon of the norms.
    """

    # The inputs of the patch embedding are no multiple of 8 at patches of 14 pixels (588), so they stay whole.
    sharding_rules: ClassVar[Rules] = (
        (r"patch_embed\.kernel", P(None, "fsdp")),
        (r"class_embedding", P(None)),
        (r"position_embedding", P(None, "fsdp")),
    )
    # VisPruner ranks the patches of a CLIP by the class token's attention, whose states are not returned.
    gives_attention: ClassVar[bool] = False

    hidden_size: PositiveInt = 1024
    intermediate_size: PositiveInt = 4096
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 16
    image_size: PositiveInt = 336
    patch_size: PositiveInt = 14
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            self.hidden_size % self.num_heads == 0,
            f"ClipConfig.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )

    @property
    def grid(self) -> int:
        """See `EncoderConfig.grid`. A remainder of pixels is dropped at the right and bottom."""
        return self.image_size // self.patch_size

    def flops_per_tile(self, layers: int) -> float:
        """See `EncoderConfig.flops_per_tile`. The class token runs through the layers."""
        embed = 2 * self.grid**2 * self.hidden_size * 3 * self.patch_size**2
        return embed + layers * block_flops(self, self.grid**2 + 1)

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> Clip:
        """See `EncoderConfig.build`."""
        return Clip(
            self,
            stride=spec.stride,
            bounds=bounds,
            attention_backend=spec.attention,
            dtype=spec.dtype,
            pixel_scale=spec.pixel_scale,
            pixel_shift=spec.pixel_shift,
            rngs=rngs,
        )


class Clip(nnx.Module):
    """The vision tower without its projection; `EncoderModule` documents its methods."""

    def __init__(
        self,
        config: ClipConfig,
        *,
        stride: int,
        bounds: tuple[int, ...],
        attention_backend: str = "auto",
        dtype: DTypeLike,
        pixel_scale: tuple[float, float, float],
        pixel_shift: tuple[float, float, float],
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
        width, init = config.hidden_size, normal(config.hidden_size**-0.5)
        self.patch_embed = linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs, use_bias=False)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        # The first row is that of the class token.
        self.position_embedding = nnx.Param(init(rngs.params(), (config.grid**2 + 1, width)))
        self.pre_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.stages = nnx.List(
            [
                stack_layers(
                    lambda r: Block(
                        config, activation=config.activation, backend=attention_backend, dtype=dtype, rngs=r
                    ),
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
        """See `EncoderModule.__call__`. Level 0 is what the first layer reads, which CLIP normalises.

        No level is normalised by the tower's last LayerNorm. Layers beyond the deepest level do not run.

        Raises:
            ValueError: A level is no bound of a stage.
        """
        del places  # every tile is a full square
        missing = [level for level in levels if level not in self.bounds]
        if missing:
            raise ValueError(f"CLIP hidden states {missing} are not stage bounds {self.bounds}")
        scale, shift = (jnp.asarray(rgb, jnp.float32) for rgb in (self.pixel_scale, self.pixel_shift))
        x = pixels.astype(jnp.float32) * scale - shift
        x = patchify(x.astype(self.dtype), self.config.patch_size, self.stride)
        *batch, cells, patches, _ = x.shape
        position = self.position_embedding[...].astype(self.dtype)
        order = raster_order(self.config.grid, self.stride)
        x = self.patch_embed(x.reshape(-1, cells * patches, x.shape[-1])) + position[1:][order]
        first = self.class_embedding[...].astype(self.dtype) + position[0]
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        x = constrain(self.pre_norm(x), "batch", None, None)
        taken = {0: x}
        for stage, stop in zip(self.stages, self.bounds[1:], strict=True):
            if stop > max(levels):
                break
            x, _ = jax.lax.scan(lambda h, block: (block(h), None), x, stage)
            taken[stop] = x
        return tuple(taken[level][:, 1:].reshape(*batch, cells, patches, -1) for level in levels)

    def received_attention(self, hidden: Float[Array, "*B cells patches D"]) -> Float[Array, "*B heads cells patches"]:
        """Refuses: the attention of a CLIP's patches needs its class token (`EncoderConfig.gives_attention`).

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("CLIP ranks patches by its class token, whose hidden states are not returned")
