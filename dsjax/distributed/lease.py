# SPDX-License-Identifier: Apache-2.0
"""A lock in an object store, which one process holds, whatever host it is on.

In: a folder of a bucket. Out: a block in which nobody else holds its lock, or a refusal that names
who does. A store has no locks, but it gives an object that is not there yet to one alone of those
who create it. So each holder in turn is an object, numbered one higher than the last. The holder
renews it; one that is not renewed any more is of a process that was killed, and the next number is
free. A holder that finds a higher number has been taken for dead, by whoever trains there now: it
ends at once, and writes nothing more. Clocks of hosts are not compared. Not done here: what is
protected.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from dsjax import signals
from dsjax.buckets import Bucket
from dsjax.distributed.lock_file import LOCK_FILE, Holder, boot_id
from dsjax.errors import ConfigError

RENEWED_EVERY = 10.0
"""Seconds between two signs of life."""

DEAD_AFTER = 60.0
"""Seconds without one after which a holder is taken for dead: more than a write that is tried again
and again may take (`buckets.bucket.DELAYS`)."""


@dataclass(frozen=True)
class _Lease:
    """What an object of the lock says."""

    holder: Holder
    token: str
    renewals: int = 0

    @classmethod
    def ours(cls) -> "_Lease":
        holder = Holder(socket.gethostname(), os.getpid(), boot_id())
        return cls(holder, uuid.uuid4().hex)

    @classmethod
    def parse(cls, data: bytes | None) -> "_Lease | None":
        try:
            host, pid, boot, token, renewals = json.loads(data or b"")
        except ValueError:
            return None
        return cls(Holder(host, pid, boot), token, renewals)

    def encode(self) -> bytes:
        return json.dumps([*self.holder, self.token, self.renewals]).encode()


@contextmanager
def leased(
    folder: Bucket, refusal: str, renewed: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the lock of a folder in a bucket during the block.

    Args:
        folder: what is locked.
        refusal: how the message begins that another process holds it.
        renewed: called between two renewals, in a thread.

    Raises:
        ConfigError: another process holds it, and is alive.
    """
    lock, ours = folder.folder(LOCK_FILE), _Lease.ours()
    number = _acquire(lock, ours, refusal)
    stop = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(lock, number, ours, stop, renewed), name="lease", daemon=True
    )

    def release() -> None:
        stop.set()
        if _read(lock, number) == ours.token:
            lock.remove([_name(number)])

    renewing.start()
    try:
        with signals.undone(release):
            yield
    finally:
        stop.set()
        renewing.join()
        release()


def holder_in(folder: Bucket) -> Holder | None:
    """Who holds the lock of a folder in a bucket, or did when it was killed; None: nobody."""
    lock = folder.folder(LOCK_FILE)
    last = max(_numbers(lock), default=None)
    lease = None if last is None else _Lease.parse(lock.read_if_there(_name(last)))
    return lease.holder if lease else None


def _acquire(lock: Bucket, ours: _Lease, refusal: str) -> int:
    """Create the object of the next number, once the last one's holder is gone."""
    while True:
        numbers = _numbers(lock)
        if numbers:
            _await_end(lock, numbers[-1], refusal)
        number = max(numbers, default=0) + 1
        if lock.create(_name(number), ours.encode()):
            lock.remove([_name(earlier) for earlier in numbers])
            return number


def _await_end(lock: Bucket, number: int, refusal: str) -> None:
    """Return when a holder is gone, or is taken for dead.

    Raises:
        ConfigError: it is alive.
    """
    first = now = _Lease.parse(lock.read_if_there(_name(number)))
    if first is None:
        return
    place, deadline = f"{lock}/{_name(number)}", time.monotonic() + DEAD_AFTER
    if first.holder.is_of_here and not first.holder.lives_here:
        return
    if not first.holder.lives_here:
        print(
            f"{place} is held by {first.holder}; waiting for up to {DEAD_AFTER:g} s for a sign of "
            "its life",
            file=sys.stderr,
            flush=True,
        )
    while now == first:
        if first.holder.lives_here:
            break
        if time.monotonic() > deadline:
            print(f"{first.holder} is taken for dead, and what it holds over", file=sys.stderr)
            return
        time.sleep(min(RENEWED_EVERY / 4, DEAD_AFTER / 8))
        now = _Lease.parse(lock.read_if_there(_name(number)))
    if now is None:
        return
    raise ConfigError(f"{refusal} ({place} is held by {first.holder})")


def _renew(
    lock: Bucket, number: int, lease: _Lease, stop: threading.Event, renewed: Callable[[], None]
) -> None:
    """Give signs of life until the block ends, or the lock is lost."""
    while not stop.wait(RENEWED_EVERY):
        try:
            if (
                _read(lock, number) not in (lease.token, None)
                or max(_numbers(lock), default=0) > number
            ):
                _end(lock)
            lease = replace(lease, renewals=lease.renewals + 1)
            lock.write(_name(number), lease.encode())
            renewed()
        except ConfigError as error:  # the store does not answer: nor does it to anybody else
            print(f"warning: {error}", file=sys.stderr)


def _end(lock: Bucket) -> NoReturn:
    """End the process: another one trains here, and may not be disturbed."""
    signals.flush(
        f"{lock}: got another holder, expected this process; it was silent for {DEAD_AFTER:g} s "
        "or more, and was taken for dead. It ends, and leaves the run to the other"
    )
    os._exit(2)


def _read(lock: Bucket, number: int) -> str | None:
    lease = _Lease.parse(lock.read_if_there(_name(number)))
    return lease.token if lease else None


def _numbers(lock: Bucket) -> list[int]:
    return sorted(int(name) for name in lock.sizes() if name.isdecimal())


def _name(number: int) -> str:
    return f"{number:08d}"
