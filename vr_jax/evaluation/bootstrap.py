"""Bootstrap intervals of scores: percentile intervals (Efron and Tibshirani 1993, chapter 13) with strata.

`scipy.stats.bootstrap` (1.18) gives the same percentile intervals, also for constant scores. It is not used because it
refuses a sample of one observation ("each sample in `data` must contain two or more observations"), and here a stratum
often has only one item: a category of a small benchmark, or a fine category of MMStar with `--limit`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 22  # The number of drawn indices that are held at a time.


@dataclass(frozen=True)
class Stratum:
    """Scores that are resampled among themselves.

    Attributes:
        weight: The factor by which the mean of the scores enters the total score.
        values: The scores, from 0 to 100.
    """

    weight: float
    values: Float[np.ndarray, " n"]

    @property
    def value(self) -> float:
        """The part of the total score that the stratum contributes."""
        return self.weight * float(np.mean(self.values))


Strata = Sequence[Stratum]


@dataclass(frozen=True)
class Estimates:
    """The scores of a benchmark.

    Attributes:
        overall: The strata of the overall score.
        categories: The strata of each category's score, in the order of the categories' first items.
    """

    overall: Strata
    categories: Mapping[str, Strata]


def plain(scores: Sequence[float]) -> Strata:
    """Returns the mean of scores from 0 to 1 as one stratum, in per cent."""
    return [Stratum(1.0, 100 * np.asarray(scores, np.float64))]


def balanced(groups: Sequence[Sequence[float]]) -> Strata:
    """Returns the mean over the means of groups of scores from 0 to 1; each group is a stratum, in per cent."""
    return [Stratum(1 / len(groups), 100 * np.asarray(scores, np.float64)) for scores in groups]


def plain_estimates(categories: Sequence[str], scores: Sequence[float]) -> Estimates:
    """Returns the mean over all items and the mean of each category.

    Args:
        categories: The category of each item.
        scores: The score of each item, from 0 to 1.
    """
    groups: dict[str, list[float]] = {}
    for category, score in zip(categories, scores, strict=True):
        groups.setdefault(category, []).append(score)
    return Estimates(plain(scores), {category: plain(members) for category, members in groups.items()})


def value(strata: Strata) -> float:
    """Returns the score of the strata, in per cent."""
    return sum(stratum.value for stratum in strata)


def draws(strata: Strata, name: str, resamples: int = RESAMPLES) -> Float[np.ndarray, " R"]:
    """Computes the score of each resample.

    A resample draws from every stratum as many values as it has, with replacement.

    Args:
        strata: The strata of a score.
        name: The name of the score, which seeds the draws. The same name gives the same draws, and different names give
            independent ones.
        resamples: The number of resamples R.

    Returns:
        The scores of the resamples, in per cent.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    total = np.zeros(resamples)
    for stratum in strata:
        count = len(stratum.values)
        rows = max(1, _CHUNK // count)
        for start in range(0, resamples, rows):
            part = slice(start, min(start + rows, resamples))
            index = rng.integers(0, count, (part.stop - part.start, count))
            total[part] += stratum.weight * stratum.values[index].mean(axis=1)
    return total


def interval(drawn: Float[np.ndarray, " R"], level: float = LEVEL) -> tuple[float, float]:
    """Returns the percentile interval that holds the share `level` of the draws."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
