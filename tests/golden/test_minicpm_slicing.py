"""`vr_jax.data.slices` against every recorded size, prompt and image of MiniCPM-V 2.0's slicing (all exact)."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.data.sliced import unpacked
from tests.golden.discovery import cases, documents
from vr_jax.data import slices
from vr_jax.data.types import Marker
from vr_jax.model.config import ImageConfig

TEXT = {
    Marker.IMAGE_START: "<image>",
    Marker.IMAGE_END: "</image>",
    Marker.SLICE_START: "<slice>",
    Marker.SLICE_END: "</slice>",
    Marker.ROW_END: "\n",
}


def rows_of(recorded: dict) -> list[tuple[dict, dict]]:
    """Each recorded size with its parameters."""
    other = recorded.get("other_parameters", {"rows": []})
    return [(recorded["parameters"], row) for row in recorded["rows"]] + [
        (other["parameters"], row) for row in other["rows"]
    ]


def image_config(parameters: dict, patches: int = 34) -> ImageConfig:
    return ImageConfig(
        tile_size=patches * parameters["patch_size"],
        aspect_ratio="slices",
        unpad=False,
        slice_size=parameters["scale_resolution"],
        max_slices=parameters["max_slice_nums"],
    )


def written(found, queries: int) -> str:
    """The layout as the text that the official processor hands to the tokenizer, without its last newline."""
    text = "".join("?" if one == Marker.NONE else TEXT[Marker(one)] for one in found.marker.tolist())
    return re.sub(r"\?+", lambda run: f"{{{len(run[0])}}}", text)


def slicing_documents() -> list:
    found = [
        pytest.param(document, path.parent, id=path.stem)
        for path, document in documents("minicpm_v")
        if "rows" in document and "parameters" in document
    ]
    return found or [pytest.param(None, None, id="absent", marks=pytest.mark.skip(reason="no recorded 'minicpm_v'"))]


@pytest.mark.parametrize(("document", "folder"), slicing_documents())
def test_sizes_and_placeholders_of_every_recorded_image(document, folder):
    """The overview, the grid, the refined size, the pieces, and the text with one place for each query."""
    for parameters, row in rows_of(document):
        patch, queries = parameters["patch_size"], parameters["query tokens"]
        config, size = image_config(parameters), tuple(row["size"])
        found = slices.slicing(size, patch, config)
        recorded = [row[name] and tuple(row[name]) for name in ("source_size", "grid", "refine_size", "slice_size")]
        assert [found.overview, found.grid, found.refined, found.piece] == recorded, row
        assert len(found.slices) == 1 + row["slices"]
        # The longest slice of the recorded sizes has 35,107 patches, so that a slot of this size holds all.
        laid_out = slices.layout(size, patch, round(queries**0.5), image_config(parameters, 200))
        assert written(laid_out, queries) + "\n" == row["layout"]
        assert len(laid_out.cell) + 1 == row["tokens"]
        assert np.count_nonzero(laid_out.cell >= 0) == row["query_tokens"]
        np.testing.assert_array_equal(laid_out.cell[laid_out.cell >= 0], np.arange(row["query_tokens"]))
        assert laid_out.tiles == len(laid_out.extent) == 1 + row["slices"]
        np.testing.assert_array_equal(laid_out.extent[:, ::-1] * patch, found.slices)


@pytest.mark.parametrize(("document", "folder"), slicing_documents())
def test_pixels_of_every_recorded_slice(document, folder):
    """All pixels of the overview and of the pieces, after the patches went through their slots."""
    assert document["pixels"]["images"]
    for recorded in document["pixels"]["images"]:
        patch = recorded["parameters"]["patch_size"]
        config = image_config(recorded["parameters"])
        with Image.open(folder / recorded["image"]) as opened:
            image = opened.convert("RGB")
        result = recorded["result"]
        expected = [np.asarray(Image.open(folder / recorded["files"][0]).convert("RGB"))]
        if result["slices"]:
            stacked = np.asarray(Image.open(folder / recorded["files"][1]).convert("RGB"))
            expected += np.split(stacked, result["slices"])
        found, laid_out = slices.tiles(image, patch, config), slices.layout(image.size, patch, 8, config)
        assert found.shape == (len(expected), 476, 476, 3)
        for slot, extent, pixels in zip(found, laid_out.extent.tolist(), expected, strict=True):
            np.testing.assert_array_equal(unpacked(slot, extent, patch), pixels)
            assert not slots_rest(slot, extent[0] * extent[1], patch).any()


def slots_rest(slot: np.ndarray, used: int, patch: int) -> np.ndarray:
    """The pixels of a slot behind its first `used` patches."""
    grid = slot.shape[0] // patch
    return slot.reshape(grid, patch, grid, patch, 3).swapaxes(1, 2).reshape(grid * grid, -1)[used:]


def whole_cases() -> list:
    """The recorded questions to a whole model; the other kinds have no images to cut."""
    return [one for one in cases("minicpm_v") if one.values[0] is None or one.values[0].kind == "whole"]


@pytest.mark.parametrize("case", whole_cases())
def test_slices_of_whole_models(case):
    """The slices of each image of a recorded question, in the order of the text."""
    patch = case.config["vision"]["patch_size"]
    parameters = {**case.config, "patch_size": patch}
    config = image_config(parameters, 8)
    found, extents = [], []
    for number in range(len(case.config["image_sizes_wh"])):
        image = Image.fromarray(case.inputs[f"image_{number}"])
        laid_out = slices.layout(image.size, patch, round(case.config["query_num"] ** 0.5), config)
        found += list(slices.tiles(image, patch, config))
        extents += laid_out.extent.tolist()
    assert extents == case.config["slice_grids_hw"]
    for number, (slot, extent) in enumerate(zip(found, extents, strict=True)):
        np.testing.assert_array_equal(unpacked(slot, extent, patch), case.outputs[f"slice_{number}"])
    assert f"slice_{len(found)}" not in case.outputs
