# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM at any moment of a command, also while a compiler or a device is waited for.

In: what to do about a signal. Out: it is done at once, in a thread of its own: Python runs signal
handlers between two instructions of the main thread alone, which may be minutes away. `end` leaves
by `os._exit`, since to tear the interpreter down beside a running compilation is a segmentation
fault. Not done here: what a training run does about a signal (`loop`), telling the other processes
(`distributed.processes`).
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)

FLUSHED_WITHIN = 1.0
"""Seconds that a reader of our output has, who may have gone, or sleep."""

_undo: list[Callable[[], None]] = []


class _Listener:
    """A thread that calls `receive` with the number of each signal; made in the main thread."""

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive = receive
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as Python wants it of what a signal handler writes to
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._outer = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # A handler in Python, whatever it does, is what makes Python write the number. What was
        # ignored when the process began (nohup, a shell's job in the background) stays so.
        heard = [n for n in NUMBERS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {n: signal.signal(n, lambda number, frame: None) for n in heard}

    def _listen(self) -> None:
        while numbers := os.read(self._read, 1):
            if numbers[0] in NUMBERS:
                self._receive(numbers[0])

    def stop(self) -> None:
        """Give the signals back to who had them, once `receive` is through."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)


@contextmanager
def sent_to(receive: Callable[[int], None]) -> Iterator[None]:
    """Call `receive` with the number of every SIGINT and SIGTERM that comes during the block.

    Blocks may lie within each other: the inner one receives. Whoever leaves a block waits until
    `receive` returns, so that nothing follows a signal that ends the process. In the main thread.
    """
    listener = _Listener(receive)
    try:
        yield
    finally:
        listener.stop()


def end_at_once() -> None:
    """Have signals end the process, from here to its last moment: the first act of a command."""
    _Listener(end)


def end(number: int) -> NoReturn:
    """End the process by a signal: undo what is half done, and leave with 128 + `number`."""
    undo_all()
    flush(f"ended by {name_of(number)}")
    os._exit(128 + number)


def name_of(number: int) -> str:
    """Return what a user knows a signal by: its name, and the keys that send it."""
    name = signal.Signals(number).name
    return f"{name} (Ctrl-C)" if number == signal.SIGINT else name


def undo_all() -> None:
    """Call what the open blocks of `undone` gave."""
    for undo in reversed(_undo.copy()):
        with suppress(Exception):  # the main thread may be just there
            undo()


def flush(last_words: str = "") -> None:
    """Write what is left to be written on stdout and stderr, before `os._exit`."""
    # A thread that waits for a reader of our output keeps others from writing: not for ever.
    writer = threading.Thread(target=_flush, args=(last_words,), daemon=True)
    writer.start()
    writer.join(FLUSHED_WITHIN)


def _flush(last_words: str) -> None:
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
        sys.stderr.write(f"{last_words}\n" if last_words else "")
        sys.stderr.flush()
        sys.stdout.flush()


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Have `undo` called, too, if a signal ends the process during the block."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)
