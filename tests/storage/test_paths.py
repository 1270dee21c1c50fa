"""Names before patterns, lists, buckets, and targets that would replace what is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import tiny_run
from vr_jax.errors import UserError
from vr_jax.storage import as_path, check_apart, matching_paths, refuse_s3, split_paths

STRANGE = ("a[1]", "b*", "c?", "d[", "e, f", "g:h", "i\nj", " k", "{l}", "~m", "n%20o", "-p")


@pytest.mark.parametrize("name", STRANGE)
def test_a_name_that_exists_is_no_pattern_and_no_list(tmp_path, name):
    (tmp_path / "a1").touch()
    (tmp_path / "bx").touch()
    path = tmp_path / name
    path.touch()
    assert matching_paths(path) == [path]
    assert split_paths(str(path)) == [str(path)]


def test_patterns_are_recursive(tmp_path):
    for name in ("x.parquet", "a/y.parquet", "a/b/z.parquet", "a/b/other"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = matching_paths(tmp_path / "**" / "*.parquet")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/b/z.parquet", "a/y.parquet", "x.parquet"]
    assert matching_paths(tmp_path / "absent.json") == [tmp_path / "absent.json"]
    with pytest.raises(UserError, match=r"config\.data\.path = .*absent.*: no file matches this pattern"):
        matching_paths(tmp_path / "absent*", "config.data.path")


def test_lists_are_split_at_commas():
    assert split_paths(" a , b/c,,") == ["a", "b/c"]
    assert split_paths("  ") == []


def test_a_path_is_of_a_disk_or_of_a_bucket():
    assert as_path("a/b", "--to") == Path("a/b")
    assert str(as_path("gs://b/c", "--to")) == "gs://b/c"
    with pytest.raises(UserError, match="--to is empty"):
        as_path("", "--to")
    with pytest.raises(UserError, match="--to = gs:/b/c: a path of a bucket begins with gs://"):
        as_path(Path("gs://b/c"), "--to")  # pathlib leaves one slash of it


def test_s3_is_refused_where_orbax_writes():
    refuse_s3("gs://b/c", "workdir")
    with pytest.raises(UserError, match=r"workdir = s3://b/c: Orbax, which writes .*, takes no s3://"):
        refuse_s3("s3://b/c", "workdir")


@pytest.mark.parametrize("field", ["init_from", "tokenizer", "data.path", "data.images"])
def test_every_path_of_the_settings_may_be_in_a_bucket(field):
    tiny_run(**{field: "s3://bucket/a"})


def test_a_target_is_apart_from_what_is_read(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for target, source in (("a", "a"), ("a", "a/b"), ("link", "a"), ("a", "link"), ("file", "file")):
        with pytest.raises(UserError, match=r"--to = .* would replace what --from = .* reads; choose another place"):
            check_apart(tmp_path / target, [tmp_path / source], where="--to", source="--from")
    check_apart(tmp_path / "a" / "b", [tmp_path / "a"], where="--to", source="--from")
    check_apart(tmp_path / "new", [tmp_path / "a", tmp_path / "file"], where="--to", source="--from")
