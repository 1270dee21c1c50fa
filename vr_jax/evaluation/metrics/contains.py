"""Whether a reply contains an answer, the metric of OCRBench (Liu et al. 2024)."""

from __future__ import annotations

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


def contains(prediction: str, answer: str) -> bool:
    """Says whether a reply contains an answer, whatever the case, line breaks and the width of characters.

    Source: docs/design/benchmarks.md#ocrbench; lmms-eval 0.7.3, `lmms_eval/tasks/ocrbench/utils.py`.
    """
    return folded(answer) in folded(prediction)


def folded(text: str) -> str:
    """Returns a text in lower case and on one line, with full-width characters as the usual ones."""
    return text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")
