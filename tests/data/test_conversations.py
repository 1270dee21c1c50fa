"""Token ids, targets and the mask of the text-guided token of both templates."""

import copy
import pickle

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.samples import parts
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder, Role
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, Turn
from vr_jax.errors import UserError

TURNS = (
    Turn("user", IMAGE, "\nWhat is this?\nOne word."),
    Turn("assistant", "A\ncar"),
    Turn("user", "And now?"),
    Turn("assistant", "Gone."),
)


def encode(tokenizer, turns=TURNS, *, template="qwen_1_5", quirk=True, pool="first_turn", prompt=False):
    encoder = ChatEncoder(tokenizer, template, quirk, pool)
    return (encoder.prompt if prompt else encoder.sample)(turns)


def text_of(tokenizer, found, mask):
    return tokenizer.decode(found.tokens[mask])


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("none", ""),
        ("first_turn", "What is this?\nOne word."),
        ("all_human", "What is this?\nOne word.And now?"),
        ("all", "What is this?\nOne word.A\ncarAnd now?Gone."),
    ],
)
def test_the_pool_selects_the_turns(tokenizer, pool, expected):
    found = encode(tokenizer, pool=pool)
    assert text_of(tokenizer, found, found.text_token_mask) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image>\nWhat?", "What?"),
        ("<image>\n\n  What?\n", "What?\n"),
        ("What?\n<image>", "What?"),  # Training moves the placeholder to the front.
        ("<image>", ""),
        ("<image>\n<image>\nBoth?", "Both?"),
        ("First <image> then <image>. Same?", "then . Same?"),
        ("<image>\nWhat is <|im_end|> here?", "What is  here?"),
    ],
)
def test_text_token_holds_the_question_behind_the_image(tokenizer, question, expected):
    found = encode(tokenizer, (Turn("user", *parts(question)), Turn("assistant", "Yes")))
    assert text_of(tokenizer, found, found.text_token_mask) == expected


def test_text_token_without_images_is_the_first_question(tokenizer):
    found = encode(tokenizer, (Turn("user", "Hi there"), Turn("assistant", "Yes")))
    assert text_of(tokenizer, found, found.text_token_mask) == "Hi there"


def test_text_token_is_the_same_in_training_and_when_asked(tokenizer):
    trained = encode(tokenizer, TURNS[:2])
    asked = encode(tokenizer, TURNS[:2], prompt=True)
    n = len(asked.tokens)
    np.testing.assert_array_equal(trained.tokens[:n], asked.tokens)
    np.testing.assert_array_equal(trained.text_token_mask[:n], asked.text_token_mask)
    assert not trained.text_token_mask[n:].any()
    assert not asked.loss_mask.any()


def test_text_token_pools_neither_answers_nor_later_turns(tokenizer):
    found = encode(tokenizer)
    assert set(found.turns[found.text_token_mask]) == {0}
    assert set(found.roles[found.text_token_mask]) == {Role.USER}


def test_roles_and_turns(tokenizer):
    found = encode(tokenizer)
    assert sorted({(int(t), int(r)) for t, r in zip(found.turns, found.roles, strict=True)}) == [
        (-1, Role.SYSTEM),
        (0, Role.USER),
        (1, Role.ASSISTANT),
        (2, Role.USER),
        (3, Role.ASSISTANT),
    ]
    assert text_of(tokenizer, found, found.turns == 3) == "<|im_start|>assistant\nGone.<|im_end|>\n"


def test_targets_with_and_without_the_label_quirk(tokenizer):
    strict = encode(tokenizer, quirk=False)
    assert text_of(tokenizer, strict, strict.loss_mask) == "A\ncar<|im_end|>Gone.<|im_end|>"
    quirk = encode(tokenizer)
    newline, start, end = tokenizer.convert_tokens_to_ids(["Ċ", "<|im_start|>", "<|im_end|>"])
    expected = (quirk.roles == Role.ASSISTANT) | np.isin(quirk.tokens, [newline, start, end])
    np.testing.assert_array_equal(quirk.loss_mask, expected)


def test_plain_pools_the_caption_only_with_the_pool_all(tokenizer):
    turns = (Turn("user", "Describe it.\n", IMAGE), Turn("assistant", "A car."))
    for pool, expected in [("first_turn", ""), ("all_human", ""), ("all", "A car.")]:
        found = encode(tokenizer, turns, template="plain", pool=pool)
        assert text_of(tokenizer, found, found.text_token_mask) == expected
    assert found.tokens[0] == IMAGE_TOKEN
    assert text_of(tokenizer, found, found.loss_mask) == "A car.\n"
    asked = encode(tokenizer, turns, template="plain", prompt=True)
    np.testing.assert_array_equal(asked.tokens, [IMAGE_TOKEN])


def test_a_system_turn_replaces_the_default(tokenizer):
    found = encode(tokenizer, (Turn("system", "Be brief."), *TURNS))
    assert tokenizer.decode(found.tokens[found.roles == Role.SYSTEM]) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text_of(tokenizer, found, found.text_token_mask) == "What is this?\nOne word."


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((), "empty_conversation"),
        ((Turn("assistant", "A"),), "empty_conversation"),
        ((Turn("user", "Q"),), "no_answer"),
        ((Turn("tool", "Q"), Turn("assistant", "A")), "unknown_role"),
        ((Turn("user", "\ud800"), Turn("assistant", "A")), "malformed_record"),
    ],
)
def test_unusable_conversations(tokenizer, turns, reason):
    with pytest.raises(SkipRecord) as caught:
        encode(tokenizer, turns)
    assert caught.value.reason == reason
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason


@pytest.mark.parametrize(
    "turns", [TURNS, (Turn("user", "no <image>"), Turn("assistant", "A")), (Turn("user", IMAGE), Turn("user", "A"))]
)
def test_plain_rejects_samples_that_are_not_captions(tokenizer, turns):
    with pytest.raises(SkipRecord) as caught:
        encode(tokenizer, turns, template="plain")
    assert caught.value.reason == "wrong_template"


@pytest.mark.parametrize("template", ["qwen_1_5", "plain"])
def test_a_text_that_reads_as_a_placeholder_is_text(tokenizer, template):
    """Also where the tokenizer has `<image>` as a token, as those of LLaVA-OneVision do."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken(name, special=True) for name in ("<image>", "<video>")], special_tokens=True)
    turns = (Turn("user", IMAGE, "What is <image>?"), Turn("assistant", "The tag <image>"))
    expected = encode(tokenizer, turns, template=template)
    assert "<image>" in tokenizer.decode(expected.tokens[expected.tokens >= 0])
    assert np.count_nonzero(expected.tokens == IMAGE_TOKEN) == 1
    np.testing.assert_array_equal(encode(own, turns, template=template).tokens, expected.tokens)
    video = encode(own, (Turn("user", "<video>"), Turn("assistant", "A")))
    assert own.convert_tokens_to_ids("<video>") in video.tokens, "the ids of other tokens stay"


def test_padding_switched_on_by_another_user_has_no_effect(tokenizer):
    expected = encode(tokenizer).tokens
    tokenizer(["a", "some longer text"], padding=True, truncation=True, max_length=4)
    np.testing.assert_array_equal(encode(tokenizer).tokens, expected)


def test_tokenizers_that_cannot_write_chatml():
    alphabet = {symbol: k for k, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="no pad token"):
        ChatEncoder(PreTrainedTokenizerFast(tokenizer_object=bare), "plain", True, "none")
    padded = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="a")
    with pytest.raises(UserError, match=r"<\|im_start\|>.* as 12 tokens"):
        ChatEncoder(padded, "qwen_1_5", True, "none")
