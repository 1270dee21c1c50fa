"""MMMU (Yue et al. 2024), validation, as lmms-eval scores it: options and open questions, with up to seven images.

Data: `lmms-lab/MMMU`, split validation, 900 rows of id ("validation_<Subject>_<n>"), question, options (the text of a
Python list), question_type ("multiple-choice" or "open"), answer, image_1 to image_7. Where a reply names no option the
reference draws one at random; here it counts as wrong. lmms-eval 0.3.5 to 0.7.2 score every open question 0, and up to
0.6 allow 16 tokens: profile v0.5 does both.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, SHORT_ANSWER, PublishedBenchmark, lettered
from vr_jax.evaluation.files import Wanted
from vr_jax.evaluation.metrics.mmmu import chosen_option, open_answer_is_right
from vr_jax.evaluation.tables import Column, Row, read_rows, text
from vr_jax.evaluation.types import Item, Published

IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_CHOICE = "multiple-choice"
_MARK = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]*_(.+?)_\d+")


def options_of(cell: Any) -> tuple[str, ...]:
    """The options in the text of a Python list, or in a list."""
    options = cell
    if isinstance(cell, str):
        try:
            options = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError(f"expected the text of a Python list, found {cell[:80]!r} ({error})") from error
    if not isinstance(options, list | tuple):
        raise ValueError(f"expected the text of a Python list, found {str(cell)[:80]!r}")
    return tuple(map(str, options))


def _question_type(cell: Any) -> str:
    if text(cell) not in (_CHOICE, "open"):
        raise ValueError(f"expected {_CHOICE} or open, found {cell!r}")
    return cell


class MMMU(PublishedBenchmark):
    name = "mmmu"
    title = "MMMU-val"
    headline = "mmmu_acc"
    group = "Knowledge"
    published = Published("lmms-lab/MMMU", "validation")
    several_folders = True  # the authors' own repository has one for each subject
    columns = (
        Column("id", text),
        Column("question", text),
        Column("options", options_of),
        Column("question_type", _question_type),
        Column("answer", text),
    )

    @property
    def max_new_tokens(self) -> int:
        return 16 if self.profile == "v0.5" else 128

    def rows(self, data: Path, wanted: Wanted) -> list[Row]:
        return read_rows(data, wanted, self.columns, image_columns=IMAGES, images_at=_images_at)

    def category_of(self, record: Mapping[str, Any]) -> str:
        subject = _SUBJECT.fullmatch(str(record.get("id", "")))
        return subject[1] if subject else "other"

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        options = record.get("options", ())
        return {
            "options": options if isinstance(options, tuple) else options_of(options),
            "question_type": record.get("question_type", ""),
        }

    def prompt(self, item: Item) -> str:
        """The marks `<image k>` stay; the images are put in front."""
        return _prompt(item.question, item.fields["options"], item.fields["question_type"])

    def image_names(self, item: Item) -> list[str]:
        """The columns of the images, in the order in which they are put in front."""
        return _image_names(self.prompt(item))

    def score(self, prediction: str, item: Item) -> float:
        if item.fields["question_type"] == _CHOICE:
            return float(chosen_option(prediction, item.fields["options"]) in item.answers)
        if self.profile == "v0.5":
            return 0.0  # as in the reference, see above
        return float(any(open_answer_is_right(prediction, answer) for answer in item.answers))

    def unparsed(self, prediction: str, item: Item) -> bool:
        return item.fields["question_type"] == _CHOICE and chosen_option(prediction, item.fields["options"]) is None

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        return {self.headline: round(sum(scores) / len(scores), 5), "n_scored": len(scores)}


def _prompt(question: str, options: Sequence[str], question_type: str) -> str:
    if question_type == _CHOICE:
        return f"{question}\n{lettered(options)}\n\n{LETTER_ANSWER}"
    return f"{question}\n\n{SHORT_ANSWER}"


def _image_names(prompt: str) -> list[str]:
    return sorted({f"image_{number}" for number in _MARK.findall(prompt)})


def _images_at(values: Mapping[str, Any]) -> list[str]:
    return _image_names(_prompt(values["question"], values["options"], values["question_type"]))
