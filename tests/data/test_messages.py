"""Messages of every format become turns with their images in order; what is wrong with others is named."""

import pytest

from tests.data.samples import TALK, png
from vr_jax.data.records import ImageFolder, conversation_of
from vr_jax.data.types import IMAGE, Conversation, Skip, Turn

ONE, TWO = png(seed=1), png(seed=2)
REPLY = {"role": "assistant", "content": "A <image>."}
ANSWER = Turn("assistant", "A <image>.")


def read(**record):
    return conversation_of(record, "x", ImageFolder(None))


def asking(*parts):
    return [{"role": "user", "content": list(parts)}, REPLY]


TEXT = {"type": "text", "text": "What is <image>?"}


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize(
    ("user", "assistant"), [("human", "gpt"), ("user", "assistant"), ("Human", "model"), ("USER", "bot")]
)
@pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
def test_speakers_and_keys_have_synonyms(key, user, assistant, who, what):
    messages = [{who: user, what: "<image>\nQ"}, {who: assistant, what: "A <image>."}]
    found = read(image=ONE, **{key: messages})
    assert found == Conversation("x", (Turn("user", IMAGE, "\nQ"), ANSWER), (ONE,))


CONTENT = {
    "transformers, from the list": ([{"type": "image"}, TEXT], [ONE]),
    "transformers, in the part": ([{"type": "image", "image": ONE}, TEXT], []),
    "transformers, a path of null": ([{"type": "image", "path": None, "text": None}, TEXT], [ONE]),
    "OpenAI": ([{"type": "image_url", "image_url": {"url": "data:image/png,%01"}}, TEXT], []),
    "OpenAI, Responses": (
        [{"type": "input_image", "image_url": "data:image/png,%01"}, TEXT | {"type": "input_text"}],
        [],
    ),
    "a text without a type": ([{"type": "image", "index": 0}, {"text": "What is <image>?"}], [ONE]),
}


@pytest.mark.parametrize("name", CONTENT)
def test_texts_among_parts_have_no_placeholders(name):
    parts, images = CONTENT[name]
    found = read(messages=asking(*parts), images=images)
    assert found.turns == (Turn("user", IMAGE, "What is <image>?"), ANSWER)
    assert found.images == ((ONE,) if images or name.startswith("trans") else (b"\x01",))


def test_images_keep_the_order_of_the_messages():
    parts = [{"type": "image", "index": 1}, {"type": "image", "image": b"own"}, {"type": "image"}]
    found = read(messages=[*asking(*parts), {"role": "user", "content": "<image>"}, REPLY], images=[ONE, TWO, b"last"])
    assert found.images == (TWO, b"own", ONE, b"last")
    assert [turn.images for turn in found.turns] == [3, 0, 1, 0]


def test_a_system_text_comes_from_the_key_or_the_first_message():
    expected = (Turn("system", "S"), Turn("user", "Q"), ANSWER)
    talk = [{"role": "user", "content": "Q"}, REPLY]
    for role in ("system", "developer"):
        assert read(messages=[{"role": role, "content": "S"}, *talk]).turns == expected
    assert read(messages=talk, system="S").turns == expected
    assert read(messages=[{"role": "system", "content": "S"}, *talk], system="S").turns == expected
    assert read(messages=talk, system="").turns == read(messages=talk, system=None).turns == expected[1:]


def test_both_names_of_a_list_may_be_there_if_they_agree():
    assert read(image=ONE, images=[ONE], conversations=TALK, messages=TALK).images == (ONE,)
    assert read(image=None, images=ONE, conversations=TALK, messages=None).images == (ONE,)
    assert read(image=[], images=[ONE], conversations=TALK).images == (ONE,)


QUESTION = {"role": "user", "content": "Q"}
WRONG = {
    "images that differ": ({"image": ONE, "images": [TWO], "conversations": TALK}, "both 'image' and 'images'"),
    "messages that differ": (
        {"messages": [QUESTION, REPLY], "conversations": TALK},
        "both 'conversations' and 'messages'",
    ),
    "null": ({"messages": None, "conversations": None}, "'conversations' is absent, and so is 'messages'"),
    "two users": (
        {"messages": [QUESTION, QUESTION, REPLY]},
        "The messages messages[0] and messages[1] are both the user's",
    ),
    "a late system": (
        {"messages": [QUESTION, {"role": "system", "content": "S"}]},
        "messages[1] is the system's, which must",
    ),
    "two systems": ({"messages": [{"role": "system", "content": "S"}] * 2}, "messages[1] is the system's, which must"),
    "system texts that differ": (
        {"messages": [{"role": "system", "content": "S"}, QUESTION], "system": "T"},
        "a system text both in the field 'system' and",
    ),
    "a system that is no text": ({"messages": [QUESTION], "system": 3}, "The field 'system' is a value of type int"),
    "a null": ({"messages": [{"role": "user", "content": None}]}, "The text of the message messages[0] is absent"),
    "half a character": (
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        "The text of the message messages[0] is not",
    ),
    "NUL": (
        {"messages": asking({"type": "text", "text": "\0"})},
        "The text of the part messages[0][0] contains the character NUL",
    ),
    "a tool": ({"messages": [{"role": "tool", "content": "x"}]}, "The message messages[0] has the speaker 'tool'"),
    "two speakers": ({"messages": [{"role": "user", "from": "gpt", "content": "x"}]}, "both 'from' and 'role'"),
    "an image beside the content": (
        {"messages": [QUESTION | {"images": ["a.png"]}]},
        "messages[0] has the key 'images'",
    ),
    "tool calls": ({"messages": [QUESTION, REPLY | {"tool_calls": [{}]}]}, "messages[1] has the key 'tool_calls'"),
    "no loss": ({"messages": [QUESTION, REPLY | {"weight": 0}]}, "messages[1] has the key 'weight'"),
    "a video": ({"messages": asking({"type": "video", "video": "a.mp4"})}, "messages[0][0] has the type 'video'"),
    "no part": ({"messages": asking(3)}, "The part messages[0][0] is a value of type int"),
    "an unknown key": ({"messages": asking(TEXT | {"max_pixels": 3})}, "messages[0][0] has the key 'max_pixels'"),
    "both": ({"messages": asking({"type": "image", "image": ONE, "text": "x"})}, "both an image and a text"),
    "no address": ({"messages": asking({"type": "image_url"})}, "messages[0][0] has the type 'image_url', but no"),
    "no file": (
        {"messages": asking({"type": "image_url", "image_url": {"url": "http://x/a.png"}})},
        "nothing is downloaded",
    ),
    "no index": ({"messages": asking({"type": "image", "index": True}), "images": [ONE]}, "the index True"),
    "beyond": (
        {"messages": asking({"type": "image", "index": 1}), "images": [ONE]},
        "index 1, but the field 'images' has 1",
    ),
    "twice": (
        {"messages": asking(*[{"type": "image", "index": 0}] * 2), "images": [ONE, TWO]},
        "Several parts have the same",
    ),
    "image of the system": (
        {"messages": [{"role": "system", "content": [{"type": "image"}]}], "images": [ONE]},
        "cannot have images",
    ),
    "lists of two lengths": (
        {"conversations": {"from": ["human"], "value": []}},
        "differ in length: 'from' 1, 'value' 0",
    ),
    "an object": ({"conversations": {"from": "human"}}, "is an object, but must be a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    record, message = WRONG[name]
    found = read(**record)
    assert isinstance(found, Skip)
    assert message in found.detail


@pytest.mark.parametrize("value", [None, "", [], 1.5, "a\nb", "\ud800", "x" * 300, {"a": 1}])
def test_an_id_that_cannot_be_shown_is_made_up(value):
    assert read(id=value, image=ONE, conversations=TALK).id == "x"
    assert read(id=7, image=ONE, conversations=TALK).id == "7"
