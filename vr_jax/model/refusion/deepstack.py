"""DeepStack: features of one encoder level each are merged to the decoder's width and added to the vision tokens.

Source: Qwen3-VL in transformers 5.23, `models/qwen3_vl/modeling_qwen3_vl.py` (`Qwen3VLVisionPatchMerger`,
`Qwen3VLTextModel._deepstack_process`); levels, layers and the pooled merger: methods.md 3.2. No gate, no zero init."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.qwen2 import DecoderInputs
from vr_jax.model.layers import LayerNorm, linear
from vr_jax.model.refusion.context import VisionContext
from vr_jax.model.registry import RefusionConfig, check, check_choice
from vr_jax.sharding import constrain

EPS = 1e-6
MERGERS = ("pool_mlp", "qwen3_vl")


@dataclass(frozen=True, kw_only=True)
class DeepStackConfig(RefusionConfig):
    """The k-th level is added after the k-th of the layers `insert_after`.

    Raises ConfigError unless there is one level for each insertion."""

    name: str = "deepstack"
    insert_after: tuple[int, ...] = (1, 2, 3)
    levels: tuple[int, ...] = (7, 15, 23)
    # pool_mlp: window mean, LayerNorm, then the form of the main projector; qwen3_vl: the published patch merger,
    # whose hidden layer has the width of a whole window (three times 93M parameters at s = 3 and D_v = 1024).
    merger: Literal["pool_mlp", "qwen3_vl"] = "pool_mlp"

    def __post_init__(self):
        super().__post_init__()
        check_choice("DeepStackConfig", "merger", self.merger, MERGERS)
        check(
            len(self.levels) == len(self.insert_after),
            f"DeepStackConfig: {len(self.levels)} levels {self.levels} for {len(self.insert_after)} insertions "
            f"insert_after = {self.insert_after}: expected one level for each insertion",
        )

    def widths(self, model: VlmConfig) -> tuple[int, int]:
        """Inputs and outputs of a merger's first layer."""
        width = model.encoder.hidden_size
        if self.merger == "pool_mlp":
            return width, model.decoder.hidden_size
        return (width * model.projector.stride**2,) * 2

    def flops_per_tile(self, model: VlmConfig) -> float:
        width, hidden = self.widths(model)
        return len(self.insert_after) * 2 * model.cells_per_tile * (width * hidden + hidden * model.decoder.hidden_size)


class Features(nnx.Module):
    """The levels as they are; nothing is learned. No gradient: the encoder is frozen."""

    def __init__(self, config: DeepStackConfig, model: VlmConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        del config, model, dtype, rngs

    def __call__(self, levels: tuple[Float[Array, "B T C S Dv"], ...]) -> tuple[Float[Array, "B T C S Dv"], ...]:
        return jax.lax.stop_gradient(levels)


class PatchMerger(nnx.Module):
    """Qwen3-VL's: the patches of a window side by side, LayerNorm, Linear, exact GELU, Linear.

    norm_per_patch: normalise each patch before they are joined (Qwen3-VL's main merger) instead of the window
    (`use_postshuffle_norm`, its DeepStack mergers)."""

    def __init__(
        self, width: int, patches: int, out: int, *, norm_per_patch: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        hidden = width * patches
        self.norm = LayerNorm(width if norm_per_patch else hidden, eps=EPS)
        self.fc1 = linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, out, dtype=dtype, rngs=rngs)
        self.norm_per_patch = norm_per_patch

    def __call__(self, windows: Float[Array, "*B S Dv"]) -> Float[Array, "*B Dt"]:
        x = self.norm(windows) if self.norm_per_patch else windows
        x = x.reshape(*x.shape[:-2], -1)
        if not self.norm_per_patch:
            x = self.norm(x)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class PoolMerger(nnx.Module):
    """Window mean, LayerNorm, Linear, exact GELU, Linear."""

    def __init__(self, width: int, out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = linear(width, out, dtype=dtype, rngs=rngs)
        self.fc2 = linear(out, out, dtype=dtype, rngs=rngs)

    def __call__(self, windows: Float[Array, "*B S Dv"]) -> Float[Array, "*B Dt"]:
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(jnp.mean(windows, axis=-2))), approximate=False))


class Block(nnx.Module):
    """Insertion `index`: merges level `index`."""

    def __init__(self, config: DeepStackConfig, model: VlmConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, out = model.encoder.hidden_size, model.decoder.hidden_size
        self.merger: PoolMerger | PatchMerger
        if config.merger == "pool_mlp":
            self.merger = PoolMerger(width, out, dtype=dtype, rngs=rngs)
        else:
            self.merger = PatchMerger(width, model.projector.stride**2, out, dtype=dtype, rngs=rngs)
        self.index = index

    def __call__(self, inputs: DecoderInputs, vision: VisionContext) -> DecoderInputs:
        """Adds to the states at vision tokens; every other state passes through untouched."""
        cells = self.merger(vision.features[self.index])
        cells = constrain(cells.reshape(cells.shape[0], -1, cells.shape[-1]), "batch", "cells", "embed")
        return inputs.replace(hidden=inputs.hidden + vision.scatter_cells(cells))
