# SPDX-License-Identifier: Apache-2.0
"""Stopping, failing and falling silent together: threads stand for processes, a dict for the store.

What real processes do is in `tests/hosts/`.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import jax
import pytest
from process_threads import SECONDS, DictStore, in_threads

from dsjax.distributed import processes as module
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.export.run import run_proof

# The watching thread ends by an exception where a process would end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


Make = Callable[[int], list[Hosts]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make the processes of a run; leaving ends their threads."""
    made: list[Hosts] = []

    def some(count: int) -> list[Hosts]:
        store = DictStore()
        made.extend(Hosts(index, count, store, index == 0) for index in range(count))
        return made

    monkeypatch.setattr(module, "_BEAT", 0.02)
    monkeypatch.setattr(module, "_LINGER", 0.5)
    yield some
    for process in made:
        process._leaving.set()
        if process._thread.ident is not None:
            process._thread.join(SECONDS)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of the processes that have ended; a thread ends instead of this process."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(module, "os", SimpleNamespace(_exit=leave))
    return codes


def until(reached: Callable[[], object]) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def proves(hosts: Hosts, error: Exception | None) -> Exception | None:
    """What a process hears of a proof that fails on it, or does not."""

    def proof() -> None:
        if error is not None:
            raise error

    try:
        return run_proof(proof, hosts).failure
    except Exception as raised:
        return RuntimeError(f"raised {raised!r}")


NO_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("failing", [set(), {0, 1, 2}, {1}, {0, 2}])
def test_all_hear_of_a_proof_that_did_not_run(make: Make, failing: set[int]):
    errors = [NO_MEMORY if index in failing else None for index in range(3)]
    heard = in_threads([partial(proves, h, e) for h, e in zip(make(3), errors, strict=True)])
    first = f"process {min(failing, default=0)}: JaxRuntimeError: {NO_MEMORY}"
    assert [str(e or first) for e in errors] == [first if e is None else str(e) for e in heard] or (
        not failing and heard == [None] * 3
    )


@pytest.mark.parametrize("alone", [0, 1])
def test_a_proof_that_fails_on_one_alone_waits_for_none(
    make: Make, alone: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dsjax.export.run.PATIENCE", 0.2)
    heard = in_threads([partial(proves, make(2)[alone], NO_MEMORY)])
    assert str(heard[0]) == f"raised {NO_MEMORY!r}"


@pytest.mark.parametrize("seed", range(4))
def test_all_stop_at_the_same_step(make: Make, seed: int):
    """Also where each runs ahead, and waits now and then for what the others have begun."""
    processes, chance = make(3), random.Random(seed)
    begun, together = [0, 0, 0], chance.choice([1, 7, 50])
    pauses = [chance.choice([0, 0.0005, 0.002]) for _ in processes]
    for process in processes:
        process.start()

    def steps(index: int) -> tuple[int, int | None]:
        for step in range(1, 100_000):
            begun[index] = step
            time.sleep(pauses[index])
            if step % together == 0:
                until(lambda step=step: min(begun) >= step)
            number = processes[index].reached_preemption()
            if number is not None:
                return step, number
        return 0, None

    timer = threading.Timer(0.3, processes[seed % 3].ask_to_stop, (15,))
    timer.start()
    ends = in_threads([lambda index=index: steps(index) for index in range(3)])
    assert len(set(ends)) == 1 and ends[0][0] > 0 and ends[0][1] == 15
    assert in_threads([process.any_preemption for process in processes]) == [15] * 3


def test_a_signal_after_the_last_step_stops_all(make: Make):
    processes = make(2)
    processes[1].ask_to_stop(2)
    assert in_threads([process.any_preemption for process in processes]) == [2, 2]
    assert [process.reached_preemption() for process in processes] == [None, None]


def test_all_hear_what_differs(make: Make):
    facts = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2, "c": 0}]

    def told(process: Hosts, mine: dict[str, int]) -> str:
        with pytest.raises(ConfigError) as error:
            process.assert_equal(mine)
        return str(error.value)

    tasks = [lambda p=p, f=f: told(p, f) for p, f in zip(make(3), facts, strict=True)]
    assert set(in_threads(tasks)) == {
        "b: got 2 on processes 0, 2 and 3 on process 1, expected the same on all processes\n"
        "c: got nothing on processes 0, 1 and 0 on process 2, expected the same on all processes"
    }


def test_one_decides(make: Make):
    processes = make(3)
    tasks = [lambda p=p: p.broadcast_from_primary(lambda: {"by": p.index}) for p in processes]
    assert in_threads(tasks) == [{"by": 0}] * 3


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("data: got x, expected y"), 2, "process 1 failed: data: got x, expected y"),
        (OSError("disk full"), 1, "process 1 failed: OSError: disk full"),
        (SystemExit(143), 143, "process 1 ended with exit code 143"),
        (KeyboardInterrupt(), 130, "process 1 was interrupted"),
    ],
)
def test_the_others_end_with_the_cause(make: Make, left: list[int], capsys, error, code, told):
    processes = make(3)
    for process in processes:
        process.start()
    with pytest.raises(SystemExit):
        processes[1].fail(error)
    until(lambda: len(left) == 3)
    assert left == [code] * 3
    assert capsys.readouterr().err.count(told) == 2  # its own console has the error itself


def test_a_silent_process_is_named(make: Make, left: list[int], capsys, monkeypatch):
    monkeypatch.setattr(module, "SILENT", 0.3)
    processes = make(3)
    for process in processes:
        process.start()
    until(lambda: len(processes[0]._beats) == 3)
    processes[2]._leaving.set()  # as after SIGKILL: it beats no more
    until(lambda: len(left) == 2)
    assert left == [1, 1]
    told = "process 2 has not been heard from for 0.3 s: it, or its machine, is gone"
    assert capsys.readouterr().err.count(told) == 2


def test_a_broken_connection_is_not_the_cause(make: Make, left: list[int], capsys, monkeypatch):
    """What is left of a collective operation fails where a peer is gone; the peer is named."""
    monkeypatch.setattr(module, "SILENT", 0.3)
    processes = make(3)
    for process in processes:
        process.start()
    until(lambda: len(processes[0]._beats) == 3)
    processes[2]._leaving.set()
    with pytest.raises(SystemExit):
        processes[1].fail(jax.errors.JaxRuntimeError("Connection closed by peer"))
    told = capsys.readouterr().err
    assert "JaxRuntimeError: Connection closed by peer; looking for the cause" in told
    assert "process 2 has not been heard from for 0.3 s" in told and "Traceback" not in told


def test_an_error_of_jax_is_told_where_nobody_is_gone(
    make: Make, left: list[int], capsys, monkeypatch
):
    monkeypatch.setattr(module, "SILENT", -4.8)
    process = make(2)[1]
    with pytest.raises(SystemExit):
        process.fail(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert left == [1]
    assert "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory" in capsys.readouterr().err
    failure = json.loads(process._store.values["dsjax/told/failure"])
    assert failure["process"] == 1 and "RESOURCE_EXHAUSTED" in failure["message"]
