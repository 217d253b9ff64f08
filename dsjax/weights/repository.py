# SPDX-License-Identifier: Apache-2.0
"""A model repository of a hub, whichever hub that is.

In: what a hub said of it. Out: the names of its files, and a directory that holds those that are
asked for. Not here: asking a hub (`hub`, `modelscope_hub`), and which are needed (`model_folder`).
"""

import glob
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Repository:
    """A model repository of a hub.

    Attributes:
        name: its id, `organization/name`.
        files: names of all its files; empty where the hub could not be asked.
        fetch: brings the files that match patterns to this machine; gives their directory.
        cached: where it lies on this machine, if the hub could not be asked.
    """

    name: str
    files: tuple[str, ...]
    fetch: Callable[[Sequence[str]], Path]
    cached: Path | None = None

    def download(self, wanted: Collection[str]) -> Path:
        """Bring files to this machine; without the hub, take what is cached.

        Returns:
            The directory that holds them, and what of the same revision was fetched earlier.

        Raises:
            ConfigError: the download fails.
        """
        return self.cached or self.fetch([glob.escape(file) for file in wanted])
