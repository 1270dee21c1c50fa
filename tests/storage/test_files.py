"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import as_path, atomic_write, is_local, write_bytes, write_json, write_text


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


def test_paths_expand_the_home_folder_and_know_buckets(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(as_path("~/runs")) == tmp_path / "runs"
    assert os.fspath(as_path("gs://bucket/runs") / "a") == "gs://bucket/runs/a"
    assert is_local("~/runs")
    assert not is_local(as_path("gs://bucket/runs"))
