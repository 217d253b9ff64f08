# SPDX-License-Identifier: Apache-2.0
"""Bring a model repository of the Hugging Face hub to this machine, or find it in the hub's cache.

In: a hub id, a revision and a choice among the repository's files. Out: a local directory.
Not here: which files are needed and whether they are sound (`hf_files`). HF_HUB_OFFLINE, HF_TOKEN
and HF_HOME are honoured by huggingface_hub itself.
"""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub

from dsjax.errors import ConfigError


def fetch(
    name: str, revision: str | None, choose: Callable[[Sequence[str]], Sequence[str]]
) -> Path:
    """Download the chosen files of a model repository; without the hub, take what is cached.

    Args:
        name: hub id, `organization/name`.
        revision: branch, tag or commit; None for the main branch.
        choose: picks the files to download from the names of all files.

    Raises:
        ConfigError: the hub refuses or cannot be reached, and the repository is not cached.
    """
    # Trap: the hub client's HTTP errors have other roots in each version (requests, httpx, httpx2),
    # so all are caught. Not `list_repo_files`: without a network it retries for 23 seconds.
    try:
        siblings = huggingface_hub.model_info(name, revision=revision).siblings or []
    except Exception as error:
        return _find_in_cache(name, revision, error)
    wanted = choose([sibling.rfilename for sibling in siblings])
    try:
        directory = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]
        )
    except Exception as error:
        raise ConfigError(_problem(name, revision, error)) from error
    return Path(directory)


def _find_in_cache(name: str, revision: str | None, reason: Exception) -> Path:
    # Asking for the config alone: only a part of the repository was ever downloaded, and whether
    # that part is whole the checks of `hf_files` find out.
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
