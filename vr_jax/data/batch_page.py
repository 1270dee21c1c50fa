"""The page of the first batch of a run: every sample as the model reads it, beside what the run was started with."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from vr_jax.data.token_pieces import Piece, pieces_of
from vr_jax.data.types import HostBatch
from vr_jax.model.batch import NO_CELL
from vr_jax.pages import page_environment

ROWS, TILES = 16, 12  # rows that are shown, and tiles of a sample
SIDE = 192  # pixels of the longer side of a shown tile


@dataclass(frozen=True)
class BatchSample:
    """One sample of a batch.

    Attributes:
        id: The name of the sample.
        row: The row of the batch that holds it, from 0.
        segment: Its number in the row, from 1.
        tokens: Its token ids.
        loss_mask: True where the token is a target of the loss.
        text_token_mask: True where the text-guided token may pool the token.
        vision_cell: The cells of its vision tokens.
        tiles: The pixels of its tiles.
    """

    id: str
    row: int
    segment: int
    tokens: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    text_token_mask: Bool[np.ndarray, " n"]
    vision_cell: Int[np.ndarray, " n"]
    tiles: UInt8[np.ndarray, "t H W 3"]

    @property
    def size(self) -> str:
        """Its numbers of tokens, targets and tiles in words."""
        vision = int((self.vision_cell != NO_CELL).sum())
        return (
            f"tokens: {len(self.tokens)}, of which vision: {vision}, targets: {self.loss_mask.sum()}, for the "
            f"text-guided token: {self.text_token_mask.sum()}; tiles: {len(self.tiles)}"
        )


def samples_of(batch: HostBatch, rows: int = ROWS) -> list[list[BatchSample]]:
    """Divides the first rows of a batch into their samples.

    Args:
        batch: The rows of one process.
        rows: The number of rows.
    """
    arrays, found = batch.batch, []
    for row, ids in enumerate(batch.record_ids[:rows]):
        samples = []
        for segment, name in enumerate(ids, start=1):
            mine = np.flatnonzero(np.asarray(arrays.segment_ids[row]) == segment)
            tiles = np.flatnonzero(np.asarray(arrays.tile_segment[row]) == segment)
            fields = {
                field: np.asarray(getattr(arrays, field)[row])[mine]
                for field in ("tokens", "loss_mask", "text_token_mask", "vision_cell")
            }
            pixels = np.asarray(arrays.tile_pixels[row])[tiles]
            samples.append(BatchSample(id=name, row=row, segment=segment, tiles=pixels, **fields))
        found.append(samples)
    return found


def tile_png(tile: UInt8[np.ndarray, "H W 3"], side: int = SIDE) -> bytes:
    """Returns a tile as a PNG file whose longer side has at most so many pixels."""
    image = Image.fromarray(tile)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class _Shown:
    """A sample of the page."""

    sample: BatchSample
    tiles: list[str]
    left: int
    pieces: list[Piece]


@dataclass(frozen=True)
class _Row:
    """A row of the page."""

    number: int
    used: int
    tokens: int
    samples: list[_Shown]


def batch_page(batch: HostBatch, tokenizer: Any, *, step: int, facts: Mapping[str, str]) -> str:
    """Returns the page of a batch as HTML.

    Args:
        batch: The rows of one process.
        tokenizer: A Hugging Face tokenizer, which decodes the tokens.
        step: The number of the update that reads the batch.
        facts: Texts about the run by their titles, which the page shows folded.
    """
    rows = []
    for number, samples in enumerate(samples_of(batch)):
        used = int((np.asarray(batch.batch.segment_ids[number]) > 0).sum())
        shown = [
            _Shown(
                one,
                [_address(tile) for tile in one.tiles[:TILES]],
                max(0, len(one.tiles) - TILES),
                pieces_of(one, tokenizer),
            )
            for one in samples
        ]
        rows.append(_Row(number, used, batch.batch.tokens.shape[1], shown))
    values = {"step": step, "rows": rows, "all_rows": len(batch.record_ids), "facts": facts}
    return page_environment("vr_jax.data").get_template("first_batch.html").render(values)


def batch_images(batch: HostBatch, rows: int = 4, tiles: int = 4) -> list[tuple[bytes, str]]:
    """Returns the first tiles of the samples in the first rows of a batch as PNG files with captions.

    Args:
        batch: The rows of one process.
        rows: The number of rows.
        tiles: The number of tiles of a sample.
    """
    return [
        (tile_png(tile), f"{sample.id}, tile {number}")
        for samples in samples_of(batch, rows)
        for sample in samples
        for number, tile in enumerate(sample.tiles[:tiles], start=1)
    ]


def _address(tile: UInt8[np.ndarray, "H W 3"]) -> str:
    return f"data:image/png;base64,{base64.b64encode(tile_png(tile)).decode()}"
