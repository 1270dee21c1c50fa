"""Files that are whole or absent."""

from __future__ import annotations

import os
import stat

import pytest

from vr_jax.atomic import atomic_write, write_whole


def test_written_whole_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_whole(path, "é")
    assert path.read_bytes() == "é".encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    write_whole(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(path.parent) == ["a.json"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.svg"
    write_whole(path, "old")

    def fail():
        with atomic_write(path) as temporary:
            assert temporary.suffix == ".svg"
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.svg"]
    with pytest.raises(OSError, match=r"a\.svg"):
        write_whole(path / "below" / "b", "")
