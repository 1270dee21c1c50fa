"""Who of several processes still lives, told over a connection of each to process 0 (a leaf module without JAX).

The coordination service of JAX notices a lost process too, but it then aborts all others with a stack trace that names
nobody, and a callback written in Python crashes it (jaxlib 0.12). So each process keeps a connection of its own:

* **Start.** Process 0 listens at the coordinator's address until all others have said who they are. Then it closes
  that port for JAX's service, which starts there, and keeps the connections. Who never comes is known by number.
* **Life.** Both ends send a beat every tenth of the timeout. A process that dies closes its connection, which is known
  at once. One that is stopped, or whose host or network is down, is silent for longer than the timeout.
* **End.** The first thing that ends the run (`Ending`) is decided once and told to all. A process that has itself
  stood still for longer than the timeout knows that the others count it as lost, and ends without writing more.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vr_jax.errors import EXIT_AGAIN, EXIT_USER_ERROR, ProcessLost, UserError

HEARTBEAT_TIMEOUT = 30.0  # seconds without a sign of life after which a process counts as lost
START_TIMEOUT = 300.0  # seconds that the processes of a run wait for each other to start
_BEATS = 10  # beats within the timeout
_LOOK = 0.5  # seconds between two looks, at most
_ASK_AGAIN = 0.5  # seconds after which process 0 is called again, if it has not answered
_SAY_WAITING = 30.0  # seconds between two messages of a process that waits for the others to start
_PORT_WAIT = 30.0  # seconds that process 0 waits for a port which an ended process may still hold
_LONGEST = 1 << 16  # bytes of a message
_AGAIN = "start all processes again with the same command"

logger = logging.getLogger("vr_jax.distributed")


@dataclass(frozen=True)
class Ending:
    """Why a run of several processes ends.

    Attributes:
        message: One line, which begins with the process at fault and its host.
        code: The exit status of the processes that are left.
    """

    message: str
    code: int


def now() -> float:
    """Returns the seconds of a clock that goes on while a process, or its machine, stands still."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _Wire:
    """A connection that carries messages, a line of JSON each."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._read = b""
        self.process: int | None = None  # who is at the other end
        self.name = ""
        self.heard = now()
        self.leaving = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends a message. A connection that takes none is found to be silent or closed elsewhere."""
        with suppress(OSError):
            self._socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that have come, or None if the connection has ended or speaks another language."""
        try:
            data = self._socket.recv(_LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._read = (self._read + data).split(b"\n")
        if not data or len(self._read) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        if not all(isinstance(message, dict) for message in messages):
            return None
        self.heard = now()
        return messages

    def close(self) -> None:
        self._socket.close()


class Liveness:
    """The connections of this process: process 0 has one to each other process, and the others have one to it.

    Attributes:
        index: Number of this process.
        me: The words for this process in messages, e.g. "process 1 of 2 on host-b".
    """

    def __init__(self, coordinator: str, count: int, index: int, *, timeout: float = HEARTBEAT_TIMEOUT, bind: str = ""):
        """Prepares the connections; `join` makes them.

        Args:
            coordinator: Address of process 0, "host:port".
            count: Number of processes of the run.
            index: Number of this process.
            timeout: Seconds without a sign of life after which a process counts as lost.
            bind: Address at which process 0 listens, "host:port"; by default the coordinator's port of all networks.
        """
        self._coordinator, self._bind = coordinator, bind
        self._count, self.index, self._timeout = count, index, timeout
        self._host = socket.gethostname()
        self.me = self._name(index, self._host)
        self._names = {index: self.me}
        self._selector = selectors.DefaultSelector()
        self._wires: dict[int, _Wire] = {}  # by the number of the process at the other end
        self._guard = threading.Lock()
        self._ending: Ending | None = None
        self._decided = threading.Event()
        self._awake = now()
        self._stood_still: Callable[[Ending], None] = lambda ending: None

    def _name(self, process: int, host: str = "") -> str:
        return f"process {process} of {self._count}" + (f" on {host}" if host else "")

    # The start

    def join(self, timeout: float = START_TIMEOUT) -> None:
        """Waits until all processes of the run have started.

        Args:
            timeout: Seconds after which those that are missing are given up.

        Raises:
            ProcessLost: A process has not started in time.
            UserError: Two processes have the same number, or were started with different numbers of processes.
        """
        if self.index == 0:
            self._wait_for_others(timeout)
        else:
            self._wait_for_first(timeout)
        self._awake = now()
        for wire in self._wires.values():
            wire.heard = now()

    def _raise_ending(self) -> None:
        """Raises the error for which the run ends before it has begun."""
        if self._ending is not None:
            kind = ProcessLost if self._ending.code == EXIT_AGAIN else UserError
            raise kind(self._ending.message)

    def _wait_for_others(self, timeout: float) -> None:
        listener = _listen(self._coordinator, self._bind, timeout)
        self._selector.register(listener, selectors.EVENT_READ)
        begin = said = told = now()
        strangers: set[_Wire] = set()  # connections that have not said who they are
        try:
            while missing := sorted({*range(1, self._count)} - {*self._wires}):
                for key, _ in self._selector.select(_LOOK):
                    if key.fileobj is listener:
                        with suppress(OSError):
                            wire = _Wire(listener.accept()[0])
                            strangers.add(wire)
                            self._selector.register(wire, selectors.EVENT_READ, wire)
                    else:
                        self._greet(key.data, strangers)
                waited = now() - begin
                if waited > timeout:
                    names = _listed(missing)
                    self.decide(
                        Ending(f"{names} of {self._count} {_never(missing, waited, self._where())}", EXIT_AGAIN)
                    )
                self._raise_ending()
                if now() - told > _LOOK:
                    told = now()
                    for wire in self._wires.values():
                        wire.send(waiting=missing)
                if now() - said > _SAY_WAITING:
                    said = now()
                    logger.warning(
                        "waited %.0f s for %s of %d %s", waited, _listed(missing), self._count, self._where()
                    )
        finally:
            self._selector.unregister(listener)
            listener.close()
            for wire in strangers:
                self._selector.unregister(wire)
                wire.close()
        for wire in self._wires.values():
            wire.send(go=self._host)

    def _greet(self, wire: _Wire, strangers: set[_Wire]) -> None:
        """Notes who is at the other end of a connection, as long as not all have come."""
        messages = wire.receive()
        if messages is None:  # it may come again
            strangers.discard(wire)
            self._selector.unregister(wire)
            wire.close()
            if wire.process is not None:
                del self._wires[wire.process]
            return
        for message in messages:
            process, count, host = (message.get(key) for key in ("process", "count", "host"))
            if wire.process is not None or not isinstance(process, int) or not isinstance(host, str):
                continue
            if count != self._count:
                name = f"process {process} of {count} on {host}"
                self._refuse(wire, f"{name}: its number of processes is {count} there and {self._count} on process 0")
            elif not 0 < process < self._count or process in self._wires:
                other = self._names[process] if process in self._names else self._names[0]
                self._refuse(wire, f"two processes have the number {process}, on {other.rpartition(' ')[2]} and {host}")
            else:
                wire.process, wire.name = process, self._name(process, host)
                self._names[process] = wire.name
                self._wires[process] = wire
                strangers.discard(wire)

    def _refuse(self, wire: _Wire, message: str) -> None:
        ending = Ending(f"{message}; start all processes of a run in the same way", EXIT_USER_ERROR)
        wire.send(ending=[ending.message, ending.code])
        self.decide(ending)

    def _wait_for_first(self, timeout: float) -> None:
        begin = said = now()
        waiting = [0]
        wire: _Wire | None = None
        while True:
            waited = now() - begin
            if waited > timeout:
                where = self._where()
                raise ProcessLost(f"{_listed(waiting)} of {self._count} {_never(waiting, waited, where)}")
            if now() - said > _SAY_WAITING:
                said = now()
                logger.warning("waited %.0f s for %s of %d %s", waited, _listed(waiting), self._count, self._where())
            if wire is None:
                waiting = [0]
                wire = self._call()
                if wire is None:
                    time.sleep(_ASK_AGAIN)
                    continue
                self._selector.register(wire, selectors.EVENT_READ, wire)
                wire.send(process=self.index, count=self._count, host=self._host)
            for _ in self._selector.select(_LOOK):
                messages = wire.receive()
                for message in messages or ():
                    waiting = message.get("waiting", waiting)
                    if "ending" in message:
                        self.decide(Ending(*message["ending"]), tell=False)
                        self._raise_ending()
                    if "go" in message:
                        wire.process, wire.name = 0, self._name(0, message["go"])
                        self._names[0] = wire.name
                        self._wires[0] = wire
                        return
                if messages is None:  # Process 0 may be started again.
                    self._selector.unregister(wire)
                    wire.close()
                    wire = None
                    time.sleep(_ASK_AGAIN)
                    break

    def _call(self) -> _Wire | None:
        host, _, port = self._coordinator.rpartition(":")
        try:
            return _Wire(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
        except OSError:
            return None

    def _where(self) -> str:
        return f"(coordinator {self._coordinator}: all must be started with this address of process 0)"

    # Life

    def start(self, stood_still: Callable[[Ending], None]) -> None:
        """Starts the thread that sends and hears beats.

        Args:
            stood_still: Called if this process has stood still for longer than the timeout; it ends the process.
        """
        self._stood_still = stood_still
        threading.Thread(target=self._watch, name="signs of life", daemon=True).start()

    def check_awake(self) -> None:
        """Ends this process if it has stood still for longer than the timeout."""
        still = now() - self._awake
        if still > self._timeout:
            self._stood_still(
                Ending(
                    f"{self.me} stood still for {still:.0f} s, and after {self._timeout:g} s the others "
                    f"count it as lost; it ends without writing anything more; {_AGAIN}",
                    EXIT_AGAIN,
                )
            )

    def _watch(self) -> None:
        beat = self._timeout / _BEATS
        due = now()
        while True:
            events = self._selector.select(min(_LOOK, beat / 2))
            self.check_awake()
            self._awake = now()
            for key, _ in events:
                self._hear(key.data)
            if now() >= due:
                due = now() + beat
                for wire in self._wires.values():
                    wire.send(beat=0)
            for wire in self._wires.values():
                if not wire.leaving and now() - wire.heard > self._timeout:
                    self._lost(
                        wire,
                        f"it gave no sign of life for {self._timeout:g} s (its process, host or network stands still)",
                    )

    def _hear(self, wire: _Wire) -> None:
        messages = wire.receive()
        if messages is None:
            self._selector.unregister(wire)
            if not wire.leaving:
                self._lost(wire, "it has ended without a word (killed, out of memory, or its host went down)")
        for message in messages or ():
            wire.leaving |= "leaving" in message
            if "ending" in message:
                self.decide(Ending(*message["ending"]))

    def _lost(self, wire: _Wire, how: str) -> None:
        wire.leaving = True  # nobody waits for it
        self.decide(Ending(f"{wire.name} is lost: {how}; {_AGAIN}", EXIT_AGAIN))

    # The end

    def decide(self, ending: Ending, *, tell: bool = True) -> Ending:
        """Decides why the run ends, unless that is decided already, and tells the other processes.

        Args:
            ending: The reason that this process knows.
            tell: Whether the others are told.

        Returns:
            The reason that counts, which is the first one.
        """
        with self._guard:
            if self._ending is not None:
                return self._ending
            self._ending = ending
        if tell:
            for wire in list(self._wires.values()):
                wire.send(ending=[ending.message, ending.code])
        self._decided.set()
        return ending

    def wait(self, timeout: float | None = None) -> Ending | None:
        """Waits until it is decided that the run ends.

        Args:
            timeout: Seconds to wait; None waits forever.

        Returns:
            The reason, or None after the timeout.
        """
        self._decided.wait(timeout)
        return self._ending

    def say_leaving(self) -> None:
        """Tells the others that this process ends and that they need not miss it."""
        for wire in list(self._wires.values()):
            wire.send(leaving=True)

    def alone(self) -> bool:
        """Returns whether all processes at the other ends have left."""
        return all(wire.leaving for wire in list(self._wires.values()))


def _listen(coordinator: str, bind: str, timeout: float) -> socket.socket:
    """The socket of process 0 at the coordinator's port."""
    host, _, port = (bind or f"[::]:{coordinator.rpartition(':')[2]}").rpartition(":")
    host = host.strip("[]")
    everywhere = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    address = ("" if host in ("", "::") else host, int(port))
    end = now() + min(timeout, _PORT_WAIT)
    while True:
        try:
            listener = socket.create_server(address, family=family, dualstack_ipv6=everywhere, backlog=1024)
        except OSError as error:
            if now() > end:
                raise UserError(
                    f"process 0 cannot listen at the coordinator's address {coordinator}: {error.strerror}; end the "
                    "program that holds the port, or choose another port for all processes"
                ) from error
            time.sleep(_ASK_AGAIN)
        else:
            listener.setblocking(False)
            return listener


def _listed(processes: Iterable[int]) -> str:
    """Names processes by their numbers, e.g. "processes 1, 2 and 5"."""
    numbers = [str(process) for process in processes]
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    shown = numbers[:8] + ([f"{len(numbers) - 8} more"] if len(numbers) > 8 else [])
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


def _never(processes: list[int], waited: float, where: str) -> str:
    return f"{'has' if len(processes) == 1 else 'have'} not started within {waited:.0f} s {where}; {_AGAIN}"
