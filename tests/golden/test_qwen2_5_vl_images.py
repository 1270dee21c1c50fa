"""Images and prompts against the recorded outputs of Qwen2.5-VL's processor (sizes, ids and positions exact)."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from tests.data.test_native import in_processor_order
from tests.golden.discovery import DATA_ROOT, Case, cases, documents, needs_data
from vr_jax.data import native
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.model.config import ImageConfig, VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.qwen2_5_vision import Qwen25VisionConfig
from vr_jax.model.projectors.merger import MergerConfig

transformers = pytest.importorskip("transformers")

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


def recorded_prompts() -> list:
    """Each recorded prompt with its messages, the sizes of its images, token ids and positions."""
    found = [
        pytest.param(row, id=row["name"], marks=needs_data("qwen2_tokenizer"))
        for _, document in documents(ITEM)
        for row in document.get("rows", ())
        if "messages" in row
    ]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=f"no recorded prompts of {ITEM}"))]


@functools.cache
def qwen_processor() -> Processor:
    """A processor of a small model with the released tokenizer, to which Qwen2.5-VL's tokens are added at their ids."""
    (special,) = (d["special token ids"] for _, d in documents(ITEM) if "special token ids" in d)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA_ROOT / "qwen2_tokenizer")
    for text, number in sorted(special.items(), key=lambda item: item[1]):
        tokenizer.add_tokens([transformers.AddedToken(text, special=True, normalized=False)], special_tokens=True)
        assert tokenizer.convert_tokens_to_ids(text) == number
    image = ImageConfig(tile_size=112, aspect_ratio="native", unpad=False, max_pixels=1003520)
    decoder = TransformerConfig(hidden_size=32, num_heads=2, num_layers=1, rope_sections=(2, 3, 3))
    encoder = Qwen25VisionConfig(hidden_size=16, num_heads=2, num_layers=1, full_attention_layers=(0,))
    config = VlmConfig(
        encoder=encoder,
        decoder=decoder,
        projector=MergerConfig(),
        image=image,
        vision_feature_layer=1,
        template="qwen2_vl",
    )
    return Processor(tokenizer, config)


def turns_of(messages: list) -> tuple[Turn, ...]:
    """The messages of the official processor as turns."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", IMAGE) for part in content]
        turns.append(Turn(message["role"], *parts))
    return tuple(turns)


@pytest.mark.parametrize("row", recorded_prompts())
def test_prompt_and_positions(row):
    files = []
    for height, width in row["image_sizes_hw"]:
        file = io.BytesIO()
        Image.new("RGB", (width, height)).save(file, "PNG")
        files.append(file.getvalue())
    found = qwen_processor().prompt(Conversation(row["name"], turns_of(row["messages"]), tuple(files)))
    image = qwen_processor().tokenizer.convert_tokens_to_ids("<|image_pad|>")
    np.testing.assert_array_equal(np.where(found.vision_cell >= 0, image, found.tokens), row["input_ids"])
    # A prompt without images has the positions 0, 1, ... on every axis, which are not recorded.
    expected = row.get("position_ids_thw", [list(range(len(row["input_ids"])))] * 3)
    np.testing.assert_array_equal(found.positions.T, expected)
    grids = [
        [1, *(found.tile_origin + found.tile_extent)[found.tile_image == k + 1].max(axis=0)] for k in range(len(files))
    ]
    assert grids == row.get("image_grid_thw", [])
    assert found.positions.max() + 1 - len(found.tokens) == row.get("rope_delta", 0)
