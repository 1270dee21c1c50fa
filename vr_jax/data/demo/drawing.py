"""Drawing of text on uint8 canvases. PIL's bundled font renders each text once, and a cache keeps the result."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

# Red, green and blue, each 0..255.
Colour = Sequence[int]


@functools.lru_cache(maxsize=4096)
def text_mask(text: str, size: int) -> Float[np.ndarray, "h w 1"]:
    """Returns how much of each pixel a text covers, from 0 to 1, cropped to the covered pixels.

    The font is part of Pillow, so the result does not depend on the fonts of the system.

    Args:
        text: The text, one line.
        size: The size of the font in pixels.
    """
    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    canvas = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), text, font=font, fill=255)
    ink = canvas.crop(canvas.getbbox())
    return np.asarray(ink, np.float32)[..., None] / 255


def blank(width: int, height: int, colour: Colour) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a canvas of one colour."""
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = colour
    return canvas


def draw_text(canvas: UInt8[np.ndarray, "H W 3"], text: str, size: int, left: int, top: int, colour: Colour) -> None:
    """Draws a text onto the canvas.

    Args:
        canvas: The pixels, which are changed in place.
        text: The text, one line.
        size: The size of the font in pixels.
        left: The left edge of the leftmost covered pixel.
        top: The top edge of the topmost covered pixel.
        colour: The colour of the text.

    Raises:
        ValueError: The text does not fit onto the canvas.
    """
    mask = text_mask(text, size)
    height, width = mask.shape[:2]
    if left < 0 or top < 0 or left + width > canvas.shape[1] or top + height > canvas.shape[0]:
        raise ValueError(
            f"the text {text!r} has {width} x {height} pixels, which at ({left}, {top}) leaves the "
            f"{canvas.shape[1]} x {canvas.shape[0]} canvas"
        )
    region = canvas[top : top + height, left : left + width]
    region[:] = region + (np.asarray(colour, np.float32) - region) * mask


def draw_text_centred(
    canvas: UInt8[np.ndarray, "H W 3"], text: str, size: int, centre_x: int, centre_y: int, colour: Colour
) -> None:
    """Draws a text around the point (centre_x, centre_y); the other arguments are those of `draw_text`."""
    height, width = text_mask(text, size).shape[:2]
    draw_text(canvas, text, size, centre_x - width // 2, centre_y - height // 2, colour)
