# SPDX-License-Identifier: Apache-2.0
"""From `model.path` to a folder whose small files lie on this machine.

In: a directory, a URL of one, a hub id, or a repository of ModelScope. Out: a `ModelFolder`:
config.json, the files that belong to the model besides its weights (`model_files`), and the names
of all others. Of a repository the small files come first, so that a model that is refused costs no
shard. Not done here: weights and their index (`hf_directory`).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsjax.config.inputs import check_model_path
from dsjax.config.json_file import read_object
from dsjax.config.paths import is_url
from dsjax.errors import ConfigError, raise_all
from dsjax.weights import hub, modelscope_hub
from dsjax.weights.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    DECIDING,
    SUBFOLDERS,
    kept_files,
    links_out,
    read_tokenizer_config,
    wanted_names,
)
from dsjax.weights.repository import Repository
from dsjax.weights.safetensors import is_lfs_pointer, lfs_problem
from dsjax.weights.storage import Folder, copied, open_folder

_INDEX = ".index.json"
_MOST_NAMES = 8

Fetch = Callable[[Collection[str]], Path]
"""Brings files to this machine; gives the directory that holds them."""


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder whose small files are on this machine.

    Attributes:
        directory: where those lie: the folder itself, the hub's cache, or copies of a URL's.
        folder: where its weights are read from.
        names: of all its files, fetched or not.
        config: the parsed config.json.
        kept: names of the files to keep beside the weights, sorted.
        repository: of a hub id whose weights are still to be fetched.
    """

    directory: Path
    folder: Folder
    names: Collection[str]
    config: dict[str, Any]
    kept: list[str]
    repository: Repository | None = None

    def with_files(self, names: Collection[str]) -> "ModelFolder":
        """Fetch more of a hub repository; a folder of another kind has all that there is."""
        if self.repository is None:
            return self
        directory = self.repository.download([*self.folder.files, *names])
        return replace(self, directory=directory, folder=_listed(directory))


def open_model_folder(path: str, revision: str | None) -> ModelFolder:
    """Find a model's folder, and bring its small files here.

    Args:
        path: a directory, a URL, a hub id, or `modelscope://organization/name`.
        revision: branch, tag or commit of the hub repository.

    Raises:
        ConfigError: nothing there, no config.json, files that are damaged or links to elsewhere.
    """
    check_model_path(path)
    if path.startswith(modelscope_hub.PREFIX):
        return _open_repository(modelscope_hub.find_repository(path, revision))
    if is_url(path):
        return _open_remote(path, revision)
    if not Path(path).expanduser().exists():
        return _open_repository(hub.find_repository(path, revision))
    directory = _check_directory(path, revision)
    folder = _listed(directory)
    _check_names(path, folder.files)
    return _with_config(directory, folder, folder.files)


def _open_remote(url: str, revision: str | None) -> ModelFolder:
    if revision is not None:
        raise ConfigError(
            f"model.revision: got {revision!r} with the URL {url!r}, expected null; a revision of "
            "the hub is a part of the URL: hf://organization/name@revision"
        )
    folder = open_folder(url, "model.path", SUBFOLDERS)
    _check_names(url, folder.files)
    directory = copied(folder, ())
    _fetch_small(folder.files, lambda names: copied(folder, names, directory))
    return _with_config(directory, folder, folder.files)


def _open_repository(repository: Repository) -> ModelFolder:
    if repository.cached is not None:
        folder = _listed(repository.cached)
        _check_names(repository.name, folder.files)
        return _with_config(repository.cached, folder, folder.files)
    _check_names(repository.name, repository.files)
    indexes = [file for file in repository.files if file.endswith(_INDEX) and "/" not in file]
    directory = _fetch_small(
        repository.files, lambda names: repository.download([*names, *indexes])
    )
    return _with_config(directory, _listed(directory), repository.files, repository)


def _fetch_small(names: Collection[str], fetch: Fetch) -> Path:
    """Bring config.json here, then the files that belong to such a model."""
    directory = fetch([name for name in DECIDING if name in names])
    _check_files(directory, [CONFIG])
    config = read_object(directory / CONFIG, "model.path")
    tokenizer_config = read_tokenizer_config(_listed(directory))
    return fetch(wanted_names(names, config, tokenizer_config))


def _with_config(
    directory: Path,
    folder: Folder,
    names: Collection[str],
    repository: Repository | None = None,
) -> ModelFolder:
    """Read what lies on this machine by now."""
    small = _listed(directory)
    _check_files(directory, [name for name in DECIDING if name in small.files])
    config = read_object(directory / CONFIG, "model.path")
    kept = kept_files(small, config)
    _check_files(directory, [*kept, *(n for n in small.files if n.endswith(_INDEX))])
    return ModelFolder(directory, folder, names, config, kept, repository)


def _check_files(directory: Path, names: Sequence[str]) -> None:
    """Refuse files that are not themselves: links to elsewhere, and what git-lfs leaves."""
    raise_all(links_out(directory, names))
    raise_all(
        lfs_problem(directory / name, "model.path")
        for name in names
        if not name.endswith(_INDEX) and is_lfs_pointer(directory / name)
    )


def _check_directory(path: str, revision: str | None) -> Path:
    local = Path(path).expanduser()
    if revision is not None:
        raise ConfigError(
            f"model.revision: got {revision!r} with the local directory {path!r}, expected null; "
            "a revision selects a version on the hub"
        )
    return local


def _check_names(path: str, names: Collection[str]) -> None:
    if CONFIG not in names:
        hint = "; it holds a PEFT adapter, give its path as adapter.path"
        found = f"; found {some([name for name in names if '/' not in name])}"
        raise ConfigError(
            f"model.path: got {path!r}, expected a model directory with {CONFIG}"
            f"{hint if ADAPTER_CONFIG in names else found}"
        )


def _listed(directory: Path) -> Folder:
    return open_folder(directory, "model.path", SUBFOLDERS)


def some(names: Iterable[str]) -> str:
    """Write the first names, and how many more there are."""
    known = sorted(names)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return ", ".join(known[:_MOST_NAMES]) + more if known else "nothing"
