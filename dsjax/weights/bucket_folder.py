# SPDX-License-Identifier: Apache-2.0
"""Writing a folder of a bucket: whole or not at all, and by one process at a time.

In: the folder's place. Out: a folder on this machine to write into, whose files go to the bucket,
into a folder in it; once all are there and proven, the store copies them into place. First the
object that says that all are there is replaced by one that says that they are not, and what readers
open first is removed; these come last. So a kill leaves the old folder, or one that nobody takes
for whole and that the next attempt may replace. Not done here: what goes into the folder; the same
on a file system (`folders`).
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from dsjax import signals
from dsjax.buckets import Bucket, remove_left_behind, scratch_folder
from dsjax.distributed.lease import leased
from dsjax.errors import ConfigError, files_of
from dsjax.weights.folders import PARTIAL, content
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
    """A folder that is being written; see `drafts.Draft`.

    Args:
        bucket: where its files go until it is complete.
        directory: where it is written.
        primary: whether this is the process that writes.
    """

    def __init__(self, bucket: Bucket, directory: Path, primary: bool) -> None:
        self._bucket, self.directory, self._primary = bucket, directory, primary
        self._digests: dict[str, str] = {}

    def share(self) -> str:
        """Send what is written so far, and return where all processes can read it."""
        if self._primary:
            self.contents()
        return str(self._bucket)

    def send(self, name: str) -> None:
        """Send a file that is complete, and remove it here: it may be large."""
        self._digests[name] = self._bucket.upload(self.directory / name, name)
        (self.directory / name).unlink()

    def contents(self, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """Send what is written and was not, and return the digest of every file in the bucket.

        Args:
            known: what is not looked at: each file's digest is known since it was sent.
        """
        del known
        for file in (path for path in sorted(self.directory.rglob("*")) if path.is_file()):
            name = file.relative_to(self.directory).as_posix()
            if self._digests.get(name) != file_digest(file):
                self._digests[name] = self._bucket.upload(file, name)
        return dict(self._digests)


def _put_in_place(draft: Bucket, bucket: Bucket, names: Collection[str], last: Last) -> None:
    """Copy a folder of a bucket over another, so that half of it is taken for whole by nobody."""
    bucket.write(last.name, last.begun)
    old = content(bucket)
    bucket.remove([name for name in old if _is_opened_first(name)])
    bucket.remove([name for name in old if name not in names and name != last.name])
    weights = [name for name in names if not _is_opened_first(name) and name != last.name]
    first = [name for name in names if _is_opened_first(name)]
    for group in (weights, first, [last.name]):
        bucket.at_once(lambda name: draft.copy_to(bucket, name), group)


def _is_opened_first(name: str) -> bool:
    """Whether readers open a model or an adapter by this file."""
    return name in ("config.json", "adapter_config.json") or name.endswith(".index.json")


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
        yield BucketDraft(bucket.folder(PARTIAL), scratch_folder(bucket.url), primary)
        return
    refusal = (
        f"{field}: got {str(bucket)!r}, which another process is writing, expected none; wait for "
        "it, or choose another"
    )
    directory, new = scratch_folder(bucket.url), bucket.folder(PARTIAL)

    def remove() -> None:
        shutil.rmtree(directory, ignore_errors=True)

    with signals.undone(remove), leased(bucket, refusal):
        try:
            check()
            remove_left_behind(bucket.url)
            new.remove(list(new.sizes()))
            with files_of(directory):
                directory.mkdir()
                draft = BucketDraft(new, directory, primary)
                yield draft
                names = draft.contents()
            _put_in_place(new, bucket, names, last)
        finally:
            remove()
            with suppress(ConfigError):  # the next attempt removes it
                new.remove(list(new.sizes()))
