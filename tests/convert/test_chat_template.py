"""The chat template of a folder is found in the order of transformers and compared with ChatML."""

from __future__ import annotations

import json

import pytest

from tests.data.prompts.small_tokenizers import LLAMA_3, byte_level, sentencepiece
from vr_jax.convert.chat_template import CHAT_TEMPLATES, find_template, named_template, unusable, writes_chatml
from vr_jax.convert.decoder_configs import LLAMA_FAMILY, MISTRAL_FAMILY, QWEN2_FAMILY, QWEN3_FAMILY
from vr_jax.data.conversations import drop_newlines
from vr_jax.data.prompts.jinja import render
from vr_jax.data.prompts.templates import NAMED
from vr_jax.data.types import IMAGE, ImagePart, Turn
from vr_jax.errors import UserError

# That of llava-onevision-qwen2-0.5b-ov-hf in its outline: no system message, and a space after the role.
OTHER = "{% for m in messages %}<|im_start|>{{ m['role'] }} {% endfor %}"


def test_the_first_file_counts(tmp_path):
    assert find_template(tmp_path) is None
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        (tmp_path / name).write_text(json.dumps({"chat_template": name}))
        assert find_template(tmp_path) == (name, str(tmp_path / name))
    (tmp_path / "chat_template.jinja").write_text("raw")
    assert find_template(tmp_path) == ("raw", str(tmp_path / "chat_template.jinja"))


def test_the_default_of_several_templates_counts(tmp_path):
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path) == ("b", str(tmp_path / "tokenizer_config.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    assert find_template(tmp_path) is None


def test_a_template_that_is_not_utf_8(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"chat_template.jinja is not UTF-8 \(.*\); save it as UTF-8"):
        find_template(tmp_path)


def test_templates_are_told_apart():
    assert writes_chatml(CHAT_TEMPLATES["qwen_1_5"])
    for other in (OTHER, "{% if %}", "{{ messages + 1 }}", "{{ messages[9]['role'] }}", "{{ 1 // 0 }}", ""):
        assert not writes_chatml(other)


CONVERSATIONS = (
    (Turn("user", IMAGE, "\n", "What is it?"),),
    (Turn("user", IMAGE, " ", IMAGE, "\n", " Which? "), Turn("assistant", "This."), Turn("user", "Why?")),
    (Turn("system", "Be brief."), Turn("user", "One?"), Turn("assistant", "Two.")),
)


def _content(part) -> dict:
    """A part of a message as transformers has it; its templates write the newline behind an image themselves."""
    return {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.removeprefix("\n")}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_export_writes_asks_as_the_format_does(name):
    """The renderings of transformers' template are the texts of our format; the tokenizer of each adds its BOS."""
    for turns in CONVERSATIONS:
        messages = [
            {"role": turn.role, "content": [_content(part) for part in turn.parts if part != " "]} for turn in turns
        ]
        prompt = turns[-1].role == "user"
        chat = NAMED[name]
        if chat.drops_newlines:  # such a format writes what stands around images itself
            turns = drop_newlines([Turn(one.role, *(part for part in one.parts if part != " ")) for one in turns])
        image = "<|vision_start|><|image_pad|><|vision_end|>" if chat.markers else "<image>"
        segments = chat.write(turns, prompt=prompt)
        expected = "".join(image if isinstance(one.part, ImagePart) else str(one.part) for one in segments)
        assert render(CHAT_TEMPLATES[name], messages, {}, prompt=prompt) == expected


def test_the_format_of_a_decoder_without_a_template(tmp_path):
    """A Llama 3 is told by its tokenizer, and by its vocabulary where there is none."""
    for family, name in ((QWEN2_FAMILY, "qwen_1_5"), (QWEN3_FAMILY, "qwen_1_5"), (MISTRAL_FAMILY, "mistral_instruct")):
        assert named_template(family, tmp_path, 400) == name
    assert named_template(LLAMA_FAMILY, tmp_path, 32064) == "vicuna_v1"
    assert named_template(LLAMA_FAMILY, tmp_path, 128320) == "llama_3"
    byte_level(LLAMA_3, bos="<|begin_of_text|>", pad="<|end_of_text|>", eos="<|eot_id|>").save_pretrained(tmp_path)
    assert named_template(LLAMA_FAMILY, tmp_path, 400) == "llama_3"
    sentencepiece("first").save_pretrained(tmp_path)
    assert named_template(LLAMA_FAMILY, tmp_path, 400) == "vicuna_v1"


def test_a_template_that_cannot_be_taken_apart_is_not_asked_by(tmp_path):
    sentencepiece("first").save_pretrained(tmp_path)
    assert unusable(CHAT_TEMPLATES["vicuna_v1"], tmp_path) is None
    assert "does not write every text" in str(unusable("{{ messages[-1]['content'] }}", tmp_path))
    assert "has no usable tokenizer" in str(unusable(CHAT_TEMPLATES["vicuna_v1"], tmp_path / "none"))
