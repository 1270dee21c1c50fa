"""A process that runs Python command lines one after another: `python -m vr_jax.demo.worker NUMBER JOBS`.

To import JAX and this package takes longer than some commands of the demo, and a worker does it once. A line on
standard input is a request, a JSON object with the command line (`argv`, without the name of the program) and the file
that its output is added to (`log`). The answer is a line on standard output with the exit status. The process is the
one with this number, from 0, of so many that share the CPU cores.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence

import jax

OUTPUT, ERRORS = 1, 2  # file descriptors
SECONDS_TO_LOOK = 1.0  # after which a worker looks again whether the demo still runs


def run(argv: Sequence[str]) -> int:
    """Runs a command line as `python` does.

    Args:
        argv: `-m`, a module and its arguments, or `-c` and code.

    Returns:
        The exit status.
    """
    kind, what, *rest = argv
    sys.argv = [kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<command>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except Exception:  # A command must not end the worker; its exit status tells the caller.
        traceback.print_exc()
        return 1
    return 0


def share_cores(number: int, jobs: int) -> None:
    """Keeps this process, number `number` of `jobs`, to its share of the CPU cores.

    Otherwise each of them would start as many threads as there are cores, and they would wait for each other.
    """
    if hasattr(os, "sched_setaffinity"):  # Not on macOS.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::jobs] or cores)


def end_without(parent: int) -> None:
    """Ends this process when its parent has ended, even by SIGKILL; nobody else would end the command that runs."""
    while os.getppid() == parent:
        time.sleep(SECONDS_TO_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Answers requests until standard input ends."""
    threading.Thread(target=end_without, args=(os.getppid(),), daemon=True).start()
    share_cores(*map(int, sys.argv[1:]))
    answers = os.fdopen(os.dup(OUTPUT), "w")
    for line in sys.stdin:
        request = json.loads(line)
        with open(request["log"], "a") as log:
            os.dup2(log.fileno(), OUTPUT)
            os.dup2(log.fileno(), ERRORS)
            status = run(request["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
        print(status, file=answers, flush=True)
        jax.clear_caches()  # The programs of another model are of no use to the next one.
        gc.collect()


if __name__ == "__main__":
    main()
