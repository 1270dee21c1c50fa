"""The program `vr-jax`: it finds the command, parses its flags, runs it, and reports a user's mistake in one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType

from vr_jax.cli.flags import Command, Group, UsageError, help_text, parse, unknown
from vr_jax.cli.logs import start_logging
from vr_jax.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_OUTPUT_CLOSED
from vr_jax.failures import as_user_error

PROGRAM = "vr-jax"
DISTRIBUTION = "vr-jax"
HELP = ("--help", "-h")
TRACEBACK_VARIABLE = "VR_JAX_TRACEBACK"  # any value but 0 shows where an error was raised, above its line
# The modules of `vr_jax.cli` that hold the commands, and what the commands do. A module is imported when its command is
# called, so that `vr-jax --help` does not wait for JAX.
COMMANDS = {
    "demo": "Compare tiny models with and without Vision Remember.",
    "train": "Train the model of a config, or continue a run that was stopped.",
    "launch": "Run several processes of a command, and restart lost ones.",
    "eval": "Score a checkpoint on benchmarks and write a report.",
    "chat": "Ask a checkpoint about images, once or in a conversation.",
    "app": "Serve a page to talk to a checkpoint, with heat maps.",
    "generate": "Answer a JSONL file of questions and images in batches.",
    "convert": "Import from Hugging Face or LLaVA, or export to their formats.",
    "prepare": "Write training data as array_record files, or check them.",
    "plan": "Compile a run for devices nobody holds: memory, FLOPs, time.",
    "probe": "Measure where visual information is lost between the layers.",
    "efficiency": "Compare time to first token, tokens per second and memory.",
    "experiments": "List the rows of the paper's tables, each with its config.",
}
OVERVIEW = """\
vr-jax: efficient vision-language models in JAX, from two CPU cores to pods.

First: vr-jax demo                    (no data needed; runs/demo/report.html)
Then:  vr-jax chat --checkpoint=runs/demo/model --image=FILE "What is here?"
       vr-jax train --config=configs/demo.py --workdir=runs/mine

Commands:
{commands}

`vr-jax COMMAND --help` tells its flags. --config=FILE[:VARIANT] is a file or a
packaged config, whose fields are set by --config.optimizer.lr=1e-4. Exit codes
(docs/failures.md): 0 done, 2 to mend, 1 a fault of vr-jax, 75 start it again.
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
    words = [PROGRAM]
    # Without PyTorch, which this program does not need, transformers warns that its models are not available.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal cannot show
    return guarded(words, lambda: _call(words, rest))


def guarded(words: Sequence[str], call: Callable[[], int | None]) -> int:
    """Runs a call and turns what is foreseen to end it into a line on standard error and an exit status.

    A run of several processes ends as a whole: the others learn of the error (`vr_jax.distributed`).

    Args:
        words: The words of the command, which begin the line. They are read when the call has ended.
        call: Returns an exit status, or None after success.

    Returns:
        The exit status: that of the call, the exit code of its error, 130 after Ctrl-C, or 141 if nobody reads what the
        call prints.
    """
    try:
        status = call() or EXIT_DONE
        _flush_output()
    except KeyboardInterrupt as error:
        _tell_others(error)
        _report(words, str(error) or "interrupted", error)
        status = EXIT_INTERRUPTED
    except BrokenPipeError as error:
        _tell_others(error)
        _report(words, "nobody reads the output any more, so the command ends", error)
        with contextlib.suppress(OSError):
            _flush_output()
        status = EXIT_OUTPUT_CLOSED
    except Exception as error:
        # Failures of a disk, of the memory or of a library come from any line. Faults of the program go on as they are.
        found = as_user_error(error)
        told = _tell_others(error)
        if found is None and (told is None or told[1] == EXIT_FAULT):
            if (module := _distributed()) is not None and module.is_watched():
                traceback.print_exc()
                module.leave(EXIT_FAULT)
            raise
        message, status = told or (str(found), found.exit_code if found else EXIT_FAULT)
        _report(words, message, error)
    if (module := _distributed()) is not None:
        module.leave(status)
    return status


def _distributed() -> ModuleType | None:
    """The module of several processes, where the command has imported it and with it JAX."""
    return sys.modules.get("vr_jax.distributed")


def _tell_others(error: BaseException) -> tuple[str, int] | None:
    """Tells the other processes of the run of an error; returns the line and the exit status, None without others."""
    module = _distributed()
    if module is None:
        return None
    ending = module.fail(error)
    return ending.message, ending.code


def _report(words: Sequence[str], message: str, error: BaseException) -> None:
    if os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"{' '.join(words)}: {message}", file=sys.stderr, flush=True)


def _flush_output() -> None:
    """Writes what was printed, so that a closed pipe or a full disk is known before the command ends.

    After an error the output goes nowhere; otherwise Python would end with a second error of the same cause.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _call(words: list[str], rest: list[str]) -> int | None:
    """Runs the command of a command line; the words that name it move from `rest` to `words`."""
    if not rest or rest[0] in (*HELP, "help"):
        print(overview())
        return EXIT_DONE
    if rest[0] == "--version":
        print(f"{PROGRAM} {version(DISTRIBUTION)}")
        return EXIT_DONE
    command = _command(words, rest)
    own = rest[: rest.index("--")] if "--" in rest else rest
    if any(argument in HELP for argument in own):
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
