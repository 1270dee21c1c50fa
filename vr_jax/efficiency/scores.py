"""Accuracies that the user brings for the plot: numbers, or summaries of evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vr_jax.efficiency.results import EfficiencyError


def parse_scores(texts: Sequence[str], names: Sequence[str]) -> list[float | None]:
    """One score (0..100) per name; all None without `texts`.

    Each text is a number or the path of a summary.json of eval.py (all benchmarks', which has an average, or one's),
    after "NAME=" or in the order of `names`. Raises EfficiencyError unless every name gets exactly one."""
    if not texts:
        return [None] * len(names)
    split = [_named(text, names) for text in texts]
    plain = [value for name, value in split if name is None]
    if plain and len(plain) < len(texts):
        raise EfficiencyError(f"--score: give all of {len(texts)} with a name, or all in the order of the systems")
    if plain:
        if len(plain) != len(names):
            raise EfficiencyError(f"--score: {len(plain)} scores for {len(names)} systems ({', '.join(names)})")
        return [_value(value) for value in plain]
    given = [name for name, _ in split]
    wrong = [name for name in names if given.count(name) != 1]
    if wrong:
        raise EfficiencyError(f"--score: expected one for each system, {wrong[0]} has {given.count(wrong[0])}")
    values = {name: _value(value) for name, value in split}
    return [values[name] for name in names]


def _named(text: str, names: Sequence[str]) -> tuple[str | None, str]:
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(f"{name}="):
            return name, text.removeprefix(f"{name}=")
    if "=" in text and not Path(text).exists():
        raise EfficiencyError(f"--score={text}: no system of that name; there are {', '.join(names)}")
    return None, text


def _value(text: str) -> float:
    try:
        return _checked(float(text), text)
    except ValueError as error:
        if isinstance(error, EfficiencyError):
            raise
    path = Path(text)
    if not path.is_file():
        raise EfficiencyError(f"--score={text}: neither a number nor a file")
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise EfficiencyError(f"--score={text}: not valid JSON ({error})") from None
    found = _score_of(summary, text)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise EfficiencyError(f"--score={text}: expected eval.py's summary.json, with a score or an average's score")
    return _checked(float(found), text)


def _score_of(summary: Any, text: str) -> Any:
    """What stands where summary.json has its score, if anything does."""
    if not isinstance(summary, dict):
        return None
    if "average" not in summary:
        return summary.get("score")
    average = summary["average"]
    if average is None:
        missing = ", ".join(map(str, summary.get("missing") or ())) or "some"
        raise EfficiencyError(
            f"--score={text}: no average, as benchmarks are missing ({missing}); run them, or give one benchmark's "
            "summary.json"
        )
    return average.get("score") if isinstance(average, dict) else None


def _checked(value: float, text: str) -> float:
    if not (math.isfinite(value) and 0 <= value <= 100):
        raise EfficiencyError(f"--score={text}: {value} is no score from 0 to 100")
    return value
