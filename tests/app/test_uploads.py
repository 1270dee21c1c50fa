"""Uploaded files: usable images come back as they are, everything else is one plain line."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.inference import tiny
from vr_jax.app import UploadError, check_uploads, uploads


def test_usable_images_come_back_as_they_are(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b <b>.png"]
    for number, file in enumerate(files):
        file.write_bytes(tiny.png(20, 10, number))
    found = check_uploads(files)
    assert [(one.name, one.data) for one in found] == [(file.name, file.read_bytes()) for file in files]
    assert check_uploads([]) == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def hostile(folder):
    """Files that are no usable images, with what the line must say of each."""
    whole = tiny.png(40, 40)
    (folder / "page.png").write_text("<html><script>alert(1)</script>")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "vector.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>')
    Image.new("1", (20000, 10000)).save(folder / "huge.png")  # 200 megapixels in 24 kB
    Image.new("1", (9500, 9500)).save(folder / "large.png")
    (folder / "folder.png").mkdir()
    return {
        "page.png": "has none of the formats PNG, JPEG",
        "empty.jpg": "has none of the formats PNG, JPEG",
        "half.png": "cannot be decoded",
        "vector.svg": "has none of the formats PNG, JPEG",
        "huge.png": "too many pixels; make it smaller than 89,478,485",
        "large.png": "too many pixels; make it smaller than 89,478,485",
        "folder.png": "cannot be read",
        "absent.png": "cannot be read",
    }


def test_what_is_no_image_is_one_line_and_the_others_stay_usable(folder, hostile):
    good = folder / "good.png"
    good.write_bytes(tiny.png(8, 8))
    for name, message in hostile.items():
        with pytest.raises(UploadError) as caught:
            check_uploads([good, folder / name, good])
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{name}: ")
        assert "\n" not in str(caught.value)
        assert str(folder) not in str(caught.value), "a path of the server is nobody's business"
        assert caught.value.usable == (good, good)


def test_several_bad_files_are_still_one_line(folder, hostile):
    with pytest.raises(UploadError) as caught:
        check_uploads([folder / name for name in hostile])
    assert str(caught.value).startswith("page.png: ")
    assert str(caught.value).endswith("(7 more files cannot be used either)")
    assert len(str(caught.value)) < 500


def test_names_with_html_and_control_characters_are_one_short_line(tmp_path):
    file = tmp_path / f"<img src=x onerror=alert(1)>\n\x1b[31m\u202e{'x' * 150}.png"
    file.write_text("no image")
    with pytest.raises(UploadError) as caught:
        check_uploads([file])
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("<img src=x onerror=alert(1)> ")  # The page escapes it (test_page.py).
    assert len(message.split(": ")[0]) <= uploads.LONGEST_NAME


def test_a_hundred_files_at_once_are_refused_before_any_is_read(tmp_path):
    with pytest.raises(UploadError, match="100 files were given, but a question may have at most 16 images"):
        check_uploads([tmp_path / f"absent{number}.png" for number in range(100)])


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(tiny.png(20, 10))
    monkeypatch.setattr(uploads, "MAX_BYTES", 100)
    with pytest.raises(UploadError, match=r"a\.png: The file has [\d,]+ bytes, but at most 100 are allowed\."):
        check_uploads([tmp_path / "a.png"])
