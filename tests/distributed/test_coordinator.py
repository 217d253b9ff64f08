# SPDX-License-Identifier: Apache-2.0
"""Process 0's port at a run's start: whatever comes there, the run's processes meet at once."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from dsjax.distributed import coordinator
from dsjax.distributed.bootstrap import wait_for_all
from dsjax.distributed.launchers import ProcessSpec
from dsjax.errors import ConfigError

SOON = 3.0
"""Seconds that a meeting may take beside any nonsense; one silent connection once took five."""

Send = Callable[[bytes], socket.socket]


class Meeting:
    """Process 0 of some processes, in a thread, and what it raised."""

    def __init__(self, processes: int, wait: float) -> None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        self.processes, self.wait = processes, wait
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._receive, daemon=True)
        self.thread.start()

    def _receive(self) -> None:
        try:
            coordinator.receive(f"localhost:{self.port}", self.port, self.processes, self.wait)
        except BaseException as error:
            self.error = error

    def connect(self) -> socket.socket:
        """A connection to it, as soon as it listens."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return socket.create_connection(("localhost", self.port), timeout=10)
            except ConnectionRefusedError:
                assert time.monotonic() < deadline and self.error is None, self.error
                time.sleep(0.01)

    def come(self, process: int, processes: int | None = None) -> Callable[[], str | None]:
        """Go there as a process; returns what waits for the answer, the problem if there is one."""
        spec = ProcessSpec(
            f"localhost:{self.port}", processes or self.processes, process, wait=self.wait
        )
        told: list[str | None] = []

        def visit() -> None:
            try:
                wait_for_all(spec)
                told.append(None)
            except ConfigError as error:
                told.append(str(error))

        thread = threading.Thread(target=visit, daemon=True)
        thread.start()

        def answer() -> str | None:
            thread.join(30)
            return told[0]

        return answer

    def ends_well(self) -> None:
        """All others come, and are sent on."""
        began = time.monotonic()
        answers = [self.come(process) for process in range(1, self.processes)]
        assert [answer() for answer in answers] == [None] * (self.processes - 1)
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None
        assert time.monotonic() - began < SOON


@pytest.fixture
def meeting() -> Iterator[Callable[[int, float], Meeting]]:
    made: list[Meeting] = []

    def some(processes: int, wait: float = 20.0) -> Meeting:
        made.append(Meeting(processes, wait))
        return made[-1]

    yield some
    for one in made:
        one.thread.join(30)


def line(**message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


GREETING = {"greeting": "dsjax", "process": 1, "processes": 3}
NONSENSE = {
    "silence": b"",
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "http2, as gRPC begins": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "half a message": json.dumps(GREETING).encode()[:20],
    "a whole one without its end": json.dumps(GREETING).encode(),
    "no number": line(greeting="dsjax"),
    "no count": line(greeting="dsjax", process=1),
    "text": line(**GREETING | {"process": "1"}),
    "a list": line(**GREETING | {"process": [1]}),
    "null": line(**GREETING | {"process": None}),
    "truth": line(**GREETING | {"process": True}),
    "a fraction": line(**GREETING | {"process": 1.0}),
    "no process": line(**GREETING | {"process": -1}),
    "process 0": line(**GREETING | {"process": 0}),
    "one too many": line(**GREETING | {"process": 3}),
    "all": line(**GREETING | {"processes": 10**30}),
    "endless digits": b'{"greeting": "dsjax", "process": ' + b"1" * 4000 + b"}\n",
    "another greeting": line(**GREETING | {"greeting": "hello"}),
    "no dictionary": b"[1, 2]\n",
    "deep": b"[" * 4000 + b"\n",
    "deeper": b'{"a":' * 100_000 + b"\n",
    "huge": b"x" * 3_000_000,
    "no text": b"\xff\xfe\x00\n",
    "two messages": line(**GREETING) + line(**GREETING),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_costs_nothing(meeting, name: str):
    """Three connections say it and stay; three say it and close."""
    here = meeting(3)
    with ExitStack() as stack:
        for stays in (True, False) * 3:
            stranger = here.connect()
            with suppress(OSError):  # it was closed in our midst
                stranger.sendall(NONSENSE[name])
            if stays:
                stack.enter_context(closing(stranger))
            else:
                stranger.close()
        here.ends_well()


def test_random_bytes_cost_nothing(meeting):
    chance = random.Random(0)
    here = meeting(4)
    with ExitStack() as stack:
        for _ in range(60):
            stranger = stack.enter_context(closing(here.connect()))
            whole = line(**GREETING | {"processes": 4})
            message = bytearray(whole if chance.random() < 0.5 else chance.randbytes(200))
            # At least its last byte is another, so that it is no greeting.
            message[chance.randrange(len(message))] ^= chance.randrange(1, 256)
            with suppress(OSError):
                stranger.sendall(bytes(message[:-1]))
        here.ends_well()


def test_many_connections_are_not_kept(meeting, monkeypatch):
    monkeypatch.setattr(coordinator, "_MOST_STRANGERS", 16)
    here = meeting(3)
    with ExitStack() as stack:
        crowd = [stack.enter_context(closing(here.connect())) for _ in range(200)]
        here.ends_well()
        crowd[0].settimeout(5)
        assert crowd[0].recv(1) == b""  # closed, to make room


def test_silent_ones_are_closed(meeting, monkeypatch):
    monkeypatch.setattr(coordinator, "GRACE", 0.2)
    here = meeting(2)
    with closing(here.connect()) as stranger:
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    here.ends_well()


def test_a_process_that_has_gone_again_may_come_anew(meeting):
    here = meeting(3)
    for _ in range(3):
        with closing(here.connect()) as gone:
            gone.sendall(line(**GREETING))
            time.sleep(0.05)
    here.ends_well()


def test_processes_of_another_run_are_told_and_not_waited_for(meeting, capsys):
    """One that was left over of an earlier start must not end this one."""
    here = meeting(3)
    told = "--processes: got 3 on process 0 and 5 on process 4, expected the same on all"
    assert here.come(4, 5)() == told
    first = here.come(1)
    time.sleep(0.3)
    assert here.come(1)() == "--process: got 1 twice, expected each of 0 to 2 once"
    assert here.come(2)() is None and first() is None
    here.thread.join(10)
    assert here.error is None
    assert f"refused a process: {told}" in capsys.readouterr().err


def test_the_end_names_who_was_refused(meeting):
    here = meeting(3, 1.5)
    refused = "--processes: got 3 on process 0 and 4 on process 2, expected the same on all"
    assert here.come(2, 4)() == refused
    told = here.come(1)()
    assert told is not None
    assert told.startswith("processes: got 2 of 3 within 1.5 s, expected all; process 2 did not")
    assert told.endswith(f"\n{refused}")
    here.thread.join(10)
    assert str(here.error) == told


@pytest.mark.parametrize("answer", [b"", b"{}\n", b'{"problem": 3}\n', b"[" * 50_000, b"\xff\n"])
def test_nonsense_in_process_0s_place(answer: bytes):
    with socket.create_server(("localhost", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    guest, _ = server.accept()
                    guest.recv(100)
                    guest.sendall(answer)
                    guest.close()

        threading.Thread(target=serve, daemon=True).start()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match="did not answer as process 0 of a run"):
            wait_for_all(ProcessSpec(f"localhost:{port}", 2, 1, wait=0.5))
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("host", ["a..b", "x" * 80, "no.such.host.invalid"])
def test_a_name_that_is_no_hosts(host: str):
    with pytest.raises(ConfigError, match="did not reach process 0 within 0.3 s"):
        wait_for_all(ProcessSpec(f"{host}:7", 2, 1, wait=0.3))
