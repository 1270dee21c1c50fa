"""generation_config.json is honoured or refused by the names of its fields."""

from __future__ import annotations

import json

import pytest

from vr_jax.errors import UserError
from vr_jax.model_directory import GenerationSettings, generation_of_chat, read_generation

QWEN2_INSTRUCT = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def test_the_file_of_qwen2_instruct(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN2_INSTRUCT))
    assert read_generation(tmp_path) == GenerationSettings(
        eos_token_ids=(151645, 151643), repetition_penalty=1.1, do_sample=True
    )
    (tmp_path / "generation_config.json").unlink()
    assert read_generation(tmp_path) == GenerationSettings()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_beams", 2, "num_beams = 2 is not supported, expected 1"),
        ("no_repeat_ngram_size", 3, "no_repeat_ngram_size = 3 is not supported, expected 0"),
        ("bad_words_ids", [[3]], r"bad_words_ids = \[\[3\]\] is not supported"),
        ("forced_eos_token_id", 3, "forced_eos_token_id = 3 is not supported"),
        ("min_length", 9, "min_length = 9 is not supported"),
        ("stop_strings", ["x"], r"stop_strings = \['x'\] is not supported"),
        ("penalty_alpha", 0.6, "penalty_alpha = 0.6 is not supported"),
        ("guidance_scale", 2.0, "guidance_scale = 2.0 is not supported"),
        ("a_later_field", 1, "the field 'a_later_field' = 1 is not known"),
        ("repetition_penalty", 0, "repetition_penalty = 0.0: expected a finite number >= 1e-30"),
        ("repetition_penalty", float("nan"), "repetition_penalty = nan: expected a finite number"),
        ("repetition_penalty", "1.1", "repetition_penalty = '1.1': expected a finite number"),
        ("eos_token_id", "x", r"eos_token_id = \('x',\)"),
        ("eos_token_id", [1, -2], "eos_token_id"),
        ("suppress_tokens", 3, "suppress_tokens = 3: expected a sequence"),
        ("min_new_tokens", -1, "min_new_tokens = -1: expected an integer >= 0"),
        ("max_new_tokens", 0, "max_new_tokens = 0: expected an integer >= 1"),
        ("do_sample", 1, "do_sample = 1: expected True or False"),
    ],
)
def test_a_field_that_is_not_computed_is_named(field, value, message, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({field: value}))
    with pytest.raises(UserError, match=message) as error:
        read_generation(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_id_beyond_the_vocabulary_is_named():
    settings = GenerationSettings(suppress_tokens=(3, 40))
    settings.check_vocabulary(41, "file")
    with pytest.raises(UserError, match=r"file: suppress_tokens has the ids \[40\]"):
        settings.check_vocabulary(40, "file")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"eos_token_id": 3, "repetition_penalty": 1.1}, {"eos_token_id": [7, 3], "repetition_penalty": 1.1}),
        ({"eos_token_id": [7, 3]}, {"eos_token_id": [7, 3]}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),  # the ends of ChatML hold anyway
        (None, None),
    ],
)
def test_a_model_of_chatml_ends_its_replies_with_the_end_of_a_message(values, expected, tmp_path):
    added = [{"id": 7, "content": "<|im_end|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    if values is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert generation_of_chat(tmp_path) == expected


def test_the_end_of_another_chat_format_is_added(tmp_path):
    added = [{"id": 7, "content": "<|im_end|>"}, {"id": 8, "content": "<|eot_id|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert generation_of_chat(tmp_path, "<|eot_id|>") == {"eos_token_id": [8, 3]}
