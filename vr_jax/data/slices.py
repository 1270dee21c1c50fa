"""MiniCPM-V 2.0's tiles: an image is resized, and cut into slices of nearly its own aspect ratio.

Source: openbmb/MiniCPM-V-2 `image_processing_minicpmv.py`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vr_jax.data.layouts import TokenLayout
from vr_jax.model.config import ImageConfig


def layout(size: tuple[int, int], patch_size: int, cells_per_side: int, config: ImageConfig) -> TokenLayout:
    """Lays out the vision tokens of an image of (width, height) pixels."""
    raise NotImplementedError


def tiles(image: Image.Image, patch_size: int, config: ImageConfig) -> UInt8[np.ndarray, "t H W 3"]:
    """Cuts an image into slices."""
    raise NotImplementedError
