"""Resizing of images with memory that the image and the tile bound, whatever the shape of the image.

Pillow resizes in two passes, along rows and along columns, and rounds to 8 bits after each, so the order of the passes
shows in the pixels. Up to version 12 it resizes along the rows first; version 13 resizes along the columns first where
the height shrinks much more than the width. `resized` makes each pass by itself, in the order of version 13, so that
every version gives the same pixels. A square is resized along its rows first. What is computed here in other steps
gives the same pixels.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

# A canvas of this many pixels (64 MiB) is made without asking whether it could be avoided.
_SMALL_CANVAS = 1 << 24
# Pillow keeps some 32 bytes of filter weights for each pixel along a side. Longer sides are resized piece by piece.
_LONG_SIDE = 1 << 16
# The number of values that are converted to float64 at a time.
_CONVERTED = 1 << 20

# Pillow's filter weights are integers with this many binary digits behind the point (Resample.c, PRECISION_BITS).
_PRECISION = 22


def resized(image: Image.Image, size: tuple[int, int], resample: str = "bicubic") -> Image.Image:
    """Resizes an image with a filter of Pillow, to the pixels of Pillow 13.

    With the bicubic filter, along a side of more than 65,536 pixels, each output pixel is computed from a piece of the
    image. The positions of the filter are then rounded otherwise, so a value can differ by 1 of 255 from that of
    Pillow's `resize`.

    Args:
        image: The image.
        size: The new (width, height).
        resample: The filter, by Pillow's name in small letters.
    """
    if image.size == size:
        return image
    if max(image.size) <= _LONG_SIDE or resample != "bicubic":
        return _in_two_passes(image, size, Image.Resampling[resample.upper()])
    if image.width >= image.height:
        return _along_columns(_along_rows(image, size[0]), size[1])
    return _along_rows(_along_columns(image, size[1]), size[0])


def _in_two_passes(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes an image along one axis and then along the other, in Pillow 13's order."""
    (width, height), (new_width, new_height) = image.size, size
    columns_first = new_height < height and height - new_height > 2 * (width - new_width)
    between = (width, new_height) if columns_first else (new_width, height)
    return image.resize(between, resample).resize(size, resample)


def _along_rows(image: Image.Image, width: int) -> Image.Image:
    """Resizes the rows of an image, as one pass of Pillow does."""
    if image.width == width or image.width <= _LONG_SIDE:
        return image.resize((width, image.height), Image.Resampling.BICUBIC)
    result = Image.new(image.mode, (width, image.height))
    for column in range(width):
        begin, end, box = _piece(image.width, width, column)
        part = image.crop((begin, 0, end, image.height))
        pixel = part.resize((1, image.height), Image.Resampling.BICUBIC, (box[0], 0, box[1], image.height))
        result.paste(pixel, (column, 0))
    return result


def _along_columns(image: Image.Image, height: int) -> Image.Image:
    """Resizes the columns of an image, as one pass of Pillow does."""
    if image.height == height or image.height <= _LONG_SIDE:
        return image.resize((image.width, height), Image.Resampling.BICUBIC)
    result = Image.new(image.mode, (image.width, height))
    for row in range(height):
        begin, end, box = _piece(image.height, height, row)
        part = image.crop((0, begin, image.width, end))
        result.paste(
            part.resize((image.width, 1), Image.Resampling.BICUBIC, (0, box[0], image.width, box[1])), (0, row)
        )
    return result


def _piece(size: int, out: int, index: int) -> tuple[int, int, tuple[float, float]]:
    """Returns the pixels begin..end-1 that an output pixel depends on, and its own place within them."""
    scale = size / out
    reach = math.ceil(2 * max(scale, 1)) + 1
    begin = max(0, math.floor(index * scale) - reach)
    end = min(size, math.ceil((index + 1) * scale) + reach)
    return begin, end, (index * scale - begin, min((index + 1) * scale, size) - begin)


def padded_square(
    image: Image.Image, side: int, colour: tuple[int, int, int], resample: str = "bicubic"
) -> UInt8[np.ndarray, "side side 3"]:
    """Centres an RGB image on a square of one colour and resizes the square (LLaVA's `expand2square`).

    The square of an image of 1 x 60,000 pixels would take 14 GB. It is therefore made only where it is small, or not
    much larger than the image; otherwise only the rows or columns of the result that the image reaches are computed.
    This is done for the bicubic filter alone, which published models have.

    Args:
        image: The image in mode RGB.
        side: The side of the result.
        colour: The colour of the padding.
        resample: The filter, by Pillow's name in small letters.
    """
    width, height = image.size
    longest = max(width, height)
    if width == height:
        return np.asarray(resized(image, (side, side), resample))
    left, top = centred(image.size, (longest, longest))
    if longest**2 <= max(_SMALL_CANVAS, 2 * width * height) or resample != "bicubic":
        square = Image.new("RGB", (longest, longest), colour)
        square.paste(image, (left, top))
        return np.asarray(resized(square, (side, side), resample))
    result = np.empty((side, side, 3), np.uint8)
    result[:] = colour
    if width > height:
        rows = np.asarray(_along_rows(image, side))
        first, blended = _blended(rows.swapaxes(0, 1), top, longest, side, colour)
        result[first : first + blended.shape[1]] = blended.swapaxes(0, 1)
    else:
        first, blended = _blended(np.asarray(image), left, longest, side, colour)
        columns = _along_columns(Image.fromarray(blended), side)
        result[:, first : first + blended.shape[1]] = np.asarray(columns)
    return result


def cropped_square(image: Image.Image, side: int, resample: str = "bicubic") -> UInt8[np.ndarray, "S S 3"]:
    """Resizes an image until its shorter side has `side` pixels, and cuts a square out of its middle.

    This is what CLIP's image processor does. Of an image that is so long that the resized one would take much memory,
    only the square is computed, where a value can differ by 1 of 255.

    Args:
        image: The image in mode RGB.
        side: The pixels per side of the result.
        resample: The filter, by Pillow's name in small letters.
    """
    (whole_w, whole_h), (width, height) = covering_size(image.size, side), image.size
    left, top = (whole_w - side) // 2, (whole_h - side) // 2
    if whole_w * whole_h <= max(_SMALL_CANVAS, 2 * width * height):
        return np.asarray(resized(image, (whole_w, whole_h), resample))[top : top + side, left : left + side]
    filter_ = Image.Resampling[resample.upper()]
    across, down = width / whole_w, height / whole_h
    # The passes are made one after another, since Pillow chooses their order by the size of the result.
    rows = image.resize((side, height), filter_, (left * across, 0, min((left + side) * across, width), height))
    return np.asarray(rows.resize((side, side), filter_, (0, top * down, side, min((top + side) * down, height))))


def covering_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Returns the (width, height) of an image whose shorter side is resized to `side`; the longer one is truncated."""
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def centred(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Returns the left and top edge of an image in the middle of `target`.

    An odd number of pixels of padding leaves one more at the right and at the bottom.
    """
    return (target[0] - size[0]) // 2, (target[1] - size[1]) // 2


def _blended(
    pixels: UInt8[np.ndarray, "h w 3"], begin: int, size: int, out: int, colour: tuple[int, int, int]
) -> tuple[int, UInt8[np.ndarray, "h n 3"]]:
    """Resizes rows that are padded with a colour, where the pixels reach the result.

    Args:
        pixels: The pixels of the rows without the padding.
        begin: The padding in front of them.
        size: The length of the padded rows.
        out: The length of the resized rows.
        colour: The colour of the padding.

    Returns:
        The first column that the pixels reach, and the n columns from there on.
    """
    end = begin + pixels.shape[1]
    scale = size / out
    reach = 2 * max(scale, 1) + 1
    columns = range(max(0, int((begin - reach) / scale) - 1), min(out, int((end + reach) / scale) + 1))
    filters = np.zeros((pixels.shape[1], len(columns)))
    padding = np.empty(len(columns))
    for number, column in enumerate(columns):
        first, weights = _weights(size, out, column)
        low, high = max(first, begin), min(first + len(weights), end)
        if low < high:
            filters[low - begin : high - begin, number] = weights[low - first : high - first]
        padding[number] = weights.sum() - filters[:, number].sum()
    result = np.empty((pixels.shape[0], len(columns), 3), np.uint8)
    rows = max(1, _CONVERTED // pixels.shape[1])
    for row in range(0, pixels.shape[0], rows):
        # Products and sums are integers below 2^53, which float64 holds exactly and BLAS adds fast.
        for channel in range(3):
            total = pixels[row : row + rows, :, channel].astype(np.float64) @ filters + padding * colour[channel]
            rounded = (total.astype(np.int64) + (1 << (_PRECISION - 1))) >> _PRECISION
            result[row : row + rows, :, channel] = np.clip(rounded, 0, 255)
    return columns[0], result


def _weights(size: int, out: int, index: int) -> tuple[int, Float[np.ndarray, " taps"]]:
    """Returns the first pixel that an output pixel depends on, and the weights of this and the next ones.

    They are those of Pillow's Resample.c (precompute_coeffs and normalize_coeffs_8bpc), integers as float64.
    """
    scale = size / out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (index + 0.5) * scale
    first = max(0, int(centre - support + 0.5))
    last = min(size, int(centre + support + 0.5))
    x = np.abs((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    filters = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    filters /= np.cumsum(filters)[-1]  # The sum is taken one by one, as Pillow takes it.
    return first, np.trunc(filters * (1 << _PRECISION) + np.where(filters < 0, -0.5, 0.5))
