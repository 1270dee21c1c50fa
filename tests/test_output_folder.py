"""A folder for one run at a time: what is refused, and what is left."""

import multiprocessing

import pytest

from vr_jax.output_folder import OutputError, directory_lock


def hold(folder, holds, end):
    with directory_lock(folder, "results.json", overwrite=False):
        holds.set()
        end.wait(60)
        (folder / "results.json").write_text("theirs")


def test_two_processes_do_not_meet(tmp_path):
    folder = tmp_path / "a" / "b"
    context = multiprocessing.get_context("spawn")
    holds, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder, holds, end))
    other.start()
    try:
        assert holds.wait(60)
        with (
            pytest.raises(OutputError, match=r"another run is writing to .*b; choose"),
            directory_lock(folder, "results.json", overwrite=True),
        ):
            pytest.fail("held twice")
    finally:
        end.set()
        other.join(60)
    assert [path.name for path in folder.iterdir()] == ["results.json"]
    with (
        pytest.raises(OutputError, match=r"b/results\.json is there already; choose another --output, or --overwrite"),
        directory_lock(folder, "results.json", overwrite=False),
    ):
        pytest.fail("would overwrite")
    with directory_lock(folder, "results.json", overwrite=True):
        assert (folder / "results.json").read_text() == "theirs"


def test_a_killed_run_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / ".lock").touch()
    with directory_lock(tmp_path, "results.json", overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "probe"):
        with pytest.raises(OutputError, match="is no folder"), directory_lock(path, "x", overwrite=False):
            pytest.fail("a file was held")
