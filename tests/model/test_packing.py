"""A packed row gives the logits of its samples alone, in every attention backend and with padding on either side."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.tiny import SampleImage, Text, example, pack, params_of, randomized, tiny_config, with_params
from vr_jax.model.vlm import VisionLanguageModel

VR = tiny_config()
CONFIGS = {"baseline": dataclasses.replace(VR, refusion=None), "vision_remember": VR}
BACKENDS = [
    "xla",
    pytest.param("cudnn", marks=pytest.mark.skip(reason="cuDNN attention needs an NVIDIA GPU; tests run on the CPU")),
    "splash",
]

SAMPLES = [
    # Several turns, two images in one turn.
    example(
        VR,
        *(Text(2), SampleImage(3, crop=1), SampleImage(1), Text(3, text_token=True), Text(2, target=True)),
        *(Text(2), Text(3, target=True)),
        seed=1,
    ),
    example(VR, Text(4, text_token=True), Text(3, target=True), Text(2), Text(2, target=True), seed=2),  # text only
    # An image in each turn.
    example(
        VR,
        *(
            SampleImage(2),
            Text(2, text_token=True),
            Text(2, target=True),
            SampleImage(1),
            Text(1),
            Text(1, target=True),
        ),
        seed=3,
    ),
    example(VR, Text(5), Text(2, target=True), seed=4),  # no text-guided token
    example(VR, Text(1), SampleImage(5), Text(4, target=True), seed=5),  # an image without a question
]


# Both sides are float32, and sum in different orders because their rows differ in length. The largest distance measured
# is 1.6e-5, on an Intel Xeon (Sapphire Rapids); the bound is two and a half times that. A leak between samples changes
# logits by more than 1e-3 (`test_segments_are_what_keeps_samples_apart`).
NOISE = {"atol": 4e-5, "rtol": 1e-5}


@jax.jit
def logits_of(model: VisionLanguageModel, batch):
    return model.logits(model(batch)[0])


def unpacked(batch, values) -> dict[str, np.ndarray]:
    """First token ids of a sample (unique here) -> its values."""
    found = {}
    for b, row in enumerate(np.asarray(batch.segment_ids)):
        for segment in range(1, row.max() + 1):
            at = row == segment
            found[np.asarray(batch.tokens)[b, at].tobytes()] = np.asarray(values)[b, at]
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def alone(request):
    """The model, and each sample's logits from a row of its own without any padding token before or after."""
    config = CONFIGS[request.param]
    model = randomized(nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0))))
    found = {}
    for sample in SAMPLES:
        batch = pack(config, [[sample]])
        found |= unpacked(batch, logits_of(model, batch))
    return config, model, found


def with_backend(config, model, backend: str) -> VisionLanguageModel:
    other = dataclasses.replace(config, attention=backend)
    return with_params(nnx.eval_shape(lambda: VisionLanguageModel(other, rngs=nnx.Rngs(0))), params_of(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_equal_the_samples_alone(alone, backend: str):
    config, model, expected = alone
    rows = [[SAMPLES[0], SAMPLES[1], SAMPLES[2]], [SAMPLES[3], SAMPLES[4]], []]
    batch = pack(config, rows, tokens=130, tiles=8)
    found = unpacked(batch, logits_of(with_backend(config, model, backend), batch))
    assert found.keys() == expected.keys()
    assert len(found) == len(SAMPLES)
    for name, logits in expected.items():
        np.testing.assert_allclose(found[name], logits, **NOISE)


def test_right_aligned_rows(alone):
    config, model, expected = alone
    left = pack(config, [[sample] for sample in SAMPLES], pad_side="left")
    for name, logits in unpacked(left, logits_of(model, left)).items():
        np.testing.assert_allclose(logits, expected[name], **NOISE)


def test_segments_are_what_keeps_samples_apart(alone):
    """The comparison can fail: one segment for all changes the later samples."""
    config, model, expected = alone
    batch = pack(config, [SAMPLES])
    merged = batch.replace(segment_ids=batch.segment_ids.clip(0, 1), tile_segment=batch.tile_segment.clip(0, 1))
    found = unpacked(batch, logits_of(model, merged))
    differs = {name: np.abs(found[name] - logits).max() > 1e-3 for name, logits in expected.items()}
    assert sum(differs.values()) >= len(SAMPLES) - 1
