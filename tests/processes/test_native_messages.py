"""What C++ libraries print about a lost process is held back, all else is passed on, and an abort comes later."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

PRINTING = """
import ctypes, sys, time
from vr_jax.processes.native_messages import hold_back

library = ctypes.CDLL(None)
assert hold_back(["client.h"])
stream = ctypes.c_void_p.in_dll(library, "stderr")
for line in (
    b"a line of another library\\n",
    b"F1130 19:18:24.378692    9097 client.h:86] Terminating process\\n",
    b"*** Check failure stack trace: ***\\n    @     0x7f  somewhere()\\n",
    b"E1130 19:18:24.378693    9097 allocator.cc:86] out of memory\\n",
    b"of which this is the rest\\n",
):
    library.fputs(line, stream)
sys.stderr.write("of Python\\n")  # in one piece; print writes the line end apart
time.sleep(0.5)
"""

ABORTING = """
import ctypes, threading, time
from vr_jax.processes.native_messages import abort_later

abort_later()
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()  # without the lock of Python, as C++ does
time.sleep(1)
print("still here", flush=True)
time.sleep(60)
"""


def run(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_only_the_reports_of_lost_processes_are_held_back():
    done = run(PRINTING)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stderr.splitlines()) == [
        "E1130 19:18:24.378693    9097 allocator.cc:86] out of memory",
        "a line of another library",
        "of Python",
        "of which this is the rest",
    ]


def test_nothing_is_passed_on_where_standard_error_is_closed(tmp_path):
    """A file that is opened later gets the number of standard error, and must not get the messages."""
    code = """
import os, sys
from vr_jax.processes.native_messages import hold_back

assert not hold_back(["client.h"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


def test_an_abort_leaves_seconds_for_an_orderly_end_and_then_happens():
    begin = time.monotonic()
    done = run(ABORTING)
    assert done.stdout == "still here\n"
    assert done.returncode == -signal.SIGABRT
    assert 5 < time.monotonic() - begin < 60
