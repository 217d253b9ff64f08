# SPDX-License-Identifier: Apache-2.0
"""The processes of a run as one: they agree, they stop at the same step, they fail together.

In: a `ProcessSpec` among the processes (`bootstrap`), None for a process alone. Out: `Hosts`, which
every stage asks who writes and what all have decided. A process alone asks nobody, and starts
nothing. What is told goes through the key-value store of jax's coordinator; a thread of each
process looks there twice a second, so that no step waits for it. Not done here: moving arrays
(`arrays`).
"""

import hashlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

import jax

from dsjax import signals
from dsjax.distributed.bootstrap import wait_for_all
from dsjax.distributed.coordinator import numbered
from dsjax.distributed.jax_internals import coordinator_client
from dsjax.distributed.launchers import ProcessSpec
from dsjax.errors import ConfigError, raise_all, system_fault

SILENT = 30.0
"""Seconds without a sign of life after which a process is gone."""

JAX_SILENT = 100
"""The same for jax, which ends the process without a word of ours: the second line of defence."""

_BEAT, _HURRY, _LINGER = 0.5, 0.01, 10.0
_ALIVE, _TOLD, _AT, _GONE = "dsjax/alive/", "dsjax/told/", "dsjax/at/", "dsjax/gone/"
_FAILURE, _STOP = f"{_TOLD}failure", f"{_TOLD}stop"

T = TypeVar("T")


@runtime_checkable
class Store(Protocol):
    """What is used of jax's client of the coordinator."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Put a value; raises where there is one, unless `allow_overwrite`."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """List the keys that begin so, and their values."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Wait for a value; raises if it does not come in time."""
        ...


class Hosts:
    """This process among those of its run; without arguments a process alone.

    Attributes:
        index: number of this process.
        count: how many there are.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        store: Store | None = None,
        keeps_store: bool = False,
    ) -> None:
        self.index, self.count = index, count
        self._client, self._keeps_store = store, keeps_store
        self._rounds = 0
        self._asked: int | None = None
        self._tick, self._stop_at, self._stop_signal = 0, -1, 0
        self._lock, self._held = threading.Lock(), False
        self._failing, self._leaving = threading.Event(), threading.Event()
        self._cause: dict[str, Any] | None = None
        self._beats: dict[str, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)

    @property
    def primary(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    @property
    def _store(self) -> Store:
        assert self._client is not None, "a process alone has nobody to tell"
        return self._client

    def log_once(self, text: str) -> None:
        """Print a line on stderr, once for all processes."""
        if self.primary:
            print(text, file=sys.stderr)

    # What all decide together: every process calls these in the same order.

    def all_gather_text(self, text: str, within: float = math.inf) -> list[str]:
        """Give a text, get those of all processes in their order, once all have called this.

        Args:
            text: of this process.
            within: seconds to wait for the others. By default as long as it takes: the thread ends
                a process whose others are gone.

        Raises:
            TimeoutError: some did not call this in time.
        """
        if self.count == 1:
            return [text]
        self._rounds += 1
        place, deadline = f"dsjax/round/{self._rounds}", time.monotonic() + within
        self._store.key_value_set(f"{place}/in/{self.index}", text)
        if self.primary:
            found: dict[str, str] = {}
            while len(found) < self.count:
                _check_time(deadline)
                time.sleep(_HURRY)
                found = dict(self._store.key_value_dir_get(f"{place}/in/"))
            texts = [found[f"{place}/in/{index}"] for index in range(self.count)]
            self._store.key_value_set(f"{place}/out", json.dumps(texts))
            return texts
        while True:
            _check_time(deadline)
            with suppress(jax.errors.JaxRuntimeError):
                return json.loads(self._store.blocking_key_value_get(f"{place}/out", 1000))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.all_gather_text("")

    def broadcast_from_primary(self, ask: Callable[[], T]) -> T:
        """Process 0's answer, which JSON can hold, on every process."""
        return json.loads(self.all_gather_text(json.dumps(ask()) if self.primary else "")[0])

    def assert_equal(self, facts: Mapping[str, Any]) -> None:
        """Hold what this process knows against what the others know.

        Raises:
            ConfigError: on every process, with a line for each fact that differs.
        """
        mine = json.dumps({name: str(value) for name, value in facts.items()})
        digest = hashlib.blake2b(mine.encode(), digest_size=16).hexdigest()
        if len(set(self.all_gather_text(digest))) == 1:
            return
        everyone = [json.loads(text) for text in self.all_gather_text(mine)]
        problems = []
        for name in dict.fromkeys(name for theirs in everyone for name in theirs):
            values: dict[str, list[int]] = {}
            for index, theirs in enumerate(everyone):
                values.setdefault(theirs.get(name, "nothing"), []).append(index)
            if len(values) > 1:
                got = " and ".join(f"{v} on {numbered(who)}" for v, who in values.items())
                problems.append(f"{name}: got {got}, expected the same on all processes")
        raise_all(problems)

    # Stopping: at the same step, without asking anybody at any other.

    def ask_to_stop(self, number: int) -> None:
        """Note a signal, as its handler does."""
        self._asked = self._asked or number

    def reached_preemption(self) -> int | None:
        """Return the signal to stop by now; all processes ask equally often, for the same answer.

        Once a process has been asked to stop, the thread of each tells how often this was called,
        and holds the next call up until it knows all numbers: all stop at the call after the
        highest. The calling thread never waits for another process, else (jax runs steps ahead)
        one could wait for a step that another has not begun.
        """
        if self.count == 1:
            return self._asked
        with self._lock:
            self._tick += 1
            return self._stop_signal if self._tick == self._stop_at else None

    def any_preemption(self) -> int | None:
        """Whether any process has been asked to stop; for the end of a loop, all wait for all."""
        asked = [json.loads(text) for text in self.all_gather_text(json.dumps(self._asked))]
        return next((number for number in asked if number), None)

    # Failing: one tells, all end.

    def start(self) -> None:
        """Begin to watch the other processes."""
        self._thread.start()

    def shutdown(self) -> None:
        """End together: nobody leaves before all have done their work."""
        self.barrier()
        self._leaving.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others and this console why this process ends, and end."""
        self._failing.set()
        error = system_fault(error) or error
        code, message = _told(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._await_cause(message)
        if self._cause is None:
            self._tell(_FAILURE, {"process": self.index, "code": code, "message": message})
        if isinstance(error, ConfigError):
            print(f"error: {error}", file=sys.stderr)
        elif self._cause is None and code == 1:
            traceback.print_exception(error)
        cause = self._cause
        if cause is not None and cause["process"] != self.index and cause["message"] != message:
            code = self._say_cause(cause)
        self._exit(code)

    def end_by(self, number: int) -> NoReturn:
        """End by a signal, now and wherever the main thread is; with this process the others."""
        if self.count == 1:
            signals.end(number)
        self._failing.set()
        code, message = 128 + number, f"ended by {signals.name_of(number)}"
        self._tell(_FAILURE, {"process": self.index, "code": code, "message": message})
        print(message, file=sys.stderr)
        self._exit(code)

    def _await_cause(self, message: str) -> None:
        """Give another process time to tell why; a broken connection is what it looks like here."""
        first = message.strip().splitlines()[0]
        print(f"process {self.index} {first}; looking for the cause", file=sys.stderr, flush=True)
        deadline = time.monotonic() + SILENT + 5
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(_HURRY)

    def _say_cause(self, cause: Mapping[str, Any]) -> int:
        print(f"process {cause['process']} {cause['message']}", file=sys.stderr)
        return cause["code"]

    def _tell(self, key: str, what: Any) -> None:
        with suppress(jax.errors.JaxRuntimeError):  # another was first, or nobody is there
            self._store.key_value_set(key, json.dumps(what))

    def _exit(self, code: int) -> NoReturn:
        """Leave without jax's farewell, which waits for processes that may never come."""
        signals.undo_all()
        self._tell(f"{_GONE}{self.index}", "")
        if self._keeps_store:  # it ends with this process
            deadline = time.monotonic() + _LINGER
            with suppress(jax.errors.JaxRuntimeError):
                while len(self._store.key_value_dir_get(_GONE)) < self.count:
                    time.sleep(_HURRY)
                    if time.monotonic() > deadline:
                        break
            time.sleep(0.2)
        signals.flush()
        os._exit(code)

    # The thread.

    def _watch(self) -> None:
        beats = 0
        while not self._leaving.wait(_HURRY if self._held else _BEAT):
            beats += 1
            # Where the coordinator cannot be reached, jax ends this process at once.
            with suppress(jax.errors.JaxRuntimeError):
                mine = f"{_ALIVE}{self.index}"
                self._store.key_value_set(mine, str(beats), allow_overwrite=True)
                if self.primary:
                    self._look_for_silent()
                self._look_for_news()

    def _look_for_silent(self) -> None:
        """As process 0: tell of a process whose beats have ended."""
        now = time.monotonic()
        for index in range(self.count):  # also one that has never been heard from
            self._beats.setdefault(f"{_ALIVE}{index}", ("", now))
        for key, beat in self._store.key_value_dir_get(_ALIVE):
            if self._beats[key][0] != beat:
                self._beats[key] = (beat, now)
        for key, (_, since) in self._beats.items():
            if now - since > SILENT:
                message = f"has not been heard from for {SILENT:g} s: it, or its machine, is gone"
                process = int(key.removeprefix(_ALIVE))
                self._tell(_FAILURE, {"process": process, "code": 1, "message": message})

    def _look_for_news(self) -> None:
        told = dict(self._store.key_value_dir_get(_TOLD))
        if _FAILURE in told:
            self._cause = cause = json.loads(told[_FAILURE])
            if not self._failing.is_set():
                self._exit(self._say_cause(cause))
        if self._asked is not None and _STOP not in told:
            self._tell(_STOP, self._asked)
        if _STOP in told and self._stop_at < 0:
            self._settle_stop(json.loads(told[_STOP]))

    def _settle_stop(self, number: int) -> None:
        """Hold up `reached_preemption` until all processes' numbers of its calls are known."""
        mine = f"{_AT}{self.index}"
        at = dict(self._store.key_value_dir_get(_AT))
        if mine not in at:
            self._held = self._held or self._lock.acquire()
            self._store.key_value_set(mine, str(self._tick))
        elif len(at) == self.count:
            self._stop_signal, self._stop_at = number, max(map(int, at.values())) + 1
            self._held = False
            self._lock.release()


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError


def _told(error: BaseException) -> tuple[int, str]:
    """Exit code and message of what ends a process."""
    if isinstance(error, ConfigError):
        return 2, f"failed: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "was interrupted"
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code, f"ended with exit code {error.code}"
    return 1, f"failed: {type(error).__name__}: {error}"


@contextmanager
def process_group(spec: ProcessSpec | None) -> Iterator[Hosts]:
    """Wait for the other processes, connect, and stay together until the end of the block.

    An error in the block of one process ends all of them, with the cause on every console.

    Raises:
        ConfigError: the others did not come.
    """
    if spec is None:
        yield Hosts()
        return
    wait_for_all(spec)
    # CPU processes compute together by gloo. jax's way to notice SIGTERM would take the signal from
    # us also where nobody asks for it: while weights are read, it would stop nothing.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        spec.coordinator_address,
        spec.num_processes,
        spec.process_id,
        spec.local_device_ids,
        cluster_detection_method="deactivate",  # else it asks the environment again
        initialization_timeout=60,
        heartbeat_timeout_seconds=JAX_SILENT,
        shutdown_timeout_seconds=60,
    )
    # A TPU numbers its processes itself.
    index, count = jax.process_index(), jax.process_count()
    hosts = Hosts(index, count, coordinator_client(), keeps_store=spec.process_id == 0)
    hosts.start()
    with signals.sent_to(hosts.end_by):
        try:
            yield hosts
        except BaseException as error:
            hosts.fail(error)
        hosts.shutdown()
