"""The accuracies for the plot, which the user gives as numbers or as summaries of evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from vr_jax.errors import UserError
from vr_jax.storage import as_path


def parse_scores(texts: Sequence[str], names: Sequence[str]) -> list[float | None]:
    """Reads the accuracy of each system.

    Args:
        texts: The accuracies, each a number from 0 to 100 or the path of a summary.json of `vr-jax eval`: that of all
            benchmarks, which has an average, or that of one benchmark. They are in the order of the names, or each
            begins with NAME=.
        names: The names of the systems.

    Returns:
        The accuracies in the order of the names; all of them are None without `texts`.

    Raises:
        UserError: A text is neither, or not every system has exactly one accuracy.
    """
    if not texts:
        return [None] * len(names)
    split = [_named(text, names) for text in texts]
    plain = [value for name, value in split if name is None]
    if plain and len(plain) < len(texts):
        raise UserError(f"--score: give all {len(texts)} scores with a name, or all in the order of the systems.")
    if plain:
        if len(plain) != len(names):
            raise UserError(f"--score: {len(plain)} scores are given for {len(names)} systems ({', '.join(names)}).")
        return [_value(value) for value in plain]
    given = [name for name, _ in split]
    wrong = [name for name in names if given.count(name) != 1]
    if wrong:
        raise UserError(f"--score: every system needs one score, but {wrong[0]} has {given.count(wrong[0])}.")
    values = {name: _value(value) for name, value in split}
    return [values[name] for name in names]


def _named(text: str, names: Sequence[str]) -> tuple[str | None, str]:
    """Splits NAME=SCORE; the name is None if there is none."""
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(f"{name}="):
            return name, text.removeprefix(f"{name}=")
    if "=" in text and not as_path(text).exists():
        raise UserError(f"--score={text}: no system has this name; the names are {', '.join(names)}.")
    return None, text


def _value(text: str) -> float:
    """Reads one accuracy."""
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        return _checked(number, text)
    path = as_path(text, "--score")
    if not path.is_file():
        raise UserError(f"--score={text}: this is neither a number nor a file.")
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"--score={text}: the file is not JSON ({error}).") from None
    found = _score_of(summary, text)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UserError(f"--score={text}: expected the summary.json of `vr-jax eval`, with a score or an average.")
    return _checked(float(found), text)


def _score_of(summary: Any, text: str) -> Any:
    """Returns the entry of a summary.json that should be its score, or None."""
    if not isinstance(summary, dict):
        return None
    if "average" not in summary:
        return summary.get("score")
    average = summary["average"]
    if average is None:
        missing = ", ".join(map(str, summary.get("missing") or ())) or "some"
        raise UserError(
            f"--score={text}: there is no average, because benchmarks are missing ({missing}); run them, or give the "
            "summary.json of one benchmark."
        )
    return average.get("score") if isinstance(average, dict) else None


def _checked(value: float, text: str) -> float:
    if not (math.isfinite(value) and 0 <= value <= 100):
        raise UserError(f"--score={text}: {value} is not a score from 0 to 100.")
    return value
