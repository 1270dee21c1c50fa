"""GQA (Hudson and Manning 2019), testdev-balanced, as lmms-eval scores it: exact match.

Data: `lmms-lab/GQA`, split testdev; 12,578 questions in configuration testdev_balanced_instructions, their 398 images
in testdev_balanced_images (joined by imageId). Both profiles score alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vr_jax.data.records import ImageFolder, images_of
from vr_jax.data.skips import SkipRecord
from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark
from vr_jax.evaluation.files import Wanted, find_shards
from vr_jax.evaluation.metrics.exact import exact_match
from vr_jax.evaluation.tables import Column, Row, anything, parquet_records, read_rows, text
from vr_jax.evaluation.types import EvaluationError, Item, Published

IMAGES = "testdev_balanced_images"


class GQA(PublishedBenchmark):
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

    def downloads(self, split: str | None = None) -> list[str]:
        wanted = self.wanted(split)
        return wanted.patterns() + replace(wanted, config=IMAGES).patterns()

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

    def category_of(self, record: Mapping[str, Any]) -> str:
        types = record.get("types")
        structural = types.get("structural") if isinstance(types, Mapping) else None
        return structural if isinstance(structural, str) and structural else "all"

    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{SHORT_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        return float(any(exact_match(prediction, answer) for answer in item.answers))


def _images(data: Path, wanted: Wanted) -> dict[str, Path | bytes]:
    """The images by their id, each held once."""
    folder = data if data.is_dir() else data.parent.parent  # one file of questions: images lie beside its folder
    no_folder = ImageFolder(None)
    found: dict[str, Path | bytes] = {}
    for path in find_shards(folder, wanted, ("id", "image")):
        for record in parquet_records(path, ("id", "image")):
            if isinstance(record, dict) and isinstance(record["id"], str) and record["image"] is not None:
                (found[record["id"]],) = images_of(record, no_folder)
    if not found:
        raise EvaluationError(f"{data}: {IMAGES} holds no images")
    return found
