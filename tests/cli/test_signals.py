"""SIGTERM and SIGHUP end a block as Ctrl-C does, once; what is ignored stays ignored."""

import os
import signal
import threading

import pytest

from vr_jax.cli.signals import ENDING, cleaned_up_on_signals


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_block_and_a_second_one_the_process(number):
    outside = signal.signal(number, signal.default_int_handler)  # Below nohup a terminal's signal is ignored.
    before, inside = signal.getsignal(number), []

    def work():
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            inside.append(signal.getsignal(number))

    try:
        with pytest.raises(KeyboardInterrupt, match=f"ended by {number.name}"), cleaned_up_on_signals():
            work()
        assert [*inside, signal.getsignal(number)] == [before, before]
    finally:
        signal.signal(number, outside)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cleaned_up_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_nothing():
    found = []

    def work():
        with cleaned_up_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
