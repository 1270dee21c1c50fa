"""Texts as the page shows them."""

from __future__ import annotations

SHOWN = 2000  # The number of characters of a longer text that are shown.
NAME = 200  # The number of characters of a longer name that are shown.
DASH = "\N{EN DASH}"


def short_name(name: str) -> str:
    """Returns a name, or the beginning of a longer one. The filters of the page use the same short names."""
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def thousands(value: int) -> str:
    """Writes a number with a comma between thousands."""
    return f"{value:,}"
