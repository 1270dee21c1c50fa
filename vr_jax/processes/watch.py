"""Ends a process whose run has lost another one, whatever the process waits for (a leaf module without JAX)."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from vr_jax.processes.liveness import Ending, Liveness
from vr_jax.processes.native_messages import abort_later, hold_back

_GRACE = 2.0  # seconds that a process has to end by itself after another one has failed
_OWN_GRACE = 5.0  # the same after its own failure, which may have to release what it holds
_SECOND = 1.0  # seconds that an error waits for the news of a lost process, of which it may be a consequence
_LAST = 5.0  # seconds that process 0, through which all hear of a failure, waits for the others
_RELEASE = 2.0  # seconds for what is released before the end
# The source files of XLA that report a lost process, each with a stack trace.
_REPORTS = (
    *("client.h", "client.cc", "coordination_service.cc", "coordination_service_agent.cc"),
    *("preemption_sync_manager.cc", "preemption_notifier.cc", "grpc_coordination_client.cc"),
)

logger = logging.getLogger("vr_jax.distributed")


class Watch:
    """Ends this process if another process of the run is lost or fails.

    Attributes:
        releases: What `leave` calls before the end, last first.
    """

    def __init__(self, liveness: Liveness, timeout: float):
        """Starts the threads that hear of the others and end this process.

        Args:
            liveness: The connections, joined.
            timeout: Seconds without a sign of life after which a process counts as lost.
        """
        self._liveness, self._timeout = liveness, timeout
        self._leaving = threading.Lock()
        self._ending = threading.Event()
        self._stopping = threading.Lock()
        self._failed = False
        self.releases: list[Callable[[], object]] = []
        hold_back(_REPORTS)
        abort_later()
        if threading.current_thread() is threading.main_thread():
            # Its handler is the first that the main thread does in Python after the process has stood still.
            signal.signal(signal.SIGCONT, self._continued)
        atexit.register(liveness.say_leaving)
        liveness.start(self._stood_still)
        threading.Thread(target=self._end_with_others, name="failures of other processes", daemon=True).start()

    def tell(self, own: Ending, *, lost: bool) -> Ending:
        """Tells the failure of this process, unless another one has failed before.

        Args:
            own: The line and the exit status of this process.
            lost: Whether it only says that another process is lost, so that it is waited until that one is known.

        Returns:
            The failure that came first.
        """
        self._failed = True
        found = self._liveness.wait(self._timeout + _GRACE if lost else _SECOND)
        return found or self._liveness.decide(Ending(f"{self._liveness.me}: {own.message}", own.code))

    def check_awake(self) -> None:
        """Ends this process if it has stood still."""
        self._liveness.check_awake()

    def _continued(self, number: int, frame: FrameType | None) -> None:
        self._liveness.check_awake()

    def _stood_still(self, ending: Ending) -> None:
        """Ends this process without a further step, since others may be writing to its folders by now."""
        while not self._stopping.acquire(blocking=False):  # Another thread ends the process at this moment.
            time.sleep(1)
        with suppress(OSError):
            os.write(2, f"{ending.message}\n".encode())
        os._exit(ending.code)

    def leave(self, code: int) -> None:
        """Ends this process; process 0, through which all hear of a failure, does so last.

        Args:
            code: The exit status.
        """
        self._ending.set()
        with self._leaving:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            releasing = threading.Thread(target=self._release, daemon=True)
            releasing.start()
            releasing.join(_RELEASE)
            self._liveness.say_leaving()
            end = time.monotonic() + _LAST
            while self._liveness.index == 0 and time.monotonic() < end and not self._liveness.alone():
                time.sleep(0.1)
            os._exit(code)

    def _release(self) -> None:
        for release in reversed(self.releases):
            with suppress(Exception):  # It ends anyway, and another start takes over what was not released.
                release()

    def _end_with_others(self) -> None:
        found = self._liveness.wait()
        assert found is not None
        # The main thread may be about to end by itself, with the same message; otherwise it waits for somebody.
        if not self._ending.wait(_OWN_GRACE if self._failed else _GRACE):
            logger.error("%s", found.message)
            self.leave(found.code)
