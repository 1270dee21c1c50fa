"""What is measured: models from config files and checkpoints, all with the same kind of prompt."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vr_jax.data.processor import Processor
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.efficiency.results import EfficiencyError
from vr_jax.errors import ConfigError
from vr_jax.experiments import IMAGES
from vr_jax.inference import user_turn, with_pruning
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model_directory import read_config
from vr_jax.settings import load_config

CONFIG = "config"  # --image: as the config has it
IMAGE_CHOICES = (*IMAGES, CONFIG)


Kind = Literal["config", "checkpoint"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a config file (FILE[:VARIANT], random weights) or a model directory."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class System:
    """One model to measure, under the name that tables show."""

    name: str
    source: Source
    config: VlmConfig


def systems(sources: Sequence[Source], image: str) -> list[System]:
    """The models of `sources` in their order, each with the image layout `image` (a key of IMAGES, or CONFIG) for
    tiles of its own size, and with the pruner that a config's `eval` section names.

    Raises EfficiencyError for no source or one given twice, ModelDirectoryError, and ConfigError for a config file or a
    model that does not work with that layout."""
    if not sources:
        raise EfficiencyError("nothing to measure: give --config=FILE[:VARIANT] (several times to compare)")
    names = _names(sources)
    return [System(name, source, _config(source, image)) for name, source in zip(names, sources, strict=True)]


def _names(sources: Sequence[Source]) -> list[str]:
    """The shortest of: variant, or what a file or folder is called; the same with its file; all of it."""
    if repeated := [source.text for source, count in Counter(sources).items() if count > 1]:
        raise EfficiencyError(f"{repeated[0]} is given twice")

    def candidates(source: Source) -> tuple[str, str, str]:
        if source.kind == "checkpoint":
            parts = Path(source.text).parts
            return "/".join(parts[-2:]), "/".join(parts[-3:]), source.text
        file, _, variant = source.text.partition(":")
        stem = Path(file).stem
        return variant or stem, f"{stem}:{variant}" if variant else stem, source.text

    names = [candidates(source)[0] for source in sources]
    for longer in (1, 2):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else candidates(source)[longer]
            for name, source in zip(names, sources, strict=True)
        ]
    return names


def _config(source: Source, image: str) -> VlmConfig:
    pruning: str | Mapping[str, Any] | None = None
    if source.kind == "checkpoint":
        if not Path(source.text).is_dir():
            raise EfficiencyError(f"{source.text} is not a model directory: there is no such folder")
        config = read_config(source.text)
    else:
        settings = load_config(source.text)
        config, pruning = settings.model, settings.eval.pruning
    try:
        if image != CONFIG:
            config = dataclasses.replace(config, image=IMAGES[image](config.image.tile_size))
        # A pruner comes last: it may lay images out in its own way.
        return with_pruning(config, pruning)
    except ConfigError as error:
        raise ConfigError(f"{source.text} with --image={image}: {error}") from error


def image_size(image: ImageConfig) -> tuple[int, int]:
    """(width, height) in pixels of an image that fills the layout's largest grid, of equals the squarest: 2 x 2 tiles
    under AnyRes4, 3 x 3 under AnyRes9. Nothing of it is padding."""
    grid = (
        max(image.grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1]))) if image.is_anyres else (1, 1)
    )
    return grid[0] * image.tile_size, grid[1] * image.tile_size


def prompt(processor: Processor, text_tokens: int, seed: int = 0) -> Example:
    """A question of noise about an image of noise: `text_tokens` tokens that are not the image's, the chat template
    among them. Raises EfficiencyError for fewer than the template needs."""

    def turn(digits: int) -> Turn:
        # One token per digit, in Qwen2's tokenizer as in the demo's.
        return user_turn("".join(str(number % 10) for number in range(digits)), 1)

    least = len(processor.encoder.prompt((turn(1),), has_image=True).tokens) - 1
    if text_tokens < least:
        raise EfficiencyError(f"text_tokens = {text_tokens}: the chat template and one digit take {least}")
    width, height = image_size(processor.config.image)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    example = processor.prompt(Conversation("prompt", (turn(text_tokens - least + 1),), (file.getvalue(),)))
    found = int(np.sum(~is_vision(example)))
    if found != text_tokens:
        raise EfficiencyError(f"the tokenizer makes {found} tokens of a question that should have {text_tokens}")
    return example


def is_vision(example: Example) -> Bool[np.ndarray, " n"]:
    """Which tokens of a prompt are the image's: cells and newlines."""
    return example.vision_cell != NO_CELL
