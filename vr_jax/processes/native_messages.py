"""What libraries in C++ print and do when another process of the run is lost (a leaf module without JAX).

Each thread of JAX's coordination service reports the loss of process 0 by a stack trace, and then aborts the process.
None of it can be switched off, and a callback written in Python crashes (jaxlib 0.12). So two things of the C library
are changed for the time of a run of several processes:

* The variable `stderr` of C points to a pipe. A thread passes on what comes through it, but for the messages of the
  source files that report lost processes; these go to the log at level DEBUG. Python writes to the file itself.
* The handler of SIGABRT is `sleep`, which is called with the number of the signal: an abort happens 6 seconds later,
  and this process ends in an orderly way before.

Where the C library has no such variable, as outside glibc, nothing is changed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Collection
from contextlib import suppress

_RECORD = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\] ")  # how a record of absl's log begins
_UNBUFFERED = 2  # _IONBF of stdio.h
_AT_ONCE = 1 << 16  # bytes

logger = logging.getLogger("vr_jax.processes.native_messages")


def abort_later() -> None:
    """Delays each abort of this process by six seconds, in which the other threads go on."""
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def hold_back(files: Collection[str]) -> bool:
    """Keeps the messages of some source files in C++ from standard error.

    Args:
        files: Names of the files, as they stand in the messages, e.g. "client.h".

    Returns:
        Whether it is done: the C library lets it, and there is a standard error.
    """
    if sys.stderr is None:  # It was closed before the start, so that its number may be that of any file by now.
        return False
    library = ctypes.CDLL(None)
    try:
        variable = ctypes.c_void_p.in_dll(library, "stderr")
        library.fdopen.restype = ctypes.c_void_p
    except (ValueError, AttributeError):
        return False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # A full pipe must not stop a thread that waits for the pipe's reader.
    stream = library.fdopen(writer, b"w")
    if not stream:
        return False
    library.setvbuf(ctypes.c_void_p(stream), None, _UNBUFFERED, ctypes.c_size_t(0))
    held = frozenset(name.encode() for name in files)
    threading.Thread(target=_pass_on, args=(reader, held), name="messages of libraries", daemon=True).start()
    variable.value = stream
    return True


def _pass_on(reader: int, held: frozenset[bytes]) -> None:
    """Copies a pipe to standard error, a whole line at a time, without the records of some files."""
    within = False  # whether the last record is held back, to which lines without a beginning of their own belong
    rest = b""
    while data := os.read(reader, _AT_ONCE):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if begin := _RECORD.match(line):
                within = begin[1] in held
            if within:
                logger.debug("%s", line.decode(errors="replace").rstrip())
            else:
                with suppress(OSError):
                    os.write(2, line + b"\n")
