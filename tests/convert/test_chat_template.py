"""The chat template of a folder is found in the order of transformers and compared with ChatML."""

from __future__ import annotations

import json

import pytest

from vr_jax.convert.chat_template import find_template, writes_chatml
from vr_jax.convert.processor_export import CHAT_TEMPLATE
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
    assert writes_chatml(CHAT_TEMPLATE)
    for other in (OTHER, "{% if %}", "{{ messages + 1 }}", "{{ messages[9]['role'] }}", "{{ 1 // 0 }}", ""):
        assert not writes_chatml(other)
