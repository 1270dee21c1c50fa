"""The tiles and vision tokens of an image, by the mode of the model's `ImageConfig`."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vr_jax.data import anyres, native, slices
from vr_jax.data.layouts import TokenLayout
from vr_jax.model.config import VlmConfig


def layout(size: tuple[int, int], config: VlmConfig, *, alone: bool = True) -> TokenLayout:
    """Lays out the vision tokens of an image.

    Args:
        size: The (width, height) of the image in pixels.
        config: The model.
        alone: Whether the image is the only one of its sample. In the modes "anyres" and "anyres_max", the images of a
            sample with several get one tile each.

    Returns:
        The layout. It may be cached and shared, so its arrays are read-only.

    Raises:
        SkipRecord: The model has no tiles for an image of this size.
    """
    image = config.image
    if image.aspect_ratio == "native":
        return native.layout(size, config.encoder.patch_size, config.projector.stride, image)
    if image.aspect_ratio == "slices":
        return slices.layout(size, config.encoder.patch_size, config.cells_per_side, image)
    return anyres.layout(size, config.cells_per_side, image, alone=alone)


def tiles(image: Image.Image, config: VlmConfig, *, alone: bool = True) -> UInt8[np.ndarray, "t H W 3"]:
    """Cuts an RGB image into the tiles that `layout` counts for its size.

    Args:
        image: The image in mode RGB.
        config: The model.
        alone: See `layout`.
    """
    if config.image.aspect_ratio == "native":
        return native.tiles(image, config.encoder.patch_size, config.projector.stride, config.image)
    if config.image.aspect_ratio == "slices":
        return slices.tiles(image, config.encoder.patch_size, config.image)
    return anyres.tiles(image, config.image, alone=alone)
