"""Heat maps that lie over an image, and the colours of their legend."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SPAN = 2.0  # The colours end at 2 ** -SPAN and 2 ** SPAN times the uniform weight.
_STEPS = 64  # The number of colours on each side of the uniform weight.
# Each stop has a position in doublings of the uniform weight, and its red, green, blue and opacity. Weights below the
# uniform one are cool, weights above it are warm, and the uniform weight is transparent.
_STOPS = (
    (-2.0, (30, 58, 138, 0.70)),
    (-1.0, (59, 96, 190, 0.45)),
    (0.0, (160, 160, 160, 0.0)),
    (1.0, (245, 150, 20, 0.55)),
    (2.0, (200, 20, 40, 0.80)),
)
# The colours as the stops of a CSS gradient.
GRADIENT = ", ".join(
    f"rgba({red}, {green}, {blue}, {opacity}) {100 * (place + SPAN) / (2 * SPAN):g}%"
    for place, (red, green, blue, opacity) in _STOPS
)


@dataclass(frozen=True)
class HeatMap:
    """An image that the page lays over the first image of an item.

    Attributes:
        label: The name of the insertion, e.g. "after layer 1". The page's switch for all cards uses it.
        png: A PNG file with opacity and with the aspect ratio of the image (see `heat_png`). One pixel for each weight
            is enough.
        note: One line that the page shows below the image.
    """

    label: str
    png: bytes = field(repr=False)
    note: str = ""


def heat_png(ratios: Float[np.ndarray, "H W"]) -> bytes:
    """Draws attention weights as a small PNG file with opacity.

    The colour depends on the logarithm of the weight and no longer changes below 1/4 and above 4.

    Args:
        ratios: The weights divided by the uniform weight. NaN, where no token can attend, is transparent.

    Raises:
        ValueError: The map is empty or has a negative weight.
    """
    if ratios.ndim != 2 or ratios.size == 0 or (ratios < 0).any():
        raise ValueError(f"a heat map needs non-negative weights of shape (H, W), found shape {ratios.shape}")
    with np.errstate(divide="ignore"):
        doublings = np.clip(np.log2(ratios.astype(np.float64)), -SPAN, SPAN)
    # A palette image needs only one byte for each weight.
    index = np.round((np.nan_to_num(doublings) / SPAN + 1) * _STEPS).astype(np.uint8)
    palette = np.stack([_colour(step / _STEPS * SPAN) for step in range(-_STEPS, _STEPS + 1)])
    image = Image.fromarray(index, "P")
    image.putpalette(palette[:, :3].tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=palette[:, 3].tobytes(), optimize=True)
    return buffer.getvalue()


def _colour(doublings: float) -> UInt8[np.ndarray, " 4"]:
    places = [place for place, _ in _STOPS]
    parts = [np.interp(doublings, places, [colour[k] for _, colour in _STOPS]) for k in range(4)]
    return np.array([*parts[:3], 255 * parts[3]]).round().astype(np.uint8)
