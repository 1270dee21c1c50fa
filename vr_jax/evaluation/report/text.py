"""Any text made fit for an HTML page in UTF-8."""

from __future__ import annotations

import html
import re

SHOWN = 2000  # characters of a longer text that are shown
NAME = 200  # characters of a longer name
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def escape(text: object) -> str:
    """For element content and quoted attributes. Control characters are shown by their symbols, halves of characters
    (lone surrogates) and non-characters as U+FFFD."""
    return html.escape(_UNSHOWABLE.sub(_symbol, str(text).replace("\r\n", "\n")), quote=True)


def shortened(text: str, length: int = SHOWN) -> str:
    """Escaped; of a longer text the beginning, and how long it is."""
    if len(text) <= length:
        return escape(text)
    return f'{escape(text[:length])}… <small class="cut">(the first {length:,} of {len(text):,} characters)</small>'


def short_name(name: str) -> str:
    """Not escaped; the beginning of a longer name, which the filters of the page then go by."""
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def breakable(name: str) -> str:
    """Escaped and short; a name like `Basic_Medical_Science` may go on in the next line after an underscore."""
    return escape(short_name(name)).replace("_", "_<wbr>")


def number(value: int) -> str:
    return f"{value:,}"


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
