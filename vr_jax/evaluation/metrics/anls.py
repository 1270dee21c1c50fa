"""Average normalised Levenshtein similarity (ANLS; Biten et al. 2019), the metric of DocVQA."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Scores a prediction by its similarity to the closest reference answer.

    The similarity is 1 minus the edit distance divided by the length of the longer text. A similarity below
    `THRESHOLD` counts as 0. lmms-eval ignores case and the amount of white space in the distance, but divides by the
    length of the texts as they are, in upper case ("ß" then counts as two characters). This function does the same.

    Args:
        prediction: The text that the model answered.
        answers: The reference answers.

    Returns:
        0, or a similarity from 0.5 to 1. Without reference answers, 0.

    Source: lmms-eval 0.7.3, `lmms_eval/api/metrics.py:anls`.
    """
    best = 1 - min((_normalised_distance(prediction, answer) for answer in answers), default=1.0)
    return best if best >= THRESHOLD else 0.0


def _normalised_distance(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return Levenshtein.distance(_folded(answer), _folded(prediction)) / length if length else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())
