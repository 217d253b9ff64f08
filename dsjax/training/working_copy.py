# SPDX-License-Identifier: Apache-2.0
"""The small files of a run in a bucket, on this machine: fetched at the start, sent as they change.

In: a run's folder. Out: for one in a bucket, a folder here with its small files, which is removed
in the end; what is written into it goes to the bucket every few seconds, and whenever `publish` is
called. For a run on a file system there is nothing to do. Not done here: checkpoints and exports,
which are read and written in the bucket (`bucket_store`, `weights.bucket_folder`).
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsjax import signals
from dsjax.buckets import Bucket, remove_left_behind
from dsjax.distributed.lock_file import LOCK_FILE
from dsjax.errors import ConfigError, files_of
from dsjax.training.run_dir import RunDir

PUBLISHED_EVERY = 10.0
"""Seconds between two looks at what has changed."""

_WHOLE = 1 << 23
"""Files of up to so many bytes are sent from memory."""

_UNFINISHED = (".tmp", ".partial")
"""Parts of the names of files that are about to be renamed."""


class WorkingCopy:
    """The files of a run here, and what of them has been sent.

    Args:
        run: the run's files.
        bucket: its folder.
    """

    def __init__(self, run: RunDir, bucket: Bucket) -> None:
        self._run, self._path, self._bucket = run, run.path, bucket
        self._sent: dict[str, tuple[int, int]] | None = None  # None until all is fetched
        self._sending = threading.Lock()

    def fetch(self) -> None:
        """Copy the small files that the bucket has; what lay here before is removed.

        Raises:
            ConfigError: they cannot be read, or not be written here.
        """
        remove_left_behind(self._bucket.url)
        with files_of(self._path):
            try:
                self._path.mkdir(parents=True)
            except FileExistsError as error:
                raise ConfigError(
                    f"{self._path}: got what is not this process's, expected nothing; remove it, "
                    "or set TMPDIR to another folder"
                ) from error
        names = set(self._bucket.files()).intersection(self._run.small_files)
        self._bucket.at_once(lambda name: self._bucket.download(name, self._path / name), names)
        self._sent = self._files()

    def publish(self) -> None:
        """Send what has changed; it is there when this returns.

        Raises:
            ConfigError: the store does not take it.
        """
        with self._sending:
            sent = self._sent
            if sent is None:
                return
            for name, state in self._files().items():
                if sent.get(name) != state:
                    with suppress(FileNotFoundError):  # renamed or removed since
                        self._send(name, state[0])
                        sent[name] = state

    @contextmanager
    def published(self) -> Iterator[None]:
        """Send what has changed every few seconds, from a thread, until the block ends."""
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(PUBLISHED_EVERY):
                try:
                    self.publish()
                except Exception as error:  # the next time, or the next checkpoint, tries again
                    print(f"warning: {error}", file=sys.stderr)

        thread = threading.Thread(target=send, name="publish", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def remove(self) -> None:
        """Remove what is here."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _send(self, name: str, size: int) -> None:
        """Send a file as it was when it was looked at: it may grow meanwhile."""
        if size <= _WHOLE:
            with (self._path / name).open("rb") as file:
                self._bucket.write(name, file.read(size))
            return
        snapshot = self._path / ".sent"
        shutil.copyfile(self._path / name, snapshot)
        os.truncate(snapshot, size)
        self._bucket.upload(snapshot, name)
        snapshot.unlink()

    def _files(self) -> dict[str, tuple[int, int]]:
        """Return size and time of every file that is no half-written one."""
        found = {}
        for folder, _, names in os.walk(self._path):
            for name in names:
                file = Path(folder, name)
                unfinished = name.startswith(".") or any(part in name for part in _UNFINISHED)
                with suppress(FileNotFoundError):
                    if name != LOCK_FILE and not unfinished and file.is_file():
                        status = file.stat()
                        key = file.relative_to(self._path).as_posix()
                        found[key] = (status.st_size, status.st_mtime_ns)
        return found


@contextmanager
def fetched(run: RunDir) -> Iterator[None]:
    """Have the files of a run here during the block, for looking at it."""
    bucket = run.bucket
    if bucket is None:
        yield
        return
    copy = WorkingCopy(run, bucket)
    with shown_as_url(run), signals.undone(copy.remove):
        try:
            copy.fetch()
            yield
        finally:
            copy.remove()


@contextmanager
def shown_as_url(run: RunDir) -> Iterator[None]:
    """Have the messages of a block name a run's files where they lie, not their copies here."""
    try:
        yield
    except ConfigError as error:
        if run.url is None or str(run.path) not in str(error):
            raise
        raise ConfigError(str(error).replace(str(run.path), run.url)) from error
