"""MME (Fu et al. 2023) as lmms-eval scores it: per image two questions with yes or no, and a bonus for both.

Data: `lmms-lab/MME`, split test, 2,374 rows of question_id (equal for the two questions), question, answer ("Yes" or
"No"), category, image. Both profiles score alike. The paper's number is that of the ten perception categories, /20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vr_jax.evaluation.benchmarks.published import SHORT_ANSWER, PublishedBenchmark
from vr_jax.evaluation.statistics import Estimates, Stratum
from vr_jax.evaluation.tables import Column, text
from vr_jax.evaluation.types import Item, Published

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
_REQUEST = " Please answer yes or no."


def _yes_or_no(cell: Any) -> str:
    if _plain(text(cell)) not in ("yes", "no"):
        raise ValueError(f"expected Yes or No, found {cell!r}")
    return cell


class MME(PublishedBenchmark):
    """A damaged row whose category is unknown is wrong and in no category: the perception score is multiplied by the
    share of the rows with a category."""

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

    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("category", ""))

    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"question_id": str(record.get("question_id", ""))}

    def prompt(self, item: Item) -> str:
        return f"{item.question.strip().replace(_REQUEST, '')}\n{SHORT_ANSWER}"

    def score(self, prediction: str, item: Item) -> float:
        return float(yes_or_no(prediction) in map(_plain, item.answers))

    def unparsed(self, prediction: str, item: Item) -> bool:
        return yes_or_no(prediction) == "other"

    def limited(self, items: Sequence[Item], limit: int | None) -> list[Item]:
        """The first `limit` items, and the partners of these that come later: no pair is torn."""
        if limit is None:
            return list(items)
        kept = {_pair(item) for item in items[:limit]}
        return [item for item in items if _pair(item) in kept]

    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Sums over the categories, of which each counts up to 200: perception up to 2000, cognition up to 800."""
        means = {category: sum(pairs) / len(pairs) for category, pairs in _pairs(items, scores).items()}
        known = _known_share(items)
        cognition = [mean for category, mean in means.items() if category not in PERCEPTION]
        return {
            self.headline: known * sum(mean for category, mean in means.items() if category in PERCEPTION),
            **({"mme_cognition_score": sum(cognition)} if cognition else {}),
        }

    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        """What is resampled are pairs, 0..100. Perception categories weigh a tenth each, cognition not at all."""
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
    """ "yes", "no", or "other": the whole reply, its letter, or what its first four characters hold."""
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
    """A row whose columns are damaged is a pair of its own."""
    return item.category, item.fields["question_id"] or item.id


def _pairs(items: Sequence[Item], scores: Iterable[float]) -> dict[str, list[float]]:
    """By category, what each pair of questions is worth: 0, 50, or 200. A question without its partner, where the data
    is incomplete, is worth 0 or 100: no bonus for both."""
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
