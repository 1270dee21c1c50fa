"""Streaming never cuts a character and loses nothing."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from tests.golden.discovery import DATA_ROOT, needs_data
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.types import IMAGE, Turn
from vr_jax.inference import PromptError, TextStream, decode_text, user_turn
from vr_jax.inference.streaming import REPLACEMENT

TEXT = "  naïve 猫😀é — 14.5 %\n\tfin 👩‍👩‍👧 q\u0301 x"


@pytest.fixture(
    scope="module", params=["demo", pytest.param("qwen2", marks=needs_data("qwen2_tokenizer", "vocab.json"))]
)
def tokenizer(request):
    return demo_tokenizer() if request.param == "demo" else AutoTokenizer.from_pretrained(DATA_ROOT / "qwen2_tokenizer")


def pieces_of(tokenizer, tokens, step):
    stream = TextStream(tokenizer)
    return [stream.push(tokens[i : i + step]) for i in range(0, len(tokens), step)], stream.finish()


@pytest.mark.parametrize("step", [1, 2, 5])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, step):
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces, rest = pieces_of(tokenizer, tokens, step)
    assert "".join(pieces) == TEXT
    assert rest == ""
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(pieces) // 2, "text should appear while it is decoded"


def test_bytes_that_are_no_character_appear_at_the_end(tokenizer):
    cat = tokenizer.encode("ab猫", add_special_tokens=False)
    pieces, rest = pieces_of(tokenizer, cat[:-1], 1)
    assert "".join(pieces) + rest == decode_text(tokenizer, cat[:-1])
    assert (rest == REPLACEMENT) == (len(cat) > 3)


def test_any_tokens_join_to_the_decoded_text(tokenizer):
    """Random ids: broken bytes, specials, and ids beyond the tokenizer's (a padded vocabulary)."""
    rng = random.Random(0)
    for _ in range(30):
        tokens = [rng.randrange(len(tokenizer) + 3) for _ in range(rng.randrange(1, 25))]
        pieces, rest = pieces_of(tokenizer, tokens, rng.randrange(1, 4))
        assert "".join(pieces) + rest == decode_text(tokenizer, tokens)


def test_images_go_in_front_unless_they_have_places():
    assert user_turn("What?", 0) == Turn("user", "What?")
    assert user_turn("What?", 1) == Turn("user", IMAGE, "\nWhat?")
    assert user_turn("What?", 2) == Turn("user", IMAGE, " ", IMAGE, "\nWhat?")
    assert user_turn(("Is ", IMAGE, " like ", IMAGE, "?"), 2).parts == ("Is ", IMAGE, " like ", IMAGE, "?")
    with pytest.raises(PromptError, match=r"places for 1 image\(s\), but 2 image\(s\) are given"):
        user_turn(("Is ", IMAGE), 2)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_question_about_the_text_of_a_placeholder_is_asked_as_it_is(images):
    turn = user_turn("What does <image> mean?", images)
    assert turn.images == images
    assert turn.parts[-1].endswith("What does <image> mean?")
