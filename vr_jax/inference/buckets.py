"""The few static lengths that prompts are padded to, so that few shapes are compiled."""

from __future__ import annotations

from dataclasses import dataclass


class PromptTooLong(ValueError):
    """A prompt with more tokens or tiles than the largest bucket; one line for the user."""


@dataclass(frozen=True)
class Buckets:
    """Allowed numbers of token slots and tile slots of a prompt, ascending.

    Tokens grow by at most a half, which bounds the padding. Tiles are exact up to ten (anyres with nine), because an
    unused tile slot still runs through the encoder.

    Raises ValueError unless both are strictly increasing and positive."""

    tokens: tuple[int, ...] = (
        64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768,
    )  # fmt: skip
    tiles: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 40, 48, 64)

    def __post_init__(self):
        for name in ("tokens", "tiles"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"buckets.{name} = {sizes}: expected at least one, positive, strictly increasing")

    @property
    def max_tokens(self) -> int:
        return self.tokens[-1]

    @property
    def max_tiles(self) -> int:
        return self.tiles[-1]

    def fit(self, tokens: int, tiles: int) -> tuple[int, int]:
        """The smallest bucket that holds a prompt. Raises PromptTooLong."""
        return self.fit_tokens(tokens), _smallest(self.tiles, tiles, "tiles")

    def fit_tokens(self, tokens: int) -> int:
        """The smallest number of slots that holds so many tokens. Raises PromptTooLong."""
        return _smallest(self.tokens, tokens, "tokens")


def _smallest(sizes: tuple[int, ...], needed: int, what: str) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise PromptTooLong(f"a prompt of {needed} {what}, the largest bucket holds {sizes[-1]}")
