# SPDX-License-Identifier: Apache-2.0
"""Snapshots of runs as one HTML file, which needs nothing beside it and no network.

In: snapshots. Out: the text of the page: `page.html` with the style, the script, and the snapshots
as JSON in it. What runs say (names, paths, configurations) is data to the script, which never takes
it for HTML; and the page's policy lets this script and this style alone work, and loads nothing.
Not done here: drawing (`marks.js`, `curves.js`, `page.js`).
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import resources

import dsjax
from dsjax.view.snapshot import Snapshot

SCRIPTS = ("marks.js", "curves.js", "page.js")
"""The parts of the page's script, in the order in which they need one another."""


def to_html(runs: Sequence[Snapshot], made: datetime) -> str:
    """Write the page of some runs.

    Args:
        runs: what they have written.
        made: when that was, with a time zone.
    """
    data = {
        "made": f"{made:%Y-%m-%d %H:%M:%S %Z}",
        "version": dsjax.__version__,
        "runs": [asdict(run) for run in runs],
        "differences": differences(runs),
    }
    style, script = _file("page.css"), "\n".join(map(_file, SCRIPTS))
    parts = {
        "STYLE": style,
        "SCRIPT": script,
        "STYLE_HASH": source_of(style),
        "SCRIPT_HASH": source_of(script),
        "DATA": to_json(data),
    }
    # All at once: what is put in is not looked through.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def differences(runs: Sequence[Snapshot]) -> list[tuple[str, list[str | None]]]:
    """List the keys of the configurations whose YAML is not the same in all runs.

    `output_dir` is not among them: it always differs.

    Returns:
        (section and key, the YAML of each run, None where a run does not have the key), in the
        order in which keys come up.
    """
    texts = [{(section, key): text for section, key, text in run.config} for run in runs]
    keys = dict.fromkeys(name for of_run in texts for name in of_run)
    keys.pop(("", "output_dir"), None)
    found = [(name, [of_run.get(name) for of_run in texts]) for name in keys]
    return [(".".join(filter(None, name)), of_runs) for name, of_runs in found if _differ(of_runs)]


def _differ(texts: Sequence[str | None]) -> bool:
    return len(set(texts)) > 1


def to_json(data: object) -> str:
    """Write JSON that can stand in a `<script>`: no text in it ends that, or begins a comment."""
    return json.dumps(data, allow_nan=False).replace("<", r"\u003c")


def _file(name: str) -> str:
    return resources.files("dsjax.view").joinpath(name).read_text("utf-8")


def source_of(text: str) -> str:
    """Return what a content security policy calls the script, or style, of a text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
