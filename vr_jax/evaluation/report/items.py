"""The items that a report shows, and their scores beside those of the most frequent answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vr_jax.evaluation.report.heat import HeatMap
from vr_jax.storage import Path

State = Literal["right", "partial", "wrong", "unscored"]


@dataclass(frozen=True)
class ReportItem:
    """One question with the answer of the model.

    The texts may contain any characters, and the images may be damaged; the page then says so.

    Attributes:
        id: The id of the item.
        category: The category of the item.
        question: The question, with its options and context.
        references: The reference answers.
        prediction: The answer of the model, or None if the item could not be asked.
        score: The score, from 0 to 1.
        images: The encoded images, or the paths of their files, in the order of the prompt.
        benchmark: The name of the benchmark in the summary.
        error: The reason why the item could not be asked or scored, or None.
        cut_off: Whether the answer ended at the token limit.
        maps: The heat maps over the first image.
        others: The answers of other models, as pairs of name and text.
    """

    id: str
    category: str
    question: str
    references: tuple[str, ...]
    prediction: str | None
    score: float
    images: tuple[bytes | Path, ...] = field(default=(), repr=False)
    benchmark: str = ""
    error: str | None = None
    cut_off: bool = False
    maps: tuple[HeatMap, ...] = field(default=(), repr=False)
    others: tuple[tuple[str, str], ...] = ()

    @property
    def state(self) -> State:
        """The state by which the page filters and colours the item."""
        if self.error is not None or self.prediction is None or math.isnan(self.score):
            return "unscored"
        return "right" if self.score >= 1 else "wrong" if self.score <= 0 else "partial"


@dataclass(frozen=True)
class ScoreRow:
    """The score of a set of items.

    Attributes:
        name: The category, or "all".
        count: The number of items.
        score: The mean score, from 0 to 1.
        baseline: The score of always giving the most frequent answer, from 0 to 1.
    """

    name: str
    count: int
    score: float
    baseline: float


def score_rows(items: Sequence[ReportItem]) -> list[ScoreRow]:
    """Computes the scores of all items and of each category, beside those of the most frequent answer of each.

    Raises:
        ValueError: There are no items.
    """
    if not items:
        raise ValueError("no items to score")

    def row(name: str, members: Sequence[ReportItem]) -> ScoreRow:
        accepted = Counter(reference for item in members for reference in set(item.references))
        score = sum(item.score for item in members) / len(members)
        return ScoreRow(name, len(members), score, max(accepted.values(), default=0) / len(members))

    categories = sorted({item.category for item in items})
    groups = {name: [item for item in items if item.category == name] for name in categories}
    return [row("all", items), *(row(name, members) for name, members in groups.items())]
