"""Equality of texts up to case and ASCII punctuation, the metric of GQA, AI2D and ScienceQA."""

from __future__ import annotations

import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, reference: str) -> bool:
    """Says whether two texts are equal once case and the 32 ASCII punctuation characters are removed.

    Articles, number words, inner spaces and typographic punctuation are compared as they are.

    Source: `exact_match` of Hugging Face `evaluate`, which lmms-eval 0.7.3 calls.
    """
    return _folded(prediction) == _folded(reference)


def _folded(text: str) -> str:
    # The reference implementation holds the texts in NumPy arrays of fixed-width strings. NumPy drops NUL characters at
    # the end, and it cuts off the character that lower-casing adds to a text (only U+0130 becomes longer).
    text = text.rstrip("\0")
    return text.lower()[: len(text)].translate(_PUNCTUATION).rstrip("\0")
