"""Copies of what lies in a bucket, for libraries that know disks only."""

import os

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import BucketPath, on_disk
from vr_jax.storage.bucket_path import ObjectState
from vr_jax.storage.store import filesystem, write_object


def test_a_path_of_a_disk_is_its_own_copy(tmp_path):
    assert on_disk(tmp_path / "a") == tmp_path / "a"


def test_objects_and_folders_are_copied_once(bucket, object_store):
    (bucket / "m" / "a.txt").write_text("a")
    (bucket / "m" / "b" / "c.txt").write_text("c")
    copy = on_disk(bucket / "m")
    assert copy.name == "m"
    assert (copy / "a.txt").read_text() == "a"
    assert (copy / "b" / "c.txt").read_text() == "c"
    assert on_disk(bucket / "m") == copy
    assert sorted(os.listdir(on_disk(bucket / "m", ["a.txt"]))) == ["a.txt"]
    assert on_disk(bucket / "m" / "a.txt").read_text() == "a"
    assert not on_disk(bucket / "absent").exists()


def test_a_changed_object_is_copied_anew(bucket):
    (bucket / "a.txt").write_text("one")
    assert on_disk(bucket / "a.txt").read_text() == "one"
    (bucket / "a.txt").write_text("two")
    assert on_disk(bucket / "a.txt").read_text() == "two"


def test_a_large_object_is_copied_in_parts(bucket, monkeypatch):
    monkeypatch.setattr("vr_jax.storage.disk_copy._BLOCK_BYTES", 1000)
    data = bytes(range(256)) * 20
    (bucket / "large").write_bytes(data)
    assert on_disk(bucket / "large").read_bytes() == data


@pytest.mark.parametrize("name", ["/outside.txt", "b//c.txt", "./c.txt"])
def test_no_object_is_written_outside_the_copy(bucket, object_store, tmp_path, name):
    """A bucket may hold any names, and who reads it need not be who has written it."""
    if name.startswith("/"):
        name = f"{tmp_path}{name}"
    address = f"{bucket}/shared/{name}"
    write_object(f"{bucket}/shared/good.txt", b"good")
    write_object(address, b"bad")
    try:
        with pytest.raises(UserError, match="which no file can have"):
            on_disk(bucket / "shared")
        assert not (tmp_path / "outside.txt").exists()
    finally:
        filesystem(address).rm_file(address)


@pytest.mark.parametrize("name", ["../outside.txt", "b/../../outside.txt", ".."])
def test_no_name_leads_out_of_the_copy(monkeypatch, name):
    """The store of the tests takes no such name."""
    state = ObjectState(st_size=3, st_mtime_ns=0, version="")
    monkeypatch.setattr(BucketPath, "objects", lambda self: {"good.txt": state, name: state})
    with pytest.raises(UserError, match="which no file can have"):
        on_disk("gs://bkt/shared")
