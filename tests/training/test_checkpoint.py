"""A checkpoint that cannot be written: one line, nothing half, and those before it stay. Nothing is compiled here."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vr_jax import failures
from vr_jax.errors import UserError
from vr_jax.settings import CheckpointSettings
from vr_jax.training import checkpoint, checksums
from vr_jax.training.checkpoint import Checkpoints, check_room, state_bytes
from vr_jax.training.state import TrainState

SIZE = 200_000  # bytes of the arrays


def state(seed: int) -> TrainState:
    """A state of random arrays on one device, which no compression makes smaller."""
    values = np.random.default_rng(seed).integers(0, 2**32, SIZE // 8, np.uint32)
    arrays = jax.device_put({"a": values, "b": values + 1}, jax.devices()[0])
    return TrainState(step=jax.device_put(np.int32(seed), jax.devices()[0]), params=arrays, frozen={}, opt_state=())


def abstract() -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(1))


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, state(step), data={"n": step}, config={}, skip_statistics={}, metrics={"loss": 1.0 / step})


def steps_left(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def saved(tmp_path):
    """A workdir with a checkpoint of step 1."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    return tmp_path


def assert_intact(workdir, step=1):
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore_newest(abstract())
    assert restored.step == step
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(step))


def test_too_little_room_is_found_before_a_save_and_both_numbers_are_told(saved, monkeypatch):
    monkeypatch.setattr(failures.shutil, "disk_usage", lambda _: SimpleNamespace(free=7_000))
    with (
        pytest.raises(UserError, match=r"checkpoints/2 cannot be written: 200\.00 kB are needed, 7\.00 kB are free"),
        Checkpoints(saved) as checkpoints,
    ):
        save(checkpoints, 2)
    assert steps_left(saved) == ["1"]
    assert_intact(saved)


@pytest.fixture
def full_disk(tmp_path):
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk (tmpfs)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_disk_that_fills_while_a_checkpoint_is_written(full_disk, monkeypatch, capfd, at_once):
    """The room is there when the save begins, and another program takes it. TensorStore fails in its own threads."""
    with Checkpoints(full_disk) as checkpoints:
        save(checkpoints, 1)
    free = os.statvfs(full_disk).f_bavail * os.statvfs(full_disk).f_bsize
    (full_disk / "other").write_bytes(b"x" * (free - 50_000))
    monkeypatch.setattr(checkpoint, "check_free", lambda *_: None)

    def run():
        with Checkpoints(full_disk) as checkpoints:
            save(checkpoints, 2)
            if at_once:
                checkpoints.wait()  # as the next save does

    with pytest.raises(UserError) as error:
        run()
    message = str(error.value)
    assert message.startswith(f"{full_disk / 'checkpoints'} cannot be written: ")
    assert "No space left on device" in message
    assert "free some space, or choose another folder" in message
    assert "\n" not in message
    assert steps_left(full_disk) == ["1"]
    (full_disk / "other").unlink()
    assert_intact(full_disk)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO, errno.EMFILE])
def test_what_the_checksums_cannot_be_written_for_is_the_error(saved, monkeypatch, number):
    def fail(directory):
        raise OSError(number, os.strerror(number), str(directory / "checksums.process_0.json"))

    monkeypatch.setattr(checksums, "write_record", fail)
    with pytest.raises(UserError, match=os.strerror(number)), Checkpoints(saved) as checkpoints:
        save(checkpoints, 2)
    monkeypatch.undo()
    assert_intact(saved)


def test_the_only_checkpoint_stays_until_the_next_one_has_its_checksums(tmp_path, monkeypatch):
    """A run may be killed between the two, and the next one counts only with its checksums."""
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints.finish()
        assert checkpoints.steps() == [2]

    def fail(directory):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checksums, "write_record", fail)
    with pytest.raises(UserError, match="Input/output"), Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        save(checkpoints, 3)
    monkeypatch.undo()
    assert steps_left(tmp_path) == ["2", "3"]
    assert_intact(tmp_path, 2)


@pytest.mark.parametrize(("keep_last", "kept"), [(2, [2, 3, 5, 6]), (0, [2, 3])])
def test_the_best_checkpoints_stay_beside_the_newest(tmp_path, keep_last, kept):
    losses = {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.6, 5: 0.7, 6: 0.8}
    with Checkpoints(tmp_path, keep_last=keep_last, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state(step), data={}, config={}, skip_statistics={}, metrics={"loss": loss})
        checkpoints.finish()
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == 2


def test_one_checkpoint_is_restored_by_its_step_and_a_damaged_one_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints.finish()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, abstract()).state, state(1))
        largest = max((tmp_path / "checkpoints" / "1").rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"checkpoints/1 cannot be used: .*; restore a copy, or use another one"):
            checkpoints.restore(1, abstract())
    assert steps_left(tmp_path) == ["1", "2"]


def test_a_checkpoint_of_another_optimizer_says_what_it_was_written_with(tmp_path):
    written = {"trainable": ["*"], "optimizer": {"name": "adamw"}, "lora": {"rank": 4, "targets": ["decoder.*"]}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), data={}, config=written, skip_statistics={}, metrics={"loss": 1.0})
        checkpoints.finish()
        other = dataclasses.replace(abstract(), params={})
        with pytest.raises(UserError, match=r"written with config\.trainable = .* config\.optimizer\.name = 'adamw', "):
            checkpoints.restore_newest(other)


def test_checksums_of_a_checkpoint_that_is_absent_make_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        checksums.write_record(tmp_path / "checkpoints" / "2")
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_end(saved, monkeypatch):
    def fail(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checksums, "write_record", fail)

    def run():
        with Checkpoints(saved) as checkpoints:
            save(checkpoints, 2)
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        run()


def test_the_folder_of_the_checkpoints_must_be_one(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is not a folder; choose another one"):
        Checkpoints(tmp_path)


def test_the_room_for_a_whole_run_is_found_before_it(saved, monkeypatch):
    """keep_last + keep_best + 1 checkpoints and the model; what older checkpoints take is free for the new ones."""
    settings = CheckpointSettings(keep_last=2, keep_best=1)
    each = state_bytes(abstract())
    assert each == SIZE + 4
    present = sum(path.stat().st_size for path in (saved / "checkpoints").rglob("*") if path.is_file())
    needed = 4 * each + 1_000 - present

    def check(free, saves=100):
        monkeypatch.setattr(failures.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        check_room(saved, settings, abstract(), 1_000, saves)

    check(needed)
    with pytest.raises(UserError) as error:
        check(needed - 1)
    message = str(error.value)
    assert "no room for 4 checkpoints of 200.00 kB (config.checkpoint.keep_last = 2, keep_best = 1, and one" in message
    assert "the exported model of 1.00 kB: " in message
    assert " are needed, " in message
    assert "keep fewer checkpoints, free some space, or choose another --workdir" in message
    check(1_000 + max(0, each - present), saves=1)
    check(1_000, saves=0)


def test_one_process_looks_at_the_files_of_all_processes_that_wrote(tmp_path, monkeypatch):
    """Three processes wrote; the second one of two that continue looks at the records of the second one alone."""
    for process in range(3):
        monkeypatch.setattr(checksums.distributed, "process_index", lambda process=process: process)
        (tmp_path / f"ocdbt.process_{process}").mkdir()
        (tmp_path / f"ocdbt.process_{process}" / "data").write_bytes(bytes([process] * 8))
        checksums.write_record(tmp_path)
    (tmp_path / "ocdbt.process_2" / "data").write_bytes(bytes(8))

    def looked_at(index, count):
        monkeypatch.setattr(checksums.distributed, "process_index", lambda: index)
        monkeypatch.setattr(checksums.distributed, "process_count", lambda: count)
        return checksums.record_files(tmp_path, 3)

    names = [[path.name for path in looked_at(index, 2)] for index in (0, 1)]
    assert names == [["checksums.process_0.json", "checksums.process_2.json"], ["checksums.process_1.json"]]
    assert checksums.find_damage(looked_at(1, 2)) is None
    assert "ocdbt.process_2/data: CRC-32 differs" in checksums.find_damage(looked_at(0, 2))
    assert "ocdbt.process_2/data: CRC-32 differs" in checksums.find_damage(looked_at(0, 1))
