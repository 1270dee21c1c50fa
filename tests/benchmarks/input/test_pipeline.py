"""The image benchmark compares the tiles before it measures, and leaves the process as it was."""

import importlib
import os
import re

import numpy as np
import pytest


@pytest.fixture
def pipeline():
    """The script, imported here because it changes the environment, which a fixture restores after the test."""
    pytest.importorskip("torch")
    return importlib.import_module("benchmarks.input.pipeline")


@pytest.mark.slow
def test_script(pipeline, capsys):
    """It is slow because transformers imports torch, and resizes images of up to ten tiles."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    pipeline.main(["--count=2", "--rounds=1"])
    printed = capsys.readouterr().out
    assert re.search(r"; 2 images, \d+ tiles$", printed, re.MULTILINE)
    assert "transformers, Pillow: same tiles, pixels differ by at most 0 of 255" in printed
    assert re.search(r"vr_jax, with text +[\d.]+ images/s .* x 1\.00 of our time", printed)
    assert cores is None or os.sched_getaffinity(0) == cores


def test_compare(pipeline):
    ours = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    theirs = ours.transpose(0, 3, 1, 2) / 127.5 - 1
    assert pipeline.compare(ours, theirs) == 0
    theirs[1, 2, 0, 1] += 3 / 127.5
    assert pipeline.compare(ours, theirs) == 3
    with pytest.raises(SystemExit, match="2 tiles of an image, and transformers 1"):
        pipeline.compare(ours, theirs[:1])


def test_images_are_taken_from_every_folder(pipeline, tmp_path):
    for name in ("a/0.png", "a/1.png", "a/2.txt", "b/deep/0.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = pipeline.found([tmp_path / "a", tmp_path / "b"], 2)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a/0.png", "b/deep/0.JPG"]
    with pytest.raises(SystemExit, match="no images"):
        pipeline.found([tmp_path / "none"], 2)
