"""Relaxed accuracy (Masry et al. 2022), the metric of ChartQA."""

from __future__ import annotations

TOLERANCE = 0.05


def relaxed_match(prediction: str, answer: str) -> bool:
    """Says whether a prediction agrees with a reference answer.

    A number may differ from a non-zero reference by five percent of the reference. Everything else must be equal except
    for case. A text is a number if Python's `float` reads it, possibly without per-cent signs at its end.

    Source: docs/design/benchmarks.md#chartqa; lmms-eval 0.7.3, `lmms_eval/tasks/chartqa/utils.py:relaxed_correctness`.
    """
    found, wanted = _number(prediction), _number(answer)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
