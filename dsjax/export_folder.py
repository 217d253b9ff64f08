# SPDX-License-Identifier: Apache-2.0
"""Whose an export's folder is: what may be replaced, and what is there already.

In: a run's configuration and what its training summed up to. Out: the marker that lies in every
export, and a refusal of every folder that is not this run's own. Not done here: what else an export
holds (export.py).
"""

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.assembly import CHECKPOINTS
from dsjax.config import RunConfig, identity
from dsjax.errors import ConfigError
from dsjax.folders import check_empty

MARKER = "dsjax_export.json"
"""Says that an export is ours and what it is of."""


def export_marker(
    config: RunConfig, form: str, step: int, sums: Mapping[str, float]
) -> dict[str, Any]:
    """What an export says it is; two trainings that differ in anything have different markers.

    Args:
        config: the run's.
        form: merged or peft.
        step: the optimizer step that is exported.
        sums: of the loss and the tokens up to that step, as its checkpoint holds them. They tell
            apart what the configuration does not: other rows in files of the same names.
    """
    marker = {
        "format": form,
        "step": step,
        "model": config.model.path,
        "run": identity(config),
        "sums": dict(sums),
    }
    return marker | ({"dtype": config.export.dtype} if config.export.dtype else {})


def read_marker(out: Path) -> dict[str, Any] | None:
    """What the export in a folder says it is; None if there is none of ours."""
    file = out / MARKER
    try:
        marker = json.loads(file.read_text("utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) else None


def write_marker(folder: Path, marker: Mapping[str, Any]) -> None:
    """Mark a folder whose files are all written; the sizes tell later whether all are there."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    text = json.dumps({**marker, "files": files})
    (folder / MARKER).write_text(text + "\n", "utf-8")


def is_exported(out: Path, marker: Mapping[str, Any]) -> bool:
    """Whether a folder holds this very export, whole."""
    found = read_marker(out) or {}
    files = found.pop("files", {})
    there = all((out / n).is_file() and (out / n).stat().st_size == s for n, s in files.items())
    return found == marker and there


def check_replaceable(out: Path, config: RunConfig, field: str = "export.path") -> None:
    """Refuse to replace a folder with anything in it but this run's own export.

    Raises:
        ConfigError: what the run reads or writes lies there, or somebody's files, or the export of
            another run.
    """
    for key, path in _needed(config):
        if path.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{field}: got {str(out)!r}, in which {key} ({str(path)!r}) lies, expected a "
                "folder that holds nothing but the export"
            )
    marker = read_marker(out)
    if marker is None:
        check_empty(out, field)
    elif marker.get("run") != identity(config):
        raise ConfigError(
            f"{field}: got {str(out)!r}, which holds the export of another run (of "
            f"{marker.get('model')!r}, step {marker.get('step')}), expected this run's own or a "
            "new folder; choose another, or remove that one"
        )


def _needed(config: RunConfig) -> list[tuple[str, Path]]:
    """The files and folders that a run reads or writes, with their keys; hub ids left out."""
    run, data = Path(config.output_dir), config.data
    read = [("model.path", config.model.path), ("adapter.path", config.adapter.path)]
    for key, sources in (("data.train", data.train), ("data.eval", data.eval or [])):
        read += [(key, name) for s in sources for name in (s, *glob.glob(s, recursive=True))]
    there = [(key, Path(name)) for key, name in read if name is not None and Path(name).exists()]
    return [*there, *(("output_dir", run / name) for name in (".", CHECKPOINTS, "tensorboard"))]
