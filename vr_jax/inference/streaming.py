"""Decodes generated tokens to text, whole or piece by piece, without cutting a character in two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

REPLACEMENT = "�"  # U+FFFD stands for bytes that are not, or not yet, a character


@dataclass(frozen=True)
class Piece:
    """What one step of decoding added to an answer.

    Attributes:
        text: The new text, which never ends inside a character. It is empty while a character is incomplete.
        tokens: The number of tokens of the answer so far, without the stop token.
        finish: None while the answer goes on; in the last piece "stop" if a stop token ended the answer, and "length"
            if the limit did.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


def decode_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Returns the text of generated tokens, without special tokens and with white space as it is."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Decodes tokens as they come.

    Joined, the pieces of `push` and `finish` are `decode_text` of all tokens. A byte-level token may end inside a
    character; it is held back until the character is complete. Only the tokens since the last complete text are decoded
    again, so that the work for a token does not grow with the answer.
    """

    def __init__(self, tokenizer: Any):
        """Starts with no tokens.

        Args:
            tokenizer: A Hugging Face tokenizer.
        """
        self.tokenizer = tokenizer
        # These tokens were returned already. They are decoded again with the next ones, because a tokenizer may treat
        # the first token of a text differently.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete, which is empty while a character is incomplete."""
        self._pending += tokens
        # At most three tokens of one byte each can belong to an incomplete character.
        for end in range(len(self._pending), max(len(self._pending) - 4, 0), -1):
            text = self._text(self._pending[:end])
            if text and not text.endswith(REPLACEMENT):
                self._context, self._pending = self._pending[:end], self._pending[end:]
                return text
        return ""

    def finish(self) -> str:
        """Returns what was held back; bytes that never became a character are U+FFFD."""
        text, self._pending = self._text(self._pending), []
        return text

    def _text(self, tokens: list[int]) -> str:
        known = decode_text(self.tokenizer, self._context)
        return decode_text(self.tokenizer, self._context + tokens)[len(known) :]
