"""Our model against `Qwen2_5_VLForConditionalGeneration` of transformers, with random weights in float32."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests import torch_weights
from tests.qwen2_5_vl import inputs_of, load_model, model_config
from tests.tiny import quick

IMAGE, START, END = 90, 91, 92
VISION = {
    "depth": 4,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    # transformers rounds it down to three cells of two patches.
    "window_size": 27,
    "fullatt_block_indexes": [0, 2],
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}
SECTIONS, THETA = (1, 1, 2), 5e5
# The rows and columns of patches of the images of each row, in which tiles hold up to 6 x 6 patches.
BATCHES = {
    "one image of whole windows": [[(6, 12)]],
    "partial windows at both edges": [[(8, 10)]],
    "two images": [[(4, 14), (8, 2)]],
    "left padding": [[(2, 4)], [(10, 8), (6, 6)], []],
    "text alone": [[], []],
}


@functools.cache
def reference():
    """transformers' model, and ours with its weights."""
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTIONS)}
    config = Qwen2_5_VLConfig(
        vision_config=VISION | {"out_hidden_size": TEXT["hidden_size"]},
        text_config=TEXT | {"rope_parameters": rope, "pad_token_id": 0},
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch_weights.randomize(theirs)
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    ours = model_config(VISION, TEXT | {"rope_theta": THETA, "mrope_section": SECTIONS}, tied=False)
    return theirs, load_model(ours, weights)


def rows_of(images: list[list[tuple[int, int]]], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of prompts with text around every image, aligned to the right, and the mask of real tokens."""

    def text(count: int) -> list[int]:
        return rng.integers(1, IMAGE, count).tolist()

    rows = []
    for number, row in enumerate(images):
        spans = [[START, *[IMAGE] * (height * width // 4), END, *text(2)] for height, width in row]
        rows.append([*text(3 + number), *(token for span in spans for token in span), *text(2)])
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows], np.int64)
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


@jax.jit
def logits_of(model, patches, batch):
    states = model.encoder.states(patches, model.config.feature_levels, batch.tile_places)
    hidden, _ = model.run(dict(zip(model.config.feature_levels, states, strict=True)), batch)
    return model.logits(hidden)


# "left padding" has all the others' features, and each shape is compiled.
@pytest.mark.parametrize("name", quick(BATCHES, "left padding", "text alone"))
def test_logits(name: str):
    theirs, ours = reference()
    rng = np.random.default_rng(1)
    ids, mask = rows_of(BATCHES[name], rng)
    grids = [(1, *size) for row in BATCHES[name] for size in row]
    patches = rng.normal(size=(sum(height * width for _, height, width in grids), 3, 1, 4, 4)).astype(np.float32)
    patches[::5] *= 1e-3  # A wrong epsilon of a norm is seen.
    pixels = np.repeat(patches, 2, axis=2).reshape(len(patches), 3 * 2 * 4 * 4)
    images = {}
    if grids:
        images = {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.tensor(grids)}
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            mm_token_type_ids=torch.from_numpy((ids == IMAGE).astype(np.int64)),
            **images,
        ).logits.numpy()

    data = inputs_of(ours.config, ids, mask, pixels, grids, image_token=IMAGE)
    found = np.asarray(logits_of(ours, data.patches, data.batch))
    assert np.abs(expected[mask]).max() > 1
    # The largest difference that was measured on a CPU is 6e-6.
    np.testing.assert_allclose(found[mask], expected[mask], atol=5e-5, rtol=1e-5)
