"""Nothing computed for a position may depend on a later answer or turn (docs/design/decisions.md#decision-12).

The test is exact: it looks at gradients over whole conversations. A text-guided token that leaks on purpose shows that
it can fail.
"""

import dataclasses
import io
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.model.families import FAMILIES, family_config, family_images
from tests.tiny import Text, example, pack, quick, randomized, tiny_config, tiny_decoder, tiny_refusion
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.model.batch import Batch
from vr_jax.model.config import VlmConfig
from vr_jax.model.vlm import VisionLanguageModel, abstract_model

TEXT = tiny_decoder(vocab_size=320)


def image(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


CONVERSATIONS = (
    Conversation(
        id="two turns, an image in each",
        turns=(
            Turn("user", IMAGE, "\nWhat is it?"),
            Turn("assistant", "a cat"),
            Turn("user", IMAGE, "\nAnd now?"),
            Turn("assistant", "a dog"),
        ),
        images=(image(40, 20, 1), image(24, 24, 2)),
    ),
    Conversation(id="text only", turns=(Turn("user", "Hi?"), Turn("assistant", "yes"))),
    Conversation(
        id="one image",
        turns=(Turn("user", IMAGE, "\nWhich?"), Turn("assistant", "red")),
        images=(image(20, 40, 3),),
    ),
)


class Dependence(NamedTuple):
    """on[p, q]: the logits of position p depend on the input state of position q; the rest is of the row's tokens."""

    on: np.ndarray
    answer: np.ndarray
    text_token: np.ndarray
    segment: np.ndarray
    image: np.ndarray  # number, 0 if it is no vision token

    @property
    def forward(self) -> np.ndarray:
        """Only what looks ahead: q > p."""
        return np.triu(self.on, 1)

    @property
    def within_image(self) -> np.ndarray:
        """Both positions lie between the first and the last vision token of one image (newlines included)."""
        inside = np.zeros_like(self.on)
        for number in set(self.image) - {0}:
            at = np.flatnonzero(self.image == number)
            inside[at[0] : at[-1] + 1, at[0] : at[-1] + 1] = True
        return inside

    @property
    def leaked(self) -> np.ndarray:
        """Answer tokens that an earlier position depends on."""
        return self.forward.any(axis=0) & self.answer


def dependence_of(config: VlmConfig) -> Callable[[Batch], Dependence]:
    """Computes the dependence in the first row of batches, with one random model and one compilation."""
    model = randomized(abstract_model(config))
    original = VisionLanguageModel.embed

    @jax.jit
    def compute(model, batch):
        shape = (*batch.tokens.shape, config.decoder.hidden_size)
        direction = jax.random.normal(jax.random.key(0), (*shape[:2], config.decoder.vocab_size))

        def score(delta, position):
            with mock.patch.object(VisionLanguageModel, "embed", lambda *args: original(*args) + delta):
                hidden, _ = model(batch)
            return jnp.sum(model.logits(hidden[0, position]) * direction[0, position])

        def row(position):
            return jnp.any(jax.grad(score)(jnp.zeros(shape), position)[0] != 0, axis=-1)

        return jax.lax.map(row, jnp.arange(shape[1]))

    def of(batch: Batch) -> Dependence:
        cell = np.asarray(batch.vision_cell[0])
        image = np.asarray(batch.tile_image[0])[np.maximum(cell, 0) // config.cells_per_tile]
        return Dependence(
            on=np.asarray(compute(model, batch)),
            answer=np.asarray(batch.loss_mask[0]),
            text_token=np.asarray(batch.text_token_mask[0]),
            segment=np.asarray(batch.segment_ids[0]),
            image=np.where(cell >= 0, image, 0),
        )

    return of


@pytest.fixture(scope="module")
def dependence():
    """text_pool -> Dependence. The text-guided token's text is a matter of the data."""
    refusion = tiny_refusion(levels=(2, 3), insert_after=(1, 2))
    config = tiny_config(decoder=dataclasses.replace(TEXT, num_layers=3), refusion=refusion)
    compute = dependence_of(config)

    def of(text_pool: str) -> Dependence:
        asks = dataclasses.replace(config, refusion=dataclasses.replace(refusion, text_pool=text_pool))
        processor = Processor(demo_tokenizer(), asks, label_quirk=False)
        return compute(pack(config, [[processor.example(conversation) for conversation in CONVERSATIONS]]))

    return of


def test_no_position_depends_on_a_later_answer_or_turn(dependence):
    found = dependence("first_turn")
    assert found.answer.sum() >= 3 * 3
    assert not found.leaked.any()
    # What does look ahead: images within themselves, and into the first question (and what that question has read).
    order = np.arange(len(found.answer))
    question = np.zeros_like(found.answer)
    for segment in set(found.segment[found.text_token]):
        here = found.segment == segment
        question |= here & (order <= order[here & found.text_token].max())
        assert order[here & found.text_token].max() < order[here & found.answer].min()
    assert not (found.forward & ~found.within_image & ~question).any()
    assert (found.forward & ~found.within_image & found.text_token).any()
    assert (found.forward & found.within_image).any()


def test_no_sample_depends_on_another(dependence):
    found = dependence("all")  # even with the leaky text-guided token
    assert not (found.on & (found.segment[:, None] != found.segment)).any()
    same = (found.segment[:, None] == found.segment) & np.tri(len(found.segment), dtype=bool)
    assert found.on[same].mean() > 0.99


def test_without_text_images_look_ahead_within_themselves_only(dependence):
    found = dependence("none")
    assert not found.text_token.any()
    assert not (found.forward & ~found.within_image).any()


@pytest.mark.parametrize("text_pool", ["all", "all_human"])
def test_leaky_variants_fail(dependence, text_pool: str):
    """Pooling every message tells the images what will be answered. Pooling every question does so, too, where
    several turns are: at the second insertion a later question has read the answers before it."""
    found = dependence(text_pool)
    assert found.leaked[found.segment == 1].any()  # two turns
    assert not found.leaked[found.segment == 2].any()  # no image
    assert found.leaked[found.segment == 3].any() == (text_pool == "all")  # one turn


# The conversations above are LLaVA's. The samples of other families are made without their prompts.
@pytest.mark.parametrize("family", quick([name for name in FAMILIES if name != "llava"], "qwen2_5_vl"))
def test_other_families_keep_the_promise_and_leak_if_answers_are_pooled(family: str):
    config = family_config(family)
    refusion = dataclasses.replace(config.refusion, levels=config.refusion.levels[1:], insert_after=(1, 2))
    config = family_config(family, decoder=dataclasses.replace(config.decoder, num_layers=3), refusion=refusion)
    large, small, _ = family_images(family)
    samples = [
        example(
            config,
            *(Text(2), large, Text(3, text_token=True), Text(2, target=True)),
            *(Text(1), small, Text(2), Text(2, target=True)),
            seed=1,
        ),
        example(config, Text(2, text_token=True), Text(2, target=True), seed=2),
        example(config, small, Text(2, text_token=True), Text(2, target=True), seed=3),
    ]
    batch, compute = pack(config, [samples]), dependence_of(config)
    found = compute(batch)
    assert found.answer.sum() >= 3 * 2
    assert not found.leaked.any()
    assert (found.forward & ~found.within_image & found.text_token).any()
    assert (found.forward & found.within_image).any()
    assert not (found.on & (found.segment[:, None] != found.segment)).any()

    everything = (batch.vision_cell < 0) & (batch.segment_ids > 0)
    leaky = compute(batch.replace(text_token_mask=everything))
    assert [leaky.leaked[leaky.segment == segment].any() for segment in (1, 2, 3)] == [True, False, True]
    assert not (leaky.on & (leaky.segment[:, None] != leaky.segment)).any()
