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


@pytest.mark.slow  # It compiles the demo's model in a process; .ci/run trains the demo.
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
        (["--config.steps=-1"], "config.steps = -1: expected an integer >= 0"),
        (["--config.steps=0", "--config.epochs=0"], "config.epochs = 0.0: expected a finite number >= 1e-30"),
        (["--config.steps=0", "--config.epochs=-1"], "config.epochs = -1.0: expected a finite number >= 1e-30"),
        (["--config.checkpoint.every=0"], "config.checkpoint.every = 0: expected an integer >= 1"),
        (["--config.checkpoint.keep_last=0"], "config.checkpoint.keep_last = 0: expected an integer >= 1"),
        (["--config.samples_per_step=0"], "config.samples_per_step = 0: expected an integer >= 1"),
        (["--config.samples_per_step=-5"], "config.samples_per_step = -5: expected an integer >= 1"),
        (["--config.optimizer.b1=1.5"], "config.optimizer.b1 = 1.5: expected a finite number >= 0 and <= 0.999999"),
        (["--config.optimizer.lr_groups=(('*', -1e-3),)"], "config.optimizer.lr_groups = (('*', -0.001),): expected"),
        (["--config.optimizer.weight_decay=nan"], "config.optimizer.weight_decay = nan: expected a finite number"),
        (["--config.data.max_skipped=nan"], "config.data.max_skipped = nan: expected a finite number"),
        (["--config.seed=-1"], "config.seed = -1: expected an integer >= 0 and <= 4294967295"),
        (["--config.seed=4294967296"], "config.seed = 4294967296: expected an integer >= 0 and <= 4294967295"),
        (["--config.steps=5", "--config.optimizer.warmup_ratio=0.9"], "makes all 5 updates a warm-up"),
        (["--config.data.images=mine"], "has no effect with config.data.format = 'demo'"),
        (
            ["--config.data.path=my.json", "--config.data.demo.size=9"],
            "config.data.demo.size = 9 has no effect with config.data.path = 'my.json'",
        ),
        (["--config.trainable=projecter.*"], "'projecter.*' matches no parameter; did you mean projector.*"),
        (
            ["--config.optimizer.lr_groups=(('encoder.*', 1e-5),)", "--config.trainable=projector.*"],
            "'encoder.*' matches frozen parameters only",
        ),
        (["--config.eval.limit=3"], "config.eval.limit has no effect on this command"),
        (["--config.batch.rows=12"], "config.batch.rows = 12 is not divisible by 8 = replica 1 x fsdp 8 x"),
        (["--config.mesh.tensor=3"], "mesh replica=-1 x fsdp=-1 x tensor=3 needs a tensor that divides the 8 devices"),
        (
            ["--config.batch.rows=7", "--config.batch.accumulation=2"],
            "config.batch.rows = 7 is not divisible by config.batch.accumulation = 2",
        ),
    ],
)
def test_typical_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main(["train", "--config=configs/demo.py", f"--workdir={workdir}", *arguments]) == 2
    assert not workdir.exists(), "nothing starts"
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
