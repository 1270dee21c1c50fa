"""`vr_jax.data.native` against the recorded outputs of Qwen2.5-VL's image processor (sizes and pixels exact)."""

import numpy as np
import pytest
from PIL import Image

from tests.data.test_native import in_processor_order
from tests.golden.discovery import Case, cases, documents
from vr_jax.data import native
from vr_jax.data.skips import SkipRecord
from vr_jax.model.config import ImageConfig

ITEM = "vr_qwen2_5_vl"


def recorded_sizes() -> list:
    """Each recorded size with its limits: (height, width), factor, fewest pixels, most pixels, and the result."""
    found = []
    for _, document in documents(ITEM):
        for row in document["rows"] if "limits" in document else ():
            for name, limits in document["limits"].items():
                pixels = limits["min_pixels"], limits["max_pixels"]
                found.append(pytest.param(row["size_hw"], 28, *pixels, row[name], id=f"{row['size_hw']}-{name}"))
        other = document.get("other", {})
        for row in other.get("rows", ()):
            pixels = other["min_pixels"], other["max_pixels"]
            found.append(
                pytest.param(row["size_hw"], other["factor"], *pixels, row["result"], id=f"{row['size_hw']}-other")
            )
    return found or [pytest.param(None, 0, 0, 0, None, marks=pytest.mark.skip(reason=f"no recorded sizes of {ITEM}"))]


@pytest.mark.parametrize(("size", "factor", "least", "most", "expected"), recorded_sizes())
def test_smart_resize(size, factor, least, most, expected):
    if expected == "error":
        with pytest.raises(SkipRecord):
            native.smart_resize(*size, factor, least, most)
    else:
        assert list(native.smart_resize(*size, factor, least, most)) == expected


@pytest.mark.parametrize("case", [one for one in cases(ITEM) if getattr(one.values[0], "kind", "") == "processor"])
def test_pixels(case: Case):
    recorded = case.config
    config = ImageConfig(
        tile_size=112,
        aspect_ratio="native",
        unpad=False,
        min_pixels=recorded["min_pixels"],
        max_pixels=recorded["max_pixels"],
        image_mean=tuple(recorded["image_mean"]),
        image_std=tuple(recorded["image_std"]),
    )
    image = Image.fromarray(case.tensors["in.image"])
    tiles, layout = native.tiles(image, 14, 2, config), native.layout(image.size, 14, 2, config)
    expected = case.outputs
    rows, columns = expected["image_grid_thw"][0, 1:]
    np.testing.assert_array_equal((layout.origin + layout.extent).max(axis=0), [rows, columns])
    if rows <= 8 and columns <= 8:
        np.testing.assert_array_equal(tiles[0, : rows * 14, : columns * 14], expected["resized"])
    patches = in_processor_order(tiles, layout, config)
    tolerance = {"atol": 2e-6, "rtol": 1e-5}
    np.testing.assert_allclose(patches[:4], expected["pixel_values_first4"], **tolerance)
    np.testing.assert_allclose(patches[-4:], expected["pixel_values_last4"], **tolerance)
