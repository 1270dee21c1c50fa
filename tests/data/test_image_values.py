"""Every form in which a record contains or names an image is read, or refused by name."""

import base64

import pytest

from tests.data.samples import png
from vr_jax.data.image_values import image_of
from vr_jax.data.records import ImageFolder
from vr_jax.data.skips import SkipRecord

IMAGE = png()
BASE64 = base64.b64encode(IMAGE).decode()
INSIDE = {
    "bytes": IMAGE,
    "bytearray": bytearray(IMAGE),
    "a struct of bytes": {"bytes": IMAGE, "path": None},
    "bytes before their path": {"bytes": IMAGE, "path": "a.png"},
    "a struct of base64": {"bytes": BASE64},
    "transformers' base64": {"base64": BASE64},
    "a struct in a part": {"image": {"bytes": IMAGE, "path": None}},
    "OpenAI's address": {"image_url": {"url": f"data:image/png;base64,{BASE64}", "detail": "high"}},
    "base64": BASE64,
    "base64 in lines": "\n".join(BASE64[k : k + 76] for k in range(0, len(BASE64), 76)),
    "base64 without padding": BASE64.rstrip("="),
    "a data URI": f"data:image/png;base64,{BASE64}",
    "a data URI with parameters": f"DATA:image/png;charset=utf-8;BASE64,{BASE64}",
    "a data URI of percent signs": "data:image/png," + "".join(f"%{byte:02x}" for byte in IMAGE),
}


@pytest.mark.parametrize("name", INSIDE)
def test_an_image_in_the_record(name):
    assert image_of(INSIDE[name], "image", ImageFolder(None)) == IMAGE


@pytest.mark.parametrize(
    "value", ["0.png", {"path": "0.png"}, {"bytes": None, "path": "0.png"}, {"url": "0.png"}, "file://{}/0.png"]
)
def test_the_name_of_a_file(folder, value):
    images = folder / "images"
    value = value.format(images) if isinstance(value, str) else value
    assert image_of(value, "image", ImageFolder(images)).read_bytes() == IMAGE


REFUSED = {
    "http://a.b/c.png": "the address 'http://a.b/c.png', but nothing is downloaded",
    "s3://a/c.png": "the address 's3://a/c.png'",
    "file:///etc/passwd": "leads out of the image folder",
    "data:video/mp4;base64,AAAA": "a data URI of the type 'video/mp4'",
    "data:image/png": "no valid data URI",
    f"data:image/png;base64,{BASE64[:80]}*": "not valid base64",
    BASE64[:50] + "é": "not valid base64",
    "": "contains ''",
    3: "contains 3",
    None: "contains None",
    True: "contains True",
    "a\ud83d.png": "half of a surrogate pair",
}


@pytest.mark.parametrize("value", REFUSED)
def test_what_is_no_image_is_named(folder, value):
    with pytest.raises(SkipRecord) as caught:
        image_of(value, "image", ImageFolder(folder / "images"))
    assert REFUSED[value] in caught.value.detail
    assert "'image'" in caught.value.detail or "image path" in caught.value.detail
    assert len(caught.value.detail) < 400


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must have one of bytes, path"),
        ({"path": "a.png", "url": "b.png"}, "has path, url, but must have one of"),
        ({"bytes": [137, 80]}, "contains [137, 80]"),
        ({"image": {"image": {"path": "a.png"}}}, "contains {'path': 'a.png'}"),
        ({"base64": 3}, "contains 3"),
        ({"path": "0.png", "video": "x.mp4"}, "has the key 'video'"),
    ],
)
def test_a_struct_without_one_image_is_named(folder, value, message):
    with pytest.raises(SkipRecord) as caught:
        image_of(value, "images[1]", ImageFolder(folder / "images"))
    assert message in caught.value.detail
    assert "images[1]" in caught.value.detail
