# SPDX-License-Identifier: Apache-2.0
"""Writing a folder so that it is there complete or not at all.

In: the folder's final path. Out: a folder beside it to write into, renamed when all is written; a
kill leaves the old one, or none, never half of the new. Not done here: what goes into it.
"""

import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dsjax import signals
from dsjax.errors import ConfigError, files_of
from dsjax.storage import is_url, written_to_url


def check_empty(path: str | Path, field: str = "output directory") -> None:
    """Refuse to write where something else lies, or where nothing can."""
    if is_url(str(path)):
        raise ConfigError(written_to_url(str(path), field))
    folder = Path(path)
    check_possible(folder, field)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{field}: got {str(path)!r}, which is not empty; expected a new folder")


def check_possible(folder: Path, field: str) -> None:
    """Refuse a folder that could not be made, or not be written to."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        got = f"{str(folder)!r} under the file {there}" if there != folder else f"the file {there}"
        raise ConfigError(f"{field}: got {got}, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{field}: got {str(folder)!r}, expected a folder; {there} is read-only")


def check_room(folder: Path, needs: Mapping[str, int], field: str) -> None:
    """Refuse to begin what the disk of a folder, which need not be there yet, has no room for.

    Args:
        folder: where it goes.
        needs: bytes of what will be written there.
        field: what the message begins with.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free, needed = shutil.disk_usage(there).free, sum(needs.values())
    if needed > free:
        parts = " and ".join(f"{size / 2**20:,.1f} MiB for {what}" for what, size in needs.items())
        raise ConfigError(
            f"{field}: got {free / 2**20:,.1f} MiB free at {there}, expected at least {parts}; "
            "free some space there, or choose another place"
        )


@contextmanager
def written_beside(path: Path, primary: bool = True) -> Iterator[Path]:
    """Give a new folder beside `path`; on leaving normally it takes `path`'s place.

    What lies at `path` is replaced. What an earlier, killed attempt left beside it is removed. Of
    several processes the `primary` one does so, for all; that they wait for one another is theirs.
    """
    path = path.absolute()
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    if not primary:
        yield partial
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    remove = functools.partial(shutil.rmtree, partial, ignore_errors=True)
    try:
        with signals.undone(remove), files_of(path):
            yield partial
    except Exception:
        remove()
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)
