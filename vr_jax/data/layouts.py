"""The vision tokens of one image in order, and the tiles that they are computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vr_jax.data.types import Marker


@dataclass(frozen=True)
class TokenLayout:
    """The n vision tokens of one image in order, known before anything is computed.

    Attributes:
        cell: The compressed cell that a token stands for, tile * cells per tile + row * cells per side + column with
            tile 0 as the first tile; or NEWLINE; or NO_CELL for a marker.
        tiles: The number of tiles of the image, the base tile included.
        grid: The (columns, rows) of the grid of tiles, or None for modes with one tile.
        cells: The four cells that a token interpolates, where the map of tokens is shrunk bilinearly; else None. `cell`
            then contains the first of them. A newline has zeros.
        weights: The weights of these four cells. A newline has zeros.
        marker: The `Marker` of each token, which is NONE for a vision token; None where there are no markers.
        place: The row and column of each token in the image's one grid of tokens, which multi-axis rotary positions
            count, and -1 for a marker; None where an image has no such grid.
        extent: The rows and columns of patches of each tile; None where tiles are full squares.
        origin: The row and column of each tile's first patch in the image; None where tiles are images of their own.
    """

    cell: Int[np.ndarray, " n"]
    tiles: int
    grid: tuple[int, int] | None = None
    cells: Int[np.ndarray, "n 4"] | None = None
    weights: Float[np.ndarray, "n 4"] | None = None
    marker: Int[np.ndarray, " n"] | None = None
    place: Int[np.ndarray, "n 2"] | None = None
    extent: Int[np.ndarray, "t 2"] | None = None
    origin: Int[np.ndarray, "t 2"] | None = None


@dataclass(frozen=True)
class Placement:
    """The position of an image on the canvas that its tiles form. The rest of the canvas is padding.

    Attributes:
        first: The number of the upper left tile of the canvas.
        columns: The number of tiles from left to right.
        rows: The number of tiles from top to bottom.
        left: The left edge of the image in pixels of the canvas.
        top: The top edge of the image in pixels of the canvas.
        width: The width of the image in pixels of the canvas.
        height: The height of the image in pixels of the canvas.
        tile: The (width, height) of a tile in pixels of the canvas. None is a square of `ImageConfig.tile_size`.
    """

    first: int
    columns: int
    rows: int
    left: float
    top: float
    width: float
    height: float
    tile: tuple[int, int] | None = dataclasses.field(default=None, kw_only=True)


def written(layout: TokenLayout, markers: Collection[Marker]) -> TokenLayout:
    """Leaves the markers out that a chat format has no token for.

    Args:
        layout: The layout.
        markers: The markers that the format has.

    Returns:
        The layout itself where it has no other markers.
    """
    if layout.marker is None:
        return layout
    kept = np.isin(layout.marker, [Marker.NONE, *markers])
    if kept.all():
        return layout
    names = ("cell", "cells", "weights", "marker", "place")
    fields = {name: value[kept] for name in names if (value := getattr(layout, name)) is not None}
    return dataclasses.replace(layout, **fields)


def frozen(layout: TokenLayout) -> TokenLayout:
    """Makes the arrays of a layout read-only, because layouts are cached and shared."""
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return layout
