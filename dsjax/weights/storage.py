# SPDX-License-Identifier: Apache-2.0
"""Folders that are read, on this machine or behind a URL; the only place that knows which.

In: a path, or a URL that fsspec opens (gs://, s3://, hf://). Out: the folder's files by name, each
readable by byte ranges. Nothing is downloaded as a whole but by `copied`, for small files.
Not done here: the way to a store, and writing there (`buckets`); what the files mean
(`hf_directory`, `peft`).
"""

import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import numpy as np

from dsjax.buckets import again, connect, new_digest, reason
from dsjax.config.paths import is_url
from dsjax.errors import ConfigError, files_of

READS_AHEAD = 8
"""Reads that are under way at a time, of remote files: one alone mostly waits for its answer."""
LOCAL_READS = min(4, max(2, os.cpu_count() or 1))
"""Reads of files on this machine: a core each, up to as many as host memory is bounded with."""
_DROP_PAGES_FROM = 1 << 23
_DIGEST_BYTES = 1 << 24
ALIGNMENT = 64
"""Of memory that jax takes for an array on the CPU without a copy."""

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL.

    Attributes:
        url: where it lies, for messages.
        size: its bytes when the folder was listed.
    """

    url: str
    size: int
    _system: fsspec.AbstractFileSystem = field(repr=False)
    _path: str = field(repr=False)

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return PurePosixPath(self._path).name

    def __str__(self) -> str:
        return self.url

    def read(self, offset: int, length: int) -> bytes:
        """Read a byte range with one request; safe to call from several threads.

        Raises:
            ConfigError: the store refuses or cannot be reached, again and again.
            OSError: the file is shorter than it was.
        """
        if not length:  # no HTTP range is empty
            return b""
        # Trap: a file system without ranges of its own opens the file and reads ahead by default.
        options = {} if self._system.async_impl else {"cache_type": "none"}
        end = offset + length
        try:
            data = again(
                lambda: self._system.cat_file(self._path, start=offset, end=end, **options),
                self.url,
            )
        except Exception as error:  # every store's library has its own classes
            raise ConfigError(
                f"{self.url}: got {reason(error)}, expected its bytes {offset} to {end}; check "
                "the network and the permission to read, and run again"
            ) from error
        assert isinstance(data, bytes)
        if len(data) != length:
            raise OSError(f"{self.url} ended at byte {offset + len(data)}: it changed while in use")
        return data

    def read_bytes(self) -> bytes:
        """Read the whole file, as `Path.read_bytes` does on this machine."""
        return self.read(0, self.size)


File = Path | RemoteFile


@dataclass(frozen=True)
class Folder:
    """A folder as it was when it was opened.

    Attributes:
        place: path or URL, as messages name it.
        files: its files by name, sorted, those of the sub-folders asked for as `folder/name`.
    """

    place: str
    files: dict[str, File]

    def __str__(self) -> str:
        return self.place

    @property
    def is_remote(self) -> bool:
        """Whether its files lie behind a URL."""
        return any(isinstance(file, RemoteFile) for file in self.files.values())

    @property
    def reads_ahead(self) -> int:
        """How many reads are worth having under way at a time."""
        return READS_AHEAD if self.is_remote else LOCAL_READS


def open_folder(path: str | Path, config_field: str, subfolders: Collection[str] = ()) -> Folder:
    """List the files of a folder.

    Args:
        path: a directory that exists, or a URL.
        config_field: what the message of an error begins with.
        subfolders: names of folders in it, if they are there, whose files are listed too.

    Raises:
        ConfigError: no such folder behind the URL, or no way to it.
    """
    if is_url(str(path)):
        return _open_url(str(path).rstrip("/"), config_field, subfolders)
    places = [Path(path), *(Path(path) / name for name in subfolders)]
    found = [file for place in places if place.is_dir() for file in place.iterdir()]
    files: dict[str, File] = {
        str(file.relative_to(path)): file for file in sorted(found) if file.is_file()
    }
    return Folder(str(path), files)


def _open_url(url: str, config_field: str, subfolders: Collection[str]) -> Folder:
    system, root = connect(url, config_field)
    entries = _listed(system, root, url, config_field)
    if [entry["name"] for entry in entries if entry["type"] == "file"] == [root]:
        raise ConfigError(
            f"{config_field}: got the file {url!r}, expected the folder that holds it; "
            f"give {url.rpartition('/')[0]!r}"
        )
    found = {_last(entry): entry for entry in entries if _is_file(entry, root)}
    for entry in entries:
        if entry["type"] == "directory" and _last(entry) in subfolders:
            inside = _listed(system, entry["name"].rstrip("/"), url, config_field)
            files = [file for file in inside if _is_file(file, entry["name"])]
            found |= {f"{_last(entry)}/{_last(file)}": file for file in files}
    return Folder(
        url,
        {
            name: RemoteFile(f"{url}/{name}", entry["size"], system, entry["name"])
            for name, entry in sorted(found.items())
        },
    )


def _last(entry: Mapping[str, Any]) -> str:
    return PurePosixPath(entry["name"]).name


def _is_file(entry: Mapping[str, Any], folder: str) -> bool:
    """Whether an entry of a listing is a file in it.

    A store without folders may hold an empty object of the folder's name.
    """
    return entry["type"] == "file" and entry["name"].rstrip("/") != folder.rstrip("/")


def _listed(
    system: fsspec.AbstractFileSystem, path: str, url: str, config_field: str
) -> list[dict[str, Any]]:
    try:
        return system.ls(path, detail=True)
    except Exception as error:
        raise ConfigError(
            f"{config_field}: got {url!r}, expected a folder that can be listed "
            f"({reason(error)}); check the address, the credentials and the network"
        ) from error


def size_of(file: File) -> int:
    """Bytes of a file."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def read_text(file: File) -> str:
    """Read the whole of a UTF-8 file.

    Raises:
        UnicodeDecodeError: it is something else.
    """
    return read_at(file, 0, size_of(file)).tobytes().decode("utf-8")


def read_at(file: File, offset: int, length: int) -> np.ndarray:
    """Read bytes of a file into a fresh uint8 array, without a shared file position."""
    if isinstance(file, RemoteFile):
        return np.frombuffer(file.read(offset, length), np.uint8).copy()
    buffer = _empty(length)
    view, done = buffer.data, 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while done < length:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"{file} ended at byte {offset + done}: it changed while in use")
            done += count
        # In a container the page cache of a file read once counts against the memory limit.
        if length >= _DROP_PAGES_FROM and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return buffer


def _empty(length: int) -> np.ndarray:
    """Return bytes of memory where jax takes them for an array on the CPU without a copy."""
    whole = np.empty(length + ALIGNMENT, np.uint8)
    return whole[-whole.ctypes.data % ALIGNMENT :][:length]


def file_digest(file: File, new: Callable[[], Any] = new_digest) -> str:
    """Return the digest of all bytes of a file; `new` makes what they are given to."""
    whole, size = new(), size_of(file)
    for offset in range(0, size, _DIGEST_BYTES):
        whole.update(read_at(file, offset, min(_DIGEST_BYTES, size - offset)).data)
    return whole.hexdigest()


def copied(folder: Folder, names: Collection[str], into: Path | None = None) -> Path:
    """Copy small files of a remote folder to this machine.

    Args:
        folder: where they are.
        names: of the files; those that are copied already are left.
        into: the directory of an earlier call; None makes one, which is there as long as `folder`.

    Returns:
        The directory that holds them.
    """
    directory = into or Path(tempfile.mkdtemp(prefix="dsjax-"))
    if into is None:
        weakref.finalize(folder, shutil.rmtree, directory, ignore_errors=True)
    names = [name for name in names if not (directory / name).exists()]
    reads = [lambda file=folder.files[name]: _whole(file) for name in names]
    for name, content in zip(names, in_order(reads, READS_AHEAD), strict=True):
        with files_of(directory / name):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
    return directory


def _whole(file: File) -> bytes:
    return read_at(file, 0, size_of(file)).tobytes()


def in_order(
    reads: Iterable[Callable[[], T]], at_a_time: int, threads: int | None = None
) -> Iterator[T]:
    """Results of reads in their order, while up to `at_a_time` are under way in threads.

    Args:
        reads: asked for here, one by one, as there is room for them.
        at_a_time: how many may be running, waiting for a thread, or done and not yet taken.
        threads: 1 makes what they do happen in order too; as many as `at_a_time` by default.
    """
    if at_a_time <= 1:
        yield from (read() for read in reads)
        return
    running: deque[Any] = deque()
    pool = ThreadPoolExecutor(threads or at_a_time)
    try:
        for read in reads:
            running.append(pool.submit(read))
            if len(running) == at_a_time:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
