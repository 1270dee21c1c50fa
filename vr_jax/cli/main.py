"""The program `vr-jax`: it finds the command, parses its flags, runs it, and reports a user's mistake in one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from vr_jax.cli.flags import Command, Group, UsageError, help_text, parse, unknown
from vr_jax.cli.logs import start_logging
from vr_jax.errors import EXIT_DONE, EXIT_INTERRUPTED, UserError

PROGRAM = "vr-jax"
DISTRIBUTION = "vr-jax"
HELP = ("--help", "-h")
# The modules of `vr_jax.cli` that hold the commands, and what the commands do. A module is imported when its command is
# called, so that `vr-jax --help` does not wait for JAX.
COMMANDS = {
    "demo": "Train a tiny model on generated images, score it, write a report.",
    "train": "Train the model of a config, or continue a run that was stopped.",
    "eval": "Score a checkpoint on benchmarks and write a report.",
    "chat": "Ask a checkpoint about images, once or in a conversation.",
    "generate": "Answer a JSONL file of questions and images in batches.",
    "convert": "Import from Hugging Face or LLaVA, or export to their formats.",
    "prepare": "Write training data as array_record files.",
    "plan": "Compile a run for devices nobody holds: memory, FLOPs, time.",
    "probe": "Measure where visual information is lost between the layers.",
    "efficiency": "Compare time to first token, tokens per second and memory.",
    "experiments": "List the rows of the paper's tables, each with its config.",
}
OVERVIEW = """\
vr-jax: efficient vision-language models in JAX, from two CPU cores to pods.

First: vr-jax demo                    (no data needed; runs/demo/report.html)
Then:  vr-jax chat --checkpoint=runs/demo/model --image=FILE "How many bars?"
       vr-jax train --config=configs/demo.py --workdir=runs/mine

Commands:
{commands}

`vr-jax COMMAND --help` tells its flags. Flags have underscores; dashes work.
--config=FILE[:VARIANT] is a file or a packaged config, whose fields are set by
--config.optimizer.lr=1e-4. Exit codes: 0 done, 2 a mistake to mend, 130 Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
        arguments: The command line without the program's name; by default that of the process.

    Returns:
        The command's exit status, or the exit code of the `UserError` that ended it, after its message was written to
        standard error.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if not rest or rest[0] in (*HELP, "help"):
        print(overview())
        return EXIT_DONE
    if rest[0] == "--version":
        print(f"{PROGRAM} {version(DISTRIBUTION)}")
        return EXIT_DONE
    words = [PROGRAM]
    return guarded(words, lambda: _call(words, rest))


def guarded(words: Sequence[str], call: Callable[[], int | None]) -> int:
    """Runs a call and turns what is foreseen to end it into a line on standard error and an exit status.

    Args:
        words: The words of the command, which begin the line. They are read when the call has ended.
        call: Returns an exit status, or None after success.

    Returns:
        The exit status: that of the call, the exit code of its `UserError`, or 130 after Ctrl-C.
    """
    try:
        return call() or EXIT_DONE
    except UserError as error:
        print(f"{' '.join(words)}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"{' '.join(words)}: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def _call(words: list[str], rest: list[str]) -> int | None:
    """Runs the command of a command line; the words that name it move from `rest` to `words`."""
    command = _command(words, rest)
    if any(argument in HELP for argument in rest):
        print(help_text(" ".join(words), command))
        return EXIT_DONE
    if isinstance(command, Group):
        if command.default is None:
            raise UsageError(_no_action(command, rest))
        command = command.default
    start_logging(" ".join(words), verbose=command.verbose)
    flags = parse(command.flags, rest)
    try:
        return command.run(flags)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command.interrupted) from None


def _command(words: list[str], rest: list[str]) -> Command | Group:
    """Finds the command or the action that the first arguments name, and moves its words from `rest` to `words`."""
    name = rest[0].replace("-", "_")
    if name not in COMMANDS:
        raise UsageError(unknown("command", rest[0], list(COMMANDS)))
    words.append(name)
    del rest[0]
    found: Command | Group = importlib.import_module(f"vr_jax.cli.{name}").COMMAND
    if isinstance(found, Group) and rest and (action := rest[0].replace("-", "_")) in found.actions:
        words.append(action)
        del rest[0]
        return found.actions[action]
    return found


def _no_action(group: Group, rest: Sequence[str]) -> str:
    if rest:
        return unknown("action", rest[0], list(group.actions))
    return f"an action is missing; known: {', '.join(group.actions)}"


def overview() -> str:
    """The text of `vr-jax --help`, which fits on one screen."""
    rows = "\n".join(f"  {name:<11}  {summary}" for name, summary in COMMANDS.items())
    return OVERVIEW.format(commands=rows).rstrip()
