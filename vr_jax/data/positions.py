"""Multi-axis rotary positions of a sample: a time, a row and a column axis for each token.

Source: transformers `models/qwen2_5_vl/modeling_qwen2_5_vl.py`, `get_rope_index`, for still images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vr_jax.data.layouts import TokenLayout


def multi_axis_positions(images: Sequence[tuple[int, TokenLayout]], length: int) -> Int[np.ndarray, "n 3"]:
    """Counts the positions of the tokens of a sample.

    A text token is one further than the token before it on all axes. The tokens of an image that starts at p are at
    (p, p + row, p + column), and the token behind it is at p + max(rows, columns).

    Args:
        images: The index of the first token of each image, and the image's layout, in order. The tokens of an image
            without a grid are counted like text.
        length: The number n of tokens of the sample.

    Returns:
        The time, row and column of each token.
    """
    # The distance from one token to the next, and what a vision token adds to the axes.
    step = np.ones(length, np.int64)
    offset = np.zeros((length, 3), np.int64)
    for start, layout in images:
        if layout.place is None:
            continue
        at = start + np.flatnonzero(layout.place[:, 0] >= 0)
        if not at.size:
            continue
        place = layout.place[layout.place[:, 0] >= 0]
        offset[at, 1:] = place
        step[at] = 0
        step[at[-1]] = int(place.max()) + 1
    begin = np.cumsum(np.append(0, step[:-1]))
    return (begin[:, None] + offset).astype(np.int32)
