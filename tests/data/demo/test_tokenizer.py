"""The demo's tokenizer is small and lossless, has Qwen2's special tokens, and keeps conversations short."""

import pickle
from random import Random

import pytest
from transformers import AutoTokenizer

from vr_jax.data.demo.images import SUBJECTS
from vr_jax.data.demo.tokenizer import demo_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


def test_tokenizer_is_small_lossless_and_has_chatml(tokenizer):
    assert len(tokenizer) <= 512
    for text in ("What is the word?", "concatenated", "naïve 猫\n\t x  ", "".join(map(chr, range(1, 300)))):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("", add_special_tokens=False) == []
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = tokenizer.convert_tokens_to_ids(specials)
    assert [tokenizer.encode(name, add_special_tokens=False) for name in specials] == [[i] for i in ids]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 1


def test_questions_and_answers_are_short(tokenizer):
    rng = Random(0)
    for subject in SUBJECTS.values():
        for _ in range(50):
            for question in subject.questions(subject.content(rng)):
                assert len(tokenizer.encode(question.text, add_special_tokens=False)) <= 5
                assert len(tokenizer.encode(question.answer, add_special_tokens=False)) == 1


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhat is the value of the red bar?<|im_end|>\nnaïve"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.get_vocab() == demo_tokenizer().get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    clone = pickle.loads(pickle.dumps(tokenizer))
    assert clone.encode(text) == tokenizer.encode(text)
