"""Keys of records: those that bring media, a system text or an effect are refused by name, others are ignored."""

import pytest

from tests.data.samples import png, record
from vr_jax.data.records import ImageFolder, conversation_of
from vr_jax.data.schema import describes_content, shown
from vr_jax.data.types import Conversation, Skip

REFUSED = {
    **dict.fromkeys(("video", "img", "image_2", "image2", "imagePath", "image_path", "Image", "photo"), "a.jpg"),
    **dict.fromkeys(("audio", "frames", "pixel_values", "png", "mp4", "media", "voice", "attachments"), "x"),
    **dict.fromkeys(("pic" + "ture", "image_base64", "imageURL", "cover_img"), "x"),
    **dict.fromkeys(("system_prompt", "sys", "SystemMessage"), "Be brief."),
    **dict.fromkeys(("tools", "functions", "thinking", "reasoning_content"), "f"),
    "tool_calls": [{"name": "f"}],
    "videos": ["a.mp4"],
    "blob": b"\xff",
    "extra": {"nested": ["data:image/png;base64,AAAA"]},
    "weight": 0,
    "loss_weight": 0.5,
    "loss_mask": [0, 1],
    "training": False,
    **dict.fromkeys(("mask", "masked", "ignore", "prefix"), True),
    "history": [["a", "b"]],
    **dict.fromkeys(("instructions", "persona", "preamble"), "You are a pirate."),
    "screenshots": ["a"],
}
IGNORED = {
    **dict.fromkeys(("source", "data_source", "dataset", "task", "caption", "url", "split", "model"), "coco"),
    **dict.fromkeys(("image_id", "video_source", "image_hash", "img_format", "image_name"), "a"),
    **dict.fromkeys(("width", "height", "image_width", "num_images", "clip_score", "has_image", "weight"), 1),
    **dict.fromkeys(("video", "img", "system_prompt", "audio", "tools"), None),
    **dict.fromkeys(("videos", "image_2"), ""),
    "image_sizes": [[640, 480]],
    "frames": [],
    "loss": 0.25,
    "training": True,
    "training_step": 500,
    "masked": False,
    "mask": [[0, 1], [1, 0]],
    "figure": "Figure 3",
    "page": 4,
    "metadata": {"width": 3, "boxes": [[1, 2]]},
    "file_name": "a.jpg",
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_brings_something_is_refused_by_name(folder, key):
    found = conversation_of(record(0) | {key: REFUSED[key]}, "x", ImageFolder(folder / "images"))
    assert isinstance(found, Skip)
    assert found.reason == "malformed_record"
    assert f"the key {key!r}, which" in found.detail
    assert len(found.detail) < 400


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_describes_something_is_ignored(folder, key):
    images = ImageFolder(folder / "images")
    found = conversation_of(record(0) | {key: IGNORED[key]}, "x", images)
    assert isinstance(found, Conversation), found
    assert found == conversation_of(record(0), "x", images)


def test_a_file_name_in_a_record_without_images_is_refused(folder):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    found = conversation_of({"conversations": talk, "file_name": "dir/A.JPG"}, "x", ImageFolder(folder))
    assert "the key 'file_name', which names a file of an image" in found.detail
    for value in (["a.png"], {"path": "a.heic"}, [{"path": "b.svg"}], "http://host/a.pdf"):
        found = conversation_of({"conversations": talk, "files": value}, "x", ImageFolder(folder))
        assert "the key 'files', which names a file of an image" in found.detail
    assert isinstance(
        conversation_of({"conversations": talk, "file_name": "a.txt"}, "x", ImageFolder(None)), Conversation
    )


def test_keys_that_are_worth_reading_are_known_by_their_words():
    assert [
        name
        for name in ("image_2", "imgPath", "tools", "image_id", "embedding", "video_source")
        if describes_content(name)
    ] == [
        "image_2",
        "imgPath",
        "tools",
    ]


def test_long_values_are_cut():
    assert len(shown("x" * 100_000)) < 100
    assert len(shown({"a": ["x" * 1000] * 1000, "b": png()})) < 500
