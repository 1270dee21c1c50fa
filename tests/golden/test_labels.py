"""Token ids, targets and inference prompts against every recorded chat of LLaVA-NeXT's preprocessing (exact)."""

import unicodedata

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.golden.discovery import DATA_ROOT, Entry, entries, needs_data
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder, Role, move_images
from vr_jax.data.schema import SPEAKERS
from vr_jax.data.texts import place_images
from vr_jax.data.types import Turn

pytestmark = needs_data("qwen2_tokenizer")
IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA_ROOT / "qwen2_tokenizer")


def recorded_turn(role: str, text: str, has_image: bool) -> Turn:
    """A message as LLaVA's code reads it: in a sample with images each `<image>` is one, in replies too."""
    return Turn(role, *(place_images([text], text.count("<image>"))[0] if has_image else (text,)))


def recorded_turns(sample: dict, has_image: bool) -> list[Turn]:
    return [recorded_turn(SPEAKERS[one["from"]], one["value"], has_image) for one in sample["conversations"]]


def assert_recorded(found, ids, labels):
    np.testing.assert_array_equal(found.tokens, ids)
    expected = np.asarray(labels)
    # Labels of the placeholders themselves vanish when the image is spliced in (docs/design/methods.md#official-code).
    expected = np.where(np.asarray(ids) == IMAGE_TOKEN, IGNORED, expected)
    np.testing.assert_array_equal(np.where(found.loss_mask, found.tokens, IGNORED), expected)


@pytest.mark.parametrize("case", entries("labels", "qwen_1_5"))
def test_chatml_training(case: Entry, tokenizer):
    has_image = case.value["has_image"]
    turns = recorded_turns(case.value["sample"], has_image)
    encoder = ChatEncoder(tokenizer, "qwen_1_5", label_quirk=True, text_pool="first_turn")
    found = encoder.sample(turns)
    assert_recorded(found, case.value["input_ids"], case.value["labels"])
    if has_image:
        expected = [message["value"] for message in case.value["after_preprocess_multimodal"]]
        assert [turn.text for turn in move_images(turns)] == expected

    # Answers are known by role: with the quirk, targets outside them are only newline, im_start and im_end.
    answer = found.roles == Role.ASSISTANT
    extra = found.tokens[found.loss_mask & ~answer]
    assert set(extra.tolist()) <= set(tokenizer.convert_tokens_to_ids(["Ċ", "<|im_start|>", "<|im_end|>"]))
    strict = ChatEncoder(tokenizer, "qwen_1_5", label_quirk=False, text_pool="first_turn")
    targets = strict.sample(turns)
    np.testing.assert_array_equal(targets.tokens, found.tokens)
    assert not np.any(targets.loss_mask & ~answer)
    kept = [turn.text for turn in (move_images(turns) if has_image else turns)]
    kept = [t for t, turn in zip(kept, turns, strict=True) if turn.role == "assistant"]
    kept = kept[1:] if turns[0].role == "assistant" else kept
    expected = "".join(text.replace("<image>", "") if has_image else text for text in kept)
    decoded = tokenizer.decode(targets.tokens[targets.loss_mask & (targets.turns >= 0)])
    # The tokenizer joins white space that ends in a newline: the header's newline is one token with the white space
    # before the answer's first word where that holds a newline. The decoded targets then begin with the header's
    # newline.
    before_first_word = kept[0][: len(kept[0]) - len(kept[0].lstrip())]
    merged = "\n" if "\n" in before_first_word or "\r" in before_first_word else ""
    assert decoded.replace("<|im_end|>", "") == unicodedata.normalize(
        "NFC", merged + expected.replace("<|im_end|>", "")
    )
    closing = [targets.tokens[targets.loss_mask & (targets.turns == t)][-1] for t in np.unique(found.turns[answer])]
    assert closing == [tokenizer.convert_tokens_to_ids("<|im_end|>")] * len(closing)


@pytest.mark.parametrize("case", entries("labels", "plain"))
def test_plain_training(case: Entry, tokenizer):
    encoder = ChatEncoder(tokenizer, "plain", label_quirk=True, text_pool="first_turn")
    found = encoder.sample(recorded_turns(case.value["sample"], has_image=True))
    assert_recorded(found, case.value["input_ids"], case.value["labels"])
    assert not found.text_token_mask.any()


@pytest.mark.parametrize("case", entries("labels", "inference_qwen_1_5"))
def test_inference_prompt(case: Entry, tokenizer):
    question = case.value["question"]
    encoder = ChatEncoder(tokenizer, "qwen_1_5", label_quirk=True, text_pool="first_turn")
    found = encoder.prompt([recorded_turn("user", question, has_image=True)])
    np.testing.assert_array_equal(found.tokens, case.value["input_ids"])
    assert not found.loss_mask.any()
