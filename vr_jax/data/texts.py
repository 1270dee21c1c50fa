"""Texts that come from outside: which ones a tokenizer can encode, and where `<image>` in them stands for an image.

Only formats that write a message as one text have placeholders: LLaVA's JSON, and the prompts of lmms-eval. In all
other places a text that reads `<image>` is text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, IMAGE_PLACEHOLDER, Part

_PLACEHOLDER = re.compile(re.escape(IMAGE_PLACEHOLDER))


def check_text(value: object, name: str) -> str:
    """Returns a text after checking that a tokenizer can encode it.

    Args:
        value: The text.
        name: What the text is, as the beginning of a sentence.

    Raises:
        SkipRecord: "malformed_record" if the value is not a text, or if the text contains half of a surrogate pair,
            which JSON can express and UTF-8 cannot, or the character NUL, at which C code ends a text.
    """
    if not isinstance(value, str):
        found = "absent" if value is None else f"a value of type {type(value).__name__}"
        raise SkipRecord("malformed_record", f"{name} is {found}, but must be a str.")
    if "\0" in value:
        raise SkipRecord("malformed_record", f"{name} contains the character NUL (U+0000) at {value.index(chr(0))}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(value[error.start]):04X}"
            detail = f"{name} is not valid Unicode: it contains half of a surrogate pair, {half}, at {error.start}."
            raise SkipRecord("malformed_record", detail) from error
    return value


def place_images(texts: Sequence[str], images: int) -> list[tuple[Part, ...]]:
    """Reads the placeholders `<image>` of messages in a format that writes them into the text.

    If the texts have at most as many `<image>` as there are images, each of them is a placeholder. If they have more,
    those that stand alone, at the beginning of a message or on a line of their own, are placeholders, then those inside
    sentences in their order as long as there are images for them; the others are text. So "What does <image> mean?" is
    a question about text where there is no image, and a placeholder that stands alone never loses its meaning: without
    an image for it the numbers differ, which is an error.

    Args:
        texts: The messages.
        images: The number of images that belong to them.

    Returns:
        The parts of each message.
    """
    found = [(k, match) for k, text in enumerate(texts) for match in _PLACEHOLDER.finditer(text)]
    alone = {(k, match.start()) for k, match in found if _stands_alone(match)}
    inside = [(k, match.start()) for k, match in found if (k, match.start()) not in alone]
    placeholders = alone | set(inside[: max(0, images - len(alone))])
    result = []
    for k, text in enumerate(texts):
        parts: list[Part] = []
        begin = 0
        for match in _PLACEHOLDER.finditer(text):
            if (k, match.start()) in placeholders:
                parts += [text[begin : match.start()], IMAGE]
                begin = match.end()
        result.append((*parts, text[begin:]))
    return result


def _stands_alone(match: re.Match[str]) -> bool:
    """Returns whether only white space and other placeholders stand before it, or beside it on its line."""
    text, begin, end = match.string, match.start(), match.end()
    line_begin = text.rfind("\n", 0, begin) + 1
    line_end = text.find("\n", end)
    beside = text[line_begin:begin] + text[end : len(text) if line_end < 0 else line_end]
    return _is_blank(beside) or _is_blank(text[:begin])


def _is_blank(text: str) -> bool:
    return not text.replace(IMAGE_PLACEHOLDER, "").strip()
