"""The forms that a sample takes on its way from a file to a batch: conversation, example, host batch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vr_jax.model.batch import Batch
from vr_jax.storage import Path

# How formats that write messages as one text mark an image, and how a message with images is shown.
IMAGE_PLACEHOLDER = "<image>"

Speaker = Literal["system", "user", "assistant"]


class ImagePart(enum.Enum):
    """The place of an image in a message. It has one value, so that it is the same object in every process."""

    IMAGE = IMAGE_PLACEHOLDER


IMAGE = ImagePart.IMAGE
# A message consists of these. A text is never searched for placeholders.
Part = str | ImagePart


class Marker(enum.IntEnum):
    """A text token that stands beside the vision tokens of an image and belongs to its layout.

    The layout names the marker, and the model's chat format says which token it is (`ChatEncoder.markers`).
    """

    NONE = 0
    IMAGE_START = 1
    IMAGE_END = 2
    SLICE_START = 3
    SLICE_END = 4
    ROW_END = 5


@dataclass(frozen=True, init=False)
class Turn:
    """One message of a conversation: a speaker, and texts and images in order.

    Attributes:
        role: The speaker of the message.
        parts: The texts and the places of images. No text is empty, and no two texts are neighbours.
    """

    role: Speaker
    parts: tuple[Part, ...]

    def __init__(self, role: Speaker, *parts: Part):
        """Joins neighbouring texts and leaves out empty ones, so that equal messages are equal objects."""
        joined: list[Part] = []
        for part in parts:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            elif part != "":
                joined.append(part)
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "parts", tuple(joined))

    @property
    def text(self) -> str:
        """The message as one text, in which `IMAGE_PLACEHOLDER` stands for each image."""
        return "".join(IMAGE_PLACEHOLDER if part is IMAGE else str(part) for part in self.parts)

    @property
    def images(self) -> int:
        """The number of images of the message."""
        return self.parts.count(IMAGE)


@dataclass(frozen=True)
class Conversation:
    """One sample before tokenisation, independent of the file format that it came from.

    Attributes:
        id: The name of the sample in log and error messages.
        turns: The messages in order.
        images: The encoded images (PNG, JPEG, ...) as bytes, or the paths of their files. They match the image parts
            of `turns` in order.
        source: The number of the source of the sample among several ones.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...] = ()
    source: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Example:
    """One tokenised sample without padding: n tokens, vision tokens included, and t image tiles.

    The fields mean what the fields of the same name in `vr_jax.model.batch.Batch` mean, except that cells and images
    are numbered within the sample instead of within a row of the batch.

    Attributes:
        id: The name of the sample in log and error messages.
        tokens: Token ids. A vision token holds the pad id.
        loss_mask: True where the token is a target of the loss.
        text_token_mask: True where the text-guided token may pool the token.
        vision_cell: The compressed cell of a vision token, NEWLINE or NO_CELL.
        tile_pixels: RGB pixels of all tiles.
        tile_image: The number of the image that a tile belongs to, counted from 1.
        cells_per_tile: The number of compressed cells of a tile, by which one tile shifts `vision_cell`.
        vision_cells: The four cells that a vision token interpolates, or None if no token is interpolated.
        vision_weights: The weights of these four cells.
        positions: The time, row and column axis of multi-axis rotary positions, or None where tokens are counted.
        tile_extent: Rows and columns of patches of each tile, or None where tiles are full squares.
        tile_origin: Row and column of each tile's first patch in its image, where the model's batches have it.
        source: The number of the source of the sample among several ones.
    """

    id: str
    tokens: Int[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    text_token_mask: Bool[np.ndarray, " n"]
    vision_cell: Int[np.ndarray, " n"]
    tile_pixels: UInt8[np.ndarray, "t H W 3"]
    tile_image: Int[np.ndarray, " t"]
    cells_per_tile: int
    vision_cells: Int[np.ndarray, "n 4"] | None = None
    vision_weights: Float[np.ndarray, "n 4"] | None = None
    positions: Int[np.ndarray, "n 3"] | None = None
    tile_extent: Int[np.ndarray, "t 2"] | None = None
    tile_origin: Int[np.ndarray, "t 2"] | None = None
    source: int = 0


@dataclass(frozen=True)
class Skip:
    """A sample that cannot be used.

    Attributes:
        id: The name of the sample.
        reason: One of `vr_jax.data.skips.REASONS`.
        detail: One line that states what was found and what was expected.
    """

    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class HostBatch:
    """A batch of numpy arrays together with what only the host needs to know about it.

    Attributes:
        batch: The arrays that go to the devices.
        record_ids: The names of the samples in each row of the batch.
        skipped: The unusable samples that were met since the previous batch.
    """

    batch: Batch
    record_ids: tuple[tuple[str, ...], ...]
    skipped: tuple[Skip, ...] = ()
