# SPDX-License-Identifier: Apache-2.0
"""Limits on what somebody else's program, a chat template, may take of this process.

In: a block that runs it. Out: the same block, ended once it computes for too long or asks for too
much memory. Jinja's sandbox limits neither: two loops in one another, or a text that is doubled
forty times, hold a run for ever, or the whole machine. Not here: the program, and the message.
"""

import functools
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 5
"""Seconds of computation; a usual conversation takes a thousandth of one."""

MOST_BYTES = 2 * 2**30
"""Memory besides what is in use; a usual conversation takes less than a megabyte."""

_alone = threading.Lock()  # the limits are the process's


class LimitError(Exception):
    """The block was ended; the message says what it took too much of."""


@contextmanager
def limited() -> Iterator[None]:
    """End a block that takes more than `LIMIT_S` or `MOST_BYTES`.

    In a thread that is not the main one, to which Python gives no signals, time has no limit; nor
    has memory on systems without /proc.

    Raises:
      LimitError: it took more.
    """
    reason = ""
    with _alone, _limited_time():
        try:
            with _limited_memory():
                yield
        except MemoryError:
            reason = f"MemoryError: it asks for more than {MOST_BYTES / 2**30:g} GiB"
    if reason:  # raised here, where what took the memory is gone
        raise LimitError(reason)


@contextmanager
def _limited_time() -> Iterator[None]:
    """Count the process's own time, for a machine may be slow, or a process stopped and resumed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _listen()
    try:
        try:
            # Again and again: somebody else's `except Exception` may have taken the first.
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S, LIMIT_S)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # should the signal have come just then
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@functools.cache
def _listen() -> None:
    """Have the signal end the block; once, for that takes longest of all."""
    signal.signal(signal.SIGVTALRM, _end)


def _end(*_: object) -> None:
    raise LimitError(f"it takes longer than {LIMIT_S} s")


@contextmanager
def _limited_memory() -> Iterator[None]:
    pages = _pages()
    if pages is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(os.pread(pages, 64, 0).split()[0]) * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@functools.cache
def _pages() -> int | None:
    """Open the file in which the system says how large this process is; None if it does not."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
