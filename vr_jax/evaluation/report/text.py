"""Texts as the page shows them."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

SHOWN = 2000  # The number of characters of a longer text that are shown.
NAME = 200  # The number of characters of a longer name that are shown.
DASH = "\N{EN DASH}"
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def showable(value: Any) -> Any:
    """Replaces the characters of a text that an HTML page in UTF-8 cannot hold.

    Control characters are shown by their symbols. Halves of surrogate pairs and non-characters become U+FFFD. The
    template engine calls this function on every value before it escapes the value.

    Args:
        value: A value of a template. Markup is returned as it is.
    """
    if isinstance(value, Markup):
        return value
    return _UNSHOWABLE.sub(_symbol, str(value).replace("\r\n", "\n"))


def short_name(name: str) -> str:
    """Returns a name, or the beginning of a longer one. The filters of the page use the same short names."""
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def thousands(value: int) -> str:
    """Writes a number with a comma between thousands."""
    return f"{value:,}"


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
