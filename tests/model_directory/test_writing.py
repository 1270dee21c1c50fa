"""A model directory is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from vr_jax.errors import UserError
from vr_jax.model_directory import load_params, save_params, writing


def test_existing_directories_are_refused_or_replaced_whole(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    save_params(target, {}, {"image_newline": jnp.zeros(2)})  # an empty folder is no directory yet
    with pytest.raises(UserError, match="exists"):
        save_params(target, {}, {"image_newline": jnp.ones(2)})
    (target / "notes").write_text("written by somebody else")
    save_params(target, {}, {"image_newline": jnp.ones(2)}, overwrite=True)
    np.testing.assert_array_equal(load_params(target)["image_newline"], np.ones(2))
    assert sorted(os.listdir(target)) == ["_COMPLETE", "config.json", "notes", "params"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_save_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    save_params(tmp_path / "model", {}, {"image_newline": jnp.zeros(2)})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "copy_side_files", full)
    with pytest.raises(UserError, match="No space left"):
        save_params(tmp_path / "model", {}, {"image_newline": jnp.ones(2)}, tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    np.testing.assert_array_equal(load_params(tmp_path / "model")["image_newline"], np.zeros(2))


def test_too_little_room_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7))
    with pytest.raises(UserError, match=r"cannot be written: 8 bytes are needed, 7 bytes are free"):
        save_params(tmp_path / "model", {}, {"image_newline": jnp.zeros(2)})
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """A real write error, of TensorStore: files above 4 kB fail."""
    script = """
import resource, sys, jax.numpy as jnp, jax
from vr_jax.errors import UserError
from vr_jax.model_directory import save_params
array = jax.random.normal(jax.random.key(0), (64, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_params(sys.argv[1], {}, {"image_newline": array})
except UserError as error:
    print("UserError", error)
"""
    result = subprocess.run(
        # Without -B, the interpreter would also write bytecode, cut off at the limit.
        [sys.executable, "-B", "-c", script, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "File too large" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == []
