# SPDX-License-Identifier: Apache-2.0
"""A lock that one process holds, for all hosts that share the file system.

In: the lock file's path. Out: a block in which nobody else holds it, or a refusal that names who
does. The lock is the system's own and goes with the process that holds it, however that ends. It is
taken on a file that is open for writing: such a lock NFS passes on to its server, while one on a
folder is known to its own host only. The file says which process it is and is removed with the
lock; one that a kill leaves holds nothing. Not done here: what is protected.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dsjax import signals
from dsjax.buckets import process_lives
from dsjax.errors import ConfigError

LOCK_FILE = ".dsjax.lock"
"""In a folder, the file that is locked for it."""

PATIENCE = 120.0
"""Seconds to wait for the lock of a host that may have crashed: a file server frees it once its
lease has run out, after 90 s by default."""

_POLL = 1.0
_TRIES = 100  # to make a folder that others remove at the same time
_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.ESTALE)  # the last: removed since it was opened
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_without_locks: set[int] = set()
"""Devices of which it has been said that they have no locks."""


class Holder(NamedTuple):
    """A process as its lock file names it."""

    host: str
    pid: int
    boot: str

    def __str__(self) -> str:
        return f"process {self.pid} of host {self.host}"

    @property
    def is_of_here(self) -> bool:
        """Whether it is, or was, a process of this host since that was started.

        Containers that follow each other on several machines share a name, and often a number.
        """
        return (self.host, self.boot) == (socket.gethostname(), boot_id())

    @property
    def lives_here(self) -> bool:
        """Whether there is such a process on this host, where a lock goes with its process."""
        return self.is_of_here and process_lives(self.pid)


@contextmanager
def locked(file: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a file during the block; the folder that it lies in is made.

    Raises:
        ConfigError: with the text `refusal` first, another process holds it.
    """
    descriptor = _acquire(file, refusal)
    there = [file]

    def remove() -> None:
        while there:
            with suppress(OSError):
                there.pop().unlink()

    try:
        with signals.undone(remove):
            yield
    finally:
        remove()  # while it is still held: who opens it from now on finds another
        os.close(descriptor)


def holder_of(file: Path) -> Holder | None:
    """Who holds a lock, as its file says; None if there is no file, or it names nobody.

    The lock is not tried, which whoever takes it just then would see. A kill leaves the file:
    `Holder.lives_here` tells.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _acquire(file: Path, refusal: str) -> int:
    """Open and lock the file, and write into it who holds it."""
    began, said, tried = time.monotonic(), False, 0
    while True:
        descriptor = _open(file)
        holder = _read(descriptor)
        if _lock(descriptor, file):
            if _is_at(file, descriptor):
                _tell_left(file, holder)
                _sign(descriptor)
                return descriptor
            os.close(descriptor)
            continue
        os.close(descriptor)
        who = str(holder or "a process that it does not name")
        if holder is not None and holder.lives_here:
            raise ConfigError(f"{refusal} ({file} is held by {who})")
        if time.monotonic() - began > PATIENCE:
            raise ConfigError(
                f"{refusal} ({file} is held by {who}, and still was after {PATIENCE:g} s; if that "
                "has ended for certain, remove this file)"
            )
        tried += 1
        if not said and (holder is not None or tried > 1):  # it may be just about to sign
            said = True
            print(
                f"{file} is held by {who}; waiting for up to {PATIENCE:g} s, since a file server "
                "frees the lock late where a host has crashed",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(min(_POLL, PATIENCE / 4))


def _open(file: Path) -> int:
    """Open a file, made if need be with the folders above it, which others make and remove."""
    for again in reversed(range(_TRIES)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):  # was there, or was not, a moment ago
            if not again:
                raise
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            raise ConfigError(
                f"{file}: got a link or a folder, expected a file that is locked, or none; "
                "remove it"
            ) from error
    raise AssertionError("the last try returns or raises")


def _lock(descriptor: int, file: Path) -> bool:
    """Try to lock an open file; what has no locks counts as locked, and is told."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            error.filename = str(file)
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _without_locks:
            _without_locks.add(device)
            told = f"{file.parent}: cannot be locked ({error.strerror}); let no second process "
            print(f"{told}write there", file=sys.stderr)
    return True


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether the file was not removed, by whoever held it, between the opening and the lock."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def boot_id() -> str:
    """Name the time since this machine was started, as Linux does; elsewhere nothing."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    return ""


def _read(descriptor: int) -> Holder | None:
    """Who holds the file, or did; None if it does not say."""
    with suppress(OSError, ValueError):
        host, pid, boot = os.pread(descriptor, 400, 0).decode().removesuffix("\n").split(" ")
        if 0 < int(pid) < 2**31:
            return Holder(host, int(pid), boot)
    return None


def _sign(descriptor: int) -> None:
    text = f"{socket.gethostname()} {os.getpid()} {boot_id()}\n"
    with suppress(OSError):  # a full disk: locked it is all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        os.fsync(descriptor)  # NFS would keep it here as long as the file is open


def _tell_left(file: Path, holder: Holder | None) -> None:
    """Tell who did not remove the file: where hosts do not see each other's locks it may live."""
    if holder is not None and (holder.lives_here or not holder.is_of_here):
        told = f"{file} was left by {holder}: it was killed, or its lock is not seen from here"
        print(f"{told}; make sure that it has ended", file=sys.stderr)
