# SPDX-License-Identifier: Apache-2.0
"""Bring a model repository of ModelScope to this machine, or find it in ModelScope's cache.

In: `modelscope://organization/name` and a revision. Out: as for the Hugging Face hub (`hub`), the
names of the repository's files, and a local directory that holds those that are asked for. Not
here: which are needed (`model_folder`). The library, an extra of dsjax, itself honours
MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE and MODELSCOPE_API_TOKEN.
"""

import re
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsjax.errors import ConfigError
from dsjax.weights.repository import Repository

PREFIX = "modelscope://"
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_repository(path: str, revision: str | None) -> Repository:
    """Ask ModelScope for a repository's files; without it, look into its cache.

    Raises:
        ConfigError: no such repository, no way to it, or its library is not installed.
    """
    name = path.removeprefix(PREFIX)
    if not _ID.fullmatch(name):
        raise ConfigError(f"model.path: got {path!r}, expected {PREFIX}organization/name")
    if find_spec("modelscope") is None:
        raise ConfigError(
            f"model.path: got {path!r}, expected the library that reads {PREFIX}, which is not "
            "installed; pip install modelscope"
        )
    api: Any = import_module("modelscope.hub.api")
    fetch = partial(_download, name, revision)
    try:
        # Older versions list folders as well.
        entries = api.HubApi().get_model_files(name, revision=revision, recursive=True)
        files = [entry["Path"] for entry in entries if entry.get("Type") != "tree"]
    except Exception as error:  # of several libraries
        return Repository(name, (), fetch, _find_in_cache(name, revision, error))
    return Repository(name, tuple(files), fetch)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    library: Any = import_module("modelscope")
    try:
        found = Path(
            library.snapshot_download(name, revision=revision, allow_patterns=list(patterns))
        )
        # Trap: some versions log the files that failed, and return.
        missing = [pattern for pattern in patterns if not any(found.glob(pattern))]
        if missing:
            raise FileNotFoundError(f"{missing[0]} was not downloaded")
    except Exception as error:
        raise ConfigError(_problem(name, revision, error)) from error
    return found


def _find_in_cache(name: str, revision: str | None, reason: Exception) -> Path:
    library: Any = import_module("modelscope")
    try:
        found = Path(library.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        raise ConfigError(_problem(name, revision, reason)) from reason
    if not (found / "config.json").is_file():
        raise ConfigError(_problem(name, revision, reason)) from reason
    return found


def _problem(name: str, revision: str | None, reason: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    text = " ".join(str(reason).split())
    return (
        f"model.path: got {PREFIX + name!r}{at}, expected a repository of ModelScope that is "
        "cached or can be downloaded; it is not in the cache, and ModelScope could not be used "
        f"({type(reason).__name__}: {text})"
    )
