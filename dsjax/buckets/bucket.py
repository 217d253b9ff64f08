# SPDX-License-Identifier: Apache-2.0
"""A folder in an object store that is written: whole objects, retries, and a look at what arrived.

In: a URL, names below it, bytes or files. Out: objects, of which nobody ever sees half; their list.
A store has no folders to make and none to rename: what belongs together is complete when the object
that says so, written last, is there. What fails is tried again with back-off; what was taken is
looked at, and written again if it is not there. Not done here: which object is the last.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import fsspec

from dsjax.buckets.connection import connect, reason
from dsjax.buckets.retry import again
from dsjax.config.paths import is_url
from dsjax.errors import ConfigError

AT_A_TIME = 8
"""Requests under way: one alone mostly waits for its answer."""

_COMPARED = 1 << 20
"""Objects of up to so many bytes are read again once they are written; of others the size is."""
_CHUNK = 1 << 24
_OTHER_BYTES = "it was taken, and other bytes are there than were written"
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError)
"""Answers of a store that another try does not change."""

T = TypeVar("T")
S = TypeVar("S")

new_digest = hashlib.sha256
"""What takes the bytes of a file, in order, to say which they are: processors have instructions
for it, and it is 2.5 times as fast as BLAKE2b where they do."""


@dataclass(frozen=True)
class Bucket:
    """A folder behind a URL; none of its objects need be there.

    Attributes:
        url: of the folder.
        key: what messages begin with: the configuration's, which names it.
    """

    url: str
    key: str
    _system: fsspec.AbstractFileSystem = field(repr=False)
    _root: str = field(repr=False)

    @classmethod
    def open(cls, url: str, config_field: str) -> "Bucket":
        """Find the way to a folder; nothing is asked of the store yet.

        Raises:
            ConfigError: no store is behind the URL, or its library is not installed.
        """
        # Remembered lists would hide what other hosts write.
        options = {"auto_mkdir": True} if url.startswith("file://") else {}
        system, root = connect(url.rstrip("/"), config_field, use_listings_cache=False, **options)
        return cls(url.rstrip("/"), config_field, system, root)

    def __str__(self) -> str:
        return self.url

    def holds_place(self, place: str) -> bool:
        """Whether a URL is of this folder, or of something in it."""
        return f"{place.rstrip('/')}/".startswith(f"{self.url}/")

    def folder(self, name: str) -> "Bucket":
        """Return the folder of a name in this one."""
        return Bucket(f"{self.url}/{name}", self.key, self._system, self._path(name))

    def sizes(self) -> dict[str, int]:
        """List all objects in the folder and the folders in it: name -> bytes, sorted.

        Raises:
            ConfigError: there is no such bucket, or it cannot be listed.
        """
        try:
            found = self._again(lambda: self._system.find(self._root, detail=True), self.url)
        except FileNotFoundError as error:
            raise self._no_bucket(error) from error
        files = {
            path.removeprefix(self._root).lstrip("/"): entry["size"]
            for path, entry in sorted(dict(found).items())
            if entry["type"] == "file"  # a store without folders may hold objects of their names
        }
        return {name: size for name, size in files.items() if name and not name.endswith("/")}

    def folders(self) -> list[str]:
        """List the names of the folders in the folder, that is, of those with anything in them."""
        return self._children("directory")

    def files(self) -> list[str]:
        """List the names of the objects in the folder, without those in folders in it."""
        return self._children("file")

    def _children(self, kind: str) -> list[str]:
        try:
            entries = self._again(lambda: self._system.ls(self._root, detail=True), self.url)
        except FileNotFoundError:
            return []
        paths = [entry["name"] for entry in entries if entry["type"] == kind]
        names = {path.rstrip("/").removeprefix(self._root).lstrip("/") for path in paths}
        return sorted(names - {""})

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read an object, or a byte range of it; safe to call from several threads.

        Raises:
            FileNotFoundError: there is none of that name.
            ConfigError: the store refuses or cannot be reached, again and again.
        """
        # Trap: a file system without ranges of its own opens the file and reads ahead by default.
        options = {} if self._system.async_impl else {"cache_type": "none"}
        data = self._again(
            lambda: self._system.cat_file(self._path(name), start=start, end=end, **options),
            f"{self.url}/{name}",
        )
        assert isinstance(data, bytes)
        return data

    def read_if_there(self, name: str) -> bytes | None:
        """Read an object; None if there is none of that name."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def digest(self, name: str) -> str:
        """Return the digest of an object, as `weights.storage.file_digest` of a file.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        place, whole = f"{self.url}/{name}", new_digest()
        size = self._again(lambda: self._system.info(self._path(name))["size"], place)
        for start in range(0, size, _CHUNK):
            whole.update(self.read(name, start, min(start + _CHUNK, size)))
        return whole.hexdigest()

    def holds(self, name: str) -> bool:
        """Whether there is an object of a name."""
        return self._again(lambda: self._system.isfile(self._path(name)), f"{self.url}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write an object in place of what has its name; it is there when this returns.

        Raises:
            ConfigError: the store does not take it.
        """

        def put() -> None:
            self._system.pipe_file(self._path(name), data)
            self._check_arrived(name, data)

        self._put(put, name)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of its name, whoever else tries the same.

        Returns:
            Whether it is ours.
        """

        def put() -> None:
            try:
                self._system.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                raise
            except Exception as error:  # some say so in other words
                if self.holds(name):
                    raise FileExistsError(name) from error
                raise
            self._check_arrived(name, data)

        try:
            self._put(put, name)
        except FileExistsError:
            # An answer that was lost: the first try wrote it.
            return self.read_if_there(name) == data
        return True

    def upload(self, file: Path, name: str) -> str:
        """Copy a file into the store, and compare what arrived byte for byte.

        Returns:
            Its digest, as `digest` gives it.

        Raises:
            ConfigError: the store does not take it.
        """

        with file.open("rb") as content:
            digest = hashlib.file_digest(content, new_digest).hexdigest()

        def put() -> None:
            self._system.put_file(str(file), self._path(name))
            if not self.holds(name) or self.digest(name) != digest:
                raise OSError(_OTHER_BYTES)

        self._put(put, name)
        return digest

    def download(self, name: str, file: Path) -> None:
        """Copy an object to a file; the folders that it lies in are made.

        Raises:
            FileNotFoundError: there is none of that name.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._again(
            lambda: self._system.get_file(self._path(name), str(file)), f"{self.url}/{name}"
        )

    def copy_to(self, other: "Bucket", name: str) -> None:
        """Have the store copy an object to a folder of the same store; the sizes are compared.

        Raises:
            ConfigError: the store does not do it.
        """

        def put() -> None:
            source, target = self._path(name), other._path(name)
            size = self._system.info(source)["size"]
            self._system.cp_file(source, target)
            arrived = -1
            with suppress(FileNotFoundError):
                arrived = self._system.info(target)["size"]
            if arrived != size:
                raise OSError(_OTHER_BYTES)

        self._put(put, name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are left out."""

        def remove(name: str) -> None:
            try:
                self._again(lambda: self._system.rm_file(self._path(name)), f"{self.url}/{name}")
            except FileNotFoundError:
                return

        self.at_once(remove, list(names))

    def at_once(self, act: Callable[[S], T], items: Collection[S]) -> list[T]:
        """Return what `act` gives for each item, several requests at a time."""
        if len(items) <= 1:
            return [act(item) for item in items]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            return list(pool.map(act, items))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_arrived(self, name: str, data: bytes) -> None:
        """Raise where a store that took an object does not have it."""
        there = False
        with suppress(FileNotFoundError):
            if len(data) <= _COMPARED:
                there = self._system.cat_file(self._path(name)) == data
            else:
                there = self._system.info(self._path(name))["size"] == len(data)
        if not there:
            raise OSError(_OTHER_BYTES)

    def _put(self, put: Callable[[], None], name: str) -> None:
        try:
            self._again(put, f"{self.url}/{name}")
        except FileNotFoundError as error:
            raise self._no_bucket(error) from error

    def _no_bucket(self, error: FileNotFoundError) -> ConfigError:
        return ConfigError(
            f"{self.key}: got {self.url!r}, expected a bucket that is there ({reason(error)}); "
            "make it, or check its name"
        )

    def _again(self, request: Callable[[], T], place: str) -> T:
        """Make a request until it is answered; one that can be made twice.

        Raises:
            FileNotFoundError: the answer. So is FileExistsError.
            ConfigError: what the store says at last.
        """
        try:
            return again(request, place)
        except (*_FINAL, ConfigError):
            raise
        except Exception as error:  # every store's library has its own classes
            raise ConfigError(
                f"{self.key}: got {reason(error)} from {place}, expected it to be read and "
                "written; check the address, the credentials, the permissions and the network, "
                "and run the same command again"
            ) from error


Place = Path | Bucket
"""Where a folder lies that is written: on a file system, or in a store."""


def open_place(path: str, key: str) -> Place:
    """Return the folder of a path or of a URL.

    Args:
        path: as the configuration or a command line gives it.
        key: what names it there, for messages.
    """
    return Bucket.open(path, key) if is_url(path) else Path(path)
