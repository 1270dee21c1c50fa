"""The tiles and vision tokens of an image, by the mode of the model's `ImageConfig`."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vr_jax.data import anyres, native, slices
from vr_jax.data.layouts import Placement, TokenLayout
from vr_jax.data.types import Marker
from vr_jax.model.config import VlmConfig

# The markers that the layouts of a mode can have, and a chat format that has tokens for them.
MARKERS = {
    "native": ((Marker.IMAGE_START, Marker.IMAGE_END), "qwen2_vl"),
    "slices": (tuple(marker for marker in Marker if marker != Marker.NONE), "minicpm_v"),
}


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
        windows = config.refusion is not None
        return slices.layout(size, config.encoder.patch_size, config.cells_per_side, image, windows=windows)
    return anyres.layout(size, config.cells_per_side, image, alone=alone)


def tiles(image: Image.Image, config: VlmConfig, *, alone: bool = True) -> UInt8[np.ndarray, "t H W 3"]:
    """Cuts an RGB image into the tiles that `layout` counts for its size.

    Args:
        image: The image in mode RGB.
        config: The model.
        alone: See `layout`.

    Raises:
        SkipRecord: The model has no tiles for an image of this size.
    """
    if config.image.aspect_ratio == "native":
        return native.tiles(image, config.encoder.patch_size, config.projector.stride, config.image)
    if config.image.aspect_ratio == "slices":
        return slices.tiles(image, config.encoder.patch_size, config.image)
    return anyres.tiles(image, config.image, alone=alone)


def placement(size: tuple[int, int], config: VlmConfig, *, alone: bool = True, base: bool = False) -> Placement:
    """Returns where `tiles` puts an image.

    Args:
        size: The (width, height) of the image.
        config: The model.
        alone: See `layout`.
        base: Whether the placement on the base tile or the overview is asked for instead of that on the grid. Where
            there is no grid, and where windows of the whole image are the only tiles, both are the same.

    Raises:
        SkipRecord: The model has no tiles for an image of this size.
    """
    image = config.image
    if image.aspect_ratio == "native":
        return native.placement(size, config.encoder.patch_size, config.projector.stride, image)
    if image.aspect_ratio == "slices":
        return slices.placement(size, config.encoder.patch_size, image, base=base)
    return anyres.placement(size, image, alone=alone, base=base)
