"""Assembly of examples into one `HostBatch` of static shape, as `vr_jax.model.batch` defines it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from vr_jax.data.types import Example, HostBatch, Skip
from vr_jax.model.batch import NO_CELL, OPTIONAL_FIELDS, SOURCES, Batch, BatchShape


def collate(
    rows: Sequence[Sequence[Example]],
    shape: BatchShape,
    pad_side: Literal["right", "left"] = "right",
    *,
    skipped: Sequence[Skip] = (),
    optional: Collection[str] = (),
) -> HostBatch:
    """Puts the examples of each row one behind another. Padding tokens are 0, and rows that are not given are empty.

    Args:
        rows: The examples of each row, at most `shape.rows` rows.
        shape: The sizes of the batch.
        pad_side: The side of a row's padding. "left" aligns prompts at the right, as generation needs it.
        skipped: The unusable samples that the batch reports.
        optional: Names of the optional fields of `Batch` that the batch has, whether the examples have them or not:
            those that the model needs (`VlmConfig.batch_fields`), and `SOURCES` for several sources. An example with
            weighted cells adds those fields.

    Raises:
        ValueError: There are more rows, tokens or tiles than `shape` has, or tiles of another size.
    """
    if pad_side not in ("right", "left"):
        raise ValueError(f"pad_side = {pad_side!r}: expected 'right' or 'left'")
    if len(rows) > shape.rows:
        raise ValueError(f"{len(rows)} rows were given for a batch of {shape.rows} rows")
    size = (shape.rows, shape.tokens)
    arrays: dict[str, np.ndarray] = {
        "tokens": np.zeros(size, np.int32),
        "positions": np.zeros(size, np.int32),
        "segment_ids": np.zeros(size, np.int32),
        "loss_mask": np.zeros(size, bool),
        "text_token_mask": np.zeros(size, bool),
        "vision_cell": np.full(size, NO_CELL, np.int32),
        "tile_pixels": np.zeros((shape.rows, shape.tiles, shape.tile_size, shape.tile_size, 3), np.uint8),
        "tile_segment": np.zeros((shape.rows, shape.tiles), np.int32),
        "tile_image": np.zeros((shape.rows, shape.tiles), np.int32),
    }
    weighted = any(example.vision_cells is not None for row in rows for example in row)
    for name in {*optional, *(("vision_cells", "vision_weights") if weighted else ())}:
        axis, inner, dtype = OPTIONAL_FIELDS[name]
        arrays[name] = np.zeros((shape.rows, getattr(shape, axis), *inner), dtype)
    for index, row in enumerate(rows):
        _check_row(index, row, shape)
        used = sum(len(example.tokens) for example in row)
        begin, tile, images = (shape.tokens - used if pad_side == "left" else 0), 0, 0
        for segment, example in enumerate(row, start=1):
            _put(arrays, example, segment, index, begin, tile, images)
            begin += len(example.tokens)
            tile += len(example.tile_pixels)
            images += int(example.tile_image.max(initial=0))
    ids = tuple(tuple(example.id for example in row) for row in rows)
    return HostBatch(
        batch=Batch(**arrays),  # type: ignore[arg-type]  # The arrays are numpy until they are put on devices.
        record_ids=ids + ((),) * (shape.rows - len(rows)),
        skipped=tuple(skipped),
    )


def _check_row(index: int, row: Sequence[Example], shape: BatchShape) -> None:
    """Checks that the examples of a row fit into it."""
    tokens = sum(len(example.tokens) for example in row)
    tiles = sum(len(example.tile_pixels) for example in row)
    if tokens > shape.tokens or tiles > shape.tiles:
        names = ", ".join(example.id for example in row)
        raise ValueError(
            f"row {index} ({names}) has {tokens} tokens and {tiles} tiles, but a row of the batch has room for "
            f"{shape.tokens} and {shape.tiles}"
        )
    for example in row:
        side = example.tile_pixels.shape[1]
        if side != shape.tile_size:
            raise ValueError(
                f"sample {example.id} has tiles of {side} pixels, but those of the batch have {shape.tile_size}"
            )


def _put(
    arrays: dict[str, np.ndarray], example: Example, segment: int, row: int, begin: int, tile: int, images: int
) -> None:
    """Writes one example into its row, behind `begin` tokens, `tile` tiles and `images` images."""
    at = (row, slice(begin, begin + len(example.tokens)))
    for name in ("tokens", "loss_mask", "text_token_mask"):
        arrays[name][at] = getattr(example, name)
    positions = example.positions
    arrays["positions"][at] = np.arange(len(example.tokens)) if positions is None else positions[:, 0]
    if "grid_positions" in arrays:
        arrays["grid_positions"][at] = arrays["positions"][at][:, None] if positions is None else positions[:, 1:]
    arrays["segment_ids"][at] = segment
    if SOURCES in arrays:
        arrays[SOURCES][at] = example.source
    vision = example.vision_cell >= 0
    base = tile * example.cells_per_tile
    arrays["vision_cell"][at] = np.where(vision, example.vision_cell + base, example.vision_cell)
    if example.vision_cells is not None:
        arrays["vision_cells"][at] = np.where(vision[:, None], example.vision_cells + base, 0)
        arrays["vision_weights"][at] = example.vision_weights
    elif "vision_cells" in arrays:
        arrays["vision_cells"][at] = np.where(vision, example.vision_cell + base, 0)[:, None]
        arrays["vision_weights"][at] = vision[:, None] * np.asarray([1, 0, 0, 0], np.float32)
    at = (row, slice(tile, tile + len(example.tile_pixels)))
    arrays["tile_pixels"][at] = example.tile_pixels
    arrays["tile_segment"][at] = segment
    arrays["tile_image"][at] = example.tile_image + images
    for name in ("tile_extent", "tile_origin"):
        if name in arrays:
            arrays[name][at] = getattr(example, name)
