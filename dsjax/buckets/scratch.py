# SPDX-License-Identifier: Apache-2.0
"""Folders on this machine for what goes to a bucket, or came from there: each process has its own.

In: a URL. Out: a path in the temporary directory (`TMPDIR`); what killed processes of this machine
have left for the same URL is removed. Not done here: making the folder, and filling it.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def scratch_folder(url: str) -> Path:
    """Name this process's folder for a URL."""
    return Path(tempfile.gettempdir()) / f"{_prefix(url)}{os.getpid()}"


def remove_left_behind(url: str) -> None:
    """Remove the folders for a URL of processes that are no more, and this process's."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(url)}*"):
        process = folder.name.removeprefix(_prefix(url))
        if process == str(os.getpid()) or (process.isdecimal() and not process_lives(int(process))):
            shutil.rmtree(folder, ignore_errors=True)


def _prefix(url: str) -> str:
    name = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return f"dsjax-{name}-"


def process_lives(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
