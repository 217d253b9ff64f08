# SPDX-License-Identifier: Apache-2.0
"""A run's own configuration, read where the run lies by now: its folder may have been moved.

In: what `config.yaml` of a run's folder says, and where that file lies. Out: the same, with the
folder as `output_dir`; and what is not at its place any more is looked for as far from the folder
as it was, so that a project that was moved, or copied, as a whole is found as a whole. Not done
here: refusing what is not found (`inputs`, and whoever reads it).
"""

import glob
import os.path
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsjax.config.paths import METRICS, RUN_CONFIG, is_url
from dsjax.errors import ConfigError

_PATHS = {"model": ("path",), "adapter": ("path",), "data": ("train", "eval")}
"""Keys that say where something is read."""


def settled(tree: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Put a run's folder in the place of the `output_dir` that its configuration names.

    Args:
        tree: section -> key -> value.
        file: that it was read from; of any other file than a run's own the tree stays as it is.
    """
    before, here = _other_place(tree, file), file.absolute().parent
    if before is None:
        return dict(tree)

    def found(path: str) -> str:
        if not os.path.isabs(path) or _is_there(path):
            return path
        moved = os.path.normpath(here / os.path.relpath(path, before))
        if os.path.exists(moved):
            return moved
        far = os.path.relpath(path, glob.escape(before))
        pattern = os.path.normpath(os.path.join(glob.escape(str(here)), far))
        return pattern if _is_there(pattern) else path

    changed = with_paths(tree, found) | {"output_dir": str(file.parent)}
    export = tree.get("export")
    if isinstance(export, Mapping) and isinstance(export.get("path"), str):
        inside = os.path.relpath(export["path"], before)
        if os.path.isabs(export["path"]) and not inside.startswith(os.pardir):
            changed["export"] = {**export, "path": os.path.normpath(here / inside)}
    return changed


def check_unmoved(tree: Mapping[str, Any], file: Path) -> None:
    """Refuse to train by a run's own configuration that names another place: moved, or edited?

    Raises:
        ConfigError: it does.
    """
    before, here = _other_place(tree, file), file.parent
    if before is not None:
        raise ConfigError(
            f"output_dir: got {before!r} in {file}, which is of the run in {str(here)!r}, expected "
            f"one place; add output_dir={here} to go on with that run, which was moved, or "
            f"output_dir={before} for a new one"
        )


def _other_place(tree: Mapping[str, Any], file: Path) -> str | None:
    """Return the `output_dir` of a run's own configuration that lies elsewhere."""
    before, here = tree.get("output_dir"), file.absolute().parent
    # A configuration of a user's own may have this name too; a run writes an absolute path, and
    # its metrics beside it.
    if file.name != RUN_CONFIG or not (here / METRICS).is_file():
        return None
    if not isinstance(before, str) or not os.path.isabs(before):
        return None
    return None if os.path.realpath(before) == os.path.realpath(here) else before


def with_paths(tree: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Change every path at which a configuration reads something."""
    changed = dict(tree)
    for name, keys in _PATHS.items():
        section = tree.get(name)
        if isinstance(section, Mapping):
            given = {key: section[key] for key in keys if section.get(key) is not None}
            changed[name] = {**section, **{key: _each(given[key], change) for key in given}}
    return changed


def absolute(path: str) -> str:
    """Make a path, or a pattern of paths, absolute that stands for something.

    A hub's id or an address stays as it is.
    """
    if is_url(path) or os.path.isabs(path) or not _is_there(path):
        return path
    if os.path.exists(path):
        return os.path.abspath(path)
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), path))


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _is_there(path: str) -> bool:
    """Whether a path, or a pattern of paths, stands for something."""
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))
