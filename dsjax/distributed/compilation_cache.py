# SPDX-License-Identifier: Apache-2.0
"""Compiled programs on disk, so that what was compiled once is read by the next start.

In: the environment. Out: jax's persistent compilation cache, switched on, in the user's cache home.
jax's own variables hold as ever: JAX_COMPILATION_CACHE_DIR names another folder, or a bucket,
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. Not done here: the cache itself.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

MAX_BYTES = 10 * 2**30
"""What all programs in the default folder may take; the one unused for longest goes first."""


def keep_compiled(environment: Mapping[str, str]) -> str | None:
    """Let jax keep its compiled programs, unless it was told where, or to keep none.

    For a process alone: where several compile one program together, all have to find it or none,
    which only a folder that all of them share can give.

    Args:
        environment: of this process.

    Returns:
        Where they are kept; None: nowhere.
    """
    settings: Any = jax.config
    if settings.jax_enable_compilation_cache and settings.jax_compilation_cache_dir is None:
        try:
            home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(home) / "dsjax" / "compiled"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # a user of a container may have no home
            return None
        if not os.access(folder, os.W_OK):
            return None
        _remove_torn(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return place_of_programs()


def place_of_programs() -> str | None:
    """Return where jax keeps its compiled programs; None: nowhere."""
    settings: Any = jax.config
    return settings.jax_compilation_cache_dir if settings.jax_enable_compilation_cache else None


def _remove_torn(folder: Path) -> None:
    """Remove what a killed process was writing: jax would warn of it at every start.

    jax writes a program first and the time of its last use after it.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            with suppress(OSError):
                program.unlink()
