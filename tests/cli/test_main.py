"""The program as a whole: its overview, its help texts, unknown names, and how errors leave it."""

import dataclasses
import errno
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import blocks
from vr_jax import errors
from vr_jax.cli.flags import Group
from vr_jax.cli.main import COMMANDS, guarded, main, overview
from vr_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def commands():
    """Every command and action, by the words that call it."""
    for name in COMMANDS:
        found = importlib.import_module(f"vr_jax.cli.{name}").COMMAND
        if isinstance(found, Group):
            yield from (((name, action), one) for action, one in found.actions.items())
            found = found.default
        if found is not None:
            yield (name,), found


def test_the_overview_fits_on_a_screen(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert (out, err) == (f"{overview()}\n", "")
    lines = overview().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(f"\n  {name} " in overview() for name in COMMANDS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vr-jax 0.")


def test_every_command_has_help_and_one_summary(capsys):
    """The overview and the help of a command say the same, and every flag is explained by a sentence."""
    for words, command in commands():
        assert main([*words, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{command.summary}\n")
        if len(words) == 1:
            assert command.summary == COMMANDS[words[0]]
        for field in dataclasses.fields(command.flags):
            help = field.metadata["flag"].help
            assert help[:1].isupper(), f"{words}: {field.name}: {help!r}"
            assert help.endswith("."), f"{words}: {field.name}: {help!r}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "vr-jax: unknown command trian; did you mean train? known: "),
        (["train", "--confg=x"], "vr-jax train: unknown flag --confg; did you mean --config? known: "),
        (["train", "--workdir=x"], "vr-jax train: --config is missing: give --config=FILE[:VARIANT]. "),
        (["chat"], "vr-jax chat: --checkpoint is missing: give --checkpoint=DIR. Model directory: "),
        (["prepare", "a"], "vr-jax prepare: unexpected argument 'a'; flags start with --; did you mean --from=a?"),
        (["convert"], "vr-jax convert: an action is missing; known: import, export"),
        (["convert", "imprt"], "vr-jax convert: unknown action imprt; did you mean import? known: import, export"),
        (["experiments", "now"], "vr-jax experiments: unexpected argument 'now'; flags start with --"),
    ],
)
def test_unknown_names_are_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_errors_leave_with_their_exit_code(capsys):
    class OwnError(UserError):
        exit_code = 4

    def fail(error):
        raise error

    assert guarded(["vr-jax", "x"], lambda: None) == 0
    assert guarded(["vr-jax", "x"], lambda: 3) == 3
    assert guarded(["vr-jax", "x"], lambda: fail(UserError("no"))) == 2
    assert guarded(["vr-jax", "x"], lambda: fail(OwnError("own"))) == 4
    assert guarded(["vr-jax", "x"], lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "vr-jax x: no\nvr-jax x: own\nvr-jax x: interrupted\n"
    with pytest.raises(ValueError, match="a fault of the program"):
        guarded(["vr-jax", "x"], lambda: fail(ValueError("a fault of the program")))


def test_failures_of_a_disk_or_of_memory_are_one_line_and_a_traceback_is_asked_for(capsys, monkeypatch):
    def fail(error):
        raise error

    full = OSError(errno.ENOSPC, "No space left on device", "/disk/a")
    assert guarded(["vr-jax", "x"], lambda: fail(full)) == 2
    assert guarded(["vr-jax", "x"], lambda: fail(MemoryError())) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("vr-jax x: /disk/a: No space left on device")
    assert second.startswith("vr-jax x: this machine's memory does not suffice")
    monkeypatch.setenv("VR_JAX_TRACEBACK", "1")
    assert guarded(["vr-jax", "x"], lambda: fail(UserError("no"))) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("vr-jax x: no\n")


def test_the_page_of_failures_shows_what_is_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("failures.md", "console")
    command, *printed = block.splitlines()
    assert main(shlex.split(command.removeprefix("$ vr-jax "))) == 2
    assert capsys.readouterr().err.splitlines() == printed
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_failures_has_every_exit_code():
    page = (ROOT / "docs" / "failures.md").read_text()
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "vr_jax"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{overview()}\n"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_script_is_the_command(command, monkeypatch, capsys):
    """train.py and eval.py print what `vr-jax train` and `vr-jax eval` print, and end with the same status."""
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"{command}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert main([command, "--help"]) == ended.value.code
    assert printed == capsys.readouterr().out != ""


def test_the_rows_of_the_tables_are_listed(capsys):
    assert main(["experiments"]) == 0
    assert "table3: " in capsys.readouterr().out
