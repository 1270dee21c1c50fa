"""The named templates: the text that the official code writes, ids as transformers makes them, targets and masks."""

import json
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.data.prompts.small_tokenizers import (
    CHATML,
    LLAMA_3,
    MINICPM,
    SENTENCEPIECE,
    byte_level,
    of_transformers,
    sentencepiece,
)
from vr_jax.data.conversations import ChatEncoder, Role
from vr_jax.data.prompts.templates import NAMED
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, ImagePart, Marker, Turn
from vr_jax.errors import UserError

TURNS = (
    Turn("user", IMAGE, "\nWhat is this?\nOne word."),
    Turn("assistant", "A car."),
    Turn("user", "And now? "),
    Turn("assistant", "The ball"),
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# What the official code writes for TURNS (LLaVA: `Conversation.get_prompt`; Llama 3: Meta's chat template; MiniCPM-V:
# `conversation_to_ids_minicpm`), with <image> for the image.
WRITTEN = {
    "vicuna_v1": f"{VICUNA} USER: <image>\nWhat is this?\nOne word. ASSISTANT: A car.</s>USER: And now?  ASSISTANT: "
    "The ball</s>",
    "llama_3": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAVA}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?\nOne word.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA car.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nThe ball<|eot_id|>",
    "mistral_instruct": "[INST] <image>\nWhat is this?\nOne word. [/INST] A car. </s>[INST] And now?  [/INST] The ball "
    "</s>",
    "minicpm_v": "<用户><image>\nWhat is this?\nOne word.<AI>A car.<用户>And now? <AI>The ball</s>",
    "qwen_1_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\nWhat is this?\nOne word.<|im_end|>\n<|im_start|>assistant\nA car.<|im_end|>\n"
    "<|im_start|>user\nAnd now? <|im_end|>\n<|im_start|>assistant\nThe ball<|im_end|>\n",
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>What is this?\nOne word.<|im_end|>\n<|im_start|>assistant\nA car.<|im_end|>\n"
    "<|im_start|>user\nAnd now? <|im_end|>\n<|im_start|>assistant\nThe ball<|im_end|>\n",
}
# What a prompt of the first three messages ends with, behind the third message.
ASKED = {
    "vicuna_v1": "USER: And now?  ASSISTANT:",
    "llama_3": "And now?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral_instruct": "[INST] And now?  [/INST]",
    "minicpm_v": "<用户>And now? <AI>",
    "qwen_1_5": "And now? <|im_end|>\n<|im_start|>assistant\n",
    "qwen2_vl": "And now? <|im_end|>\n<|im_start|>assistant\n",
}
TARGETS = {
    "vicuna_v1": " A car.</s> The ball</s>",
    "llama_3": "A car.<|eot_id|>The ball<|eot_id|>",
    "mistral_instruct": " A car. </s> The ball </s>",
    "minicpm_v": "A car.The ball</s>",
    "qwen_1_5": "A car.<|im_end|>The ball<|im_end|>",
    "qwen2_vl": "A car.<|im_end|>The ball<|im_end|>",
}


def llama_3() -> PreTrainedTokenizerFast:
    return byte_level(LLAMA_3, bos=LLAMA_3[0], pad=LLAMA_3[1], eos="<|eot_id|>")


def chatml() -> PreTrainedTokenizerFast:
    return byte_level(CHATML, pad=CHATML[0], eos="<|im_end|>")


TOKENIZERS = {
    **{f"{kind}-{model}": lambda k=kind, m=model: sentencepiece(k, m) for kind, model in SENTENCEPIECE},
    "llama_3": llama_3,
    "chatml": chatml,
}
PAIRS = [
    *((name, f"{kind}-{model}") for name in ("vicuna_v1", "mistral_instruct") for kind, model in SENTENCEPIECE),
    ("llama_3", "llama_3"),
    ("qwen_1_5", "chatml"),
    ("qwen2_vl", "chatml"),
]


@pytest.fixture(scope="module")
def tokenizers():
    made = {name: make() for name, make in TOKENIZERS.items()}
    made["minicpm"] = minicpm()
    return made


def minicpm() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece("always", "bpe", MINICPM)
    tokenizer.add_tokens(["\n"])
    return tokenizer


def encoder_of(tokenizer, template, *, quirk=False, pool="first_turn") -> ChatEncoder:
    return ChatEncoder(tokenizer, template, quirk, pool)


def text_of(template: str, turns, *, prompt: bool) -> str:
    segments = NAMED[template].write(turns, prompt=prompt)
    return "".join("<image>" if isinstance(one.part, ImagePart) else one.part for one in segments)


def characters(tokenizer, ids) -> str:
    """The text of some tokens, with the space that a sentencepiece tokenizer begins a word with."""
    pieces = tokenizer.convert_ids_to_tokens([int(number) for number in ids])
    return tokenizer.backend_tokenizer.decoder.decode(["", *pieces]) if pieces else ""


def test_every_named_template_is_written_here():
    assert set(WRITTEN) == set(ASKED) == set(TARGETS) == set(NAMED)


@pytest.mark.parametrize("template", NAMED)
def test_the_text_is_that_of_the_official_code(template):
    turns = list(TURNS)
    if template == "qwen2_vl":  # `ChatEncoder.sample` drops the newline of LLaVA's records.
        turns[0] = Turn("user", IMAGE, "What is this?\nOne word.")
    if template == "minicpm_v":
        turns[0] = Turn("user", IMAGE, "What is this?\nOne word.")
    assert text_of(template, turns, prompt=False) == WRITTEN[template]
    asked = text_of(template, turns[:3], prompt=True)
    assert asked.endswith(ASKED[template])
    assert WRITTEN[template].startswith(asked)


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_ids_are_those_of_transformers(template, kind, tokenizers):
    """A special token stands for the image in transformers, and where the tokenizer has it, also here."""
    tokenizer = tokenizers[kind]
    encoder = encoder_of(tokenizer, template)
    expected = of_transformers(tokenizer, WRITTEN[template])
    found = encoder.sample(TURNS)
    np.testing.assert_array_equal(found.tokens, expected)
    if tokenizer.bos_token is not None:
        assert np.count_nonzero(found.tokens == tokenizer.bos_token_id) == 1
        assert found.tokens[0] == tokenizer.bos_token_id
    several = [
        Turn("user", IMAGE, " ", IMAGE, "\nWhat  is this?"),
        Turn("assistant", " Two dogs "),
        Turn("user", IMAGE),
    ]
    expected = of_transformers(tokenizer, text_of(template, several, prompt=True))
    np.testing.assert_array_equal(encoder.prompt(several).tokens, expected)


def test_ids_of_minicpm(tokenizers):
    """<image> and </image> stand around an image there, so that the layout's ends split the text as one token does."""
    tokenizer = tokenizers["minicpm"]
    found = encoder_of(tokenizer, "minicpm_v").sample(TURNS)
    expected = of_transformers(tokenizer, WRITTEN["minicpm_v"].replace("<image>", "<|IMG|>"), "<|IMG|>")
    np.testing.assert_array_equal(found.tokens, expected)


@pytest.mark.parametrize(("template", "kind"), [*PAIRS, ("minicpm_v", "minicpm")])
def test_targets_are_the_answers_and_what_closes_them(template, kind, tokenizers):
    tokenizer = tokenizers[kind]
    found = encoder_of(tokenizer, template).sample(TURNS)
    if "unigram" not in kind:  # which spells what its vocabulary lacks as <unk>
        assert characters(tokenizer, found.tokens[found.loss_mask]) == TARGETS[template]
    assert set(found.roles[found.loss_mask]) == {Role.ASSISTANT}
    assert set(found.turns[found.loss_mask]) == {1, 3}
    # The space before a reply that a tokenizer does not join to its first word is a target, too.
    turns = (Turn("user", "What?"), Turn("assistant", "Gone"))
    n = len(encoder_of(tokenizer, template).prompt(turns).tokens)
    loss = encoder_of(tokenizer, template).sample(turns).loss_mask[n:]
    assert loss[: np.count_nonzero(loss)].all()
    # A prompt is the beginning of the sample, and all that the model writes behind it up to the end is a target.
    encoder = encoder_of(tokenizer, template)
    turns = (
        TURNS[:3]
        if template not in ("qwen2_vl", "minicpm_v")
        else (Turn("user", IMAGE, "What is this?\nOne word."), *TURNS[1:3])
    )
    n = len(encoder.prompt(turns).tokens)
    np.testing.assert_array_equal(encoder.prompt(turns).tokens, found.tokens[:n])
    behind = found.loss_mask[n:]
    assert behind[: np.count_nonzero(behind)].all()


@pytest.mark.parametrize(("template", "kind"), [*PAIRS, ("minicpm_v", "minicpm")])
def test_the_text_guided_token_pools_text_only(template, kind, tokenizers):
    tokenizer = tokenizers[kind]
    expected = {
        "none": "",
        "first_turn": "What is this?\nOne word.",
        "all_human": "What is this?\nOne word.And now? ",
        "all": "What is this?\nOne word.A car.And now? The ball",
    }
    for pool, text in expected.items():
        found = encoder_of(tokenizer, template, pool=pool).sample(TURNS)
        chosen = found.tokens[found.text_token_mask]
        assert not np.isin(chosen, tokenizer.all_special_ids).any()
        assert not (found.text_token_mask & (found.roles == Role.SYSTEM)).any()
        if "unigram" in kind:
            continue
        written = characters(tokenizer, chosen).replace(" ", "")
        assert written == text.replace(" ", "")


def test_the_quirk_of_the_labels_is_llavas(tokenizers):
    """`preprocess_llama3` makes whole assistant messages targets, and four special tokens wherever they stand."""
    tokenizer = tokenizers["llama_3"]
    found = encoder_of(tokenizer, "llama_3", quirk=True).sample(TURNS)
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    expected = (found.roles == Role.ASSISTANT) | np.isin(found.tokens, tokenizer.convert_tokens_to_ids(list(names)))
    np.testing.assert_array_equal(found.loss_mask, expected)
    for template, kind in (("vicuna_v1", "first-bpe"), ("qwen2_vl", "chatml")):
        with_quirk, without = (
            encoder_of(tokenizers[kind], template, quirk=quirk).sample(TURNS) for quirk in (True, False)
        )
        np.testing.assert_array_equal(with_quirk.loss_mask, without.loss_mask)


def test_a_system_message_replaces_the_default():
    turns = [Turn("system", "Be brief."), Turn("user", "Hi")]
    assert text_of("vicuna_v1", turns, prompt=True) == "Be brief. USER: Hi ASSISTANT:"
    assert text_of("mistral_instruct", turns, prompt=True) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert "<|end_header_id|>\n\nBe brief.<|eot_id|>" in text_of("llama_3", turns, prompt=True)
    assert text_of("qwen2_vl", turns, prompt=True).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("minicpm_v", [Turn("system", "S"), Turn("user", "Q")], "'minicpm_v' has no system messages"),
        (
            "vicuna_v1",
            [Turn("user", "Q"), Turn("system", "S")],
            "'vicuna_v1' has a system message only at the beginning",
        ),
        ("mistral_instruct", [Turn("user", "Q"), Turn("user", "Q")], "'mistral_instruct' needs messages of user and"),
    ],
)
def test_messages_that_a_format_cannot_write(template, turns, message):
    with pytest.raises(SkipRecord, match=message) as caught:
        NAMED[template].write(turns, prompt=True)
    assert caught.value.reason == "wrong_template"


def test_markers(tokenizers):
    tokenizer = tokenizers["minicpm"]
    markers = encoder_of(tokenizer, "minicpm_v").markers
    names = {"IMAGE_START": "<image>", "IMAGE_END": "</image>", "SLICE_START": "<slice>", "SLICE_END": "</slice>"}
    expected = {Marker[name]: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    assert markers == expected | {Marker.ROW_END: tokenizer.convert_tokens_to_ids("\n")}
    assert ChatEncoder(tokenizer, "plain", False, "none", markers_of="minicpm_v").markers == markers
    qwen = tokenizers["chatml"]
    ends = qwen.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    assert list(encoder_of(qwen, "qwen2_vl").markers.values()) == ends
    assert encoder_of(qwen, "qwen_1_5").markers == {}


@pytest.mark.parametrize(
    ("template", "kind", "token"),
    [
        ("qwen2_vl", "llama_3", r"'<\|im_start\|>'"),
        ("minicpm_v", "first-bpe", "'<image>'"),
        ("llama_3", "chatml", r"'<\|begin_of_text\|>'"),
        ("vicuna_v1", "chatml", "'</s>'"),
    ],
)
def test_a_tokenizer_without_a_token_of_the_format_is_refused(template, kind, token, tokenizers):
    with pytest.raises(UserError, match=rf"encodes {token} as \d+ tokens .* the template '{template}' needs one"):
        encoder_of(tokenizers[kind], template)


def test_an_end_token_that_no_text_becomes_is_refused():
    """Qwen2's vocabulary has "</s>" as an ordinary token without the merges that would make it."""
    tokenizer = byte_level(("<|endoftext|>", *MINICPM), pad="<|endoftext|>", eos="<|endoftext|>")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["</s>"] = len(tokenizer)
    ordinary = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<|endoftext|>"
    )
    assert ordinary.get_vocab()["</s>"] not in ordinary.encode("a</s>")
    with pytest.raises(UserError, match=r"encodes '</s>' as \d+ tokens .* the template 'minicpm_v' needs one token"):
        ChatEncoder(ordinary, "minicpm_v", False, "none")
    ordinary.add_special_tokens({"additional_special_tokens": ["</s>"]})
    sample = ChatEncoder(ordinary, "minicpm_v", False, "none").sample([Turn("user", "Hi"), Turn("assistant", "Yes")])
    assert sample.tokens[-1] == ordinary.get_vocab()["</s>"]


def test_captions_begin_with_the_token_that_the_tokenizer_puts_in_front(tokenizers):
    turns = (Turn("user", IMAGE), Turn("assistant", "A car."))
    tokenizer = tokenizers["first-bpe"]
    found = encoder_of(tokenizer, "plain").sample(turns)
    np.testing.assert_array_equal(found.tokens, of_transformers(tokenizer, "<image>A car.\n"))
    assert characters(tokenizer, found.tokens[found.loss_mask]) == "A car.\n"


@pytest.mark.parametrize(("template", "kind"), [*PAIRS, ("minicpm_v", "minicpm")])
def test_a_reply_is_encoded_as_it_follows_its_prompt(template, kind, tokenizers):
    encoder = encoder_of(tokenizers[kind], template)
    ids, behind = encoder.reply("The ball")
    whole = encoder.sample([Turn("user", "Which?"), Turn("assistant", "The ball")])
    asked = encoder.prompt([Turn("user", "Which?")])
    np.testing.assert_array_equal(np.concatenate([asked.tokens, ids]), whole.tokens)
    assert behind == (1 if kind == "chatml" else 0)
    assert whole.loss_mask[len(asked.tokens) :].sum() == len(ids) - behind


def test_an_encoder_can_be_pickled(tokenizers):
    for template, kind in (("vicuna_v1", "first-bpe"), ("minicpm_v", "minicpm")):
        encoder = encoder_of(tokenizers[kind], template)
        copied = pickle.loads(pickle.dumps(encoder))
        np.testing.assert_array_equal(copied.sample(TURNS).tokens, encoder.sample(TURNS).tokens)
        assert copied.markers == encoder.markers
