"""`vr-jax launch` finds what it runs; tests/processes/test_supervisor.py has what it does with it."""

import sys

import pytest

from vr_jax.cli.flags import UsageError, parse
from vr_jax.cli.launch import LaunchFlags, program
from vr_jax.cli.main import main

TRAIN = ("train", "--config=c.py", "--workdir=w", "--processes=9")


@pytest.mark.parametrize("words", [("--processes=4", "--", *TRAIN), ("--processes=4", *TRAIN)])
def test_the_command_comes_last_and_keeps_its_flags(words):
    flags = parse(LaunchFlags, words)
    assert flags.processes == 4
    assert flags.command == TRAIN


def test_a_command_of_vr_jax_or_a_program_is_run():
    assert program(TRAIN) == [sys.executable, "-m", "vr_jax", *TRAIN]
    assert program(["bash", "-c", "true"])[1:] == ["-c", "true"]
    with pytest.raises(UsageError, match=r"trian is no command of vr-jax \(demo, train, .*\) and no program of this"):
        program(["trian"])
    with pytest.raises(UsageError, match="launch runs other commands and not itself"):
        program(["launch", "train"])


def test_help_after_the_dashes_is_that_of_the_command(capsys):
    assert main(["launch", "--help"]) == 0
    assert "usage: vr-jax launch [flags] COMMAND..." in capsys.readouterr().out
    assert main(["launch", "--processes=1", "--restarts=0", "--", "bash", "-c", "exit 0", "--help"]) == 0


def test_nothing_to_run_is_one_line(capsys):
    assert main(["launch", "--processes=2"]) == 2
    assert capsys.readouterr().err.startswith("vr-jax launch: COMMAND is missing: give COMMAND...")
