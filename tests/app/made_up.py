"""A stand-in for a generator, which answers without a compiled program, and made-up weights of a prompt."""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tests.inference import tiny
from vr_jax.app import Loader, Settings, Variant
from vr_jax.data import tiling
from vr_jax.data.processor import Processor
from vr_jax.data.types import Example
from vr_jax.inference import Piece, Sampling
from vr_jax.model.config import VlmConfig
from vr_jax.model.refusion.vision_remember import Reread


class Echo:
    """Answers with what it was asked: the number of tiles and of tokens of the prompt, in three pieces.

    Attributes:
        model: Holds the config alone.
        compilations: Counts a program at the first question.
        before: Is called before each piece.
    """

    def __init__(self, config: VlmConfig, before: Callable[[int], None] = lambda number: None):
        self.model = types.SimpleNamespace(config=config)
        self.compilations: Counter[str] = Counter()
        self.before = before

    def pieces(self, prompt: Example, *, max_new_tokens: int, sampling: Sampling) -> Iterator[Piece]:
        texts = f"{len(prompt.tile_pixels)} tiles", f", {len(prompt.tokens)} tokens", f", t = {sampling.temperature}"
        for number, text in enumerate(texts):
            self.before(number)
            self.compilations["program"] = 1
            yield Piece(text, 4 * number + 1, ("length" if max_new_tokens == 9 else "stop") if number == 2 else None)


def loader(generator: Echo, loads: list[Variant] | None = None) -> Loader:
    """Loads a stand-in, and notes the variants."""

    @contextlib.contextmanager
    def load(variant: Variant):
        if loads is not None:
            loads.append(variant)
        yield generator, Processor(tiny.TOKENIZER, generator.model.config)

    return load


def settings(count: int = 1, **changes) -> Settings:
    """Settings for a number of models, without heat maps unless they are asked for."""
    given = {"max_new_tokens": 8, "sampling": Sampling(), "variants": (Variant(),) * count, "maps": False}
    return Settings(**given | changes)


def weights(config: VlmConfig, sizes: Sequence[tuple[int, int]], slots: int, seed: int = 0) -> tuple[Reread, ...]:
    """Random weights of a prompt with images of some sizes: one for each insertion, zero where there is no token."""
    assert config.refusion is not None
    rng = np.random.default_rng(seed)
    layouts = [tiling.layout(size, config, alone=len(sizes) == 1) for size in sizes]
    tiles, per_tile = sum(one.tiles for one in layouts), config.cells_per_tile
    seen, offset = np.zeros(tiles * per_tile, bool), 0
    for one in layouts:
        seen[one.cell[one.cell >= 0] + offset] = True
        offset += one.tiles * per_tile
    seen = seen.reshape(tiles, per_tile)
    found = []
    for _ in config.refusion.insert_after:
        values = rng.gamma(0.5, size=(tiles, per_tile, slots)).astype(np.float32) * seen[..., None]
        values /= np.maximum(values.sum(axis=-1, keepdims=True), 1e-9)
        found.append(Reread(weights=values, update=rng.uniform(0.1, 0.9, seen.shape).astype(np.float32) * seen))
    return tuple(found)
