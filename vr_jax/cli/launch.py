"""`vr-jax launch`: runs several processes of a command on this machine, and starts them again when one is lost."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vr_jax.cli.flags import Command, Flags, UsageError, flag
from vr_jax.cli.main import COMMANDS, PROGRAM
from vr_jax.fields import NonNegativeInt, PositiveFloat, PositiveInt
from vr_jax.processes.supervisor import Plan, Supervisor


@dataclass(frozen=True, kw_only=True)
class LaunchFlags(Flags):
    """The flags of `vr-jax launch`."""

    command: tuple[str, ...] = flag(
        help="What each process runs: a command of vr-jax, or a program, with its flags. It comes last.",
        metavar="COMMAND",
        remainder=True,
    )
    processes: PositiveInt = flag(1, "Number of processes.")
    restarts: NonNegativeInt = flag(
        3,
        "Number of restarts without progress after which it gives up. A run makes progress when it continues from a "
        "later step.",
    )
    pause: PositiveFloat = flag(
        1.0,
        "Seconds before the first restart. Each further one without progress waits twice as long, at most a minute.",
    )
    grace: PositiveFloat = flag(
        60.0, "Seconds after which processes are killed that do not end when another one has ended without success."
    )


def run(flags: LaunchFlags) -> int:
    """Runs the processes and returns the exit status."""
    plan = Plan(
        program(flags.command),
        processes=flags.processes,
        restarts=flags.restarts,
        pause=flags.pause,
        grace=flags.grace,
    )
    return Supervisor(plan, _say, sys.stdout.buffer, sys.stderr.buffer).run()


def program(command: Sequence[str]) -> list[str]:
    """Returns the program and the arguments of a command.

    Args:
        command: The words after `--`.

    Raises:
        UsageError: There is no such command or program.
    """
    name = command[0].replace("-", "_")
    if name == "launch":
        raise UsageError("launch runs other commands and not itself; name one of them after --")
    if name in COMMANDS:
        return [sys.executable, "-m", "vr_jax", *command]
    found = shutil.which(command[0])
    if found is None:
        raise UsageError(
            f"{command[0]} is no command of {PROGRAM} ({', '.join(COMMANDS)}) and no program of this machine"
        )
    return [found, *command[1:]]


def _say(line: str) -> None:
    print(f"{PROGRAM} launch: {line}", file=sys.stderr, flush=True)


COMMAND = Command(
    summary="Run several processes of a command, and restart lost ones.",
    flags=LaunchFlags,
    run=run,
    details="""Each process gets its number, the number of processes and the address of process 0 by the environment
    (JAX_PROCESS_ID, JAX_NUM_PROCESSES, JAX_COORDINATOR_ADDRESS); its lines are printed with its number in front.

    All are started again after exit code 75 and after a death by a signal; any other exit code has to be mended first.
    SIGTERM and Ctrl-C ask the processes to save and end; a second one kills them.

    Exit codes: 0 done; 75 stopped, and the same command continues; 2 given up; that of a process which was not started
    again.""",
    examples=(
        "vr-jax launch --processes=4 -- train --config=configs/demo.py --workdir=runs/four",
        "vr-jax launch --restarts=10 -- train --config=configs/demo.py --workdir=runs/one",
    ),
)
