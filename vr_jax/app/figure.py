"""The figure beside an answer: an image, and for each insertion what its vision tokens re-read.

The page holds the whole map of each insertion, and an atlas: the windows of all tokens side by side, one pixel for each
patch. Its script draws the part of the atlas that belongs to the token under the pointer, so that no request is made
while the pointer moves.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from PIL import Image

from vr_jax.app.windows import Window, windows
from vr_jax.data.images import decode_rgb, open_image, size_of
from vr_jax.evaluation import GRADIENT, HeatMap, heat_maps, heat_png, of_image
from vr_jax.model.config import VlmConfig
from vr_jax.model.refusion.vision_remember import Reread
from vr_jax.pages import page_environment

LONGEST = 1024  # the longer side of an image on the page, in pixels
QUALITY = 88  # of a photograph as WebP
SMALL = 256  # images of at most so many pixels per side are stored without loss and enlarged pixel by pixel


@dataclass(frozen=True)
class Insertion:
    """What the tokens of an image re-read at one insertion.

    Attributes:
        map: The map of the whole image.
        atlas: The PNG file with the window of every token.
        largest: The largest weight of each token, relative to the uniform one.
        updates: The size of each token's update, relative to the token's state.
    """

    map: HeatMap
    atlas: bytes = field(repr=False)
    largest: tuple[float, ...] = field(repr=False)
    updates: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Figure:
    """An image with the maps of all insertions.

    Attributes:
        title: What the image is, e.g. "Image 1 of 2".
        image: The image as the model sees it, turned upright, as a PNG or WebP file.
        mime: The type of `image`.
        size: The width and height of the original image in pixels.
        windows: The windows of the tokens, in the order of the atlas.
        slot: The width and height of a slot of the atlas, in patches.
        columns: The number of slots in a row of the atlas.
        insertions: The maps; none where no vision token lies on the image.
    """

    title: str
    image: bytes = field(repr=False)
    mime: str
    size: tuple[int, int]
    windows: tuple[Window, ...] = field(repr=False)
    slot: tuple[int, int]
    columns: int
    insertions: tuple[Insertion, ...]

    @property
    def enlarged(self) -> bool:
        """Whether the image is so small that its pixels are shown as squares."""
        return max(self.size) <= SMALL

    @property
    def url(self) -> str:
        """The image as a data URL."""
        return _url(self.image, self.mime)

    @property
    def script_data(self) -> str:
        """What the page's script reads, as JSON."""
        return json.dumps(
            {
                "slot": self.slot,
                "columns": self.columns,
                "boxes": [[round(edge, 5) for edge in one.box] for one in self.windows],
                "patches": [one.patches for one in self.windows],
                "places": [(one.row, one.column) for one in self.windows],
                "insertions": [
                    {
                        "map": _url(one.map.png, "image/png"),
                        "atlas": _url(one.atlas, "image/png"),
                        "note": one.map.note,
                        "largest": [round(number, 3) for number in one.largest],
                        "updates": [round(number, 5) for number in one.updates],
                    }
                    for one in self.insertions
                ],
            }
        )


def figures(
    found: Sequence[Reread], images: Sequence[bytes], config: VlmConfig, *, overview: bool = False
) -> tuple[Figure, ...]:
    """Draws the weights of a prompt over each of its images.

    Args:
        found: The weights at each insertion; see `vr_jax.evaluation.rereads`.
        images: The encoded images of the prompt. They are turned upright, as those of a `Chat` are.
        config: The config of the model.
        overview: Whether the base tile or the overview is shown instead of the grid of tiles.

    Returns:
        One figure for each image.
    """
    decoded = [_decoded(image) for image in images]
    sizes = [size for _, size in decoded]
    return tuple(
        _figure(of_image(found, sizes, number, config), image, sizes, number, config, overview)
        for number, (image, _) in enumerate(decoded)
    )


def figures_html(drawn: Sequence[Figure]) -> str:
    """Writes figures as HTML; texts are escaped. The page's style sheet and script belong to it."""
    template = page_environment("vr_jax.app").get_template("figures.html")
    return template.render(figures=drawn, gradient=Markup(GRADIENT))


def _figure(
    found: Sequence[Reread],
    image: Image.Image,
    sizes: Sequence[tuple[int, int]],
    number: int,
    config: VlmConfig,
    overview: bool,
) -> Figure:
    alone, size = len(sizes) == 1, sizes[number]
    maps = heat_maps(found, size, config, images=len(sizes), base=overview, which="")
    places = windows(found, size, config, alone=alone, base=overview) if maps else []
    high, wide = np.max([(1, 1), *(one.patches for one in places)], axis=0).tolist()
    columns = max(1, math.isqrt(len(places)))
    insertions = []
    for one, reread in zip(maps, found, strict=False):
        weights, updates = np.asarray(reread.weights), np.asarray(reread.update)
        atlas = np.full((-(-len(places) // columns) * high, columns * wide), np.nan)
        ratios = [place.ratios(weights) for place in places]
        for slot, values in enumerate(ratios):
            top, left = slot // columns * high, slot % columns * wide
            atlas[top : top + values.shape[0], left : left + values.shape[1]] = values
        largest = tuple(float(values.max()) for values in ratios)
        insertions.append(
            Insertion(one, heat_png(atlas), largest, tuple(float(updates[p.tile, p.cell]) for p in places))
        )
    title = f"Image {number + 1} of {len(sizes)}" if len(sizes) > 1 else "The image"
    data, mime = _encoded(image)
    return Figure(title, data, mime, size, tuple(places), (wide, high), columns, tuple(insertions))


def _decoded(data: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """Decodes an image for the page, and returns its original size."""
    with open_image(data) as opened:
        size = size_of(opened, rotate=True)
        image = decode_rgb(opened, rotate=True)
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return image.copy(), size


def _encoded(image: Image.Image) -> tuple[bytes, str]:
    """Encodes an image of the page, without loss if it is small."""
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(buffer, "PNG")
        return buffer.getvalue(), "image/png"
    image.save(buffer, "WEBP", quality=QUALITY, method=2)
    return buffer.getvalue(), "image/webp"


def _url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
