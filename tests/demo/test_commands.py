"""The commands of the demo are those that a user types; chains run in order, and a failure stops the rest."""

import ast
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from vr_jax.cli.eval import EvalFlags
from vr_jax.cli.flags import parse
from vr_jax.cli.train import TrainFlags
from vr_jax.demo.commands import Step, Workers, prepare_steps, system_steps
from vr_jax.demo.systems import SYSTEMS
from vr_jax.errors import UserError
from vr_jax.settings import load_config


def python(name, tmp_path, code):
    return Step(name, ("python", "-c", code), tmp_path / name / "log.txt")


def write(path):
    return f"open({str(path)!r}, 'w').close()"


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda one: one.name)
def test_the_commands_of_a_system_exist_and_follow_each_other(system, tmp_path):
    phase1, phase2, evaluation = system_steps(system, tmp_path, seed=3, steps=7, overrides=["optimizer.lr=0.5"])
    for step, trained in ((phase1, "start"), (phase2, f"{system.name}/phase1/model")):
        assert step.words[:2] == ("vr-jax", "train")
        flags = parse(TrainFlags, list(step.words[2:]))
        config = load_config(flags.config, flags.overrides)
        assert (config.steps, config.seed, config.optimizer.lr) == (7, 3, 0.5)
        assert config.init_from == str(tmp_path / trained)
        assert (config.model.refusion is not None) == system.remembers
        assert config.model.projector.stride**2 == system.ratio
    flags = parse(EvalFlags, list(evaluation.words[2:]))
    assert flags.checkpoint == str(tmp_path / system.name / "phase2" / "model")


def test_a_command_is_shown_as_it_can_be_typed(tmp_path):
    step, _ = prepare_steps(tmp_path / "it's", pages=1, held_out=1, seed=0)
    words = shlex.split(step.shown)
    assert words == list(step.words)
    assert step.argv == words[1:]
    compile(words[2], "shown", "exec")


@pytest.mark.parametrize("name", ['it\'s "a" demo', "\U0001f600 d\u00e9mo", "back\\slash"])
def test_the_pages_are_drawn_in_the_folder_of_the_demo_whatever_its_name(tmp_path, name):
    step, _ = prepare_steps(tmp_path / name, pages=1, held_out=5, seed=0)
    [call] = [node for node in ast.walk(ast.parse(step.words[2])) if isinstance(node, ast.Call)]
    assert ast.literal_eval(call.args[0]) == str(tmp_path / name / "data")


def test_chains_run_in_order_and_report_each_command(tmp_path):
    marks = [tmp_path / str(number) for number in range(3)]
    chain = [python("first", tmp_path, write(marks[0]))]
    chain += [python("second", tmp_path, f"import os; assert os.path.exists({str(marks[0])!r}); {write(marks[1])}")]
    lines = []
    with Workers(2, lines.append) as workers:
        workers.run([chain, [python("other", tmp_path, write(marks[2]))]])
    assert all(mark.exists() for mark in marks)
    shown = [line for line in lines if line.startswith("$ ")]
    assert sorted(shown) == sorted(f"$ {step.shown}" for step in (*chain, python("other", tmp_path, write(marks[2]))))
    assert sum(line.endswith(" s") for line in lines) == 3


@pytest.mark.slow  # Three processes start.
def test_a_failure_ends_the_demo_with_the_end_of_its_log(tmp_path):
    """The command behind it is not started, and a command beside it is ended."""
    never = tmp_path / "never"
    fails = python("fails", tmp_path, "import sys; print('the reason'); sys.exit(3)")
    chains = [
        [fails, python("behind", tmp_path, write(never))],
        [python("beside", tmp_path, "import time; time.sleep(60)")],
    ]
    began = time.monotonic()
    reason = r"fails ended with exit status 3; .*log\.txt ends with: the reason"
    with pytest.raises(UserError, match=reason), Workers(2, lambda line: None) as workers:
        workers.run(chains)
    assert not never.exists()
    assert time.monotonic() - began < 50


@pytest.mark.slow  # Its worker imports JAX.
def test_a_command_runs_as_in_a_process_of_its_own(tmp_path):
    """It sees its own arguments, its output is in its log alone, and an exception is a failure."""
    first = Step("first", ("python", "-m", "vr_jax", "--help"), tmp_path / "first.txt")
    second = python("second", tmp_path, "print(__name__); raise ValueError('broken')")
    reason = r"second ended with exit status 1; .* ends with: .*ValueError: broken"
    with pytest.raises(UserError, match=reason), Workers(1, lambda line: None) as workers:
        workers.run([[first, second]])
    assert "vr-jax demo" in first.log.read_text()
    assert second.log.read_text().startswith("__main__\n")


@pytest.mark.slow  # Its worker imports JAX.
def test_a_worker_that_dies_is_a_failure(tmp_path):
    dies = python("dies", tmp_path, "import os; print('last words', flush=True); os._exit(7)")
    reason = r"dies ended with exit status 7; .* ends with: last words"
    with pytest.raises(UserError, match=reason), Workers(1, lambda line: None) as workers:
        workers.run([[dies]])


HOLDER = """
import pathlib, sys
from vr_jax.demo.commands import Step, Workers
folder = pathlib.Path(sys.argv[1])
code = f"import os, time; open({str(folder / 'began')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
with Workers(1, print) as workers:
    workers.run([[Step("waits", ("python", "-c", code), folder / "log.txt")]])
"""


@pytest.mark.slow  # Two processes import JAX one after the other.
def test_no_command_outlives_a_demo_that_is_killed(tmp_path):
    """A command that goes on would write into the folder of the next demo."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.DEVNULL)
    began = tmp_path / "began"
    try:
        wait_until(lambda: began.exists() and began.read_text(), 120)
    finally:
        holder.kill()
        holder.wait()
    worker = int(began.read_text())
    try:
        wait_until(lambda: has_ended(worker), 30)
    finally:
        if not has_ended(worker):
            os.kill(worker, signal.SIGKILL)


def wait_until(reached, seconds):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)


def has_ended(process):
    """Whether a process has ended; one that nobody reaped has."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
