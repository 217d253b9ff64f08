# SPDX-License-Identifier: Apache-2.0
"""The small files of a run in a bucket, on this machine: fetched at the start, sent as they change.

In: a run's folder. Out: for one in a bucket, a folder here with its small files, which is removed
in the end; what is written into it goes to the bucket whenever `publish` is called. For a run on a
file system there is nothing to do. Not done here: checkpoints and exports, which are read and
written in the bucket (`bucket_store`, `weights.bucket_folder`).
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsjax.buckets import Bucket
from dsjax.distributed.lock_file import LOCK_FILE
from dsjax.training.run_dir import RunDir

_WHOLE = 1 << 23
"""Files of up to so many bytes are sent from memory."""


class WorkingCopy:
    """The files of a run here, and what of them has been sent.

    Args:
        run: the run's files.
        bucket: its folder.
    """

    def __init__(self, run: RunDir, bucket: Bucket) -> None:
        self._path, self._bucket = run.path, bucket
        self._sent: dict[str, tuple[int, int]] = {}
        self._sending = threading.Lock()

    def fetch(self) -> None:
        """Copy the small files that the bucket has; what lay here before is removed."""
        with self._sending:  # what is here by half is not sent
            shutil.rmtree(self._path, ignore_errors=True)
            self._path.mkdir(parents=True)
            # A name with a dot is of a process that is just trying whether it may write.
            names = [name for name in self._bucket.files() if not name.startswith(".")]
            self._bucket.at_once(lambda name: self._bucket.download(name, self._path / name), names)
            self._sent = self._files()

    def publish(self) -> None:
        """Send what has changed; it is there when this returns.

        Raises:
            ConfigError: the store does not take it.
        """
        with self._sending:
            for name, state in self._files().items():
                if self._sent.get(name) != state:
                    self._send(name, state)
                    self._sent[name] = state

    def _send(self, name: str, state: tuple[int, int]) -> None:
        file = self._path / name
        if state[0] <= _WHOLE:
            self._bucket.write(name, file.read_bytes())
        else:
            self._bucket.upload(file, name)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Return size and time of every file; one that is half written has a name with a dot."""
        found = {}
        for folder, _, names in os.walk(self._path):
            for name in names:
                file = Path(folder, name)
                if name != LOCK_FILE and not name.startswith(".") and file.is_file():
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
    try:
        WorkingCopy(run, bucket).fetch()
        yield
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
