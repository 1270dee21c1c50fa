"""The scores of a run as the page shows them, read from its overall summary (summary.json)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vr_jax.evaluation.paper_scores import GROUP_SIZES
from vr_jax.evaluation.report.items import ScoreRow


@dataclass(frozen=True)
class Estimate:
    """A score 0..100, its 95 % interval and the majority answer's score, where they are known."""

    score: float
    interval: tuple[float, float] | None = None
    items: int | None = None
    baseline: float | None = None


@dataclass(frozen=True)
class BenchmarkScores:
    name: str
    title: str
    group: str | None  # of the paper's tables
    overall: Estimate
    categories: Mapping[str, Estimate]
    unscored: Mapping[str, int]  # reason -> items; they count as wrong


@dataclass(frozen=True)
class RunScores:
    """`groups` holds the complete ones; `average` is None until all eleven benchmarks are there."""

    benchmarks: tuple[BenchmarkScores, ...]
    groups: Mapping[str, Estimate]
    average: Estimate | None

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> RunScores:
        """Raises ValueError for a field that is missing or of another kind."""
        try:
            benchmarks = tuple(_benchmark(name, one) for name, one in summary["benchmarks"].items())
            groups = {name: _estimate(one) for name, one in (summary.get("groups") or {}).items() if one is not None}
            average = summary.get("average")
            return cls(benchmarks, groups, None if average is None else _estimate(average))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the summary of the run is not as expected: {type(error).__name__}: {error}") from error

    @property
    def of_the_paper(self) -> tuple[BenchmarkScores, ...]:
        return tuple(one for one in self.benchmarks if one.group in GROUP_SIZES)

    def missing(self) -> str:
        """Why groups or the average have no score; empty if they all have one."""
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
        return f"{len(found)} of {total} benchmarks were run{detail}. A mean needs all of its benchmarks."


def with_baselines(summary: Mapping[str, Any], benchmark: str, rows: Sequence[ScoreRow]) -> dict[str, Any]:
    """The summary with the majority answer's score beside that of a benchmark and of its categories.

    rows: `score_rows` of all of its items. A category without a row has no baseline."""
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
