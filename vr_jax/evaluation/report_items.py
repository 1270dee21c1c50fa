"""What a report shows of an evaluation: a sample of its items with their pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vr_jax.evaluation.report import ReportItem
from vr_jax.evaluation.runner import Evaluation


def sample(total: int, count: int) -> Sequence[int]:
    """`count` numbers out of 0..total-1, evenly spaced; all of them if there are not more."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist() if count else []


def report_items(evaluation: Evaluation, count: int) -> list[ReportItem]:
    """At most `count` items for `report.write_report`."""
    pairs = [(evaluation.items[i], evaluation.results[i]) for i in sample(len(evaluation.items), count)]
    return [
        ReportItem(
            id=item.id,
            category=item.category,
            question=item.question,
            references=item.answers,
            prediction=f"(not asked: {result.error})" if result.prediction is None else result.prediction,
            score=result.score,
            image=item.images[0] if item.images and result.error is None else None,
        )
        for item, result in pairs
    ]
