"""The few static lengths that prompts are padded to, so that few shapes are compiled."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from vr_jax.errors import UserError
from vr_jax.fields import Config, PositiveInt, check
from vr_jax.model.config import VlmConfig

# The tile slots of models that keep the sizes of images. A tile is then a small window, of which an image of 12.8
# million pixels has 1,024, or up to 1,359 if it is long and thin. The number of slots grows by at most a half above 8.
_NATIVE_TILES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)


class PromptTooLong(UserError):  # the name of the reason that evaluation counts
    """A prompt has more tokens or tiles than the largest bucket. Evaluation counts such a prompt and goes on."""


@dataclass(frozen=True)
class Buckets(Config):
    """The numbers of token slots and tile slots that a batch of prompts may have.

    Token slots grow by at most a half from one bucket to the next, which bounds the padding. Tile slots are exact up to
    ten (an image with nine tiles and its overview), because an unused tile slot still runs through the encoder. Models
    that keep the sizes of images have other numbers of tile slots (`of`).

    Attributes:
        tokens: Increasing numbers of token slots.
        tiles: Increasing numbers of tile slots.

    Raises:
        ConfigError: The numbers are not positive or not strictly increasing.
    """

    tokens: tuple[PositiveInt, ...] = (
        64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768,
    )  # fmt: skip
    tiles: tuple[PositiveInt, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 40, 48, 64)

    def __post_init__(self) -> None:
        """Checks that the sizes increase."""
        super().__post_init__()
        for name in ("tokens", "tiles"):
            sizes = getattr(self, name)
            increasing = bool(sizes) and all(low < high for low, high in itertools.pairwise(sizes))
            check(increasing, f"Buckets.{name} = {sizes}: expected at least one number, strictly increasing")

    @classmethod
    def of(cls, config: VlmConfig) -> Buckets:
        """Returns the buckets for the prompts of a model.

        Args:
            config: The model.
        """
        return cls(tiles=_NATIVE_TILES) if config.image.aspect_ratio == "native" else cls()

    @property
    def max_tokens(self) -> int:
        """The number of token slots of the largest bucket."""
        return self.tokens[-1]

    @property
    def max_tiles(self) -> int:
        """The number of tile slots of the largest bucket."""
        return self.tiles[-1]

    def fit(self, tokens: int, tiles: int) -> tuple[int, int]:
        """Returns the token slots and tile slots of the smallest bucket that holds a prompt.

        Raises:
            PromptTooLong: The prompt is larger than the largest bucket.
        """
        return self.fit_tokens(tokens), _smallest(self.tiles, tiles, "tiles")

    def fit_tokens(self, tokens: int) -> int:
        """Returns the smallest number of token slots that holds so many tokens.

        Raises:
            PromptTooLong: There are more tokens than the largest bucket has slots.
        """
        return _smallest(self.tokens, tokens, "tokens")


def _smallest(sizes: tuple[int, ...], needed: int, what: str) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise PromptTooLong(f"a prompt of {needed} {what}, the largest bucket holds {sizes[-1]}")
