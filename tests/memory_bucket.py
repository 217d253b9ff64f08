# SPDX-License-Identifier: Apache-2.0
"""A bucket in this process's memory: fsspec's memory:// file system, and what was read from it.

In: a directory. Out: its URL as a bucket's folder, and every read as (file name, first byte, end).
Not here: what has to be true of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

Read = tuple[str, int, int]


@dataclass
class Bucket:
    """What lies in memory, and the reads so far."""

    reads: list[Read] = field(default_factory=list)

    def upload(self, directory: Path, name: str = "bucket/model") -> str:
        """Copy a directory, folders in it too; returns its URL."""
        system = MemoryFileSystem()
        for file in sorted(path for path in directory.rglob("*") if path.is_file()):
            system.pipe_file(f"/{name}/{file.relative_to(directory)}", file.read_bytes())
        return f"memory://{name}"

    def bytes_of(self, suffix: str = "") -> int:
        """How many bytes were read from files whose name ends so."""
        return sum(end - start for name, start, end in self.reads if name.endswith(suffix))


@contextmanager
def opened() -> Iterator[Bucket]:
    """An empty bucket, which is empty again afterwards."""
    bucket, read = Bucket(), MemoryFileSystem.cat_file

    def recorded(system: MemoryFileSystem, path: str, start: int, end: int, **options) -> bytes:
        bucket.reads.append((path.rpartition("/")[2], start, end))
        return read(system, path, start=start, end=end, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "store", {})
        patch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
        patch.setattr(MemoryFileSystem, "cat_file", recorded)
        yield bucket
