"""The facts about a model and a prompt that a method may read."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from vr_jax.model.windows import average_window

# A mean and a standard deviation of 0.5: pixels lie in -1..1.
SIGLIP_SCALE = (2 / 255, 2 / 255, 2 / 255)
SIGLIP_SHIFT = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The facts about a whole model that its methods may read; `VlmConfig.spec` makes one.

    Attributes:
        grid: Patches per side of a tile.
        encoder_width: Channels of the encoder's hidden states.
        encoder_layers: Number of the encoder's layers.
        decoder_width: Channels of the decoder's hidden states.
        decoder_layers: Number of the decoder's layers.
        decoder_heads: Query heads of a decoder layer.
        rope_theta: Base of the decoder's rotary frequencies.
        projector: Name of the projector.
        stride: Patches per side of a window, which becomes one vision token.
        cells_per_side: Vision tokens per side of a tile.
        feature_level: The encoder's hidden state that feeds the projector; 0 is the patch embeddings.
        attention: Backend of the full attention (`vr_jax.kernels.attention`).
        remat: What the decoder's layers recompute in the backward pass (`layers.maybe_remat`).
        dtype: Type of the activations.
        layout: How the patches of an image lie in tiles (`EncoderConfig.layout`).
        multi_axis: Whether the decoder has rotary positions of several axes (`DecoderConfig.multi_axis`).
        window_slots: Patch slots of a window, where windows differ in size; None where each has stride * stride.
        encoder: Name of the encoder.
        encoder_gives_attention: Whether the encoder's module has `EncoderModule.received_attention`.
        pixel_scale: What the value 0..255 of a pixel is multiplied by, for red, green and blue.
        pixel_shift: What is then subtracted.
    """

    grid: int
    encoder_width: int
    encoder_layers: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    rope_theta: float
    projector: str
    stride: int
    cells_per_side: int
    feature_level: int
    attention: str = "auto"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    layout: str = "square"
    multi_axis: bool = False
    window_slots: int | None = None
    encoder: str = "siglip"
    encoder_gives_attention: bool = True
    pixel_scale: tuple[float, float, float] = SIGLIP_SCALE
    pixel_shift: tuple[float, float, float] = SIGLIP_SHIFT

    @property
    def patches_per_tile(self) -> int:
        """Patches of a tile."""
        return self.grid**2

    @property
    def patches_per_cell(self) -> int:
        """Patch slots of a window."""
        return self.window_slots or self.stride**2

    @property
    def window_size(self) -> float:
        """Patches of a window; where windows differ in size, the mean over those of a full slot."""
        return self.stride**2 if self.window_slots is None else average_window(self.grid, self.cells_per_side)

    @property
    def cells_per_tile(self) -> int:
        """Vision tokens of a tile."""
        return self.cells_per_side**2


@dataclass(frozen=True, kw_only=True)
class PromptSize:
    """The contents of a prompt, as far as a pruner's budget depends on them.

    Attributes:
        text: Text tokens.
        cells: Vision tokens that stand for a cell.
        newlines: Image-newline tokens.
        tiles: Tiles.
    """

    text: int
    cells: int
    newlines: int
    tiles: int

    @property
    def vision(self) -> int:
        """Vision tokens, newlines included."""
        return self.cells + self.newlines
