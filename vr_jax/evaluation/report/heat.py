"""Heat maps that lie over an image, and the legend of their colours."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from PIL import Image

SPAN = 2.0  # the colours end at 2 ** -SPAN and 2 ** SPAN times the uniform weight
_STEPS = 64  # colours on each side of the uniform weight
# At so many doublings: red, green, blue, opacity. Less than uniform is cool, more is warm, uniform is see-through.
_STOPS = (
    (-2.0, (30, 58, 138, 0.70)),
    (-1.0, (59, 96, 190, 0.45)),
    (0.0, (160, 160, 160, 0.0)),
    (1.0, (245, 150, 20, 0.55)),
    (2.0, (200, 20, 40, 0.80)),
)


@dataclass(frozen=True)
class HeatMap:
    """An image to be laid over an item's first image, of the same aspect: RGBA, a pixel for each weight is enough.

    label: which insertion, e.g. "after layer 1"; the page's switch for all cards goes by it. note: one line below the
    image. `heat_png` makes `png` with the colours of the page's legend."""

    label: str
    png: bytes = field(repr=False)
    note: str = ""


def heat_png(ratios: Float[np.ndarray, "H W"]) -> bytes:
    """Weights relative to the uniform one (1 = as much as any other place) as a small PNG with opacity.

    The colour follows log2 of the weight and ends at 1/4 and 4. NaN (a place that no token could read) is see-through.
    Raises ValueError for an empty or negative map."""
    if ratios.ndim != 2 or ratios.size == 0 or (ratios < 0).any():
        raise ValueError(f"a heat map needs non-negative weights of shape (H, W), found shape {ratios.shape}")
    with np.errstate(divide="ignore"):
        doublings = np.clip(np.log2(ratios.astype(np.float64)), -SPAN, SPAN)
    index = np.round((np.nan_to_num(doublings) / SPAN + 1) * _STEPS).astype(np.uint8)  # a palette: a byte per weight
    palette = np.stack([_colour(step / _STEPS * SPAN) for step in range(-_STEPS, _STEPS + 1)])
    image = Image.fromarray(index, "P")
    image.putpalette(palette[:, :3].tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=palette[:, 3].tobytes(), optimize=True)
    return buffer.getvalue()


def _colour(doublings: float) -> np.ndarray:
    places = [place for place, _ in _STOPS]
    parts = [np.interp(doublings, places, [colour[k] for _, colour in _STOPS]) for k in range(4)]
    return np.array([*parts[:3], 255 * parts[3]]).round().astype(np.uint8)


def legend() -> str:
    """What the colours mean, as HTML."""
    stops = ", ".join(
        f"rgba({r}, {g}, {b}, {a}) {100 * (place + SPAN) / (2 * SPAN):g}%" for place, (r, g, b, a) in _STOPS
    )
    ticks = "".join(f"<span>{html.escape(text)}</span>" for text in ("1/4", "1/2", "1", "2", "4"))
    return (
        '<div class="legend" role="img" aria-label="colours: blue places are read less than uniform attention would, '
        'orange and red ones more, up to 4 times">'
        "<span>read less</span>"
        f'<span class="scale"><span class="ramp"><i style="background:linear-gradient(to right, {stops})"></i></span>'
        f'<span class="ticks">{ticks}</span></span><span>read more</span>'
        "<small>attention weight, 1 = uniform</small></div>"
    )
