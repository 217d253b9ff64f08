# SPDX-License-Identifier: Apache-2.0
"""The final evaluation's file, `eval_results.json`: of what weights and of what rows it is.

In: results, and what they are of. Out: the file; and whether the one that lies there is the wanted
one. Not done here: evaluating (`evaluation`), deciding when (`loop`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.distributed.checksums import digest
from dsjax.training.run_dir import RunDir
from dsjax.weights.folders import write_atomic


def evaluation_manifest(step: int, sums: Mapping[str, float], rows: str) -> dict[str, Any]:
    """Return what an evaluation says it is of.

    Args:
        step: the optimizer step.
        sums: of loss and tokens up to it, which tell one training from another.
        rows: fingerprint of the rows.
    """
    return {"step": step, "run": digest(dict(sums)), "data": rows}


def write_results(run: Path, manifest: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write the results of an evaluation, so that they are there whole or not at all."""
    write_atomic(RunDir(run).eval_results, json.dumps({**manifest, **values}, indent=2) + "\n")


def is_evaluated(run: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a run's folder holds this very evaluation."""
    found = _read(run)
    return "eval_loss" in found and all(found.get(k) == value for k, value in manifest.items())


def evaluated_rows(run: Path) -> str:
    """Fingerprint of the rows that a run was evaluated on; empty if it was not."""
    return str(_read(run).get("data", ""))


def _read(run: Path) -> dict[str, Any]:
    try:
        found = json.loads(RunDir(run).eval_results.read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}  # not there, or damaged: it is made again
    return found if isinstance(found, dict) else {}
