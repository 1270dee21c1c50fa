"""Layouts without the markers that a chat format does not have."""

import dataclasses

import numpy as np

from vr_jax.data.layouts import TokenLayout, written
from vr_jax.data.types import Marker
from vr_jax.model.batch import NO_CELL

LAYOUT = TokenLayout(
    cell=np.array([NO_CELL, 0, NO_CELL, 1, NO_CELL]),
    tiles=1,
    marker=np.array([Marker.IMAGE_START, 0, Marker.ROW_END, 0, Marker.IMAGE_END]),
    place=np.array([[-1, -1], [0, 0], [-1, -1], [1, 0], [-1, -1]]),
    extent=np.array([[4, 2]]),
)


def test_only_known_markers_stay():
    found = written(LAYOUT, {Marker.IMAGE_START: 7, Marker.IMAGE_END: 8})
    assert found.cell.tolist() == [NO_CELL, 0, 1, NO_CELL]
    assert found.marker.tolist() == [Marker.IMAGE_START, 0, 0, Marker.IMAGE_END]
    assert found.place.tolist() == [[-1, -1], [0, 0], [1, 0], [-1, -1]]
    assert found.extent is LAYOUT.extent
    assert written(LAYOUT, {}).cell.tolist() == [0, 1]


def test_a_layout_is_shared_where_nothing_is_left_out():
    assert written(LAYOUT, list(Marker)) is LAYOUT
    bare = dataclasses.replace(LAYOUT, marker=None)
    assert written(bare, {}) is bare
