"""Records on their way from files to batches: conversation -> example -> host batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vr_jax.model.batch import Batch

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "user", "assistant"]
    text: str  # may hold IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class Conversation:
    """One sample, whatever file it came from. `images` match the placeholders of `turns` in order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...] = ()  # encoded files (PNG, JPEG, ...)


@dataclass(frozen=True)
class Example:
    """One tokenised sample, unpadded: n tokens (vision tokens included) and t tiles. Cells and images count
    from its own first tile (tile * u*u + cell) and image (1..). Field meanings are those of `Batch`."""

    id: str
    tokens: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    text_token_mask: Bool[np.ndarray, " n"]
    vision_cell: Int[np.ndarray, " n"]
    tile_pixels: UInt8[np.ndarray, "t H W 3"]
    tile_image: Int[np.ndarray, " t"]
    cells_per_tile: int  # u*u: how far one tile moves `vision_cell`
    vision_cells: Int[np.ndarray, "n 4"] | None = None
    vision_weights: Float[np.ndarray, "n 4"] | None = None


@dataclass(frozen=True)
class Skip:
    """A sample that could not be used. `reason` is a word of `skips.SkipReason`, `detail` one line for the log."""

    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class HostBatch:
    """A batch of numpy arrays with what only the host needs to know."""

    batch: Batch
    record_ids: tuple[tuple[str, ...], ...]  # the samples of each row
    skipped: tuple[Skip, ...] = field(default=())  # met since the batch before
