# SPDX-License-Identifier: Apache-2.0
"""A new folder that takes its place as a whole, on a file system or in a bucket.

In: the place. Out: a `Draft` to write into, which knows where all processes can read it meanwhile,
and what it holds. Not done here: how it takes its place (`folders`, `bucket_folder`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from dsjax.buckets import Bucket, Place
from dsjax.weights.bucket_folder import BucketDraft, Last, bucket_directory
from dsjax.weights.folders import atomic_directory
from dsjax.weights.storage import READS_AHEAD, file_digest, in_order


class Draft:
    """A folder that is being written.

    Args:
        directory: where its files go.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def share(self) -> str:
        """Return where all processes can read what is written so far, once it is."""
        return str(self.directory)

    def contents(self, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """Return the digest of every file that is written by now, by its path in the folder.

        Args:
            known: those of files that were read again since they were written.
        """
        return file_digests(self.directory, known)


def file_digests(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the digest of every file in a folder by its path in it; `known` ones as they are."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    others = [name for name in names if name not in known]
    reads = [functools.partial(file_digest, names[name]) for name in others]
    found = dict(zip(others, in_order(reads, READS_AHEAD), strict=True))
    return {name: known[name] if name in known else found[name] for name in names}


@contextmanager
def new_folder(
    place: Place, field: str, last: Last, primary: bool, check: Callable[[], None]
) -> Iterator[Draft | BucketDraft]:
    """Give a folder to write; on leaving normally it takes the place, as a whole.

    Args:
        place: on a file system (`atomic_directory`), or in a bucket (`bucket_directory`).
        field: what a refusal begins with.
        last: the file that says that all others are there; it is written among them.
        primary: whether this is the process that writes.
        check: refuses what must not be replaced.
    """
    if isinstance(place, Bucket):
        with bucket_directory(place, field, last, primary, check) as draft:
            yield draft
        return
    with atomic_directory(place, field, primary, check) as directory:
        yield Draft(directory)
