"""The page of `vr-jax prepare --check`: lengths, skipped records, and the first samples as the model sees them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from vr_jax.data.checking import DataReport
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.data.processor import Processor
from vr_jax.data.skips import REMEDIES, SkipRecord
from vr_jax.data.sources import Source
from vr_jax.data.token_pieces import Piece, pieces_of, shortened
from vr_jax.data.types import Conversation, Skip
from vr_jax.pages import page_environment
from vr_jax.storage import PathLike, write_bytes

SIDE = 256  # pixels of the longer side of a shown image
IMAGES = 4  # images that are shown of a sample
BINS = 30


@dataclass(frozen=True)
class Shown:
    """A sample of the page.

    Attributes:
        id: The name of the sample.
        size: Its numbers of tokens, targets and tiles in words.
        images: Its images as data addresses.
        pieces: Its tokens.
    """

    id: str
    size: str
    images: list[str]
    pieces: list[Piece]


def _thumbnail(image: Any) -> str:
    """Returns an image, small, as a data address; an empty one if it cannot be read any more."""
    try:
        with open_image(image) as opened:
            small = decode_rgb(opened).copy()
    except SkipRecord:
        return ""
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown(record: Conversation, processor: Processor | None) -> Shown:
    images = [_thumbnail(image) for image in record.images[:IMAGES]]
    if processor is None:
        turns = [
            Piece("target" if one.role == "assistant" else "text", f"{one.role}: {one.text}\n") for one in record.turns
        ]
        return Shown(record.id, f"{len(record.images)} images", images, shortened(turns))
    example = processor.example(record)
    size = f"{len(example.tokens)} tokens, {example.loss_mask.sum()} targets, {len(example.tile_pixels)} tiles"
    return Shown(record.id, size, images, pieces_of(example, processor.tokenizer))


def _bars(values: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """Returns a histogram: the bounds, and the height of each bar as a share of the highest."""
    low, high = int(values.min()), int(values.max())
    edges = np.linspace(low, high + 1, min(BINS, high - low + 1) + 1)
    counts, _ = np.histogram(values, edges)
    return {"low": low, "high": high, "heights": (counts / counts.max()).tolist(), "median": int(np.median(values))}


def write_check_page(path: PathLike, report: DataReport, source: Source, processor: Processor | None) -> None:
    """Writes the page of a report. The file appears only when it is complete.

    Args:
        path: The HTML file.
        report: The complete report.
        source: The records, of which `report.first` are shown.
        processor: Prepares the samples as for training; without one, the page shows their messages.

    Raises:
        UserError: The file cannot be written.
    """
    records = [source[index] for index in report.first]
    examples: dict[str, list[Skip]] = {}
    for skip in report.statistics.examples.values():
        examples.setdefault(skip.reason, []).append(skip)
    values: Mapping[str, Any] = {
        "report": report,
        # The rows of the table of percentiles scroll on a narrow screen, since broken ones could not be read.
        "wide": {line for line in report.lines() if line.startswith("   ") or line.split(" ")[0] in report.lengths},
        "lines": [line for line in report.lines() if not line.startswith("  ") or line.startswith("   ")],
        "histograms": {name: _bars(numbers) for name, numbers in report.lengths.items() if len(numbers)},
        "counts": sorted(report.statistics.counts.items()),
        "examples": examples,
        "remedies": REMEDIES,
        "samples": [_shown(one, processor) for one in records if isinstance(one, Conversation)],
        "has_tokens": processor is not None,
    }
    page = page_environment("vr_jax.data").get_template("check.html").render(values)
    write_bytes(path, page.encode())
