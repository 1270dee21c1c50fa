"""Signals that end a command which cleans up behind itself."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# What `kill` and a service manager send, and what a terminal sends that is closed.
ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def cleaned_up_on_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the block as Ctrl-C does, so that it ends its processes and removes its files.

    A second signal ends the process at once. A signal that is ignored, as SIGHUP is below `nohup`, stays so. Outside
    the main thread nothing changes.

    Raises:
        KeyboardInterrupt: A signal came.
    """
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        previous.clear()

    def end(number: int, frame: FrameType | None) -> None:
        restore()
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")

    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, end)
    try:
        yield
    finally:
        restore()
