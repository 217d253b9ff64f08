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
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NoReturn

from dsjax import signals
from dsjax.buckets import Bucket, process_lives
from dsjax.distributed.lock_file import LOCK_FILE, Holder, boot_id
from dsjax.errors import ConfigError

RENEWED_EVERY = 10.0
"""Seconds between two signs of life."""

DEAD_AFTER = 60.0
"""Seconds without one after which a holder is taken for dead: more than a write that is tried again
and again may take (`buckets.bucket.DELAYS`)."""


_held: set[str] = set()
"""Tokens of the locks that this process holds."""


@dataclass(frozen=True)
class _Lease:
    """What an object of the lock says."""

    holder: Holder
    token: str
    renewals: int = 0

    @classmethod
    def ours(cls) -> "_Lease":
        return cls(Holder(socket.gethostname(), os.getpid(), _place()), uuid.uuid4().hex)

    @classmethod
    def parse(cls, data: bytes | None) -> "_Lease | None":
        try:
            host, pid, boot, token, renewals = json.loads(data or b"")
            return cls(Holder(str(host), int(pid), str(boot)), str(token), int(renewals))
        except (ValueError, TypeError):
            return None

    @property
    def is_over(self) -> bool:
        """Whether its process is known to have ended: where its number can be looked up.

        Where it cannot, or there is such a process, only the missing signs of life tell.
        """
        if (self.holder.host, self.holder.boot) != (socket.gethostname(), _place()):
            return False
        if self.holder.pid == os.getpid():  # an earlier one with our number
            return self.token not in _held
        return not process_lives(self.holder.pid)

    def encode(self) -> bytes:
        return json.dumps([*self.holder, self.token, self.renewals]).encode()


@contextmanager
def leased(folder: Bucket, refusal: str) -> Iterator[None]:
    """Hold the lock of a folder in a bucket during the block.

    Args:
        folder: what is locked.
        refusal: how the message begins that another process holds it.

    Raises:
        ConfigError: another process holds it, and is alive.
    """
    lock, ours = folder.folder(LOCK_FILE), _Lease.ours()
    _held.add(ours.token)
    try:
        number = _acquire(lock, ours, refusal)
        with _renewed(lock, number, ours):
            yield
    finally:
        _held.discard(ours.token)


@contextmanager
def _renewed(lock: Bucket, number: int, ours: _Lease) -> Iterator[None]:
    """Give signs of life during the block, and remove the lock's object at its end."""
    stop = threading.Event()
    thread = threading.Thread(
        target=_renew, args=(lock, number, ours, stop), name="lease", daemon=True
    )

    def release() -> None:
        stop.set()
        try:
            if _read(lock, number) == ours.token:
                lock.remove([_name(number)])
        except ConfigError as error:  # it is taken for dead in a while
            print(f"warning: {error}", file=sys.stderr)

    thread.start()
    try:
        with signals.undone(release):
            yield
    finally:
        stop.set()
        thread.join()
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
        earlier = _numbers(lock)
        if earlier:
            _await_end(lock, earlier[-1], refusal)
        number = max(earlier, default=0) + 1
        if not lock.create(_name(number), ours.encode()):
            continue
        # Where the last holder left between the list and now, another may have begun at 1 again.
        if not set(_numbers(lock)) <= {*earlier, number}:
            lock.remove([_name(number)])
            time.sleep(random.random() * RENEWED_EVERY / 10)
            continue
        _check_exclusive(lock, _name(number), ours)
        lock.remove([_name(one) for one in earlier])
        return number


def _check_exclusive(lock: Bucket, name: str, ours: _Lease) -> None:
    """Tell where a store gives an object twice to those who create it, as some imitations do."""
    if lock.create(name, b"another"):
        print(
            f"{lock}: cannot be locked (this store replaces an object that is to be created); let "
            "no second process write there",
            file=sys.stderr,
        )
        lock.write(name, ours.encode())


def _await_end(lock: Bucket, number: int, refusal: str) -> None:
    """Return when a holder is gone, or is taken for dead.

    Raises:
        ConfigError: it is alive.
    """
    first = now = _Lease.parse(lock.read_if_there(_name(number)))
    if first is None or first.is_over:
        return
    place, deadline = f"{lock}/{_name(number)}", time.monotonic() + DEAD_AFTER
    print(
        f"{place} is held by {first.holder}; waiting for up to {DEAD_AFTER:g} s for a sign of its "
        "life",
        file=sys.stderr,
        flush=True,
    )
    while now == first:
        if time.monotonic() > deadline:
            print(f"{first.holder} is taken for dead, and what it holds over", file=sys.stderr)
            return
        time.sleep(min(RENEWED_EVERY / 4, DEAD_AFTER / 8))
        now = _Lease.parse(lock.read_if_there(_name(number)))
    if now is not None:
        raise ConfigError(f"{refusal} ({place} is held by {first.holder})")


def _renew(lock: Bucket, number: int, lease: _Lease, stop: threading.Event) -> None:
    """Give signs of life until the block ends, or the lock is lost."""
    while not stop.wait(RENEWED_EVERY):
        try:
            is_ours = _read(lock, number) == lease.token and max(_numbers(lock)) == number
            if not is_ours and not stop.is_set():
                _end(lock)
            lease = replace(lease, renewals=lease.renewals + 1)
            lock.write(_name(number), lease.encode())
        except Exception as error:  # the store does not answer: nor does it to anybody else
            print(f"warning: {error}", file=sys.stderr)


def _end(lock: Bucket) -> NoReturn:
    """End the process: another one trains here, or did, and may not be disturbed."""
    signals.undo_all()
    signals.flush(
        f"{lock}: got another holder or none, expected this process; it gave no sign of life for "
        f"{DEAD_AFTER:g} s or more, and was taken for dead. It ends, and leaves the run as it is"
    )
    os._exit(2)


def _place() -> str:
    """Name where process numbers mean the same: since this machine was started, in one container.

    Containers that share a host's name may not share its processes.
    """
    with suppress(OSError):
        return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')}"
    return boot_id()


def _read(lock: Bucket, number: int) -> str | None:
    lease = _Lease.parse(lock.read_if_there(_name(number)))
    return lease.token if lease else None


def _numbers(lock: Bucket) -> list[int]:
    return sorted(int(name) for name in lock.sizes() if name.isdecimal())


def _name(number: int) -> str:
    return f"{number:08d}"
