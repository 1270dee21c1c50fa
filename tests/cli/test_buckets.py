"""The commands of docs/buckets.md run against a store on this machine, and leave nothing on the disk."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.docs import blocks, check_command, commands
from tests.object_store import ROOT
from tools.tiny_files import write_data
from vr_jax.storage import UploadedFolder, is_complete

TINY = {
    "train": ("--config.steps=2", "--config.batch.rows=2", "--config.data.workers=1", "--config.tensorboard=True"),
    "eval": ("--max_new_tokens=2",),
}


def test_the_commands_exist():
    assert {words[0] for words in commands("buckets.md")} == {"train", "eval", "convert", "prepare"}
    for words in commands("buckets.md"):
        check_command(words)
    assert "pip install 'vr-jax[gcs]'" in "\n".join(blocks("buckets.md", "console"))


@pytest.mark.slow  # Five processes import JAX, and one of them compiles the demo's model.
def test_all_of_them_run_and_leave_nothing_on_the_disk(bucket, tmp_path):
    with UploadedFolder(bucket) as files:
        write_data(files.local)
        (files.local / "data" / "blip_laion_cc_sbu_558k.json").rename(files.local / "data" / "data.json")
        (files.local / "data" / "ChartQA").rename(files.local / "benchmarks_chartqa")
        (files.local / "benchmarks").mkdir()
        (files.local / "benchmarks_chartqa").rename(files.local / "benchmarks" / "chartqa")
        files.upload()
    for name in ("home", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    places["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    for words in commands("buckets.md"):
        line = shlex.join([*words, *TINY.get(words[0], ())]).replace("gs://bucket", str(bucket))
        done = subprocess.run(
            [sys.executable, "-m", "vr_jax", *shlex.split(line)],
            cwd=tmp_path / "cwd",
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert not [path for name in ("home", "cwd") for path in (tmp_path / name).rglob("*")]
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert is_complete(bucket / "run" / "model")
    assert is_complete(bucket / "hf")
    assert len((bucket / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert list((bucket / "run" / "tensorboard").glob("events*"))
    assert (bucket / "run" / "first_batch.html").is_file()
    assert json.loads((bucket / "results" / "summary.json").read_text())
    assert list((bucket / "prepared").rglob("*.array_record*"))
