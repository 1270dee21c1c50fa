"""Reading of image files into batches of tiles, in threads that work ahead of the device."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int, UInt8

from vr_jax.data import anyres
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.data.skips import SkipRecord
from vr_jax.model.config import ImageConfig
from vr_jax.probe.tiny_imagenet import LabelledImage
from vr_jax.storage import Path

# This number of batches is prepared while the device computes another one.
AHEAD = 2


@dataclass(frozen=True)
class ImageBatch:
    """A batch of B images of one tile each.

    Attributes:
        pixels: RGB pixels. An image that is missing or unreadable is black.
        labels: The classes.
        weights: 1 for an image, and 0 for one that is missing or unreadable.
    """

    pixels: UInt8[np.ndarray, "B H W 3"]
    labels: Int[np.ndarray, " B"]
    weights: Float[np.ndarray, " B"]


@dataclass
class Reader:
    """Reads images and resizes each to one tile with PIL's bicubic filter.

    Attributes:
        folder: The folder of the data.
        image: The size of a tile.
        workers: The number of threads.
        unreadable: The names of the images that could not be read, each with the reason. It grows while reading.
    """

    folder: Path
    image: ImageConfig
    workers: int = 8
    unreadable: dict[str, str] = field(default_factory=dict)

    def batches(
        self, images: Sequence[LabelledImage], rows: int, order: Int[np.ndarray, " n"] | None = None
    ) -> Iterator[ImageBatch]:
        """Reads all images.

        Args:
            images: The images.
            rows: The number of images in a batch. The last batch is filled with missing images.
            order: The order of the images; by default they keep their own.
        """
        numbers = np.arange(len(images)) if order is None else order
        parts = ([images[i] for i in numbers[start : start + rows]] for start in range(0, len(numbers), rows))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="image")
        try:
            waiting: deque[tuple[list[LabelledImage], list[Future]]] = deque()

            def submit(part: list[LabelledImage]) -> None:
                waiting.append((part, [pool.submit(self._tile, image) for image in part]))

            for part in itertools.islice(parts, AHEAD):
                submit(part)
            while waiting:
                part, futures = waiting.popleft()
                for following in itertools.islice(parts, 1):
                    submit(following)
                yield self._collect(part, [future.result() for future in futures], rows)
        finally:
            pool.shutdown(cancel_futures=True)

    def _tile(self, image: LabelledImage) -> UInt8[np.ndarray, "H W 3"] | SkipRecord:
        """Reads one image."""
        try:
            with open_image(self.folder / image.name) as opened:
                return anyres.tiles(decode_rgb(opened), self.image)[0]
        except SkipRecord as error:
            return error

    def _collect(self, part: list[LabelledImage], tiles: list, rows: int) -> ImageBatch:
        """Stacks the tiles of a batch and notes the unreadable images."""
        side = self.image.tile_size
        pixels = np.zeros((rows, side, side, 3), np.uint8)
        labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        for i, (image, tile) in enumerate(zip(part, tiles, strict=True)):
            if isinstance(tile, SkipRecord):
                self.unreadable[image.name] = f"{tile.reason}: {tile.detail}"
                continue
            pixels[i], labels[i], weights[i] = tile, image.label, 1.0
        return ImageBatch(pixels, labels, weights)
