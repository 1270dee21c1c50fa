"""Equality but for case and ASCII punctuation: `exact_match` of lmms-eval, from Hugging Face `evaluate`."""

from __future__ import annotations

import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, reference: str) -> bool:
    """Nothing else is normalised: neither articles and number words nor inner spaces and typographic punctuation."""
    return _folded(prediction) == _folded(reference)


def _folded(text: str) -> str:
    # The reference works on NumPy's fixed-width strings: NUL at the end does not exist there, and what lower-casing
    # adds (only U+0130 grows) is cut off again.
    text = text.rstrip("\0")
    return text.lower()[: len(text)].translate(_PUNCTUATION).rstrip("\0")
