"""Images that are made small enough to be embedded in a page, together within a number of bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from vr_jax.data.images import DECODE_ERRORS, decode_rgb, open_image
from vr_jax.data.skips import SkipRecord
from vr_jax.storage import Path

Source = bytes | Path  # An encoded image, or the path of its file.
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# The versions of an image, from the best to the smallest: the longest side in pixels and the WebP quality, where None
# is lossless.
IMAGE_LEVELS = ((768, 85), (768, 70), (768, 50), (640, 50), (512, 45), (384, 40), (256, 35), (160, 30), (96, 25))
MAP_LEVELS = tuple((side, None) for side in (256, 128, 96, 64, 48, 32, 16))
_UNREADABLE: tuple[type[Exception], ...] = (SkipRecord, *DECODE_ERRORS)
# The EXIF tag of the orientation. Browsers rotate images that have it, but the model sees the pixels as they are
# stored.
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Embedded:
    """An image as the page contains it.

    Attributes:
        data: The encoded image.
        mime: The MIME type of `data`.
        size: The width and height of the original image in pixels.
        problem: The reason why there is no image, or None.
    """

    data: bytes = field(default=b"", repr=False)
    mime: str = ""
    size: tuple[int, int] = (0, 0)
    problem: str | None = None

    @property
    def url(self) -> str:
        """The image as a data URL."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


Levels = Sequence[tuple[int, int | None]]


def key_of(source: Source) -> str:
    """Returns a key that is the same for equal images, so that an image of several items is embedded once."""
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else f"file {source}"


def embed(sources: Mapping[str, Source], budget: int, levels: Levels = IMAGE_LEVELS) -> dict[str, Embedded]:
    """Encodes images such that together they have at most a number of bytes.

    A file that is small enough is kept as it is. Each of the others gets the best level that fits. The bytes that small
    images leave over go to the large ones.

    Args:
        sources: The images by key.
        budget: The number of bytes, before base64.
        levels: The levels to try: `IMAGE_LEVELS` shows RGB images as the model sees them, and `MAP_LEVELS` keeps the
            opacity of heat maps.

    Returns:
        The embedded images by key. An image that cannot be decoded, or does not fit even at the last level, has a
        `problem`.
    """
    if not sources:
        return {}
    share = budget // len(sources)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def each(one: Callable[[str], Embedded], keys: Sequence[str]) -> dict[str, Embedded]:
            return dict(zip(keys, pool.map(one, keys), strict=True))

        found = each(lambda key: _best(sources[key], share, levels), list(sources))
        cap = largest_share([len(one.data) for one in found.values()], budget)
        too_large = [key for key, one in found.items() if len(one.data) > cap]
        return found | each(lambda key: _fitting(sources[key], cap, levels), too_large)


def largest_share(sizes: Sequence[int], budget: int) -> int:
    """Returns the largest number c such that the sum of min(size, c) is at most the budget."""
    left = budget
    ordered = sorted(sizes)
    for number, size in enumerate(ordered):
        even = left // (len(ordered) - number)
        if size > even:
            return even
        left -= size
    return max(ordered, default=0)


def _best(source: Source, share: int, levels: Levels) -> Embedded:
    """Returns the file itself if it is small and browsers show it as the model sees it, or else the first level."""
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with open_image(data) as image:
            if _as_it_is(image, levels) and len(data) <= share:
                mime, size = _MIME[str(image.format)], image.size
                image.load()
                return Embedded(data, mime, size)
        image, size = _pixels(data, levels)
    except _UNREADABLE as error:
        return Embedded(problem=_reason(error, source))
    return _encoded(image, size, levels[0])


def _fitting(source: Source, cap: int, levels: Levels) -> Embedded:
    """Finds the first level that has at most `cap` bytes, by bisection."""
    try:
        image, size = _pixels(source if isinstance(source, bytes) else source.read_bytes(), levels)
    except _UNREADABLE as error:  # The file could be read a moment ago, but another process may have changed it.
        return Embedded(problem=_reason(error, source))
    fits: Embedded | None = None
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        tried = _encoded(image, size, levels[middle])
        if len(tried.data) <= cap:
            fits, high = tried, middle
        else:
            low = middle + 1
    return fits or Embedded(size=size, problem="the page has no room for it")


def _as_it_is(image: Image.Image, levels: Levels) -> bool:
    side, quality = levels[0]
    opaque = image.mode in ("RGB", "L", "P", "1") and "transparency" not in image.info
    return (
        image.format in _MIME
        and max(image.size) <= side
        and getattr(image, "n_frames", 1) == 1
        and (opaque or quality is None)
        and image.getexif().get(_ORIENTATION, 1) == 1
    )


def _pixels(data: bytes, levels: Levels) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes an image, scales it down to the first level, and returns it with its original size."""
    side, quality = levels[0]
    with open_image(data) as opened:
        size = opened.size
        if quality is None:
            opened.load()
            image = opened.convert("RGBA")
        else:
            opened.draft("RGB", (side, side))  # Of a large JPEG, this decodes fewer pixels.
            image = decode_rgb(opened).copy()
    return _scaled(image, side), size


def _encoded(image: Image.Image, size: tuple[int, int], level: tuple[int, int | None]) -> Embedded:
    side, quality = level
    buffer = io.BytesIO()
    if quality is None:
        _scaled(image, side).save(buffer, "WEBP", lossless=True, method=2)
    else:
        _scaled(image, side).save(buffer, "WEBP", quality=quality, method=2)
    return Embedded(buffer.getvalue(), "image/webp", size)


def _scaled(image: Image.Image, side: int) -> Image.Image:
    if max(image.size) <= side:
        return image
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small


def _reason(error: Exception, source: Source) -> str:
    name = "" if isinstance(source, bytes) else f"{source.name}: "
    return f"{name}{error}" if str(error) else f"{name}{type(error).__name__}"
