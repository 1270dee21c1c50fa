"""`siglip_slices`: MiniCPM-V 2.0's SigLIP, which reads slices of any grid of patches in raster order.

It differs from `siglip` in four ways: the GELU is exact, the last block of the published tower is dropped, a level
beyond the last block is normalised by the tower's last LayerNorm, and the positions are resized to each slice's grid.

Source: HwwwwwwwH/MiniCPM-V-2 `modeling_minicpmv.py` (`init_vision_module`, `get_vision_embedding`) with timm 0.9.10
`vit_so400m_patch14_siglip_384`; docs/design/methods.md#minicpm-v.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from vr_jax.fields import PositiveFloat, PositiveInt, check
from vr_jax.model.batch import TilePlaces
from vr_jax.model.layers import LayerNorm, linear, normal, stack_layers
from vr_jax.model.registry import EncoderConfig, Layout
from vr_jax.model.spec import ModelSpec
from vr_jax.model.vit import Block, block_flops
from vr_jax.model.windows import patchify, slot_patches
from vr_jax.sharding import Rules, constrain

# Shape of the bicubic kernel where there is antialiasing; torch's plain bicubic has -0.75.
_CUBIC = -0.5


@dataclass(frozen=True, kw_only=True)
class SiglipSlicesConfig(EncoderConfig, name="siglip_slices"):
    """MiniCPM-V 2.0's vision tower; the defaults are those of `openbmb/MiniCPM-V-2`.

    The hidden states 0..num_layers are raw. The state num_layers + 1 is the last one after the tower's last LayerNorm.

    Attributes:
        intermediate_size: Channels of the feed-forward layers.
        num_layers: Number of layers that are kept.
        num_heads: Attention heads.
        image_size: Side of a tile slot, which holds the patches of one slice. A slice of about 448 x 448 pixels has up
            to 33 x 33 patches after its sides are rounded to patches; 34 x 34 leave room for slices of all shapes up to
            24 times as long as wide.
        patch_size: Pixels per side of a patch.
        position_grid: Positions per side of the learned position embedding.
        layer_norm_eps: Epsilon of the norms.
    """

    layout: ClassVar[Layout] = "raster"
    gives_attention: ClassVar[bool] = False
    # The inputs of the patch embedding are no multiple of 8 at patches of 14 pixels (588), so they stay whole.
    sharding_rules: ClassVar[Rules] = (
        (r"patch_embed\.kernel", P(None, "fsdp")),
        (r"patch_embed\.bias", P(None)),
        (r"position_embedding", P(None, "fsdp")),
    )

    hidden_size: PositiveInt = 1152
    intermediate_size: PositiveInt = 4304
    num_layers: PositiveInt = 26
    num_heads: PositiveInt = 16
    image_size: PositiveInt = 476
    patch_size: PositiveInt = 14
    position_grid: PositiveInt = 27
    layer_norm_eps: PositiveFloat = 1e-6

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            self.hidden_size % self.num_heads == 0,
            f"SiglipSlicesConfig.hidden_size = {self.hidden_size} is not divisible by num_heads = {self.num_heads}",
        )
        check(
            self.image_size % self.patch_size == 0,
            f"SiglipSlicesConfig.image_size = {self.image_size} is not divisible by patch_size = {self.patch_size}",
        )

    @property
    def grid(self) -> int:
        """See `EncoderConfig.grid`; a slot holds grid * grid patches."""
        return self.image_size // self.patch_size

    @property
    def last_level(self) -> int:
        """See `EncoderConfig.last_level`; the state that the last LayerNorm normalises."""
        return self.num_layers + 1

    def flops_per_tile(self, layers: int) -> float:
        """See `EncoderConfig.flops_per_tile`; of a full slot, because every slot is computed as a whole."""
        patches = self.grid**2
        embed = 2 * patches * self.hidden_size * 3 * self.patch_size**2
        return embed + min(layers, self.num_layers) * block_flops(self, patches)

    def build(self, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> SiglipSlices:
        """See `EncoderConfig.build`."""
        return SiglipSlices(self, spec, bounds=bounds, rngs=rngs)


class SiglipSlices(nnx.Module):
    """The vision tower; `EncoderModule` documents its methods."""

    def __init__(self, config: SiglipSlicesConfig, spec: ModelSpec, *, bounds: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Initialises the tower.

        Args:
            config: Its sizes.
            spec: The model that it belongs to.
            bounds: Stage k holds the layers bounds[k] .. bounds[k + 1] - 1; every raw level that is read is a bound.
            rngs: Random state of the initial values.
        """
        width, dtype = config.hidden_size, spec.dtype
        self.patch_embed = linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs)
        positions = (config.position_grid**2, width)
        self.position_embedding = nnx.Param(normal(width**-0.5)(rngs.params(), positions))
        self.stages = nnx.List(
            [
                stack_layers(
                    lambda r: Block(config, activation="gelu", backend=spec.attention, dtype=dtype, rngs=r),
                    stop - start,
                    rngs,
                )
                for start, stop in itertools.pairwise(bounds)
            ]
        )
        self.post_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.config, self.bounds, self.dtype = config, bounds, dtype
        self.pixel_scale, self.pixel_shift = spec.pixel_scale, spec.pixel_shift

    def __call__(
        self, pixels: UInt8[Array, "*B H W 3"], levels: tuple[int, ...], places: TilePlaces | None = None
    ) -> tuple[Float[Array, "*B 1 P D"], ...]:
        """See `EncoderModule.__call__`.

        Patches beyond a slice's own hold finite numbers, which no other patch reads. Layers beyond the deepest level do
        not run.

        Raises:
            ValueError: A level is no bound of a stage, or the places are absent.
        """
        depth = self.config.num_layers
        missing = [level for level in levels if level not in (*self.bounds, depth + 1)]
        if missing:
            raise ValueError(f"SigLIP hidden states {missing} are not stage bounds {self.bounds}")
        if places is None:
            raise ValueError(
                "the encoder 'siglip_slices' needs the places of the tiles, which say how slices lie in them"
            )
        scale, shift = (jnp.asarray(rgb, jnp.float32) for rgb in (self.pixel_scale, self.pixel_shift))
        x = pixels.astype(jnp.float32) * scale - shift
        x = patchify(x.astype(self.dtype), self.config.patch_size, 1)
        *batch, patches, _, inputs = x.shape
        extent = places.extent.reshape(-1, 2)
        x = self.patch_embed(x.reshape(-1, patches, inputs)) + self.positions(extent).astype(self.dtype)
        x = constrain(x, "batch", None, None)
        segments = slot_patches(extent, patches).valid.astype(jnp.int32)
        taken = {0: x}
        for stage, stop in zip(self.stages, self.bounds[1:], strict=True):
            if stop > max(levels):
                break
            x, _ = jax.lax.scan(lambda h, block: (block(h, segments), None), x, stage)
            taken[stop] = x
        if depth + 1 in levels:
            taken[depth + 1] = self.post_norm(x)
        return tuple(taken[level].reshape(*batch, 1, patches, -1) for level in levels)

    def positions(self, extent: Int[Array, "M 2"]) -> Float[Array, "M P D"]:
        """The position embedding of each slice's patches: the learned grid, resized to the slice's grid.

        Args:
            extent: Rows and columns of the slices.

        Returns:
            The embeddings in the order of the slots, float32; zeros beyond a slice's patches.
        """
        side = self.config.position_grid
        places = slot_patches(extent, self.config.grid**2)
        rows, columns = (
            resize_weights(place, size[:, None], side)
            for place, size in zip((places.row, places.column), (extent[:, 0], extent[:, 1]), strict=True)
        )
        learned = self.position_embedding[...].astype(jnp.float32).reshape(side, side, -1)
        weights = jnp.einsum("mpi,mpj->mpij", rows, columns)
        found = jnp.einsum("mpij,ijd->mpd", weights, learned, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(places.valid[..., None], found, 0)

    def received_attention(self, hidden: Float[Array, "*B 1 P D"]) -> Float[Array, "*B heads 1 P"]:
        """Refuses: the pruner that asks for it is defined for square tiles (`EncoderConfig.gives_attention`).

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("siglip_slices: no pruner reads tiles of the layout 'raster'")


def resize_weights(place: Int[Array, "M P"], size: Int[Array, "M 1"], inputs: int) -> Float[Array, "M P I"]:
    """The weights with which an antialiased bicubic resize of one axis reads its inputs.

    They are those of `jax.image.resize(..., "cubic", antialias=True)` and of torch's `interpolate(mode="bicubic",
    antialias=True)`, for outputs of any size that is known on the device only.

    Args:
        place: The output that each row of weights is for, 0 .. size - 1.
        size: Number of outputs.
        inputs: Number of inputs.
    """
    step = inputs / jnp.maximum(size, 1).astype(jnp.float32)
    centre = (place + 0.5) * step - 0.5
    # Shrinking stretches the kernel over `step` inputs.
    distance = jnp.abs(centre[..., None] - jnp.arange(inputs)) / jnp.maximum(step, 1.0)[..., None]
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)
