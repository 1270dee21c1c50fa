"""MME (Fu et al. 2023), which asks two yes-or-no questions about each image.

The data are `lmms-lab/MME`, split test, with 2,374 rows. A row has a question id (the same for both questions about an
image), a question, an answer ("Yes" or "No"), a category, and an image. Prompts and scores are those of lmms-eval, and
both profiles give the same scores (docs/design/benchmarks.md#mme). The paper's tables hold the sum over the ten
perception categories, divided by 20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, override

import numpy as np

from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark
from vr_jax.evaluation.bootstrap import Estimates, Stratum
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.tables import Column, text

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
_REQUEST = " Please answer yes or no."


def _yes_or_no(cell: Any) -> str:
    if _plain(text(cell)) not in ("yes", "no"):
        raise ValueError(f"expected Yes or No, found {cell!r}")
    return cell


class MME(PublishedBenchmark):
    """Pairs of questions with a bonus where both answers are right.

    A damaged row may lack its category. It counts as wrong: the perception score is multiplied by the share of rows
    that have a category.
    """

    name = "mme"
    title = "MME-P"
    headline = "mme_perception_score"
    group = "General"
    published = Published("lmms-lab/MME", "test")
    columns = (
        Column("question_id", text),
        Column("question", text),
        Column("answer", _yes_or_no),
        Column("category", text),
    )

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("category", ""))

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"question_id": str(record.get("question_id", ""))}

    @override
    def prompt(self, item: Item) -> str:
        return f"{item.question.strip().replace(_REQUEST, '')}\n{SHORT_ANSWER}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        return float(yes_or_no(prediction) in map(_plain, item.answers))

    @override
    def unparsed(self, prediction: str, item: Item) -> bool:
        return yes_or_no(prediction) == "other"

    @override
    def limited(self, items: Sequence[Item], limit: int | None) -> list[Item]:
        """Returns the first `limit` items together with their partners, so that every pair is complete."""
        if limit is None:
            return list(items)
        kept = {_pair(item) for item in items[:limit]}
        return [item for item in items if _pair(item) in kept]

    @override
    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Returns the sums over the categories of perception (at most 2000) and of cognition (at most 800).

        The cognition score is absent if no item belongs to a cognition category.
        """
        means = {category: sum(pairs) / len(pairs) for category, pairs in _pairs(items, scores).items()}
        known = _known_share(items)
        cognition = [mean for category, mean in means.items() if category not in PERCEPTION]
        return {
            self.headline: known * sum(mean for category, mean in means.items() if category in PERCEPTION),
            **({"mme_cognition_score": sum(cognition)} if cognition else {}),
        }

    @override
    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        """Returns the pairs of each category, whose scores are 0 to 100.

        In the overall score each perception category weighs a tenth, and the cognition categories weigh nothing.
        """
        pairs = {category: np.asarray(values) / 2 for category, values in _pairs(items, scores).items()}
        return Estimates(
            [
                Stratum(_known_share(items) / len(PERCEPTION), pairs[category])
                for category in pairs
                if category in PERCEPTION
            ],
            {category: [Stratum(1.0, values)] for category, values in pairs.items()},
        )


def yes_or_no(reply: str) -> str:
    """Reads "yes" or "no" from a reply, or else "other".

    The whole reply or its only letter decides, and otherwise the first four characters do, in which "yes" is looked for
    before "no".

    Source: docs/design/benchmarks.md#mme; lmms-eval 0.7.3, `lmms_eval/tasks/mme/utils.py:parse_pred_ans`.
    """
    reply = _plain(reply)
    if reply in ("yes", "no"):
        return reply
    if len(reply) == 1:
        return {"y": "yes", "n": "no"}.get(reply, "other")
    return next((word for word in ("yes", "no") if word in reply[:4]), "other")


def _plain(text: str) -> str:
    return text.lower().strip().replace(".", "")


def _known_share(items: Sequence[Item]) -> float:
    return sum(bool(item.category) for item in items) / len(items)


def _pair(item: Item) -> tuple[str, str]:
    """Identifies the pair of an item. An item without a question id, from a damaged row, is a pair of its own."""
    return item.category, item.fields["question_id"] or item.id


def _pairs(items: Sequence[Item], scores: Iterable[float]) -> dict[str, list[float]]:
    """Returns the score of every pair by category: 0, 50, or 200.

    A question without its partner, where the data are incomplete, scores 0 or 100, because the bonus is for two right
    answers.
    """
    members: dict[tuple[str, str], list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        if not item.category:
            continue
        members.setdefault(_pair(item), []).append(score)
    worth: dict[str, list[float]] = {}
    for (category, _), found in members.items():
        bonus = 100.0 if len(found) > 1 and sum(found) == len(found) else 0.0
        worth.setdefault(category, []).append(bonus + sum(found) / len(found) * 100)
    return worth
