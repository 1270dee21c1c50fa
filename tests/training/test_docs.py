"""The commands and code of docs/validation.md run, and its config is the one of its command."""

import os
import subprocess
import sys

import pytest

from tests.docs import blocks, commands
from tests.golden.discovery import REPOSITORY
from vr_jax.settings import load_config, read_config_file
from vr_jax.training.trackers import read_metrics

EXPORT, CONFIG = blocks("validation.md", "python")
(COMMAND,) = commands("validation.md")


def test_the_dictionary_of_the_page_says_what_its_command_says():
    config = read_config_file("configs/demo.py")
    exec(CONFIG, {"config": config})
    overrides = [word.removeprefix("--config.") for word in COMMAND if word.startswith("--config.")]
    commanded = load_config("configs/demo.py", overrides)
    written = type(commanded).from_config_dict(config)
    assert written.validation == commanded.validation
    assert written.checkpoint.best == commanded.checkpoint.best


@pytest.mark.slow  # It trains the demo's model for twelve updates.
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    exec(EXPORT, {})
    # The demo's batch is not divisible by eight devices.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    program = [sys.executable, "-m", "vr_jax", *COMMAND]
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    records = list(read_metrics(tmp_path / "runs" / "validated" / "metrics.jsonl"))
    measured = {record["step"]: [name for name in record if name.startswith("validation/")] for record in records}
    loss, score = "validation/held_out/loss", "validation/questions/demo"
    assert {step: names for step, names in measured.items() if names} == {6: [loss], 12: [loss, score]}
    assert (tmp_path / "runs" / "validated" / "first_batch.html").is_file()
