"""Folders are complete or absent, at every moment at which their writer can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import (
    COMPLETE_MARKER,
    LOCK_FILE,
    check_complete,
    complete_directory,
    directory_lock,
    folders,
    is_complete,
    owner_of,
    results_folder,
    write_text,
)

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime"}
_observers = []


def _audit(event, _):
    if event in CHANGES:
        for observe in _observers.copy():
            observe()


sys.addaudithook(_audit)  # Python has no way to remove it; without observers it does nothing


@contextlib.contextmanager
def every_moment(folder: Path, copies: Path):
    """Copies the folder before each change that the block makes to the disk: what a kill there would leave."""

    def observe():
        _observers.clear()
        shutil.copytree(folder, copies / str(len(os.listdir(copies))), symlinks=True)
        _observers.append(observe)

    copies.mkdir()
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.clear()


def end_the_writer(folder: Path):
    """Makes the lease in a copied folder that of a process that has ended."""
    for lock in folder.glob(".*.lock"):
        if lock.read_text():
            lock.write_text(json.dumps(json.loads(lock.read_text()) | {"started": "0"}))
        else:  # killed between the creation and the first line: the lease has to become stale
            os.utime(lock, (0, 0))


def write(target, text, **options):
    with complete_directory(target, **options) as folder:
        (folder / "a").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text(text)


def content(target: Path):
    return (target / "a").read_text(), (target / "sub" / "b").read_text()


def test_a_folder_is_there_only_when_complete(tmp_path):
    target = tmp_path / "above" / "model"
    with complete_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
        assert not is_complete(target)
    assert is_complete(target)
    assert sorted(os.listdir(target)) == [COMPLETE_MARKER, "a"]
    assert os.listdir(target.parent) == ["model"]


def test_killed_at_any_moment_while_replacing_leaves_the_old_or_the_new(tmp_path):
    target = tmp_path / "disk" / "model"
    write(target, "old")
    with every_moment(tmp_path / "disk", tmp_path / "copies"):
        write(target, "new", overwrite=True)
    copies = sorted((tmp_path / "copies").iterdir(), key=lambda path: int(path.name))
    found = []
    for copy in copies:
        end_the_writer(copy)
        check_complete(copy / "model")
        found.append(content(copy / "model"))
        write(copy / "model", "third", overwrite=True)
        assert content(copy / "model") == ("third", "third")
        assert os.listdir(copy) == ["model"], copy
    assert set(found) == {("old", "old"), ("new", "new")}
    assert found == sorted(found, reverse=True)  # never back to the old one
    assert len(copies) > 10


def test_killed_at_any_moment_while_writing_leaves_all_or_nothing(tmp_path):
    (tmp_path / "disk").mkdir()
    with every_moment(tmp_path / "disk", tmp_path / "copies"):
        write(tmp_path / "disk" / "model", "new")
    complete = 0
    for copy in (tmp_path / "copies").iterdir():
        end_the_writer(copy)
        if is_complete(copy / "model"):
            complete += 1
            assert content(copy / "model") == ("new", "new")
        else:
            assert not (copy / "model").exists()
            write(copy / "model", "again")
            assert content(copy / "model") == ("again", "again")
            assert os.listdir(copy) == ["model"]
    assert complete >= 1


def test_a_reader_between_the_two_renames_does_not_disturb_the_writer(tmp_path, monkeypatch):
    target = tmp_path / "model"
    write(target, "old")
    rename, seen = os.rename, []

    def rename_and_read(*paths):
        rename(*paths)
        if not target.exists():
            check_complete(target)
            seen.append(content(target))

    monkeypatch.setattr(os, "rename", rename_and_read)
    write(target, "new", overwrite=True)
    assert seen == [("new", "new")]
    assert content(target) == ("new", "new")
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def fail(target, error, **options):
        with complete_directory(target, **options) as folder:
            (folder / "a").write_text("half")
            raise error

    with pytest.raises(UserError, match=r"new cannot be written: No space left on device, .* free"):
        fail(tmp_path / "new", OSError(28, "No space left on device"))
    assert os.listdir(tmp_path) == []
    write(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "model", KeyboardInterrupt(), overwrite=True)
    assert content(tmp_path / "model") == ("old", "old")
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "1")
    with pytest.raises(UserError, match=r"empty exists; choose another folder, or overwrite it"):
        write(tmp_path / "empty", "2")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        write(tmp_path / "file", "2", overwrite=True)
    with pytest.raises(UserError, match="file is not a folder"):
        write(tmp_path / "file" / "below", "2")
    assert content(tmp_path / "empty") == ("1", "1")


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    with pytest.raises(
        UserError, match=r"home holds files that vr-jax did not write \(it has no _COMPLETE\), so it is"
    ):
        write(tmp_path / "home", "1", overwrite=True)
    assert os.listdir(tmp_path / "home") == ["precious"]
    write(tmp_path / "mine", "1", owner="me")
    assert owner_of(tmp_path / "mine") == "me"
    with pytest.raises(UserError, match="mine was not written by this run"):
        write(tmp_path / "mine", "2", overwrite=True, owner="another")
    write(tmp_path / "mine", "3", overwrite=True, owner="me")
    assert content(tmp_path / "mine") == ("3", "3")
    write(tmp_path / "mine", "4", overwrite=True)
    assert (owner_of(tmp_path / "mine"), owner_of(tmp_path / "home")) == ("", None)


def test_what_came_into_a_folder_later_is_not_lost(tmp_path):
    write(tmp_path / "model", "1")
    (tmp_path / "model" / "eval").mkdir()
    (tmp_path / "model" / ".hidden").touch()
    (tmp_path / "model" / "eval" / "items.jsonl").write_text("precious")
    write(tmp_path / "model", "2", overwrite=True)
    assert content(tmp_path / "model") == ("2", "2")
    assert (tmp_path / "model" / "eval" / "items.jsonl").read_text() == "precious"
    # A writer that is killed after the exchange leaves them in the folder that was replaced.
    shutil.copytree(tmp_path / "model", tmp_path / ".model.replaced")
    shutil.rmtree(tmp_path / "model" / "eval")
    write(tmp_path / "model", "3", overwrite=True)
    assert (tmp_path / "model" / "eval" / "items.jsonl").read_text() == "precious"
    assert os.listdir(tmp_path) == ["model"]


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    with complete_directory(tmp_path / "model") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(UserError, match="model is in use by another run"):
            write(tmp_path / "model", "second")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("first")
    assert content(tmp_path / "model") == ("first", "first")


def test_too_little_room_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7))
    write(tmp_path / "fits", "1", size=7)
    with pytest.raises(UserError, match=r"model cannot be written: 2.00 GB are needed, 7 bytes are free"):
        write(tmp_path / "model", "1", size=2 * 10**9)
    assert os.listdir(tmp_path) == ["fits"]


def test_a_folder_without_its_marker_is_refused(tmp_path):
    with pytest.raises(UserError, match="model does not exist"):
        check_complete(tmp_path / "model")
    write(tmp_path / "model", "1")
    check_complete(tmp_path / "model")
    (tmp_path / "model" / COMPLETE_MARKER).unlink()
    with pytest.raises(UserError, match=r"model is incomplete: it has no _COMPLETE, .*once more"):
        check_complete(tmp_path / "model")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        check_complete(tmp_path / "model" / "a")


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == ("new", "new")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_without_renames_the_marker_comes_last_and_goes_first(tmp_path, monkeypatch):
    """A bucket has no renames: the folder is filled in place, and counts only once its marker is there."""
    monkeypatch.setattr(folders, "is_local", lambda path: False)
    target = tmp_path / "disk" / "model"
    target.parent.mkdir()
    write(target, "old")
    assert is_complete(target)
    with every_moment(tmp_path / "disk", tmp_path / "copies"):
        write(target, "new", overwrite=True)
    states = set()
    for copy in (tmp_path / "copies").iterdir():
        states.add(content(copy / "model") if is_complete(copy / "model") else None)
    assert states <= {("old", "old"), ("new", "new"), None}
    assert {("old", "old"), None} <= states
    assert content(target) == ("new", "new")


def test_results_are_not_overwritten_unasked(tmp_path):
    with results_folder(tmp_path / "a", "results.json") as folder:
        write_text(folder / "results.json", "mine")
    assert os.listdir(tmp_path / "a") == ["results.json"]
    with (
        pytest.raises(UserError, match=r"a/results\.json exists; choose another --output, or .*--overwrite"),
        results_folder(tmp_path / "a", "results.json"),
    ):
        pytest.fail("would overwrite")
    with results_folder(tmp_path / "a", "results.json", overwrite=True) as folder:
        assert (folder / LOCK_FILE).exists()
        with (
            pytest.raises(UserError, match="a is in use by another run"),
            results_folder(tmp_path / "a", "results.json", overwrite=True),
        ):
            pytest.fail("held twice")
        with pytest.raises(UserError, match="in use"), directory_lock(tmp_path / "a"):
            pytest.fail("held twice")
