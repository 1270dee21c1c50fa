"""The commands of docs/pods.md and docs/pods_slices.md exist, take their flags, and the examples run at a tiny size."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts.launched import TINY, environment
from tests.docs import blocks, check_command, commands
from vr_jax.cli.flags import parse
from vr_jax.cli.launch import LaunchFlags
from vr_jax.processes.liveness import HEARTBEAT_TIMEOUT, START_TIMEOUT

ROOT = Path(__file__).parents[1]
LAUNCH = commands("pods.md")[0]  # another one only names a job vr-jax


def test_the_commands_of_the_page_take_their_flags():
    assert LAUNCH[0] == "launch"
    check_command(LAUNCH)
    check_command(parse(LaunchFlags, LAUNCH[1:]).command)
    named = set()
    for block in blocks("pods.md", "console"):
        words = shlex.split(block)
        named |= {word for word in words if word.startswith("launch/")}
        if "vr-jax" not in words and any("--config=" in word for word in words):
            check_command(["train", *(word for word in words if word.startswith("--"))])
    assert named == {"launch/slurm.sh", "launch/gke_jobset.yaml", "launch/tpu_vm.sh", "launch/skypilot.yaml"}
    assert all((ROOT / name).is_file() for name in named)


def test_the_page_has_the_defaults():
    page = (ROOT / "docs" / "pods.md").read_text()
    flags = parse(LaunchFlags, ["train"])
    for name in ("processes", "restarts", "pause", "grace"):
        assert f"| `--{name}` | {getattr(flags, name):g} |" in page
    assert f"`VR_JAX_HEARTBEAT_TIMEOUT` | {HEARTBEAT_TIMEOUT:g} |" in page
    assert f"`VR_JAX_START_TIMEOUT` | {START_TIMEOUT:g} |" in page


@pytest.mark.slow  # four processes train: about a minute
def test_the_example_of_the_page_trains(tmp_path):
    small = [f"--config.{name}={value}" for name, value in {**TINY, "batch.rows": 4, "samples_per_step": 4}.items()]
    changed = ["--config.steps=3", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "vr_jax", *LAUNCH, *small, *changed]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "vr-jax launch: done"
    assert (tmp_path / "run" / "model" / "config.json").exists()


SLICES_TRAIN, *SLICES_PLANS = commands("pods_slices.md")


def test_the_commands_about_slices_take_their_flags():
    assert [words[0] for words in SLICES_PLANS] == ["plan", "plan"]
    for words in (SLICES_TRAIN, *SLICES_PLANS):
        check_command(words)


@pytest.mark.slow  # A training and a plan compile: about a minute.
def test_the_examples_about_slices_run(tmp_path):
    """The log of the run and the facts of the plan tell what crosses the network."""
    small = [f"--config.{name}={value}" for name, value in TINY.items()]
    devices = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    results = []
    for command in ([*SLICES_TRAIN, f"--workdir={tmp_path / 'run'}"], SLICES_PLANS[1]):
        words = [sys.executable, "-m", "vr_jax", *command, *small]
        results.append(
            subprocess.run(
                words, cwd=ROOT, env=environment({"XLA_FLAGS": devices}), capture_output=True, text=True, timeout=900
            )
        )
    train, plan = results
    assert train.returncode == 0, train.stderr
    line = blocks("pods_slices.md", "text")[0].strip()
    assert line in train.stderr
    assert plan.returncode == 0, plan.stderr
    assert "other slices" in plan.stdout
