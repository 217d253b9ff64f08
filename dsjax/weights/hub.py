# SPDX-License-Identifier: Apache-2.0
"""Bring a model repository of the Hugging Face hub to this machine, or find it in the hub's cache.

In: a hub id and a revision. Out: the names of the repository's files, and a local directory that
holds those that are asked for. Not here: which are needed and whether they are sound
(`model_folder`, `hf_directory`). HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME are honoured by
huggingface_hub itself.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import huggingface_hub

from dsjax.errors import ConfigError
from dsjax.weights.repository import Repository


def find_repository(name: str, revision: str | None) -> Repository:
    """Ask the hub for a repository's files; without the hub, look into its cache.

    Raises:
        ConfigError: the hub refuses or cannot be reached, and the repository is not cached.
    """
    fetch = partial(_download, name, revision)
    # Trap: the hub client's HTTP errors have other roots in each version (requests, httpx, httpx2),
    # so all are caught. Not `list_repo_files`: without a network it retries for 23 seconds.
    try:
        siblings = huggingface_hub.model_info(name, revision=revision).siblings or []
    except Exception as error:
        return Repository(name, (), fetch, _find_in_cache(name, revision, error))
    return Repository(name, tuple(sibling.rfilename for sibling in siblings), fetch)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns)
            )
        )
    except Exception as error:
        raise ConfigError(_problem(name, revision, error)) from error


def _find_in_cache(name: str, revision: str | None, reason: Exception) -> Path:
    # Asking for the config alone: only a part of the repository was ever downloaded, and whether
    # that part is whole the checks of `hf_directory` find out.
    try:
        directory = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except (OSError, ValueError):
        raise ConfigError(_problem(name, revision, reason)) from reason
    if not (Path(directory) / "config.json").is_file():
        raise ConfigError(_problem(name, revision, reason)) from reason
    return Path(directory)


def _problem(name: str, revision: str | None, reason: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    text = " ".join(str(reason).split())
    return (
        f"model.path: got {name!r}{at}, expected a local directory or a hub repository that is "
        "cached or can be downloaded; there is no such directory, it is not in the cache, and the "
        f"hub could not be used ({type(reason).__name__}: {text})"
    )
