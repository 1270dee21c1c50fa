"""`vr-jax train` as a user meets it: two steps of the demo by train.py, and one line for each typical mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vr_jax.cli.main import main
from vr_jax.model_directory import read_config

ROOT = Path(__file__).parents[2]


def train(*arguments, devices=1):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_the_demo_trains_and_fields_can_be_set(tmp_path):
    done = train(
        *("--config=configs/demo.py", f"--workdir={tmp_path}", "--config.steps=2", "--config.optimizer.lr=0.5"),
        *("--config.optimizer.warmup_ratio=0.0", "--config.batch.rows=4", "--config.tensorboard=False"),
        *("--config.model.refusion.insert_after=(1,)", "--config.model.refusion.cross_heads=2"),
        "--config.trainable=('projector.*', 'decoder.*')",
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2]
    assert records[0]["lr"] == pytest.approx(0.5)
    refusion = read_config(tmp_path / "model").refusion
    assert (refusion.insert_after, refusion.cross_heads) == ((1,), 2)
    assert "step 2 of 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimzer.lr=1"], "config has no field 'optimzer'; did you mean 'optimizer'?"),
        (["--config.mesh.tensor=3"], "needs a multiple of 3 devices, found 8"),
        (
            ["--config.batch.rows=7", "--config.batch.accumulation=2"],
            "config.batch.rows = 7 is not divisible by config.batch.accumulation = 2",
        ),
    ],
    ids=["unknown field", "mesh", "batch"],
)
def test_typical_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", "--config=configs/demo.py", f"--workdir={tmp_path}", *arguments]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("vr-jax train: ")
    assert message in errors.splitlines()[-1]


def test_missing_data_is_named(tmp_path, capsys):
    arguments = ["--config=configs/real_charts.py:phase1", "--config.batch.rows=8", "--config.data.path=/nowhere.json"]
    assert main(["train", f"--workdir={tmp_path}", *arguments]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "/nowhere.json" in errors.splitlines()[-1]
