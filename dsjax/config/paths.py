# SPDX-License-Identifier: Apache-2.0
"""Which paths are URLs, and by which files a run's or a checkpoint's folder is known.

In: a path as a configuration or a command line names it. Out: whether it is a URL, and the message
where only a folder will do. Not done here: reading what lies there (`weights.storage`).
"""

import re

RUN_CONFIG, METRICS = "config.yaml", "metrics.jsonl"
"""In a run's folder: its resolved configuration, and the lines of its steps."""

FLAX_MANIFEST = "dsjax_checkpoint.json"
"""In a checkpoint that `convert to-flax` wrote: what it holds."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://.")


def is_url(path: str) -> bool:
    """Whether a path is a URL, and no path or hub id."""
    return _URL.match(path) is not None


def written_to_url(path: str, config_field: str) -> str:
    """Write the message for a URL where something is to be written."""
    return (
        f"{config_field}: got {path!r}, expected a folder of a file system; write it there, "
        "and copy it to the bucket"
    )
