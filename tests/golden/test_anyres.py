"""`vr_jax.data.anyres` against every recorded case of LLaVA-NeXT's AnyRes code (integers, pixels and hashes exact)."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from tests.golden.discovery import Entry, entries
from vr_jax.data import anyres
from vr_jax.data.conversations import IMAGE_TOKEN, TokenisedConversation
from vr_jax.data.processor import splice
from vr_jax.model.batch import NEWLINE
from vr_jax.model.config import ImageConfig, single_tile


def image_config(entry: Entry, mode: str, **changes) -> ImageConfig:
    recorded = entry.document["modes"][mode]
    pinpoints = recorded["pinpoints_wh_in_order"]
    side = min(min(pinpoint) for pinpoint in pinpoints)
    name, _, most = recorded["image_aspect_ratio"].partition("_max_")
    return ImageConfig(
        tile_size=side,
        aspect_ratio=f"{name}_max" if most else name,
        grids=tuple((w // side, h // side) for w, h in pinpoints),
        max_tiles=int(most or 9),
        unpad="unpad" in recorded["mm_patch_merge_type"],
        **changes,
    )


@pytest.mark.parametrize("case", entries("anyres", "records"))
def test_grid_crop_and_token_count(case: Entry):
    size = tuple(case.value["size_wh"])
    for mode, expected in case.value["modes"].items():
        config = image_config(case, mode)
        grid = anyres.select_grid(size, config.grids, config.tile_size)
        assert grid == tuple(expected["grid_wh"]), mode
        for side, numbers in expected["u"].items():
            u = int(side)
            found = anyres.layout(size, u, config)
            assert found.tiles == expected["tiles_total"]
            assert len(found.cell) == numbers["n_tokens"], (mode, u)
            map_size = (grid[0] * u, grid[1] * u)
            crop = anyres.unpadded(size, map_size, "truncate")
            assert crop == (tuple(numbers["rows"]), tuple(numbers["cols"])), (mode, u)
            assert (found.cells is not None) == ("interp_hw" in numbers)
            if "interp_hw" in numbers:
                h, w = numbers["interp_hw"]
                rest = found.cell[u * u :]
                assert len(rest) == h * (w + 1)
                assert np.flatnonzero(rest == NEWLINE).tolist() == [w + r * (w + 1) for r in range(h)]
            rounded = anyres.unpadded(size, map_size, "round7")
            assert (rounded != crop) == numbers.get("int_vs_round7_differs", False), (mode, u)


@pytest.mark.parametrize("case", entries("anyres", "layouts"))
def test_layout(case: Entry):
    u = case.value["u"]
    found = anyres.layout(tuple(case.value["size_wh"]), u, image_config(case, case.value["mode"]))
    tile, row, column = np.asarray(case.value["tile_row_col"]).T
    np.testing.assert_array_equal(found.cell, np.where(tile < 0, NEWLINE, tile * u * u + row * u + column))
    assert found.grid == tuple(case.value["grid_wh"])


@pytest.mark.parametrize("case", entries("anyres", "bilinear"))
def test_bilinear_branch(case: Entry):
    u = case.value["u"]
    found = anyres.layout(tuple(case.value["size_wh"]), u, image_config(case, case.value["mode"]))
    k = np.arange(found.tiles * u * u)
    features = np.stack([(k * 7919 % 1009) / 1009, k * 104729 % 10007 / 10007 - 0.5], -1).astype(np.float32)
    packed = np.einsum("nk,nkd->nd", found.weights, features[found.cells])
    packed[found.cell == NEWLINE] = [9, -9]
    np.testing.assert_allclose(packed, case.value["output"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.cell[found.cell >= 0], found.cells[found.cell >= 0, 0])


@pytest.mark.parametrize("case", entries("anyres", "images"))
def test_tiles_of_images(case: Entry):
    with Image.open(case.folder / case.value["file"]) as file:
        image = file.convert("RGB")
    assert image.size == tuple(case.value["size_wh"])
    for mode, expected in case.value["modes"].items():
        config = image_config(case, mode)
        found = anyres.tiles(image, config)
        hashes = [hashlib.sha256(tile.tobytes()).hexdigest() for tile in found]
        assert hashes == expected["tile_sha256"], mode
        assert len(found) == expected["n_tiles"] == anyres.layout(image.size, 8, config).tiles
        t, y, x = np.asarray(expected["samples_tile_row_col"]).T
        np.testing.assert_array_equal(found[t, y, x], expected["samples_rgb"])
        if "tiles_png_stacked_vertically" in expected:
            with Image.open(case.folder / expected["tiles_png_stacked_vertically"]) as stacked:
                np.testing.assert_array_equal(found.reshape(-1, config.tile_size, 3), np.asarray(stacked))
        several = anyres.tiles(image, config, alone=False)  # one image of a multi-image sample
        assert [hashlib.sha256(tile.tobytes()).hexdigest() for tile in several] == [case.value["pad_square_sha256"]]
    side = config.tile_size
    for aspect_ratio, key in (("square", "square_sha256"), ("pad", "pad_square_sha256")):
        (tile,) = anyres.tiles(image, single_tile(side, aspect_ratio=aspect_ratio))
        assert hashlib.sha256(tile.tobytes()).hexdigest() == case.value[key]


@pytest.mark.parametrize("case", entries("anyres", "splice"))
def test_splice(case: Entry):
    """The official batch call, with embeddings that say what they are; it also truncates, which vr_jax does not."""
    spec, u = case.value, case.value["u"]
    config = image_config(case, spec["mode"])
    images = list(zip(spec["image_sizes_wh"], spec["tiles_per_image"], strict=True))
    offset = 0
    for row, kind in enumerate(spec["kinds"]):
        ids = np.asarray(spec["input_ids"][row])
        labels = np.asarray(spec["labels"][row])
        count = int(np.count_nonzero(ids == IMAGE_TOKEN))
        # A text-only sample consumes one dummy image.
        mine, images = images[: max(1, count)], images[max(1, count) :]
        layouts = [anyres.layout(tuple(size), u, config, alone=count == 1) for size, _ in mine[:count]]
        assert [one.tiles for one in layouts] == [tiles for _, tiles in mine[:count]], kind
        nothing = np.zeros(len(ids), bool)
        text = TokenisedConversation(ids, labels != -100, nothing, nothing.astype(np.int8), nothing.astype(np.int32))
        found = splice(text, layouts, 0, u * u, markers={})
        value = np.where(found["vision_cell"] >= 0, found["vision_cell"] + offset, found["tokens"] + 1_000_000)
        value = np.where(found["vision_cell"] == NEWLINE, -1, value)
        offset += sum(tiles for _, tiles in mine) * u * u
        length = sum(spec["out_attention_mask"][row])
        assert length == min(len(value), spec["max_length"] or len(value))
        np.testing.assert_array_equal(value[:length], spec["out_embed_value"][row][:length])
        target = np.where(found["loss_mask"], found["tokens"], -100)
        np.testing.assert_array_equal(target[:length], spec["out_labels"][row][:length])
