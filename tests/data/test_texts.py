"""Which `<image>` of LLaVA's texts are placeholders, and which texts can be encoded."""

import pytest

from vr_jax.data.skips import SkipRecord
from vr_jax.data.texts import check_text, place_images
from vr_jax.data.types import IMAGE, Turn


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("<image>\nWhat?", 1, (IMAGE, "\nWhat?")),
        ("<image>\nWhat?", 0, (IMAGE, "\nWhat?")),
        ("What?\n<image>", 1, ("What?\n", IMAGE)),
        ("Is <image> like <image>?", 2, ("Is ", IMAGE, " like ", IMAGE, "?")),
        ("Is <image> like <image>?", 1, ("Is ", IMAGE, " like <image>?")),
        ("What does <image> mean?", 0, ("What does <image> mean?",)),
        ("What does <image> mean?\n<image>", 1, ("What does <image> mean?\n", IMAGE)),
        ("<image>\nWhat does <image> mean?", 1, (IMAGE, "\nWhat does <image> mean?")),
        ("<image><image>", 1, (IMAGE, IMAGE)),
        ("A\n <image> <image>\nB", 1, ("A\n ", IMAGE, " ", IMAGE, "\nB")),
        ("<Image> <image", 1, ("<Image> <image",)),
        ("", 1, ()),
    ],
)
def test_what_stands_alone_is_a_placeholder_and_what_has_no_image_is_text(text, images, expected):
    (found,) = place_images([text], images)
    assert Turn("user", *found).parts == expected


def test_images_go_to_the_messages_in_their_order():
    found = place_images(["First <image>?", "Then <image>?", "And what is <image>?"], 2)
    assert [Turn("user", *parts).images for parts in found] == [1, 1, 0]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "The text is absent"),
        (3, "a value of type int"),
        (b"a", "a value of type bytes"),
        ("a\0b", r"the character NUL \(U\+0000\) at 1"),
        ("ab\ud83d", r"half of a surrogate pair, U\+D83D, at 2"),
    ],
)
def test_a_text_that_cannot_be_encoded_is_named(value, problem):
    with pytest.raises(SkipRecord, match=problem) as caught:
        check_text(value, "The text")
    assert caught.value.reason == "malformed_record"
    assert check_text("Größe 😀", "The text") == "Größe 😀"
