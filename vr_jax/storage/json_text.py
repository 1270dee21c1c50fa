"""JSON of which nothing is lost: Python's own reader takes the last of two equal keys without a word."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKey(ValueError):
    """A key stands twice in one object."""


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        RepeatedKey: A key stands twice in one object.
        ValueError: The text is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKey(f"it has the key {repeated[:80]!r} twice in one object; keep one of them")
    return values
