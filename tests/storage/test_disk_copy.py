"""Copies of what lies in a bucket, for libraries that know disks only."""

import os

from vr_jax.storage import on_disk


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
