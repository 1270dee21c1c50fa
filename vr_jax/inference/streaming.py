"""Token ids in, text pieces out, without ever cutting a character in two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

REPLACEMENT = "�"  # what a decoder shows for bytes that are no character (yet)


def decode_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of generated tokens: special tokens are left out, white space stays as it is."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Decodes tokens as they come. The pieces of `push` and `finish`, joined, are `decode_text` of all tokens.

    A byte-level token may end inside a character: such an end is held back until it is complete. Only the tokens since
    the last complete text are decoded again, so the work per token does not grow with the answer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._context: list[int] = []  # already shown; decoders may treat a first token differently
        self._pending: list[int] = []

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; "" while a character is incomplete."""
        self._pending += tokens
        # At most three tokens of one byte each can belong to an incomplete character.
        for end in range(len(self._pending), max(len(self._pending) - 4, 0), -1):
            text = self._text(self._pending[:end])
            if text and not text.endswith(REPLACEMENT):
                self._context, self._pending = self._pending[:end], self._pending[end:]
                return text
        return ""

    def finish(self) -> str:
        """What was held back, as it stands: bytes that never became a character show as U+FFFD."""
        text, self._pending = self._text(self._pending), []
        return text

    def _text(self, tokens: list[int]) -> str:
        known = decode_text(self.tokenizer, self._context)
        return decode_text(self.tokenizer, self._context + tokens)[len(known) :]
