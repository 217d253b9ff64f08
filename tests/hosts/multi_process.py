# SPDX-License-Identifier: Apache-2.0
"""A command as several processes of one machine, each with simulated devices of its own.

In: the words of a command, how many processes and devices. Out: the processes, and what each said.
Not here: what has to be true of them.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_run


@dataclass
class Run:
    """Some processes, and the files that their stderr goes to."""

    processes: list[subprocess.Popen[str]]
    logs: list[Path]

    def said(self, process: int) -> str:
        """What a process has said on stderr."""
        return self.logs[process].read_text()

    def codes(self, seconds: float = 300) -> list[int]:
        """Wait for all; returns their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AssertionError([self.said(i)[-3000:] for i in range(len(self.logs))]) from error

    def kill(self) -> None:
        """SIGKILL all."""
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_until(self, reached: Callable[[], Any]) -> None:
        """Poll until it is true; no process may end first."""
        there = small_run.wait_for(self.processes[0], reached)
        if not there or any(process.poll() is not None for process in self.processes):
            self.kill()
            raise AssertionError([self.said(i)[-3000:] for i in range(len(self.logs))])


def start(
    folder: Path,
    words: Sequence[str],
    processes: int,
    devices: int = 1,
    own_words: Sequence[Sequence[str]] = (),
    folders: Sequence[Path] = (),
) -> Run:
    """Start `python WORDS` as these processes.

    Args:
        folder: for their logs.
        words: of the command, the same for all.
        processes: how many; one gets no options of `rendezvous`.
        devices: simulated, of each.
        own_words: more words for each process.
        folders: the working directory of each.
    """
    address = f"localhost:{free_port()}"
    made, logs = [], []
    for index in range(processes):
        log = folder / f"process{index}.log"
        options = ["--coordinator", address, "--processes", str(processes), "--process", str(index)]
        own = [*(options if processes > 1 else []), *(own_words[index] if own_words else [])]
        with log.open("w") as stderr:
            made.append(
                subprocess.Popen(
                    [sys.executable, *words, *own],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    cwd=folders[index] if folders else None,
                    env=os.environ
                    | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(small_run.ROOT)},
                    start_new_session=True,
                )
            )
        logs.append(log)
    return Run(made, logs)


def train(config: Path, *overrides: str, processes: int, devices: int = 1, **more: Any) -> Run:
    """Start `dsjax.train` so."""
    words = ["-m", "dsjax.train", "--config", str(config), *overrides]
    return start(config.parent, words, processes, devices, **more)


def finish(config: Path, *overrides: str, processes: int, devices: int = 1) -> Run:
    """Train to the end, which must succeed."""
    run = train(config, *overrides, processes=processes, devices=devices)
    assert run.codes() == [0] * processes, [run.said(i)[-3000:] for i in range(processes)]
    return run


def stopped(run: Run, process: int, number: signal.Signals = signal.SIGTERM) -> list[int]:
    """Send a signal to one process; returns the exit codes of all."""
    run.processes[process].send_signal(number)
    return run.codes(120)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
