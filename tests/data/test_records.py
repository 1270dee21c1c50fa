"""Raw records become conversations, and what is wrong with the others is stated."""

import pytest

from tests.data.samples import TALK, png, record
from vr_jax.data.images import open_image
from vr_jax.data.records import ImageFolder, conversation_of
from vr_jax.data.skips import SkipRecord
from vr_jax.data.types import Conversation, Skip, Turn
from vr_jax.errors import UserError


def test_several_images_text_only_and_both_message_schemas(folder):
    images = ImageFolder(folder / "images")
    several = conversation_of(record(0, image=["0.png", "1.png"]), "x", images)
    assert [path.name for path in several.images] == ["0.png", "1.png"]
    text = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    assert conversation_of(text, "x", images) == Conversation("x", (Turn("user", "Hi"), Turn("assistant", "Ho")))
    system = conversation_of(
        {"id": 17, "image": None, "conversations": [{"from": "system", "value": "S"}, *TALK]}, "x", images
    )
    assert system.id == "17"
    assert system.turns[0] == Turn("system", "S")


UNUSABLE = {
    "record is no object": ("text", "malformed_record", "The record is a value of type str, but must be an object."),
    "no conversations": ({"id": "x"}, "malformed_record", "The field 'conversations' is absent"),
    "a question": ({"id": "x", "question": "Q", "answer": "A"}, "malformed_record", "for a metric of"),
    "conversations are no list": (
        {"id": "x", "conversations": "hi"},
        "malformed_record",
        "The field 'conversations' is a value of type str, but must be a list of messages.",
    ),
    "no turns": ({"id": "x", "conversations": []}, "empty_conversation", "The list in the field 'conversations'"),
    "turn is no object": (
        {"id": "x", "conversations": [*TALK, "hi"]},
        "malformed_record",
        "The message conversations[2] is a value of type str, but must be an object.",
    ),
    "unknown role": (
        {"id": "x", "conversations": [{"from": "robot", "value": "hi"}]},
        "unknown_role",
        "has the speaker 'robot', but it must be one of 'human', 'gpt'",
    ),
    "role is no text": ({"id": "x", "conversations": [{"from": 3, "value": "hi"}]}, "unknown_role", "the speaker 3"),
    "no text": (
        {"id": "x", "conversations": [{"from": "human"}]},
        "malformed_record",
        "The text of the message conversations[0] is absent, but must be a str.",
    ),
    "text is no text": (
        {"id": "x", "conversations": [{"from": "human", "value": ["hi"]}]},
        "malformed_record",
        "The text of the message conversations[0] is a value of type list, but must be a str.",
    ),
    "image is no name": (record(0, image=3), "malformed_record", "The field 'image' contains 3, but must contain a"),
    "image is empty": (record(0, image=""), "malformed_record", "The field 'image' contains ''"),
    "image with a zero byte": (record(0, image="a\0b.png"), "malformed_record", "The field 'image' contains"),
    "image in a nested list": (record(0, image=[["0.png"]]), "malformed_record", "contains ['0.png']"),
    "absolute path": (record(0, image="/etc/passwd"), "outside_folder", "'/etc/passwd' leads out of the image folder"),
    "climbing path": (record(0, image="../secret.png"), "outside_folder", "leads out"),
    "climbing in the middle": (record(0, image="sub/../../secret.png"), "outside_folder", "leads out"),
    "link": (record(0, image="link.png"), "outside_folder", "leads out"),
    "linked folder": (record(0, image="linked/secret.png"), "outside_folder", "leads out"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_records_state_the_reason(folder, name):
    raw, reason, detail = UNUSABLE[name]
    (folder / "secret.png").write_bytes(png())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "linked").symlink_to(folder)
    found = conversation_of(raw, "the record", ImageFolder(folder / "images"))
    assert isinstance(found, Skip)
    assert found.reason == reason
    assert detail in found.detail
    assert "\n" not in found.detail


def test_a_file_name_that_is_too_long_is_a_missing_image(folder):
    found = conversation_of(record(0, image="a" * 5000), "x", ImageFolder(folder / "images"))
    with pytest.raises(SkipRecord, match="missing_image"):
        open_image(found.images[0])


def test_links_may_lead_out_of_the_folder_on_request_only(folder):
    (folder / "other.png").write_bytes(png(seed=9))
    (folder / "images" / "out.png").symlink_to(folder / "other.png")
    (folder / "images" / "in.png").symlink_to(folder / "images" / "1.png")
    strict = ImageFolder(folder / "images")
    following = ImageFolder(folder / "images", follow_links=True)
    assert conversation_of(record(0, image="out.png"), "x", strict).reason == "outside_folder"
    assert conversation_of(record(0, image="in.png"), "x", strict).images[0].read_bytes() == png(seed=1)
    assert conversation_of(record(0, image="out.png"), "x", following).images[0].read_bytes() == png(seed=9)
    assert conversation_of(record(0, image="../other.png"), "x", following).reason == "outside_folder"


def test_an_image_folder_must_exist(folder):
    with pytest.raises(UserError, match="nowhere: no such image folder"):
        ImageFolder(folder / "nowhere")
    found = conversation_of(record(0), "x", ImageFolder(None))
    assert (found.reason, "no image folder" in found.detail) == ("missing_image", True)
