"""What changes the logits does what the logits processors of transformers do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference import tiny
from vr_jax.data.collate import collate
from vr_jax.inference.processors import occurred_in_prompt, process_logits, with_token
from vr_jax.model.batch import BatchShape
from vr_jax.model_directory import GenerationSettings

torch = pytest.importorskip("torch", reason="the processors of transformers compute with torch")
SIZE, STOPS = 12, (3, 7)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_logits_are_those_of_transformers(step):
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process

    rng = np.random.default_rng(step)
    logits = rng.normal(size=(2, SIZE)).astype(np.float32)
    prompt, reply = rng.integers(0, SIZE, (2, 4)), rng.integers(0, SIZE, (2, step))
    settings = GenerationSettings(
        repetition_penalty=1.3, min_new_tokens=3, suppress_tokens=(1,), begin_suppress_tokens=(2, 5)
    )
    processors = LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
            logits_process.MinNewTokensLengthLogitsProcessor(4, 3, torch.tensor(STOPS)),
            logits_process.SuppressTokensLogitsProcessor([1]),
            logits_process.SuppressTokensAtBeginLogitsProcessor([2, 5], 4),
        ]
    )
    ids = np.concatenate([prompt, reply], axis=1)
    expected = processors(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
    occurred = jnp.zeros((2, SIZE), bool)
    for column in ids.T:
        occurred = with_token(occurred, jnp.asarray(column))
    found = process_logits(jnp.asarray(logits), settings, STOPS, jnp.int32(step), occurred)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_settings_that_change_nothing_compute_nothing():
    logits = jnp.zeros((2, SIZE))
    assert process_logits(logits, GenerationSettings(), STOPS, jnp.int32(0), None) is logits


@pytest.mark.parametrize("image_token", [None, 11, 10_000])
def test_what_occurred_in_a_prompt(image_token):
    """Ids of the text and of the image token; a model that is given embeddings has none."""
    prompts = tiny.prompts(tiny.config())
    chosen = [prompts["text"], prompts["wide"]]
    size = len(tiny.TOKENIZER) + 5
    shape = BatchShape(rows=2, tokens=112, tiles=4, tile_size=24)
    batch = collate([[one] for one in chosen], shape, pad_side="left").batch
    found = np.asarray(occurred_in_prompt(batch, size, image_token))
    for row, prompt in enumerate(chosen):
        expected = set()
        if image_token is not None:
            expected = set(prompt.tokens[prompt.vision_cell == -1].tolist())
            expected |= {image_token} & set(range(size)) if row == 1 else set()
        assert set(np.flatnonzero(found[row]).tolist()) == expected
