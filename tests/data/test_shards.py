"""The files of a split are chosen by their names, and a numbered set of files must be complete."""

import os

import pytest

from vr_jax.data.shards import files_below, of_split, require_complete, split_named_by
from vr_jax.errors import UserError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        # The names of the Hugging Face hub.
        (["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-0.parquet"], "train", [0]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "test", [1]),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], "validation", [1]),
        # One folder for each configuration; a folder that has the test split only is left out.
        (["a/train-0.parquet", "a/test-0.parquet", "b/train-0.parquet", "c/test-0.parquet"], "train", [0, 2]),
        (["a/train-0.parquet", "b/0.parquet", "b/1.parquet"], "train", [0, 1, 2]),
        # Other names of the same split, and names that people give.
        (["train.parquet", "val.parquet"], "validation", [1]),
        (["val.parquet", "validation.parquet"], "val", [0]),
        (["chartqa_train.json", "chartqa_test.json"], "train", [0]),
        (["train_sft-00000.parquet", "test_sft-00000.parquet"], "train_sft", [0]),
        (["train_sft-00000.parquet", "test_sft-00000.parquet"], "train", [0]),
        # No file names a split, or not all do.
        (["0000.parquet", "0001.parquet"], "train", [0, 1]),
        (["0000.parquet", "test.parquet"], "train", [0]),
        (["latest.parquet", "contest.parquet"], "train", [0, 1]),
    ],
)
def test_files_of_a_split(tmp_path, names, split, expected):
    files = touch(tmp_path, *names)
    assert of_split(files, split, tmp_path) == [files[k] for k in expected]


def test_a_split_that_no_file_has_is_refused(tmp_path):
    files = touch(tmp_path, "test-0.parquet", "val-0.parquet")
    with pytest.raises(UserError, match=r"no file of the split 'train'; the names of the 2 files state test, valid"):
        of_split(files, "train", tmp_path)


def test_a_folder_above_the_data_does_not_name_the_split(tmp_path):
    (file,) = touch(tmp_path, "test_data/coco/0000.parquet")
    assert split_named_by(file, tmp_path / "test_data") is None
    assert split_named_by(file, tmp_path) == "test"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train-00000-of-00010.parquet", "train-00007-of-00010.parquet"],
            "only 2 of 10 .* 1, 2, 3, 4, 5, 6, 8, 9 are",
        ),
        (["a/x-00001-of-00002.parquet", "b/x-00000-of-00002.parquet"], "only 1 of 2 files are there, the numbers 0"),
        (
            [f"x-{k:05d}-of-{n:05d}.parquet" for n in (1, 2) for k in range(n)],
            r"different downloads \(00001, 00002 files each\)",
        ),
    ],
)
def test_incomplete_sets_are_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        require_complete(touch(tmp_path, *names))


def test_complete_sets_and_names_without_numbers_are_accepted(tmp_path):
    names = ["a-00000-of-00002.parquet", "a-00001-of-00002.parquet", "b-00000-of-00001.parquet", "c.parquet"]
    require_complete(touch(tmp_path, *names))


def test_links_to_folders_are_followed_and_hidden_files_are_not_read(tmp_path):
    touch(tmp_path / "elsewhere", "one.PARQUET")
    touch(tmp_path / "data", "two.parquet", ".cache/three.parquet", ".four.parquet", "five.txt")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    assert [one.name for one in files_below(tmp_path / "data", [".parquet"])] == ["one.PARQUET", "two.parquet"]
