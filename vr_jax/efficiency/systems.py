"""The systems that are measured: models of config files and model directories, all with the same kind of prompt."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vr_jax.data import slices
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Example, Turn
from vr_jax.errors import ConfigError, UserError
from vr_jax.experiments import IMAGES
from vr_jax.hub import local_folder
from vr_jax.inference import user_turn, with_pruning
from vr_jax.model.batch import NO_CELL
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model_directory import read_config
from vr_jax.settings import load_config, split_variant

# This choice of an image layout keeps that of each config.
CONFIG = "config"
IMAGE_CHOICES = (*IMAGES, CONFIG)

# The remedies for models whose images are not cut into square tiles.
_OWN_LAYOUT = "; measure this model with --image=config, the layout of its own config"
_OWN_SIZE = "; give the size of the image to measure with --image=config --image_size=WIDTHxHEIGHT"

Kind = Literal["config", "checkpoint"]


@dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
        kind: "config" for a config file, whose model gets random weights, or "checkpoint" for a model directory.
        text: FILE or FILE:VARIANT of a config, or the path of a model directory.
    """

    kind: Kind
    text: str


@dataclass(frozen=True)
class System:
    """A model to measure.

    Attributes:
        name: The name in tables.
        source: The origin of the model.
        config: The config of the model, with the image layout and the pruner of the measurement.
    """

    name: str
    source: Source
    config: VlmConfig


def read_systems(sources: Sequence[Source], image: str) -> list[System]:
    """Reads the configs of the models.

    Args:
        sources: The origins of the models.
        image: The image layout, one of `IMAGE_CHOICES`, with tiles of each model's own size.

    Returns:
        The systems in the order of the sources. A model of a config file has the pruner that its `eval` section names.

    Raises:
        UserError: There is no source, one is given twice, or one cannot be read.
        ConfigError: A config file is wrong, or a model does not work with the image layout.
    """
    if not sources:
        raise UserError("There is nothing to measure: give --config=FILE[:VARIANT], several times to compare.")
    names = _names(sources)
    return [System(name, source, _config(source, image)) for name, source in zip(names, sources, strict=True)]


def _names(sources: Sequence[Source]) -> list[str]:
    """Names the systems by variant, file or folder; by a longer part of the source if that is not unique."""
    if repeated := [source.text for source, count in Counter(sources).items() if count > 1]:
        raise UserError(f"{repeated[0]} is given twice; give every model once.")

    def candidates(source: Source) -> tuple[str, str, str]:
        if source.kind == "checkpoint":
            parts = pathlib.PurePath(source.text).parts
            return "/".join(parts[-2:]), "/".join(parts[-3:]), source.text
        file, _, variant = split_variant(source.text)
        stem = pathlib.PurePath(file).stem
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
    """Reads the config of a model, and sets its image layout and its pruner."""
    pruning: str | Mapping[str, Any] | None = None
    if source.kind == "checkpoint":
        folder = local_folder(source.text)
        if not folder.is_dir():
            raise UserError(f"{source.text} is not a model directory: there is no such folder.")
        config = read_config(folder)
    else:
        settings = load_config(source.text)
        config, pruning = settings.model, settings.eval.pruning
    try:
        if image != CONFIG:
            config = dataclasses.replace(config, image=IMAGES[image](config.image.tile_size))
        # The pruner is set last, because it may change the image layout.
        return with_pruning(config, pruning)
    except ConfigError as error:
        layout = "square" if image == CONFIG else config.encoder.layout
        if layout == "square":
            raise ConfigError(f"{source.text} with --image={image}: {error}") from error
        # The error would advise to change the config, and only the flag is wrong.
        remedy = _OWN_SIZE if layout == "windows" else _OWN_LAYOUT
        raise ConfigError(
            f"{source.text} with --image={image}: its encoder {config.encoder.name!r} reads no square tiles{remedy}"
        ) from error


def image_size(image: ImageConfig) -> tuple[int, int]:
    """Returns the (width, height) in pixels of an image that fills the largest grid of a layout without padding.

    The grid nearest to a square is taken among equally large ones: 2 x 2 tiles for AnyRes4, 3 x 3 tiles for AnyRes9.
    An image of slices is cut into the most pieces.

    Raises:
        UserError: The layout keeps the sizes of images, so that none is the largest.
    """
    if image.aspect_ratio == "native":
        raise UserError(f"the model keeps the sizes of images{_OWN_SIZE}")
    if image.aspect_ratio == "slices":
        return slices.largest_size(image)
    grid = (
        max(image.grids, key=lambda grid: (grid[0] * grid[1], -abs(grid[0] - grid[1]))) if image.is_anyres else (1, 1)
    )
    return grid[0] * image.tile_size, grid[1] * image.tile_size


def prompt(processor: Processor, text_tokens: int, size: tuple[int, int] | None = None, seed: int = 0) -> Example:
    """Prepares a question about an image of noise.

    Args:
        processor: The processor of the model.
        text_tokens: The number of tokens that are not the image's, those of the chat template included.
        size: The (width, height) of the image, or None for the largest that the model's layout has (`image_size`).
        seed: The seed of the image.

    Raises:
        UserError: The template needs more tokens, or the model has no tiles for the size.
    """

    def turn(digits: int) -> Turn:
        # Each digit is one token, in Qwen2's tokenizer as well as in the demo's.
        text = "".join(str(number % 10) for number in range(digits))
        return user_turn(text, 1, processor.encoder.separators)

    width, height = size or image_size(processor.config.image)
    try:
        (layout,) = processor.layouts([(width, height)])
    except SkipRecord as error:
        raise UserError(f"--image_size={width}x{height}: {error.detail}") from error
    # The image's place in the text is one token, and its layout may bring markers, which are text.
    markers = 0 if layout.marker is None else int(np.count_nonzero(layout.marker))
    least = len(processor.encoder.prompt((turn(1),)).tokens) - 1 + markers
    if text_tokens < least:
        raise UserError(f"text_tokens = {text_tokens}: the chat template and one digit need {least}.")
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    example = processor.prompt(Conversation("prompt", (turn(text_tokens - least + 1),), (file.getvalue(),)))
    found = int(np.sum(~is_vision(example)))
    if found != text_tokens:
        raise UserError(f"The tokenizer encodes a question of {text_tokens} expected tokens as {found} tokens.")
    return example


def is_vision(example: Example) -> Bool[np.ndarray, " n"]:
    """Marks the tokens of a prompt that belong to the image: cells and newlines."""
    return example.vision_cell != NO_CELL
