"""Text and rectangles on uint8 canvases; text is rendered once by PIL's bundled font and blended from a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

Colour = Sequence[int]  # red, green, blue, 0..255


@functools.lru_cache(maxsize=4096)
def text_mask(text: str, size: int) -> Float[np.ndarray, "h w 1"]:
    """Coverage 0..1 of `text` at `size` pixels, cropped to its ink; needs no font of the system."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    canvas = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), text, font=font, fill=255)
    ink = canvas.crop(canvas.getbbox())
    return np.asarray(ink, np.float32)[..., None] / 255


def blank(width: int, height: int, colour: Colour) -> UInt8[np.ndarray, "height width 3"]:
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = colour
    return canvas


def draw_text(canvas: UInt8[np.ndarray, "H W 3"], text: str, size: int, left: int, top: int, colour: Colour) -> None:
    """Blends `text` in; (left, top) is the corner of its ink. Raises ValueError if it does not fit."""
    mask = text_mask(text, size)
    height, width = mask.shape[:2]
    if left < 0 or top < 0 or left + width > canvas.shape[1] or top + height > canvas.shape[0]:
        raise ValueError(
            f"text {text!r} of {width} x {height} pixels at ({left}, {top}) leaves the "
            f"{canvas.shape[1]} x {canvas.shape[0]} canvas"
        )
    region = canvas[top : top + height, left : left + width]
    region[:] = region + (np.asarray(colour, np.float32) - region) * mask


def draw_text_centred(
    canvas: UInt8[np.ndarray, "H W 3"], text: str, size: int, centre_x: int, centre_y: int, colour: Colour
) -> None:
    height, width = text_mask(text, size).shape[:2]
    draw_text(canvas, text, size, centre_x - width // 2, centre_y - height // 2, colour)
