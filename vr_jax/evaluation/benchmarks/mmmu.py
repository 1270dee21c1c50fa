"""MMMU (Yue et al. 2024), validation split: multiple-choice and open questions with up to seven images.

The data are `lmms-lab/MMMU`, split validation, with 900 rows. A row has an id ("validation_<Subject>_<n>"), a question,
options (a Python list, written as a text), a question type ("multiple-choice" or "open"), an answer, and the images
image_1 to image_7. Prompts and scores are those of lmms-eval (docs/design/benchmarks.md#mmmu), with one difference:
where a reply names no option, lmms-eval draws one at random, and here the reply counts as wrong.

Profile v0.5 scores every open question 0, as lmms-eval 0.3.5 to 0.7.2 do, and allows 16 tokens, as lmms-eval up to 0.6
does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import (
    LETTER_ANSWER,
    SHORT_ANSWER,
    PublishedBenchmark,
    lettered,
    submitted_id,
)
from vr_jax.evaluation.files import Wanted
from vr_jax.evaluation.interface import Item, ItemResult, Published
from vr_jax.evaluation.metrics.mmmu import chosen_option, open_answer_is_right
from vr_jax.evaluation.tables import Column, Row, read_rows, text
from vr_jax.storage import Path

IMAGES = tuple(f"image_{number}" for number in range(1, 8))
_CHOICE = "multiple-choice"
_MARK = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]*_(.+?)_\d+")


def options_of(cell: Any) -> tuple[str, ...]:
    """Reads options from the text of a Python list, or from a list.

    Raises:
        ValueError: The cell holds neither.
    """
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
    """College-level questions of 30 subjects, which are the categories."""

    name = "mmmu"
    title = "MMMU-val"
    headline = "mmmu_acc"
    group = "Knowledge"
    published = Published("lmms-lab/MMMU", "validation")
    several_folders = True  # The repository of the authors has a folder for each subject.
    columns = (
        Column("id", text),
        Column("question", text),
        Column("options", options_of),
        Column("question_type", _question_type),
        Column("answer", text),
    )

    @property
    @override
    def max_new_tokens(self) -> int:
        return 16 if self.profile == "v0.5" else 128

    @override
    def rows(self, data: Path, wanted: Wanted) -> list[Row]:
        return read_rows(data, wanted, self.columns, image_columns=IMAGES, images_at=_images_at)

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        subject = _SUBJECT.fullmatch(str(record.get("id", "")))
        return subject[1] if subject else "other"

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        options = record.get("options", ())
        return {
            "options": options if isinstance(options, tuple) else options_of(options),
            "question_type": record.get("question_type", ""),
            "id": record.get("id"),
        }

    @override
    def prompt(self, item: Item) -> str:
        """Returns the prompt, in which the marks `<image k>` stay; the images themselves are put in front."""
        return _prompt(item.question, item.fields["options"], item.fields["question_type"])

    def image_names(self, item: Item) -> list[str]:
        """Returns the columns of the item's images, in the order in which they are put in front of the prompt."""
        return _image_names(self.prompt(item))

    @override
    def score(self, prediction: str, item: Item) -> float:
        if item.fields["question_type"] == _CHOICE:
            return float(chosen_option(prediction, item.fields["options"]) in item.answers)
        if self.profile == "v0.5":
            return 0.0  # lmms-eval 0.3.5 to 0.7.2 do so by mistake; see the docstring of this module.
        return float(any(open_answer_is_right(prediction, answer) for answer in item.answers))

    @override
    def unparsed(self, prediction: str, item: Item) -> bool:
        return item.fields["question_type"] == _CHOICE and chosen_option(prediction, item.fields["options"]) is None

    @override
    def submission(self, items: Sequence[Item], results: Sequence[ItemResult]) -> Any:
        """Source: lmms-eval 0.7.3, `lmms_eval/tasks/mmmu/utils.py:mmmu_test_aggregate_results_for_submission`."""
        return {
            str(submitted_id(item.fields["id"], item)): _submitted(result.prediction or "", item)
            for item, result in zip(items, results, strict=True)
        }

    @override
    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        return {self.headline: round(sum(scores) / len(scores), 5), "n_scored": len(scores)}


def _submitted(prediction: str, item: Item) -> str:
    """The letter that a reply chooses, or the reply itself where it chooses none or the question is open."""
    if item.fields["question_type"] != _CHOICE:
        return prediction
    return chosen_option(prediction, item.fields["options"]) or prediction


def _prompt(question: str, options: Sequence[str], question_type: str) -> str:
    if question_type == _CHOICE:
        return f"{question}\n{lettered(options)}\n\n{LETTER_ANSWER}"
    return f"{question}\n\n{SHORT_ANSWER}"


def _image_names(prompt: str) -> list[str]:
    return sorted({f"image_{number}" for number in _MARK.findall(prompt)})


def _images_at(values: Mapping[str, Any]) -> list[str]:
    return _image_names(_prompt(values["question"], values["options"], values["question_type"]))
