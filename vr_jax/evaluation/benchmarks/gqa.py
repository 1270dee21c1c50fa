"""GQA (Hudson and Manning 2019), testdev-balanced split, scored by exact match.

The data are `lmms-lab/GQA`, split testdev. The configuration testdev_balanced_instructions has 12,578 questions, and
testdev_balanced_images has their 398 images. The column imageId of a question is the id of its image. Prompts and
scores are those of lmms-eval, and both profiles give the same scores (docs/design/benchmarks.md#gqa).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, override

from vr_jax.data.records import ImageFolder, images_of
from vr_jax.data.skips import SkipRecord
from vr_jax.errors import UserError
from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark
from vr_jax.evaluation.files import Wanted, find_shards
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.tables import Column, Row, anything, parquet_records, read_rows, text
from vr_jax.storage import Path

IMAGES = "testdev_balanced_images"


class GQA(PublishedBenchmark):
    """Questions about scenes. The category of an item is its structural type, where the data has one."""

    name = "gqa"
    title = "GQA"
    headline = "exact_match"
    group = "General"
    published = Published("lmms-lab/GQA", "testdev", "testdev_balanced_instructions")
    columns = (
        Column("question", text),
        Column("answer", text),
        Column("imageId", text, optional=True),
        Column("types", anything, optional=True),
    )

    @override
    def downloads(self, split: str | None = None) -> list[str]:
        wanted = self.wanted(split)
        return wanted.patterns() + replace(wanted, config=IMAGES).patterns()

    @override
    def rows(self, data: Path, wanted: Wanted) -> list[Row]:
        images: dict[str, Path | bytes] = {}

        def image(record: Mapping[str, Any]) -> Path | bytes:
            if not images:
                images.update(_images(data, replace(wanted, config=IMAGES)))
            name = record.get("imageId")
            if name not in images:
                raise SkipRecord("missing_image", f"imageId {name!r} is not in {IMAGES}")
            return images[name]

        return read_rows(data, wanted, self.columns, images=image)

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        types = record.get("types")
        structural = types.get("structural") if isinstance(types, Mapping) else None
        return structural if isinstance(structural, str) and structural else "all"

    @override
    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{SHORT_ANSWER}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        return float(any(exact_match(prediction, answer) for answer in item.answers))


def _images(data: Path, wanted: Wanted) -> dict[str, Path | bytes]:
    """Reads the images by their id."""
    # If `data` is a single file of questions, the folder of the images lies beside the folder of that file.
    folder = data if data.is_dir() else data.parent.parent
    no_folder = ImageFolder(None)
    found: dict[str, Path | bytes] = {}
    for path in find_shards(folder, wanted, ("id", "image")):
        for record in parquet_records(path, ("id", "image")):
            if isinstance(record, dict) and isinstance(record["id"], str) and record["image"] is not None:
                (found[record["id"]],) = images_of(record, no_folder)
    if not found:
        raise UserError(f"{data}: the parquet files of {IMAGES} hold no images; download them again")
    return found
