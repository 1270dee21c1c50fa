"""What a newcomer gets wrong about data: what can be read is read, and the rest is one line that says what to do."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from tests.data.samples import as_list, png, record
from vr_jax.data.images import open_image
from vr_jax.data.skips import SkipRecord
from vr_jax.data.sources import open_source
from vr_jax.data.types import Skip
from vr_jax.errors import UserError

ONE = json.dumps(record(0))
TWO = json.dumps(record(1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", f"{ONE}\n{TWO}\n".encode()),  # JSON lines in .json
        ("data.jsonl", f"[{ONE},\n{TWO}]".encode()),  # a list in .jsonl
        ("DATA.JSON", f"[{ONE}, {TWO}]".encode()),  # an upper-case extension
        ("data.json", f"\ufeff[{ONE}, {TWO}]".encode()),  # a byte order mark
        ("data.json", f"{ONE}\r\n{TWO}\r\n\r\n".encode()),  # line ends of Windows
    ],
    ids=["lines", "list", "upper case", "bom", "windows"],
)
def test_files_that_are_read_all_the_same(folder, name, content):
    (folder / name).write_bytes(content)
    assert [one.id for one in as_list(open_source(folder / name, images=folder / "images"))] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.json",
            f'{{"data": [{ONE}]}}',
            r"data.json: the file is one object with the keys 'data'; expected",
        ),
        (
            "data.json",
            f'{{"a": {ONE},\n "b": {TWO}}}',
            r"one object with the keys 'a', 'b'; expected a list",
        ),
        ("data.json", f"[{ONE},]", r"data.json, line 1 \(record 1\): the text is not JSON"),
        ("data.json", str([record(0)]), r"data.json, line 1 \(record 0\): the text is not JSON"),
        ("data.json", "id,image\n1,a.png\n", r"data.json, line 1: the text is not JSON"),
        ("data.csv", "id,image\n1,a.png\n", r"data.csv: the name does not tell the format. Expected a .json, .jsonl"),
        ("data.json", "", "there are no records; check the path"),
    ],
    ids=["one object", "ids as keys", "last comma", "python", "csv in .json", "csv", "empty"],
)
def test_files_that_are_no_records(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(folder / name, images=folder / "images")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data.json.gz", "data.json"])
def test_compressed_files(folder, name):
    (folder / name).write_bytes(gzip.compress(ONE.encode()))
    with pytest.raises(UserError, match="is compressed; unpack it first"):
        open_source(folder / name)


def test_a_file_in_utf_16(folder):
    (folder / "data.json").write_bytes(f"[{ONE}]".encode("utf-16"))
    with pytest.raises(UserError, match=r"data.json, line 1: the text is not UTF-8 .* save it as UTF-8"):
        open_source(folder / "data.json")


def test_folders_in_the_place_of_files_and_back(folder):
    (folder / "data.json").write_text(f"[{ONE}]")
    assert [one.id for one in as_list(open_source(folder, images=folder / "images"))] == ["r0"], "its one JSON file"
    for images, message in [
        (folder / "data.json", "data.json: no such image folder; set `images` to the folder that the image names"),
        (folder / "photos", "photos: no such image folder"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(folder / "data.json", images=images)
    with pytest.raises(UserError, match="images: the folder has no data that are known"):
        open_source(folder / "images")
    (folder / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder.json: the folder has no data that are known"):
        open_source(folder / "folder.json")


def test_a_split_that_is_not_there(folder):
    (folder / "set").mkdir()
    (folder / "set" / "train.json").write_text(f"[{ONE}]")
    with pytest.raises(UserError, match=r"no file of the split 'test'; .* state train\. Choose one"):
        open_source(folder / "set", split="test")


@pytest.mark.parametrize("image", ["{}/images/0.png", "sub\\0.png", ".\\sub\\0.png", "./0.png"])
def test_image_names_that_are_read_all_the_same(folder, image):
    """Whole paths into the image folder, and the separators of Windows."""
    (folder / "images" / "sub").mkdir()
    (folder / "images" / "sub" / "0.png").write_bytes(png(seed=0))
    (folder / "data.json").write_text(json.dumps([record(0, image=image.format(folder))]))
    (found,) = as_list(open_source(folder / "data.json", images=folder / "images"))
    assert found.images[0].read_bytes() == png(seed=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("0.PNG", "0.PNG does not exist or is not a file, but 0.png does exist; write the name as the file has it."),
        ("0.jpg", "0.jpg does not exist or is not a file, but 0.png does exist"),
        ("train2017/0.png", "train2017/0.png does not exist or is not a file."),
        ("C:\\images\\0.png", "does not exist or is not a file."),
        ("/data/images/0.png", "leads out of the image folder .* by its name; set images to a folder that holds all"),
        ("../0.png", "leads out of the image folder .* by its name"),
        ("https://host/0.png", "does not exist or is not a file|address"),
    ],
)
def test_image_names_that_lead_nowhere(folder, image, message):
    (folder / "data.json").write_text(json.dumps([record(0, image=image)]))
    (found,) = as_list(open_source(folder / "data.json", images=folder / "images"))
    detail = found.detail if isinstance(found, Skip) else problem_of(found.images[0])
    assert re.search(message, detail)


def problem_of(image):
    with pytest.raises(SkipRecord) as caught:
        open_image(image)
    return caught.value.detail
