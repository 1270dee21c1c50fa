"""Average normalised Levenshtein similarity (Biten et al. 2019), as lmms-eval computes it."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5  # a similarity below counts as nothing


def anls(prediction: str, answers: Sequence[str]) -> float:
    """0, or 0.5 to 1: the similarity with the closest answer.

    Case and white space are folded before the comparison, yet the distance is divided by the length of the longer
    unfolded text."""
    best = 1 - min((_distance(prediction, answer) for answer in answers), default=1.0)
    return best if best >= THRESHOLD else 0.0


def _distance(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return levenshtein(_folded(answer), _folded(prediction)) / length if length else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and replacements of characters between two texts.

    Myers 1999 in the form of Hyyro 2003: a column of the table is held as its differences, one bit per row; the whole
    column is one Python integer, so that texts of 100,000 characters take seconds."""
    if len(a) > len(b):
        a, b = b, a
    if not a:
        return len(b)
    rows: dict[str, int] = {}  # where each character stands in a
    for i, character in enumerate(a):
        rows[character] = rows.get(character, 0) | 1 << i
    last, mask = 1 << len(a) - 1, (1 << len(a)) - 1
    plus, minus, distance = mask, 0, len(a)  # rows where the column grows, where it falls, its last entry
    for character in b:
        equal = rows.get(character, 0)
        diagonal = (((equal & plus) + plus) ^ plus) | equal | minus
        grows = minus | (~(diagonal | plus) & mask)
        falls = plus & diagonal
        distance += bool(grows & last) - bool(falls & last)
        grows, falls = (grows << 1 | 1) & mask, (falls << 1) & mask
        vertical = equal | minus
        plus, minus = falls | (~(vertical | grows) & mask), grows & vertical
    return distance
