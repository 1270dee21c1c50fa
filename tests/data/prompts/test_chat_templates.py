"""The tokenizer's own chat template: the text of transformers, its parts by speaker, and templates that are refused."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.data.prompts.small_tokenizers import CHATML, LLAMA_3, byte_level, of_transformers, sentencepiece
from vr_jax.data.conversations import IMAGE_TOKEN, ChatEncoder, Role
from vr_jax.data.prompts.chat_templates import ChatTemplate
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import IMAGE, ImagePart, Marker, Turn
from vr_jax.errors import UserError

# Written as the published templates of these models are.
LLAMA_3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN_VL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's treatment of thoughts: only replies behind the last question have them.
QWEN_3_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role != 'assistant' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% else %}{% set content = message.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ content }}"
    "{% else %}<|im_start|>assistant\n{{ content }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# With the empty thoughts before every reply, which keeps the beginning of a conversation as it was.
STABLE_THINKING = QWEN_3_TEMPLATE.replace("{% if loop.index0 > ns.last %}", "{% if true %}")

TURNS = (
    Turn("user", IMAGE, "\nWhat is <image> here? "),
    Turn("assistant", "A user car."),
    Turn("user", "user"),
    Turn("assistant", "The <|image_pad|> ball"),
)


def tokenizer_of(kind: str, template: str):
    made = {
        "chatml": lambda: byte_level(CHATML, pad=CHATML[0], eos="<|im_end|>"),
        "llama_3": lambda: byte_level(LLAMA_3, bos=LLAMA_3[0], pad=LLAMA_3[1], eos="<|end_of_text|>"),
        "mistral": lambda: sentencepiece("first"),
        "legacy": lambda: sentencepiece("normalizer"),
    }[kind]()
    made.chat_template = template
    return made


CASES = {
    "llama_3": ("llama_3", LLAMA_3_TEMPLATE, "A user car.<|eot_id|>The <|image_pad|> ball<|eot_id|>"),
    "mistral": ("mistral", MISTRAL_TEMPLATE, "A user car.</s>The <|image_pad|> ball</s>"),
    "qwen_vl": ("chatml", QWEN_VL_TEMPLATE, "A user car.<|im_end|>The <|image_pad|> ball<|im_end|>"),
    "llava": ("legacy", LLAVA_TEMPLATE, " A user car. The <|image_pad|> ball"),
    "chatml": ("chatml", CHATML_TEMPLATE, "A user car.<|im_end|>The <|image_pad|> ball<|im_end|>"),
    "thinking": ("chatml", STABLE_THINKING, "A user car.<|im_end|>The <|image_pad|> ball<|im_end|>"),
}
IN_PARTS = {"qwen_vl": "<|vision_start|><|image_pad|><|vision_end|>", "llava": "<image>"}
PRIVATE = "\0private\0"


@pytest.fixture(scope="module")
def tokenizers():
    return {name: tokenizer_of(kind, template) for name, (kind, template, _) in CASES.items()}


def rendered(tokenizer, name: str, turns, *, prompt: bool) -> str:
    """What `apply_chat_template` of transformers writes, with PRIVATE for each image."""

    def literal(part):
        return part.replace(IN_PARTS[name], "\0literal\0") if name in IN_PARTS else part

    def content(turn):
        if name not in IN_PARTS:
            return "".join(PRIVATE if isinstance(part, ImagePart) else part for part in turn.parts)
        return [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": literal(part)}
            for part in turn.parts
        ]

    messages = [{"role": turn.role, "content": content(turn)} for turn in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
    if name in IN_PARTS:
        text = text.replace(IN_PARTS[name], PRIVATE).replace("\0literal\0", IN_PARTS[name])
    return text


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prompt", [False, True])
def test_ids_are_those_of_transformers(name, prompt, tokenizers):
    """Texts that read as placeholders, or as the name of a speaker, stay texts."""
    tokenizer = tokenizers[name]
    encoder = ChatEncoder(tokenizer, "tokenizer", False, "first_turn")
    turns = TURNS[:3] if prompt else TURNS
    found = (encoder.prompt if prompt else encoder.sample)(turns)
    if name in IN_PARTS and not prompt:  # A template that places images does not need the newline of LLaVA's records.
        turns = (Turn("user", IMAGE, "What is <image> here? "), *TURNS[1:])
    text = rendered(tokenizer, name, turns, prompt=prompt)
    np.testing.assert_array_equal(found.tokens, of_transformers(tokenizer, text, PRIVATE))
    assert np.count_nonzero(found.tokens == IMAGE_TOKEN) == 1


@pytest.mark.parametrize("name", CASES)
def test_targets_and_pooled_text_are_found_by_speaker(name, tokenizers):
    tokenizer, (_, _, targets) = tokenizers[name], CASES[name]
    found = ChatEncoder(tokenizer, "tokenizer", True, "all_human").sample(TURNS)
    decode = tokenizer.backend_tokenizer.decoder.decode

    def text(mask):
        return decode(["", *tokenizer.convert_ids_to_tokens(found.tokens[mask].tolist())])

    assert text(found.loss_mask) == targets
    assert set(found.roles[found.loss_mask]) == {Role.ASSISTANT}
    assert set(found.turns[found.loss_mask]) == {1, 3}
    pooled = "What is <image> here? user"
    assert text(found.text_token_mask).replace(" ", "") == pooled.replace(" ", "")
    assert set(found.turns[found.text_token_mask]) == {0, 2}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_is_the_beginning_of_its_sample(name, tokenizers):
    encoder = ChatEncoder(tokenizers[name], "tokenizer", False, "first_turn")
    turns = (Turn("user", IMAGE, "What is this?"), *TURNS[1:])
    whole = encoder.sample(turns)
    for k in (1, 3):
        asked = encoder.prompt(turns[:k])
        n = len(asked.tokens)
        np.testing.assert_array_equal(asked.tokens, whole.tokens[:n])
        np.testing.assert_array_equal(asked.text_token_mask, whole.text_token_mask[:n])
        assert not asked.loss_mask.any()
        assert whole.loss_mask[n]


def test_what_the_templates_say_about_themselves(tokenizers):
    found = {name: ChatTemplate.of(tokenizer) for name, tokenizer in tokenizers.items()}
    assert {name: one.placeholder for name, one in found.items() if one.placeholder} == IN_PARTS
    assert {name: one.end_tokens for name, one in found.items()} == {
        "llama_3": ("<|eot_id|>", "<|end_of_text|>"),
        "mistral": ("</s>",),
        "llava": ("</s>",),
        **dict.fromkeys(("qwen_vl", "chatml", "thinking"), ("<|im_end|>",)),
    }
    assert [name for name, one in found.items() if not one.closes_replies] == ["llava"]
    assert found["thinking"].header == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert found["chatml"].separators == (" ", "\n")
    assert found["llava"].separators == ("", "")
    assert set(found["qwen_vl"].markers) == {Marker.IMAGE_START, Marker.IMAGE_END}


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("chatml", QWEN_3_TEMPLATE, "differently where more follow.*; set the model's template to 'qwen_1_5' instead"),
        ("chatml", "{{ raise_exception('no') }}<|im_start|>", r"refuses the roles .* \(no\); .*'qwen_1_5'"),
        ("chatml", "{% if %}[INST]", r"refuses the roles .*; set the model's template to 'mistral_instruct'"),
        ("chatml", CHATML_TEMPLATE.replace("message['content'] +", "'' +"), "does not write every text"),
        ("chatml", CHATML_TEMPLATE.replace("message['content'] +", "message['content'] | upper +"), "changes a text"),
        ("chatml", CHATML_TEMPLATE.replace("assistant\n' }}", "model\n' }}"), "does not begin a reply with what"),
        ("chatml", "{{ messages.__class__ }}", "refuses the roles|does not write every text"),
        ("chatml", None, "has no chat template, .* set the model's template to one of 'qwen2_vl', 'qwen_1_5'"),
    ],
)
def test_templates_whose_parts_cannot_be_told_apart(kind, template, message):
    with pytest.raises(UserError, match=message):
        ChatEncoder(tokenizer_of(kind, template), "tokenizer", False, "none")


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("mistral", [Turn("system", "S"), Turn("user", "Q")], r"refuses the roles \['system', 'user'\]"),
        ("mistral", [Turn("user", "Q"), Turn("user", "Q")], "Conversation roles must alternate"),
        (
            "thinking",
            [Turn("user", "Q"), Turn("assistant", "<think>x</think>A"), Turn("user", "Q")],
            "removes thoughts",
        ),
    ],
)
def test_conversations_that_a_template_refuses(name, turns, message, tokenizers):
    with pytest.raises(SkipRecord, match=message) as caught:
        ChatTemplate.of(tokenizers[name]).write(turns, prompt=True)
    assert caught.value.reason == "wrong_template"


def test_a_system_message_and_an_empty_reply(tokenizers):
    encoder = ChatEncoder(tokenizers["chatml"], "tokenizer", False, "all")
    turns = [Turn("system", "Be brief."), Turn("user", "What?"), Turn("assistant")]
    found = encoder.sample(turns)
    assert tokenizers["chatml"].decode(found.tokens[found.turns == 0]) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizers["chatml"].decode(found.tokens[found.loss_mask]) == "<|im_end|>"
    assert tokenizers["chatml"].decode(found.tokens[found.text_token_mask]) == "What?"


def test_a_worker_that_gets_an_encoder_does_not_import_transformers(tokenizers, tmp_path):
    encoder = ChatEncoder(tokenizers["qwen_vl"], "tokenizer", False, "first_turn")
    file = tmp_path / "encoder.pickle"
    file.write_bytes(pickle.dumps((encoder, TURNS, encoder.sample(TURNS).tokens.tolist())))
    script = (
        "import pickle, sys\n"
        f"encoder, turns, expected = pickle.load(open({str(file)!r}, 'rb'))\n"
        "assert encoder.sample(turns).tokens.tolist() == expected\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_day_is_not_written():
    """A template that has a day of its own for renderers without `strftime_now` writes that one."""
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}"
    found = ChatTemplate.of(tokenizer_of("chatml", dated + CHATML_TEMPLATE))
    assert found.write([Turn("user", "Q")], prompt=True)[0].part == "26 Jul 2024<|im_start|>user\n"
