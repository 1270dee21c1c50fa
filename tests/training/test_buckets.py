"""A run whose folder lies in a bucket: killed at any moment, continued, and nothing of it on the disk."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.object_store import ROOT
from tests.training.test_processes import finish, series, wait_for
from tests.training.tiny import noise_inputs, tiny_config, tiny_run
from vr_jax.model_directory import load_model
from vr_jax.storage import is_complete
from vr_jax.training import loop
from vr_jax.training.state import ModelTree


def start(workdir, home, *arguments):
    """A run in a process whose home, working folder and temporary folder are below `home`."""
    for name in ("home", "cwd", "tmp"):
        (home / name).mkdir(exist_ok=True)
    env = {
        **os.environ,
        "HOME": str(home / "home"),
        "TMPDIR": str(home / "tmp"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.training.driver", str(workdir), *arguments]
    return subprocess.Popen(command, cwd=home / "cwd", env=env, stderr=subprocess.PIPE, text=True)


def has_checkpoint(workdir, step):
    return (workdir / "checkpoints" / str(step) / "checksums.process_0.json").exists()


@pytest.mark.slow  # Four processes train.
def test_killed_in_a_bucket_and_resumed_equals_an_uninterrupted_run_on_a_disk(bucket, tmp_path):
    """kill -9 between two saves and in the middle of one; then to the end. Nothing lies outside the bucket."""
    whole = tmp_path / "whole"
    loop.train(tiny_run(), whole, open_inputs=noise_inputs())
    workdir = bucket / "run"
    moments = {
        "after a save": lambda: has_checkpoint(workdir, 4),
        "while saving": lambda: (workdir / "checkpoints" / "12").exists(),
    }
    for moment in moments.values():
        process = start(workdir, tmp_path, "--delay=0.3")
        wait_for(moment, process)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    process = start(workdir, tmp_path)
    code, errors = finish(process)
    assert code == 0, errors
    assert series(workdir) == series(whole)
    ours, theirs = (ModelTree(tiny_config()).flatten(load_model(place / "model")) for place in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert is_complete(workdir / "model")
    assert not [path for name in ("home", "cwd") for path in (tmp_path / name).rglob("*")]
