"""Bootstrap intervals of scores (Efron and Tibshirani 1993: percentile intervals)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 1 << 22  # drawn indices held at a time


@dataclass(frozen=True)
class Stratum:
    """Values that are resampled among themselves, in per cent; they enter the score as `weight` times their mean."""

    weight: float
    values: Float[np.ndarray, " n"]

    @property
    def value(self) -> float:
        return self.weight * float(np.mean(self.values))


Strata = Sequence[Stratum]


@dataclass(frozen=True)
class Estimates:
    """A benchmark's score (0..100) and that of each category, in order of appearance."""

    overall: Strata
    categories: Mapping[str, Strata]


def plain(scores: Sequence[float]) -> Strata:
    """The mean of scores 0..1, in per cent."""
    return [Stratum(1.0, 100 * np.asarray(scores, np.float64))]


def balanced(groups: Sequence[Sequence[float]]) -> Strata:
    """The mean over the groups' means, in per cent; each group is resampled by itself."""
    return [Stratum(1 / len(groups), 100 * np.asarray(scores, np.float64)) for scores in groups]


def plain_estimates(categories: Sequence[str], scores: Sequence[float]) -> Estimates:
    """Every mean is over items: all of them, and those of each category."""
    groups: dict[str, list[float]] = {}
    for category, score in zip(categories, scores, strict=True):
        groups.setdefault(category, []).append(score)
    return Estimates(plain(scores), {category: plain(members) for category, members in groups.items()})


def value(strata: Strata) -> float:
    """The score itself, per cent."""
    return sum(stratum.value for stratum in strata)


def draws(strata: Strata, name: str, resamples: int = RESAMPLES) -> Float[np.ndarray, " R"]:
    """The score in every resample: each stratum drawn anew with replacement, as large as it is.

    name: seeds the draws, so that repeating gives the same interval and different scores have independent draws."""
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
    """The percentile interval that holds `level` of the draws."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
