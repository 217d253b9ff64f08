# SPDX-License-Identifier: Apache-2.0
"""Writing a folder of a bucket: whole or not at all, and by one process at a time.

In: the folder's place. Out: a folder on this machine to write into, whose files go to the bucket.
The object that says that all are there goes last; the old one is replaced first, by one that says
that they are not. So a kill leaves a folder that nobody takes for whole, and that the next attempt
may replace. Not done here: what goes into the folder; the same on a file system (`folders`).
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dsjax import signals
from dsjax.buckets import Bucket, remove_left_behind, scratch_folder
from dsjax.distributed.lease import leased
from dsjax.distributed.lock_file import LOCK_FILE
from dsjax.errors import ConfigError, files_of
from dsjax.weights.storage import file_digest


class Last(NamedTuple):
    """The object that says whether a folder is whole.

    Attributes:
        name: of it.
        begun: what it says until all others are there.
    """

    name: str
    begun: bytes


class BucketDraft:
    """A folder that is being written; see `folders.Draft`.

    Args:
        bucket: where it goes.
        directory: where it is written.
        primary: whether this is the process that writes.
    """

    def __init__(self, bucket: Bucket, directory: Path, primary: bool) -> None:
        self._bucket, self.directory, self._primary = bucket, directory, primary
        self._digests: dict[str, str] = {}

    def share(self) -> str:
        """Send what is written so far, and return where all processes can read it."""
        if self._primary:
            self._send_rest(self._files())
        return str(self._bucket)

    def send(self, name: str) -> None:
        """Send a file that is complete, and remove it here: it may be large."""
        self._digests[name] = self._bucket.upload(self.directory / name, name)
        (self.directory / name).unlink()

    def contents(self) -> dict[str, str]:
        """Return the digest of every file that is written by now, as it lies in the bucket."""
        self.share()
        return dict(self._digests)

    def complete(self, last: str) -> None:
        """Send the rest, the file that says that all are there at the end; remove what is older."""
        self._send_rest([name for name in self._files() if name != last])
        self._bucket.remove(set(content(self._bucket)) - {*self._digests, last})
        self._send_rest([last])

    def _send_rest(self, names: list[str]) -> None:
        """Copy files to the bucket, unless they were as they are; compare what arrived."""
        for name in names:
            file = self.directory / name
            if self._digests.get(name) != file_digest(file):
                self._digests[name] = self._bucket.upload(file, name)

    def _files(self) -> list[str]:
        files = [path for path in sorted(self.directory.rglob("*")) if path.is_file()]
        return [path.relative_to(self.directory).as_posix() for path in files]


def content(bucket: Bucket) -> list[str]:
    """List what lies in a folder of a bucket, its lock left out."""
    return [name for name in bucket.sizes() if not name.startswith(f"{LOCK_FILE}/")]


@contextmanager
def bucket_directory(
    bucket: Bucket,
    field: str,
    last: Last,
    primary: bool,
    check: Callable[[], None],
) -> Iterator[BucketDraft]:
    """Give a new folder here; on leaving normally what is in it is the bucket's folder.

    Args:
        bucket: the folder.
        field: what a refusal begins with.
        last: the object that says that all others are there.
        primary: whether this is the process that writes.
        check: refuses what must not be replaced.

    Raises:
        ConfigError: another process is writing the same folder, `check` says so, or the store does
            not take it.
    """
    if not primary:
        yield BucketDraft(bucket, scratch_folder(bucket.url), primary)
        return
    refusal = (
        f"{field}: got {str(bucket)!r}, which another process is writing, expected none; wait for "
        "it, or choose another"
    )
    directory = scratch_folder(bucket.url)

    def remove() -> None:
        shutil.rmtree(directory, ignore_errors=True)

    with signals.undone(remove), leased(bucket, refusal):
        try:
            check()
            remove_left_behind(bucket.url)
            bucket.write(last.name, last.begun)
            with _emptied_if_refused(bucket, last.name), files_of(directory):
                directory.mkdir()
                draft = BucketDraft(bucket, directory, primary)
                yield draft
                draft.complete(last.name)
        finally:
            remove()


@contextmanager
def _emptied_if_refused(bucket: Bucket, last: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        with suppress(ConfigError):  # a store that does not answer: the next attempt does so
            bucket.remove([name for name in content(bucket) if name != last])
            bucket.remove([last])
        raise
