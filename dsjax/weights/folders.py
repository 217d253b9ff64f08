# SPDX-License-Identifier: Apache-2.0
"""Writing a folder so that it is there complete or not at all, and by one process at a time.

In: the folder's final path. Out: a folder beside it to write into, renamed when all is written; a
kill leaves the old one, or none, never half of the new. Not done here: what goes into the folder.
"""

import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsjax import signals
from dsjax.buckets import Bucket, Place
from dsjax.config.paths import is_url, written_to_url
from dsjax.distributed.lock_file import LOCK_FILE, locked
from dsjax.errors import ConfigError, files_of

_SOURCE_FILES = ("config.json", "adapter_config.json")
"""What makes a folder a model's or an adapter's."""

PARTIAL = ".partial"
"""Folder in a bucket's folder, where its new files are until they are all there."""

_LOOKS = 3
"""At a folder that another run may remove between finding and asking: what is so stays so."""


def check_empty(path: str | Place, field: str = "output directory") -> None:
    """Refuse to write where something else lies, or where nothing can."""
    if isinstance(path, Bucket):
        if content(path):
            raise ConfigError(
                f"{field}: got {str(path)!r}, which is not empty; expected a new folder"
            )
        return
    if is_url(str(path)):
        raise ConfigError(written_to_url(str(path), field))
    folder = Path(path)
    check_possible(folder, field)
    with suppress(FileNotFoundError):
        if any(name != LOCK_FILE for name in os.listdir(folder)):
            raise ConfigError(
                f"{field}: got {str(path)!r}, which is not empty; expected a new folder"
            )


def content(bucket: Bucket) -> list[str]:
    """List what lies in a folder of a bucket; its lock and what a kill left are left out."""
    ours = (f"{LOCK_FILE}/", f"{PARTIAL}/")
    return [name for name in bucket.sizes() if not name.startswith(ours)]


def check_possible(folder: Path, field: str) -> None:
    """Refuse a folder that could not be made, or not be written to."""
    dangling = [place for place in (folder, *folder.absolute().parents) if _is_dangling(place)]
    if dangling:
        link = f"the link {dangling[0]} to {os.readlink(dangling[0])!r}, which is not there"
        raise ConfigError(f"{field}: got {link}, expected a folder; make it, or remove the link")
    for _ in range(_LOOKS):
        there, status = _standing(folder)
        if not stat.S_ISDIR(status.st_mode):
            under = f"{str(folder)!r} under the file {there}"
            got = under if there != folder else f"the file {there}"
            raise ConfigError(f"{field}: got {got}, expected a folder")
        if os.access(there, os.W_OK | os.X_OK):
            return
    raise ConfigError(f"{field}: got {str(folder)!r}, expected a folder; {there} is read-only")


def _standing(folder: Path) -> tuple[Path, os.stat_result]:
    """Find a folder, or the nearest above it that is there, and what it is.

    In one look, since a run that is refused removes the folders that it made.
    """
    for place in (folder, *folder.absolute().parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            return place, place.stat()
    raise FileNotFoundError(folder)


def _is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def check_room(
    folder: Path, needs: Mapping[str, int], field: str, leftovers: Iterable[Path] = ()
) -> None:
    """Refuse to begin what the disk of a folder, which need not be there yet, has no room for.

    Args:
        folder: where it goes.
        needs: bytes of what will be written there.
        field: what the message begins with.
        leftovers: folders that are removed before anything is written, if they are there.
    """
    there, status, usage = _disk_of(folder)
    needed = sum(needs.values())
    if not usage.total:  # a mounted bucket, which has no size
        return
    free = usage.free + sum(_bytes_in(path, status.st_dev) for path in leftovers)
    if needed > free:
        parts = " and ".join(f"{size / 2**20:,.1f} MiB for {what}" for what, size in needs.items())
        raise ConfigError(
            f"{field}: got {free / 2**20:,.1f} MiB free at {there}, expected at least {parts}; "
            "free some space there, or choose another place"
        )


def _disk_of(folder: Path) -> tuple[Path, os.stat_result, Any]:
    for _ in range(_LOOKS):
        with suppress(FileNotFoundError):  # removed since it was found
            there, status = _standing(folder)
            return there, status, shutil.disk_usage(there)
    raise FileNotFoundError(folder)


def _bytes_in(folder: Path, device: int) -> int:
    """Return what a device gets back when a folder is removed; 0 if there is none."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another process may be about to remove it
                info = os.lstat(os.path.join(place, name))
                if info.st_dev == device and info.st_nlink == 1:
                    size += min(info.st_size, info.st_blocks * 512)  # a hole takes no room
    return size


def write_atomic(file: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    with files_of(file):
        beside.write_text(text, "utf-8")
        os.replace(beside, file)


def check_apart(path: str | Place, field: str, sources: Mapping[str, str | None]) -> None:
    """Refuse to write into a folder that is read.

    A path that is no model's and no adapter's is for whoever opens it to refuse.

    Args:
        path: where is to be written.
        field: the key or option that names it.
        sources: key or option -> a model's or adapter's path; hub ids, URLs and None may be.
    """
    for key, source in sources.items():
        if source is not None and _lies_in(str(path), source):
            raise ConfigError(
                f"{field}: got {str(path)!r}, which lies in {key} ({source!r}) or is that folder, "
                "expected another: a source stays as it is; choose a folder outside of it"
            )


def _lies_in(path: str, source: str) -> bool:
    """Whether a path, or a URL, is a model's or an adapter's folder, or is in it."""
    if is_url(path) or is_url(source):
        return is_url(source) and f"{path.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    folder = Path(source).expanduser()
    if not any((folder / name).is_file() for name in _SOURCE_FILES):
        return False
    return Path(path).resolve().is_relative_to(folder.resolve())


def written_at(place: Place) -> Path:
    """Where the files of a folder are written: those that go to a bucket, on this machine first."""
    return Path(tempfile.gettempdir()) if isinstance(place, Bucket) else place


def leftovers_of(path: Place) -> tuple[Path, ...]:
    """Where a killed attempt to write a folder leaves the new one, and the old one."""
    if isinstance(path, Bucket):
        return ()
    path = path.absolute()
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")


@contextmanager
def atomic_directory(
    path: Path,
    field: str = "output directory",
    primary: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Give a new folder beside `path`; on leaving normally it takes `path`'s place.

    What lies at `path` is replaced. What an earlier, killed attempt left beside it is removed. Of
    several processes the `primary` one does so, for all; that they wait for one another is theirs.

    Args:
        path: the folder.
        field: what a refusal begins with.
        primary: whether this is the process that writes.
        check: refuses what must not be replaced. Asked again here, where nobody else can write
            there any more.

    Raises:
        ConfigError: another process is writing the same folder, or `check` says so.
    """
    path = path.absolute()
    partial, old = leftovers_of(path)
    if not primary:
        yield partial
        return
    remove = functools.partial(shutil.rmtree, partial, ignore_errors=True)
    refusal = (
        f"{field}: got {str(path)!r}, which another process is writing, expected none; wait for "
        "it, or choose another"
    )
    with locked(path.with_name(f".{path.name}.lock"), refusal):
        for leftover in (partial, old):
            _remove(leftover)
        check()
        try:
            with signals.undone(remove), files_of(path):
                partial.mkdir(exist_ok=True)
                yield partial
            if path.exists():
                os.rename(path, old)
            os.rename(partial, path)
            _remove(old)
        except Exception:
            remove()
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
