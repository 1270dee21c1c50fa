"""Files that grow and folders that libraries fill, on a disk and in a bucket."""

from contextlib import suppress

import pytest

from vr_jax.storage import AppendedFile, UploadedFolder, growing


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path / "f" if request.param == "disk" else request.getfixturevalue("bucket")


def test_a_file_grows_and_is_continued(folder):
    with AppendedFile(folder / "a.jsonl") as file:
        file.append(b"one\n")
        file.flush()
        assert (folder / "a.jsonl").read_bytes() == b"one\n"
        file.append(b"two\n", sync=True)
    with AppendedFile(folder / "a.jsonl") as file:
        assert file.read() == b"one\ntwo\n"
        file.truncate(4)
        file.append(b"three\n")
    assert (folder / "a.jsonl").read_bytes() == b"one\nthree\n"


def test_an_object_is_written_now_and_then(bucket, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(growing.time, "monotonic", lambda: now[0])
    with AppendedFile(bucket / "a.jsonl") as file:
        file.append(b"one\n")
        assert not (bucket / "a.jsonl").exists()
        now[0] = 11.0
        file.append(b"two\n")
        assert (bucket / "a.jsonl").read_bytes() == b"one\ntwo\n"
        file.append(b"three\n")
        assert (bucket / "a.jsonl").read_bytes() == b"one\ntwo\n"
    assert (bucket / "a.jsonl").read_bytes() == b"one\ntwo\nthree\n"


def test_an_error_still_writes_what_there_is(bucket):
    with suppress(ZeroDivisionError), AppendedFile(bucket / "a") as file:
        file.append(b"one\n")
        raise ZeroDivisionError
    assert (bucket / "a").read_bytes() == b"one\n"


def test_a_folder_that_a_library_fills(folder):
    with UploadedFolder(folder) as files:
        (files.local / "b").mkdir()
        (files.local / "b" / "c.txt").write_text("c")
        (files.local / "first").write_text("1")
        files.upload()
        (files.local / "first").write_text("22")
        files.upload(last="first")
    assert (folder / "b" / "c.txt").read_text() == "c"
    assert (folder / "first").read_text() == "22"
    assert files.local.exists() == (not files.is_temporary)
