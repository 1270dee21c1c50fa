"""`deepstack`: features of one encoder level each are merged to the decoder's width and added to the vision tokens.

Source: Qwen3-VL in transformers 5.23, `models/qwen3_vl/modeling_qwen3_vl.py` (`Qwen3VLVisionPatchMerger`,
`Qwen3VLTextModel._deepstack_process`). The levels, layers and the pooled merger are ours:
docs/design/methods.md#deepstack. There is no gate and no zero initialisation, as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vr_jax.fields import NonNegativeInt, PositiveInt, check
from vr_jax.model.decoders.stages import DecoderInputs
from vr_jax.model.layers import LayerNorm, linear
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.registry import Layout, RefusionConfig
from vr_jax.model.spec import ModelSpec
from vr_jax.sharding import constrain

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class DeepStackConfig(RefusionConfig, name="deepstack"):
    """DeepStack: the k-th level is added after the k-th of the layers `insert_after`.

    Attributes:
        merger: "pool_mlp" is a window mean, LayerNorm and the layers of the main projector. "qwen3_vl" is the published
            patch merger, whose hidden layer is as wide as a whole window: three times 93 M parameters at windows of
            3 x 3 patches of 1024 channels.
    """

    # Each cell is merged by itself, so a cell that a partial window lacks matters to nothing.
    layouts: ClassVar[tuple[Layout, ...]] = ("square", "windows", "raster")

    insert_after: tuple[PositiveInt, ...] = (1, 2, 3)
    levels: tuple[NonNegativeInt, ...] = (7, 15, 23)
    merger: Literal["pool_mlp", "qwen3_vl"] = "pool_mlp"

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            len(self.levels) == len(self.insert_after),
            f"DeepStackConfig: {len(self.levels)} levels {self.levels} for {len(self.insert_after)} insertions "
            f"insert_after = {self.insert_after}: expected one level for each insertion",
        )

    def check_model(self, spec: ModelSpec) -> None:
        """See `RefusionConfig.check_model`."""
        check(
            spec.layout != "raster" or self.merger == "pool_mlp",
            f"refusion.merger = {self.merger!r} with an encoder of the layout 'raster': it joins the patches of a "
            "window, and the windows of slices have no common size; set it to 'pool_mlp'",
        )

    def flops_per_tile(self, spec: ModelSpec) -> float:
        """See `RefusionConfig.flops_per_tile`."""
        if self.merger == "pool_mlp":
            width, inner = spec.encoder_width, spec.decoder_width
        else:
            width = inner = spec.encoder_width * spec.patches_per_cell
        return len(self.insert_after) * 2 * spec.cells_per_tile * (width * inner + inner * spec.decoder_width)

    def build(self, spec: ModelSpec, index: int, *, rngs: nnx.Rngs) -> Block:
        """See `RefusionConfig.build`."""
        return Block(self, spec, index, rngs=rngs)


class PatchMerger(nnx.Module):
    """Qwen3-VL's merger: the patches of a window side by side, LayerNorm, Linear, exact GELU, Linear."""

    def __init__(
        self, width: int, patches: int, out: int, *, norm_per_patch: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Initialises the layers.

        Args:
            width: Channels of a patch.
            patches: Patches of a window.
            out: Channels of the result.
            norm_per_patch: Whether each patch is normalised before they are joined, as in Qwen3-VL's main merger.
                Otherwise the joined window is (`use_postshuffle_norm`, its DeepStack mergers).
            dtype: Type of the computation.
            rngs: Random state of the initial values.
        """
        hidden = width * patches
        self.norm = LayerNorm(width if norm_per_patch else hidden, eps=EPS)
        self.fc1 = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, out, dtype=dtype, rngs=rngs)
        self.norm_per_patch = norm_per_patch

    def __call__(self, windows: Float[Array, "*B S Dv"]) -> Float[Array, "*B Dt"]:
        """Maps windows of S patches to one vector each."""
        x = self.norm(windows) if self.norm_per_patch else windows
        x = x.reshape(*x.shape[:-2], -1)
        if not self.norm_per_patch:
            x = self.norm(x)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class PoolMerger(nnx.Module):
    """Mean over the valid patches of a window, LayerNorm, Linear, exact GELU, Linear."""

    def __init__(self, width: int, out: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Initialises the layers from `width` to `out` channels."""
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = linear(width, out, dtype=dtype, rngs=rngs)
        self.fc2 = linear(out, out, dtype=dtype, rngs=rngs)

    def __call__(
        self, windows: Float[Array, "*B S Dv"], valid: Bool[Array, "*B S"] | None = None
    ) -> Float[Array, "*B Dt"]:
        """Maps windows of S patches to one vector each; `valid` are the patches that take part, or None if all do."""
        if valid is None:
            mean = jnp.mean(windows, axis=-2)
        else:
            # In float32, because a window may have dozens of patches.
            total = jnp.sum(jnp.where(valid[..., None], windows, 0), axis=-2, dtype=jnp.float32)
            mean = (total / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)).astype(windows.dtype)
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(mean)), approximate=False))


class Block(nnx.Module):
    """One insertion, which merges one level and adds it to the vision tokens."""

    def __init__(self, config: DeepStackConfig, spec: ModelSpec, index: int, *, rngs: nnx.Rngs) -> None:
        """Initialises the merger of insertion `index`, which reads the level `index`."""
        width, out, dtype = spec.encoder_width, spec.decoder_width, spec.dtype
        self.merger: PoolMerger | PatchMerger
        if config.merger == "pool_mlp":
            self.merger = PoolMerger(width, out, dtype=dtype, rngs=rngs)
        else:
            self.merger = PatchMerger(width, spec.patches_per_cell, out, dtype=dtype, rngs=rngs)
        self.index = index

    def __call__(self, inputs: DecoderInputs, vision: VisionContext) -> DecoderInputs:
        """Adds to the hidden states of vision tokens and leaves all others as they are."""
        windows = vision.features[self.index]
        cells = self.merger(windows, vision.valid) if isinstance(self.merger, PoolMerger) else self.merger(windows)
        cells = constrain(cells.reshape(cells.shape[0], -1, cells.shape[-1]), "batch", "cells", "embed")
        return inputs.replace(hidden=inputs.hidden + vision.scatter_cells(cells))
