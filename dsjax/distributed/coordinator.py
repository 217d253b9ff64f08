# SPDX-License-Identifier: Apache-2.0
"""Process 0's side of a run's start: the other processes come to it, and so does whatever else.

In: a port, how many processes there are, how long to wait. Out: every process that came is told to
go on, or why not. The port may be open to a whole network: what is silent, sends something else, or
belongs to another run is closed, and neither ends the waiting nor makes a process of the run wait.
Not done here: finding out which process this is, and going to process 0 (`bootstrap`).
"""

import json
import selectors
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dsjax.errors import ConfigError

GREETING = "dsjax"

GRACE, PAUSE = 5.0, 0.2
"""Seconds that a connection has to say who it is, and between looks at the clock."""

_MOST_BYTES, _MOST_STRANGERS, _MOST_NUMBER, _MOST_REFUSALS = 4096, 128, 2**20, 4
_TOLD_EVERY, _FAREWELL = 10.0, 1.0


def receive(coordinator: str, port: int, processes: int, wait: float) -> None:
    """Wait for the processes 1 to `processes` - 1, then send all of them on.

    Args:
        coordinator: the address, as messages name it.
        port: where to listen.
        processes: how many there are, with this one.
        wait: seconds.

    Raises:
        ConfigError: the port is taken, or not all came; those that came are told the same.
    """
    with _listen(coordinator, port) as server:
        said = f"waiting for {processes - 1} other processes at {coordinator}"
        print(said, file=sys.stderr, flush=True)
        meeting = _Meeting(server, processes)
        try:
            problem = _await_all(meeting, coordinator, wait)
            meeting.answer_all(problem)
        finally:
            meeting.close()
    if problem is not None:
        raise ConfigError(problem)


def _listen(coordinator: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            family = socket.AF_INET6
            return socket.create_server(("", port), family=family, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"--coordinator: got {coordinator}, expected a port that is free on process 0's "
            f"machine ({error.strerror}); choose another, or end what uses it"
        ) from error


def _await_all(meeting: "_Meeting", coordinator: str, wait: float) -> str | None:
    """Let them come; returns what is wrong, None once all are there."""
    began = said = time.monotonic()
    while missing := meeting.missing():
        now = time.monotonic()
        if now - began > wait:
            came = meeting.processes - len(missing)
            problem = (
                f"processes: got {came} of {meeting.processes} within {wait:g} s, expected all; "
                f"{numbered(missing)} did not come to {coordinator}: see their consoles, or give "
                "them more time with --wait SECONDS"
            )
            return "\n".join([problem, *meeting.refusals])
        if now - said > _TOLD_EVERY:
            said = now
            print(f"still waiting for {numbered(missing)}", file=sys.stderr, flush=True)
        meeting.look(PAUSE)
    return None


@dataclass
class _Stranger:
    """A connection that has not said who it is."""

    since: float
    data: bytes = b""


@dataclass
class _Meeting:
    """All connections to a port, none of which is ever waited for.

    Attributes:
        server: it listens.
        processes: how many there are, with this one.
        guests: the connections of processes of this run, by their numbers.
        refusals: why processes were refused, for the end.
    """

    server: socket.socket
    processes: int
    workers: dict[int, socket.socket] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    _strangers: dict[socket.socket, _Stranger] = field(default_factory=dict)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def __post_init__(self) -> None:
        self.server.setblocking(False)
        self._selector.register(self.server, selectors.EVENT_READ)

    def missing(self) -> list[int]:
        """List the processes that are not there."""
        return [number for number in range(1, self.processes) if number not in self.workers]

    def look(self, seconds: float) -> None:
        """Take what comes within some time, and close what has been silent for too long."""
        for key, _ in self._selector.select(seconds):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self.server:
                self._accept()
            elif connection.fileno() >= 0:  # not closed a moment ago, to make room
                self._hear(connection)
        now = time.monotonic()
        for connection, stranger in list(self._strangers.items()):
            if now - stranger.since > GRACE:
                self._drop(connection)

    def answer_all(self, problem: str | None) -> None:
        """Tell all guests, and wait a moment for them to close: the port is then free at once."""
        for worker in self.workers.values():
            with suppress(OSError):
                send(worker, {"problem": problem})
        deadline = time.monotonic() + _FAREWELL
        while self.workers and time.monotonic() < deadline:
            self.look(PAUSE)

    def close(self) -> None:
        """Close every connection."""
        for connection in (*self._strangers, *self.workers.values()):
            connection.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self.server.accept()
        except OSError:  # it has gone again, or there are too many open files
            if not self._drop_oldest():
                time.sleep(PAUSE)
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            self._drop_oldest()  # a process of the run comes again
        connection.setblocking(False)
        self._strangers[connection] = _Stranger(time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        stranger = self._strangers.get(connection)
        # A guest has nothing more to say: it has ended, or was none.
        if not data or stranger is None:
            self._drop(connection)
            return
        stranger.data += data
        if stranger.data.endswith(b"\n"):
            self._greeted(connection, _who(stranger.data))
        elif len(stranger.data) > _MOST_BYTES:
            self._drop(connection)

    def _greeted(self, connection: socket.socket, who: tuple[int, int] | None) -> None:
        if who is None:
            self._drop(connection)
            return
        process, processes = who
        if processes != self.processes:
            self._refuse(
                connection,
                f"--processes: got {self.processes} on process 0 and {processes} on process "
                f"{process}, expected the same on all",
            )
        elif process in self.workers:
            self._refuse(
                connection,
                f"--process: got {process} twice, expected each of 0 to {processes - 1} once",
            )
        else:
            del self._strangers[connection]
            self.workers[process] = connection

    def _refuse(self, connection: socket.socket, problem: str) -> None:
        """Tell one process, which may be of another run: this one goes on waiting for its own."""
        with suppress(OSError):
            send(connection, {"problem": problem})
        self._drop(connection)
        if problem not in self.refusals and len(self.refusals) < _MOST_REFUSALS:
            self.refusals.append(problem)
            print(f"refused a process: {problem}", file=sys.stderr, flush=True)

    def _drop_oldest(self) -> bool:
        oldest = next(iter(self._strangers), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._strangers.pop(connection, None)
        self.workers = {n: worker for n, worker in self.workers.items() if worker is not connection}
        connection.close()


def greeting(process: int, processes: int) -> dict[str, Any]:
    """Write what a process says first."""
    return {"greeting": GREETING, "process": process, "processes": processes}


def _who(data: bytes) -> tuple[int, int] | None:
    """Read number and count of processes from a greeting; None if it is none."""
    message = parse(data)
    process, processes = message.get("process"), message.get("processes")
    if message.get("greeting") != GREETING or type(process) is not int:
        return None
    if type(processes) is not int or not 0 < process < processes <= _MOST_NUMBER:
        return None
    return process, processes


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a message, a line."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def parse(data: bytes) -> dict[str, Any]:
    """Return a message; empty if it is something else."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def numbered(processes: Sequence[int]) -> str:
    """Name processes: `process 1`, `processes 1, 2, 5`."""
    shown = ", ".join(map(str, processes[:16])) + (", ..." if len(processes) > 16 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"
