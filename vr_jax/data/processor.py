"""Conversion of a conversation to an `Example`: text to tokens, images to tiles, placeholders to vision tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import UInt8
from PIL.Image import Image

from vr_jax.data import tiling
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder, TextPool, TokenisedConversation
from vr_jax.data.images import MAX_PIXELS, decode_rgb, open_image, size_of
from vr_jax.data.layouts import TokenLayout, written
from vr_jax.data.positions import multi_axis_positions
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE_PLACEHOLDER, Conversation, Example, Marker
from vr_jax.errors import ConfigError
from vr_jax.fields import check_value
from vr_jax.model.batch import NO_CELL, BatchShape
from vr_jax.model.config import Template, VlmConfig

logger = logging.getLogger("vr_jax.data")


@functools.cache  # A processor is copied with other limits, and each is said once.
def say_missing_markers(template: str, missing: str, mode: str, own: str) -> None:
    """Warns that a chat format has no tokens for some markers of an image mode, whose own format is `own`."""
    logger.warning(
        "The chat format %r has no token for %s, which stand beside the vision tokens of the image mode %r, so they "
        "are left out. A released model was trained with them; its format is model.template = %r.",
        template,
        missing,
        mode,
        own,
    )


@dataclass(frozen=True)
class Processor:
    """Prepares samples for one model. It can be pickled, so that worker processes can use it.

    Attributes:
        tokenizer: A Hugging Face fast tokenizer.
        config: The model.
        template: The format of the text: "chat" (the model's own, `config.template`) or "plain" (captions).
        label_quirk: Whether the targets are exactly those of LLaVA's code; see `ChatEncoder`.
        max_tokens: The largest number of tokens of a sample; None allows any number.
        max_tiles: The largest number of tiles of a sample; None allows any number.
        max_pixels: The largest number of pixels of an image. Larger ones are treated as decompression bombs.
        rotate: Whether images are turned as their EXIF orientation says, which LLaVA does not.
        encoder: The encoder of the text, made from the other attributes.

    Raises:
        UserError: The tokenizer cannot write the template.
        ConfigError: The tokenizer has more tokens than the model's vocabulary.
    """

    tokenizer: Any = field(repr=False)
    config: VlmConfig
    template: Literal["chat", "plain"] = "chat"
    label_quirk: bool = True
    max_tokens: int | None = None
    max_tiles: int | None = None
    max_pixels: int | None = MAX_PIXELS
    rotate: bool = False

    encoder: ChatEncoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Makes the encoder and checks the vocabulary."""
        pool = cast(TextPool, self.config.text_pool)
        model = self.config.template
        template: Template | Literal["plain"] = model if self.template == "chat" else "plain"
        check_value(Literal["chat", "plain"], self.template, "template")
        encoder = ChatEncoder(self.tokenizer, template, self.label_quirk, pool, markers_of=model)
        object.__setattr__(self, "encoder", encoder)
        self._say_missing_markers()
        if len(self.tokenizer) > self.config.decoder.vocab_size:
            raise ConfigError(
                f"decoder.vocab_size = {self.config.decoder.vocab_size}: the tokenizer has {len(self.tokenizer)} "
                "tokens; use the model's own tokenizer, or a larger vocabulary"
            )

    def _say_missing_markers(self) -> None:
        """Warns where the model's chat format has no tokens for what stands beside the vision tokens of its images."""
        mode = self.config.image.aspect_ratio
        markers, template = tiling.MARKERS.get(mode, ((), ""))
        if missing := [marker.name.lower() for marker in markers if marker not in self.encoder.markers]:
            say_missing_markers(self.config.template, ", ".join(missing), mode, template)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the Hugging Face tokenizer, because the encoder has all that preparing samples needs."""
        return self.__dict__ | {"tokenizer": None}

    def limited_to(self, shape: BatchShape) -> Processor:
        """Returns a processor that skips samples which do not fit into one row of `shape`."""
        return dataclasses.replace(self, max_tokens=shape.tokens, max_tiles=shape.tiles)

    def example(self, conversation: Conversation) -> Example:
        """Prepares a training sample.

        Raises:
            SkipRecord: The sample cannot be used.
        """
        return self._build(conversation, self.encoder.sample)

    def prompt(self, conversation: Conversation) -> Example:
        """Prepares a question to the model. It ends with the assistant's header, and no token is a target.

        A final turn of the assistant is left out.

        Raises:
            SkipRecord: The sample cannot be used.
        """
        return self._build(conversation, self.encoder.prompt)

    def size(self, conversation: Conversation) -> tuple[int, int]:
        """Returns the numbers of tokens and tiles of `example(conversation)` without decoding an image.

        Raises:
            SkipRecord: The sample cannot be used. A damage that only decoding reveals is not found.
        """
        with contextlib.ExitStack() as stack:
            text, _, layouts = self._laid_out(conversation, self.encoder.sample, stack)
            return _length(text, layouts), sum(one.tiles for one in layouts)

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> list[TokenLayout]:
        """Lays out the images of a sample, with those markers that the model's chat format has.

        Args:
            sizes: The (width, height) of each image.

        Raises:
            SkipRecord: The model has no tiles for an image of such a size.
        """
        laid_out = [tiling.layout(size, self.config, alone=len(sizes) == 1) for size in sizes]
        return [written(one, self.encoder.markers) for one in laid_out]

    def _build(self, conversation: Conversation, encode: Callable[..., TokenisedConversation]) -> Example:
        config = self.config
        alone = len(conversation.images) == 1
        with contextlib.ExitStack() as stack:
            text, opened, layouts = self._laid_out(conversation, encode, stack)
            pixels = [self._tiles(image, alone) for image in opened]
        side, fields = config.image.tile_size, config.batch_fields
        tiled = {
            f"tile_{name}": np.concatenate([np.zeros((0, 2), np.int32), *(getattr(one, name) for one in layouts)])
            for name in ("extent", "origin")
            if f"tile_{name}" in fields
        }
        return Example(
            id=conversation.id,
            tile_pixels=pixels[0] if alone else np.concatenate([np.zeros((0, side, side, 3), np.uint8), *pixels]),
            tile_image=np.repeat(np.arange(1, len(layouts) + 1, dtype=np.int32), [one.tiles for one in layouts]),
            cells_per_tile=config.cells_per_tile,
            source=conversation.source,
            **tiled,
            **splice(
                text,
                layouts,
                self.encoder.pad_id,
                config.cells_per_tile,
                markers=self.encoder.markers,
                weighted="vision_cells" in fields,
                multi_axis="grid_positions" in fields,
            ),
        )

    def _tiles(self, image: Image, alone: bool) -> UInt8[np.ndarray, "t H W 3"]:
        """Decodes an image, cuts it into tiles, and frees its memory."""
        with contextlib.closing(image):
            return tiling.tiles(decode_rgb(image, rotate=self.rotate), self.config, alone=alone)

    def _laid_out(
        self, conversation: Conversation, encode: Callable[..., TokenisedConversation], stack: contextlib.ExitStack
    ) -> tuple[TokenisedConversation, list[Image], list[TokenLayout]]:
        """Returns the text, the opened images, which `stack` closes, and their vision tokens."""
        images = conversation.images
        text = encode(conversation.turns)
        self._check_count(conversation, text)
        opened = [stack.enter_context(open_image(image, max_pixels=self.max_pixels)) for image in images]
        sizes = [size_of(image, rotate=self.rotate) for image in opened]
        layouts = self.layouts(sizes)
        self._check_size(text, layouts)
        return text, opened, layouts

    def _check_count(self, conversation: Conversation, text: TokenisedConversation) -> None:
        """Checks that there is one placeholder for each image."""
        placeholders = int(np.count_nonzero(text.tokens == IMAGE_TOKEN))
        if placeholders != len(conversation.images):
            raise SkipRecord(
                "image_count",
                f"The sample has {len(conversation.images)} image(s), but its messages have {placeholders} place(s) "
                f"for images, which LLaVA's format writes as {IMAGE_PLACEHOLDER}; the numbers must be equal.",
            )

    def _check_size(self, text: TokenisedConversation, layouts: Sequence[TokenLayout]) -> None:
        """Checks that the sample fits into a row."""
        check_room(_length(text, layouts), sum(one.tiles for one in layouts), self.max_tokens, self.max_tiles)


def check_room(tokens: int, tiles: int, max_tokens: int | None, max_tiles: int | None) -> None:
    """Checks that a sample fits into a row.

    Args:
        tokens: The number of tokens of the sample.
        tiles: The number of its tiles.
        max_tokens: The largest number of tokens; None allows any number.
        max_tiles: The largest number of tiles; None allows any number.

    Raises:
        SkipRecord: "too_long" or "too_many_tiles".
    """
    if max_tokens is not None and tokens > max_tokens:
        raise SkipRecord("too_long", f"The sample has {tokens} tokens, but a row has room for {max_tokens}.")
    if max_tiles is not None and tiles > max_tiles:
        raise SkipRecord("too_many_tiles", f"The sample has {tiles} tiles, but a row has room for {max_tiles}.")


def _length(text: TokenisedConversation, layouts: Sequence[TokenLayout]) -> int:
    """Returns the number of tokens after each placeholder is replaced by its vision tokens."""
    return len(text.tokens) + sum(len(one.cell) - 1 for one in layouts)


def splice(
    text: TokenisedConversation,
    layouts: Sequence[TokenLayout],
    pad_id: int,
    cells_per_tile: int,
    *,
    markers: Mapping[Marker, int],
    weighted: bool = False,
    multi_axis: bool = False,
) -> dict[str, np.ndarray]:
    """Replaces each IMAGE_TOKEN of the text by the vision tokens of its image.

    Args:
        text: The tokens and masks of the text.
        layouts: The vision tokens of each image, in the order of the IMAGE_TOKENs.
        pad_id: The id that vision tokens have.
        cells_per_tile: The number of compressed cells of a tile.
        markers: The id of each marker that a layout may have.
        weighted: Whether to return the four cells and weights of every token, too. A token of one cell then has the
            weight 1 for that cell.
        multi_axis: Whether to return the three axes of rotary positions.

    Returns:
        The token-wise fields of an `Example` by name.
    """
    placeholder = text.tokens == IMAGE_TOKEN
    lengths = np.ones(len(text.tokens), np.int64)
    lengths[placeholder] = [len(one.cell) for one in layouts]
    source = np.repeat(np.arange(len(text.tokens)), lengths)
    vision = placeholder[source]
    bases = np.cumsum([0, *(one.tiles for one in layouts)], dtype=np.int32) * cells_per_tile
    cell = np.full(len(source), NO_CELL, np.int32)
    tokens = np.where(vision, np.int32(pad_id), text.tokens[source])
    if layouts:
        cell[vision] = np.concatenate(
            [np.where(one.cell >= 0, one.cell + base, one.cell) for one, base in zip(layouts, bases, strict=False)]
        )
    starts = np.cumsum(np.append(0, lengths))[np.flatnonzero(placeholder)]
    for start, one in zip(starts.tolist(), layouts, strict=False):
        if one.marker is not None:
            at = np.flatnonzero(one.marker)
            tokens[start + at] = [markers[Marker(number)] for number in one.marker[at].tolist()]
    fields = {
        "tokens": tokens,
        "loss_mask": text.loss_mask[source],
        "text_token_mask": text.text_token_mask[source],
        "vision_cell": cell,
    }
    if multi_axis:
        images = list(zip(starts.tolist(), layouts, strict=False))
        fields["positions"] = multi_axis_positions(images, len(source))
    if weighted:
        fields["vision_cells"] = np.repeat(np.maximum(cell, 0)[:, None], 4, axis=1)
        fields["vision_weights"] = (cell[:, None] >= 0) * np.asarray([[1, 0, 0, 0]], np.float32)
        for start, one, base in zip(starts.tolist(), layouts, bases, strict=False):
            if one.cells is not None and one.weights is not None:
                slot = slice(start, start + len(one.cell))
                fields["vision_cells"][slot] = np.where(one.cell[:, None] >= 0, one.cells + base, 0)
                fields["vision_weights"][slot] = one.weights
    return fields
