"""The scores of a run, read from its overall summary (summary.json)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vr_jax.evaluation.paper_scores import GROUP_SIZES
from vr_jax.evaluation.report.items import ScoreRow


@dataclass(frozen=True)
class Estimate:
    """A score.

    Attributes:
        score: The score, from 0 to 100.
        interval: The 95 % interval of the score, if it is known.
        items: The number of items, if it is known.
        baseline: The score of always giving the most frequent answer, if it is known.
    """

    score: float
    interval: tuple[float, float] | None = None
    items: int | None = None
    baseline: float | None = None


@dataclass(frozen=True)
class BenchmarkScores:
    """The scores of a benchmark.

    Attributes:
        name: The name of the benchmark.
        title: The name in tables.
        group: The group of the paper's tables, or None.
        overall: The overall score.
        categories: The score of each category.
        unscored: The number of items that could not be scored, by reason. They count as wrong.
    """

    name: str
    title: str
    group: str | None
    overall: Estimate
    categories: Mapping[str, Estimate]
    unscored: Mapping[str, int]


@dataclass(frozen=True)
class RunScores:
    """The scores of a run.

    Attributes:
        benchmarks: The scores of the benchmarks.
        groups: The scores of the groups whose benchmarks are all there.
        average: The average over the eleven benchmarks of the paper, or None if some are missing.
    """

    benchmarks: tuple[BenchmarkScores, ...]
    groups: Mapping[str, Estimate]
    average: Estimate | None

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> RunScores:
        """Reads the scores from an overall summary.

        Args:
            summary: The fields `benchmarks` (by name: `title`, `group`, `score`, `interval`, `items`, `unscored`,
                `categories` and possibly `baseline`), `groups` and `average`.

        Raises:
            ValueError: A field is missing or has another type.
        """
        try:
            benchmarks = tuple(_benchmark(name, one) for name, one in summary["benchmarks"].items())
            groups = {name: _estimate(one) for name, one in (summary.get("groups") or {}).items() if one is not None}
            average = summary.get("average")
            return cls(benchmarks, groups, None if average is None else _estimate(average))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the summary of the run cannot be read: {type(error).__name__}: {error}") from error

    @property
    def of_the_paper(self) -> tuple[BenchmarkScores, ...]:
        """The scores of the benchmarks that belong to the paper's average."""
        return tuple(one for one in self.benchmarks if one.group in GROUP_SIZES)

    def missing(self) -> str:
        """Says why groups or the average have no score, or returns an empty text if they all have one."""
        total = sum(GROUP_SIZES.values())
        found = self.of_the_paper
        if self.average is not None or not found:
            return ""
        parts = []
        for group, size in GROUP_SIZES.items():
            if group not in self.groups:
                titles = [one.title for one in found if one.group == group]
                names = f" ({', '.join(titles)})" if titles else ""
                parts.append(f"{group} {len(titles)} of {size}{names}")
        detail = f": {'; '.join(parts)}" if parts else ""
        return (
            f"{len(found)} of {total} benchmarks were run{detail}. A mean is shown once all of its benchmarks were run."
        )


def with_baselines(summary: Mapping[str, Any], benchmark: str, rows: Sequence[ScoreRow]) -> dict[str, Any]:
    """Adds the scores of the most frequent answer to a benchmark of an overall summary and to its categories.

    Args:
        summary: The overall summary, which is not changed.
        benchmark: The name of the benchmark.
        rows: The result of `score_rows` on all items of the benchmark.

    Returns:
        A copy of the summary with the field `baseline`. A category without a row has no baseline.
    """
    found = copy.deepcopy(dict(summary))
    one = found["benchmarks"][benchmark]
    one["baseline"] = 100 * rows[0].baseline
    for row in rows[1:]:
        if row.name in one["categories"]:
            one["categories"][row.name]["baseline"] = 100 * row.baseline
    return found


def _benchmark(name: str, one: Mapping[str, Any]) -> BenchmarkScores:
    unscored = one.get("unscored") or {}
    return BenchmarkScores(
        name=name,
        title=str(one.get("title") or name),
        group=one.get("group"),
        overall=_estimate(one),
        categories={category: _estimate(part) for category, part in (one.get("categories") or {}).items()},
        unscored=dict(unscored.get("by_reason") or {}),
    )


def _estimate(one: Mapping[str, Any]) -> Estimate:
    interval = one.get("interval")
    items = one.get("items")
    return Estimate(
        score=float(one["score"]),
        interval=None if interval is None else (float(interval[0]), float(interval[1])),
        items=None if items is None else int(items),
        baseline=None if one.get("baseline") is None else float(one["baseline"]),
    )
