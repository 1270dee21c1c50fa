"""A packed row gives the logits of its samples alone, in every attention backend and with padding on either side."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.model.families import FAMILIES, family_config, family_images, without_refusion
from tests.noise import assert_within_noise, float64_config, float64_model
from tests.tiny import Text, example, pack, params_of, quick, randomized, with_params
from vr_jax.data.types import Example
from vr_jax.model.config import VlmConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

# The family of each model that is tested, and whether it has Vision Remember.
MODELS = {"baseline": ("llava", False)} | {name: (name, True) for name in FAMILIES}
BACKENDS = [
    "xla",
    pytest.param("cudnn", marks=pytest.mark.skip(reason="cuDNN attention needs an NVIDIA GPU; tests run on the CPU")),
    pytest.param("splash", marks=pytest.mark.slow),  # kernels/attention/test_splash.py has segments
]


def samples_of(family: str, config: VlmConfig) -> list[Example]:
    large, small, middle = family_images(family)
    return [
        # Several turns, two images in one turn.
        example(
            config,
            *(Text(2), large, small, Text(3, text_token=True), Text(2, target=True)),
            *(Text(2), Text(3, target=True)),
            seed=1,
        ),
        # Text only.
        example(config, Text(4, text_token=True), Text(3, target=True), Text(2), Text(2, target=True), seed=2),
        # An image in each turn.
        example(
            config,
            *(middle, Text(2, text_token=True), Text(2, target=True), small, Text(1), Text(1, target=True)),
            seed=3,
        ),
        example(config, Text(9), Text(2, target=True), seed=4),  # no text-guided token
        example(config, Text(3), large, Text(4, target=True), seed=5),  # an image without a question
    ]


def compute_logits(model: VisionLanguageModel, batch):
    return model.logits(model(batch)[0])


logits_of = jax.jit(compute_logits)


def unpacked(batch, values) -> dict[bytes, np.ndarray]:
    """First token ids of a sample (unique here) -> its values."""
    found = {}
    for b, row in enumerate(np.asarray(batch.segment_ids)):
        for segment in range(1, row.max() + 1):
            at = row == segment
            found[np.asarray(batch.tokens)[b, at].tobytes()] = np.asarray(values)[b, at]
    return found


def build(config: VlmConfig) -> VisionLanguageModel:
    return abstract_model(config)


class Alone(NamedTuple):
    """A model, and each sample's logits from a row of its own.

    Attributes:
        config: The config of the model.
        samples: The samples.
        model: The model in float32.
        plain: The logits in float32, by the token ids of the sample.
        exact: The logits in float64.
    """

    config: VlmConfig
    samples: list[Example]
    model: VisionLanguageModel
    plain: dict[bytes, np.ndarray]
    exact: dict[bytes, np.ndarray]

    def assert_equal(self, found: dict[bytes, np.ndarray]) -> None:
        """Fails where logits are further from the float64 run than rounding explains."""
        assert found.keys() == self.exact.keys()
        assert len(found) == len(self.samples)
        assert_within_noise(found, self.exact, self.plain)


@pytest.fixture(scope="module", params=quick(MODELS, "llava"))
def alone(request) -> Alone:
    family, remembers = MODELS[request.param]
    config = family_config(family)
    samples = samples_of(family, config)
    config = config if remembers else without_refusion(config)
    model = randomized(build(config))
    rows = pack(config, [[sample] for sample in samples])
    plain = unpacked(rows, logits_of(model, rows))
    with float64_model():
        wide = with_params(build(float64_config(config)), params_of(model))
        logits = jax.jit(compute_logits)(wide, rows)
        assert logits.dtype == np.float64
        exact = unpacked(rows, logits)
    return Alone(config, samples, model, plain, exact)


@pytest.mark.parametrize("number", quick(range(5), 0))
def test_padding_changes_nothing(alone, number: int):
    """A row of its own without any padding token before or after."""
    batch = pack(alone.config, [[alone.samples[number]]])
    assert (np.asarray(batch.segment_ids) > 0).all()
    [(name, found)] = unpacked(batch, logits_of(alone.model, batch)).items()
    assert_within_noise({name: found}, {name: alone.exact[name]}, {name: alone.plain[name]})


def with_backend(config, model, backend: str) -> VisionLanguageModel:
    return with_params(build(dataclasses.replace(config, attention=backend)), params_of(model))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_equal_the_samples_alone(alone, backend: str):
    rows = [alone.samples[:3], alone.samples[3:], []]
    batch = pack(alone.config, rows, tokens=130, tiles=8)
    alone.assert_equal(unpacked(batch, logits_of(with_backend(alone.config, alone.model, backend), batch)))


def test_right_aligned_rows(alone):
    left = pack(alone.config, [[sample] for sample in alone.samples], pad_side="left")
    alone.assert_equal(unpacked(left, logits_of(alone.model, left)))


def test_segments_are_what_keeps_samples_apart(alone):
    """The comparison can fail: one segment for all changes the later samples by far more than rounding."""
    batch = pack(alone.config, [alone.samples])
    merged = batch.replace(segment_ids=batch.segment_ids.clip(0, 1), tile_segment=batch.tile_segment.clip(0, 1))
    found = unpacked(batch, logits_of(alone.model, merged))
    differs = {name: np.abs(found[name] - logits).max() > 1e-3 for name, logits in alone.exact.items()}
    assert sum(differs.values()) >= len(alone.samples) - 1
    with pytest.raises(AssertionError, match="times the noise"):
        alone.assert_equal(found)
