"""MMStar (Chen et al. 2024): multiple-choice questions, averaged over 18 fine categories.

The data are `Lin-Chen/MMStar`, split val, in one file mmstar.parquet with 1,500 rows. A row has a question that
contains its options, the letter of the answer, one of 6 categories, one of 18 fine categories (l2_category), and an
image. Prompts and scores are those of lmms-eval; the two profiles read the letter from a reply in different ways
(docs/design/benchmarks.md#mmstar). lmms-eval sets no token limit; 1024 is what its model classes use then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, override

from vr_jax.evaluation.benchmarks.published import LETTER_ANSWER, PublishedBenchmark
from vr_jax.evaluation.bootstrap import Estimates, Stratum, balanced
from vr_jax.evaluation.interface import Item, Published
from vr_jax.evaluation.metrics.letters import extract_letter
from vr_jax.evaluation.tables import Column, text

_REQUEST = " Please answer yes or no."
_PREFIXES = ("", "(", "option ", "the answer is ")


class MMStar(PublishedBenchmark):
    """The mean over the fine categories of the mean score in each.

    A damaged row may lack its fine category. It counts as wrong: the mean is multiplied by the share of rows that have
    one. As a category of its own, the row would weigh as much as the 83 rows of another fine category together.
    """

    name = "mmstar"
    title = "MMStar"
    headline = "average"
    group = "Knowledge"
    published = Published("Lin-Chen/MMStar", "val")
    files = ("mmstar.parquet",)
    tokens = 1024
    columns = tuple(Column(name, text) for name in ("question", "answer", "category", "l2_category"))

    @override
    def category_of(self, record: Mapping[str, Any]) -> str:
        return str(record.get("category", ""))

    @override
    def fields_of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"l2_category": str(record.get("l2_category", ""))}

    @override
    def prompt(self, item: Item) -> str:
        return f"{item.question.strip().replace(_REQUEST, '')}\n{LETTER_ANSWER.removesuffix('.')}"

    @override
    def score(self, prediction: str, item: Item) -> float:
        right = _is_right_v05 if self.profile == "v0.5" else _is_right
        return float(any(right(prediction, answer) for answer in item.answers))

    @override
    def unparsed(self, prediction: str, item: Item) -> bool:
        return self.profile != "v0.5" and extract_letter(prediction) == ""

    @override
    def aggregate(self, items: Sequence[Item], scores: Sequence[float]) -> dict[str, float]:
        """Returns the mean over all fine categories, and over those within each category."""
        overall, within = _groups(items, scores)
        known = _known_share(items)
        means = {name: _balanced_mean(groups) for name, groups in within.items()}
        return {self.headline: known * _balanced_mean(overall), **means}

    @override
    def estimates(self, items: Sequence[Item], scores: Sequence[float]) -> Estimates:
        overall, within = _groups(items, scores)
        known = _known_share(items)
        return Estimates(
            [Stratum(known * stratum.weight, stratum.values) for stratum in balanced(list(overall.values()))],
            {category: balanced(list(groups.values())) for category, groups in within.items()},
        )


def _is_right(prediction: str, answer: str) -> bool:
    return extract_letter(prediction) == answer.strip().upper()


def _is_right_v05(prediction: str, answer: str) -> bool:
    """Applies the rule of lmms-eval up to 0.6: the letter must come first, or directly after one of the prefixes."""
    found, wanted = (one.lower().replace("\n", " ").strip() for one in (prediction, answer))
    starts = [len(prefix) for prefix in _PREFIXES if found.startswith(prefix)]
    return wanted != "" and wanted in [found[start : start + 1] for start in starts]


_Groups = dict[str, list[float]]  # The scores by fine category.


def _groups(items: Sequence[Item], scores: Sequence[float]) -> tuple[_Groups, dict[str, _Groups]]:
    """Returns the scores by fine category, of all items and of the items of each category."""
    overall: _Groups = {}
    within: dict[str, _Groups] = {}
    for item, score in zip(items, scores, strict=True):
        fine = item.fields["l2_category"]
        if not fine:
            continue
        overall.setdefault(fine, []).append(score)
        if item.category:
            within.setdefault(item.category, {}).setdefault(fine, []).append(score)
    return overall, within


def _known_share(items: Sequence[Item]) -> float:
    return sum(bool(item.fields["l2_category"]) for item in items) / len(items)


def _balanced_mean(groups: _Groups) -> float:
    if not groups:  # All rows are damaged.
        return 0.0
    return sum(sum(members) / len(members) for members in groups.values()) / len(groups)
