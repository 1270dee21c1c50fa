"""A path in a bucket behaves as a path of a disk does."""

import pathlib
import pickle
from contextlib import suppress

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import (
    BucketPath,
    as_path,
    file_errors,
    for_library,
    is_local,
    matching_paths,
    move_folder,
    remove_folder,
)

FILES = ("a.txt", "b/c.txt", "b/d/e.json", "b/d/[1].txt")


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """The same files on a disk and in a bucket."""
    root = tmp_path / "f" if request.param == "disk" else request.getfixturevalue("bucket")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def below(root, paths):
    return sorted(path.relative_to(root).as_posix() for path in paths)


def test_what_is_there(folder):
    for name, exists, is_dir in (("", True, True), ("a.txt", True, False), ("b/d", True, True), ("a", False, False)):
        path = folder / name
        assert (path.exists(), path.is_dir(), path.is_file()) == (exists, is_dir, exists and not is_dir)
    assert not (folder / "b/d/e").exists()
    assert (folder / "b/d/e.json").stat().st_size == len("b/d/e.json")
    assert (folder / "b/d/e.json").stat().st_mtime_ns > 1e18


def test_listings(folder):
    assert below(folder, folder.iterdir()) == ["a.txt", "b"]
    assert below(folder, folder.rglob("*.txt")) == ["a.txt", "b/c.txt", "b/d/[1].txt"]
    assert below(folder, folder.glob("b/*")) == ["b/c.txt", "b/d"]
    assert below(folder, folder.glob("*/d/*.json")) == ["b/d/e.json"]
    assert below(folder, folder.glob("b/**/e.*")) == ["b/d/e.json"]
    walked = {path.relative_to(folder).as_posix(): (sorted(f), sorted(n)) for path, f, n in folder.walk()}
    assert walked["b"] == (["d"], ["c.txt"])


def test_patterns(folder):
    assert below(folder, matching_paths(f"{folder}/**/*.txt")) == ["a.txt", "b/c.txt", "b/d/[1].txt"]
    assert below(folder, matching_paths(f"{folder}/b/d/[1].txt")) == ["b/d/[1].txt"]  # it exists
    with pytest.raises(UserError, match="no file matches this pattern"):
        matching_paths(f"{folder}/*.png")


def test_what_is_absent(folder):
    for wrong in (lambda p: p.read_bytes(), lambda p: p.stat(), lambda p: list(p.iterdir()), lambda p: p.unlink()):
        with pytest.raises(FileNotFoundError):
            wrong(folder / "absent")
    with pytest.raises(FileNotFoundError):
        (folder / "absent").open("rb")
    (folder / "absent").unlink(missing_ok=True)
    with pytest.raises(UserError, match="absent: No such file or directory; check the path"), file_errors("x"):
        (folder / "absent").read_text()
    with pytest.raises(NotADirectoryError):
        list((folder / "a.txt").iterdir())
    with pytest.raises(FileExistsError):
        (folder / "a.txt").mkdir(exist_ok=True)


def test_folders_move_and_go(folder):
    move_folder(folder / "b", folder / "n")
    assert not (folder / "b").exists()
    assert (folder / "n/d/[1].txt").read_text() == "b/d/[1].txt"
    remove_folder(folder / "n")
    remove_folder(folder / "n")
    assert below(folder, folder.rglob("*")) == ["a.txt"]
    (folder / "a.txt").unlink()
    assert not (folder / "a.txt").exists()


def test_parts_of_a_file_are_read(folder):
    data = bytes(range(256)) * 9000
    (folder / "large").write_bytes(data)
    with (folder / "large").open("rb") as file:
        assert file.read(10) == data[:10]
        file.seek(-7, 2)
        assert file.read() == data[-7:]
        file.seek(1_000_000)
        assert file.read(1_200_000) == data[1_000_000:2_200_000]
    with (folder / "a.txt").open() as file:
        assert file.readlines() == ["a.txt"]


def test_text_is_written_when_the_file_is_closed(bucket):
    with (bucket / "t").open("w") as file:
        file.write("first\n")
        assert not (bucket / "t").exists()
    assert (bucket / "t").read_text() == "first\n"
    with suppress(ZeroDivisionError), (bucket / "u").open("wb") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert not (bucket / "u").exists()


def test_an_address_stays_one(bucket):
    assert isinstance(as_path("s3://b/c"), BucketPath)
    assert isinstance(as_path("a/b"), pathlib.Path)
    path = as_path("gs://b/x//y/../z")
    assert str(path.resolve()) == "gs://b/x/z"
    assert str(path.absolute()) == str(path)
    assert str(as_path("gs://b/../../c").resolve()) == "gs://b/c"
    assert pickle.loads(pickle.dumps(bucket)) == bucket
    assert not is_local(bucket / "a")
    assert str((bucket / "a").parent) == str(bucket)
    assert (bucket / "a.b").with_suffix(".c").name == "a.c"


def test_a_library_gets_a_path_of_a_disk_or_an_open_object(folder):
    given = for_library(folder / "a.txt")
    assert isinstance(given, pathlib.Path) or given.read() == b"a.txt"
