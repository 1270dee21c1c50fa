"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import AppendedFile, as_path, atomic_write, is_local, write_bytes, write_json, write_text


def test_files_are_written_whole_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    write_bytes(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    write_json(path, {"a": [1, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert os.listdir(path.parent) == ["a.json"]


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.svg"
    write_text(path, "old")

    def fail():
        with atomic_write(path) as temporary:
            assert temporary.suffix == ".svg"
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.svg"]


def test_what_the_system_refuses_is_a_user_error_that_names_the_file(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"file/b cannot be written: .*(exists|Not a directory)"):
        write_text(tmp_path / "file" / "b", "")
    with pytest.raises(UserError, match=r"never cannot be written: .*No such file"), atomic_write(tmp_path / "never"):
        pass


def test_a_device_or_a_pipe_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through it")
    assert os.read(reading, 100) == b"through it"
    os.close(reading)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write_text("/dev/null", "away")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"Is a directory; a folder stands where a file is"), atomic_write(tmp_path):
        pytest.fail("the work was done")


def test_an_appended_file_grows_by_whole_pieces(tmp_path, monkeypatch):
    with AppendedFile(tmp_path / "new" / "a.jsonl") as file:
        file.append(b"one\n", sync=True)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(UserError, match=r"a\.jsonl cannot be written: File too large; files may not become"):
                file.append(b"x" * 20_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read() == b"one\n"
        file.append(b"two\n")
    assert (tmp_path / "new" / "a.jsonl").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE, errno.EIO])
def test_every_write_that_the_system_refuses_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number), str(tmp_path / "a"))

    write_text(tmp_path / "a", "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(UserError, match=os.strerror(number)) as error:
                write_text(tmp_path / "a", "new")
        assert str(error.value).startswith(f"{tmp_path / 'a'} cannot be written: ")
        assert "\n" not in str(error.value)
        assert (tmp_path / "a").read_text() == "old"
        assert os.listdir(tmp_path) == ["a"]


def test_paths_expand_the_home_folder_and_know_buckets(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(as_path("~/runs")) == tmp_path / "runs"
    assert os.fspath(as_path("gs://bucket/runs") / "a") == "gs://bucket/runs/a"
    assert is_local("~/runs")
    assert not is_local(as_path("gs://bucket/runs"))
