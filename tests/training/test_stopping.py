"""A signal is answered at once, and again belongs to others when the run has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from vr_jax.errors import UserError
from vr_jax.storage import LOCK_FILE, Lease
from vr_jax.storage.lease_file import DiskLeaseFile
from vr_jax.training.stopping import Preemption, check_still_ours


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_the_handlers_come_back(name, capfd):
    before = signal.getsignal(name)
    descriptor, threads = signal.set_wakeup_fd(-1), threading.active_count()
    signal.set_wakeup_fd(descriptor)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), name)
        assert preemption.reached(2)
    assert capfd.readouterr().err.count("asked to stop: the run saves its state at the end of the step") == 1
    assert signal.getsignal(name) is before
    assert signal.set_wakeup_fd(-1) == descriptor
    assert threading.active_count() == threads


def test_a_run_whose_folder_another_one_has_taken_over_ends_before_it_writes(tmp_path):
    check_still_ours(None)
    held = Lease.acquire(str(tmp_path), DiskLeaseFile(tmp_path / LOCK_FILE))
    check_still_ours(held)
    (tmp_path / LOCK_FILE).write_text("of another run")
    with pytest.raises(UserError, match="stood still for so long that its lease was given to another run"):
        check_still_ours(held)
    held.release()
    assert (tmp_path / LOCK_FILE).exists()


def test_other_signals_ask_nothing(capfd):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not preemption.reached(1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr().err == ""


@pytest.mark.slow  # It starts an interpreter that imports JAX.
def test_the_answer_comes_while_the_main_thread_computes():
    """The main thread is in a function of C that no signal interrupts, as a compilation is."""
    program = textwrap.dedent("""
        import hashlib, os, signal, threading
        from vr_jax.errors import UserError
from vr_jax.storage import LOCK_FILE, Lease
from vr_jax.storage.lease_file import DiskLeaseFile
from vr_jax.training.stopping import Preemption, check_still_ours

        with Preemption():
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"salt", 10_000_000)
            os.write(2, b"computed\\n")
    """)
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("asked to stop")
        asked = time.monotonic()
        assert process.stderr.readline() == "computed\n"
        assert time.monotonic() - asked > 0.5, "the answer came with the end of the computation"
    assert process.returncode == 0
