# SPDX-License-Identifier: Apache-2.0
"""An object store that several processes share: objects whole or not at all, no rename, and faults.

In: a folder of this machine, and what goes wrong when. Out: store:// as fsspec opens it. As a
command, `python object_store.py FOLDER SHARE MODULE WORD...` runs one of dsjax's with it, where so
large a share of requests goes wrong. Not here: what has to be true.
"""

import os
import random
import runpy
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

FAULTS = ("refused", "answer lost", "object lost", "object cut", "slow")
"""503 and nothing done; done and 503; nothing done and no word of it; half of it done; in time."""


def undisturbed(operation: str, path: str) -> str:
    """Give the fault of a request: none."""
    return ""


class ObjectStore(AbstractFileSystem):
    """A store in a folder; each object is a file there."""

    protocol = "store"
    cachable = False
    folder: ClassVar[Path]
    fault: ClassVar[Callable[[str, str], str]] = staticmethod(undisturbed)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._meet("list", path)
        place = self._place(path)
        if place.is_file():
            found = [place]
        else:  # of folders only those with objects exist
            children = sorted(place.iterdir()) if place.is_dir() else []
            found = [child for child in children if child.is_file() or _objects(child)]
        if not found:
            raise FileNotFoundError(path)
        entries = [self._entry(child) for child in found]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._meet("look", path)
        place = self._place(path)
        if not place.is_file() and not _objects(place):
            raise FileNotFoundError(path)
        return self._entry(place)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        self._meet("read", path)
        return self._place(path).read_bytes()[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        fault = self._meet("write", path)
        if fault == "object lost":
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{uuid.uuid4().hex}"
        beside.write_bytes(value[: len(value) // 2] if fault == "object cut" else value)
        try:
            while not _moved(beside, self._place(path), mode):
                pass
        finally:
            beside.unlink(missing_ok=True)
        if fault == "answer lost":
            raise OSError("503 Service Unavailable")

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self.pipe_file(path2, self._place(path1).read_bytes())

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath))

    def rm_file(self, path: str) -> None:
        self._meet("remove", path)
        place = self._place(path)
        place.unlink()
        with suppress(OSError):  # a store has no empty folders
            for above in place.relative_to(self.folder).parents[:-1]:
                (self.folder / above).rmdir()

    def _meet(self, operation: str, path: str) -> str:
        fault = type(self).fault(operation, path)
        if fault == "refused":
            raise OSError("503 Service Unavailable")
        if fault == "slow":
            time.sleep(0.2)
        return fault

    def _place(self, path: str) -> Path:
        return self.folder / str(self._strip_protocol(path)).lstrip("/")

    def _entry(self, place: Path) -> dict[str, Any]:
        kind = "file" if place.is_file() else "directory"
        size = place.stat().st_size if kind == "file" else 0
        return {"name": place.relative_to(self.folder).as_posix(), "size": size, "type": kind}


def _moved(file: Path, place: Path, mode: str) -> bool:
    """Give a file its name; False where the folder has gone with its last other object."""
    with suppress(FileNotFoundError):
        place.parent.mkdir(parents=True, exist_ok=True)
        (os.link if mode == "create" else os.replace)(file, place)
        return True
    return False


def _objects(place: Path) -> bool:
    return any(path.is_file() for path in place.rglob("*"))


def register(folder: Path) -> None:
    """Have store:// open what lies in a folder."""
    ObjectStore.folder = folder
    ObjectStore.fault = staticmethod(undisturbed)
    fsspec.register_implementation("store", ObjectStore, clobber=True)


@contextmanager
def disturbed(fault: Callable[[str, str], str]) -> Iterator[None]:
    """Give requests these faults during the block."""
    ObjectStore.fault = staticmethod(fault)
    try:
        yield
    finally:
        ObjectStore.fault = staticmethod(undisturbed)


def words(folder: Path, *command: str, share: float = 0) -> list[str]:
    """Give the words after `python` of a command of dsjax with the store in a folder."""
    return [__file__, str(folder), str(share), *command]


def run_command() -> None:
    """Run what the command line names."""
    from dsjax.buckets import retry

    folder, share, *sys.argv = sys.argv[1:]
    register(Path(folder))
    chance = random.Random(0)
    if float(share):
        retry.DELAYS = (0.0,) * len(retry.DELAYS)
        ObjectStore.fault = staticmethod(
            lambda *_: chance.choice(FAULTS) if chance.random() < float(share) else ""
        )
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_command()
