"""What a report shows of one item, and the scores of a set of items beside the majority answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vr_jax.evaluation.report.heat import HeatMap

State = Literal["right", "partial", "wrong", "unscored"]


@dataclass(frozen=True)
class ReportItem:
    """One question with what the model said. Texts may be anything, images may fail to decode: the page says so.

    prediction: None for an item that could not be asked. score: 0..1. images: encoded images, in the order of the
    prompt. benchmark: its name in the summary. error: why it could not be asked or scored. cut_off: whether the reply
    ended at the token limit. maps: lie over the first image."""

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

    @property
    def state(self) -> State:
        if self.error is not None or self.prediction is None or math.isnan(self.score):
            return "unscored"
        return "right" if self.score >= 1 else "wrong" if self.score <= 0 else "partial"


@dataclass(frozen=True)
class ScoreRow:
    """Items of one kind: shares 0..1; `baseline` is the majority answer's."""

    name: str
    count: int
    score: float
    baseline: float


def score_rows(items: Sequence[ReportItem]) -> list[ScoreRow]:
    """All items together, then each category, beside the accuracy of always giving its most frequent reference.

    Raises ValueError without items."""
    if not items:
        raise ValueError("no items to score")

    def row(name: str, members: Sequence[ReportItem]) -> ScoreRow:
        accepted = Counter(reference for item in members for reference in set(item.references))
        score = sum(item.score for item in members) / len(members)
        return ScoreRow(name, len(members), score, max(accepted.values(), default=0) / len(members))

    categories = sorted({item.category for item in items})
    groups = {name: [item for item in items if item.category == name] for name in categories}
    return [row("all", items), *(row(name, members) for name, members in groups.items())]
