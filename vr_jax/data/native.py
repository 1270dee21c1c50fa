"""Qwen2.5-VL's tiles: an image of any size is resized to whole cells and cut into attention windows.

Source: transformers `models/qwen2_vl/image_processing_qwen2_vl.py` (`smart_resize`) and
`models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`get_window_index`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vr_jax.data.layouts import TokenLayout
from vr_jax.model.config import ImageConfig


def layout(size: tuple[int, int], patch_size: int, stride: int, config: ImageConfig) -> TokenLayout:
    """Lays out the vision tokens of an image of (width, height) pixels."""
    raise NotImplementedError


def tiles(image: Image.Image, patch_size: int, stride: int, config: ImageConfig) -> UInt8[np.ndarray, "t H W 3"]:
    """Cuts an image into windows."""
    raise NotImplementedError
