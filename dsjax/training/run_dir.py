# SPDX-License-Identifier: Apache-2.0
"""A run's output directory: the names of its files.

In: the configuration. Out: `RunDir`, which knows where everything lies; what the folder says it is
of. Not done here: the folder's lock (`run_lock`), the files' contents (`checkpoint`, `metrics_log`,
`eval_results`, `export`), an earlier run's (`resume`). jax is not imported, so that a command which
only looks at a run starts at once.
"""

import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from dsjax.config import RunConfig, load_config
from dsjax.config.inputs import check_run_dir
from dsjax.config.paths import METRICS, RUN_CONFIG
from dsjax.distributed.lock_file import LOCK_FILE

BOARD = "tensorboard"
"""Folder of TensorBoard's files and of profiles."""


@dataclass(frozen=True)
class RunDir:
    """The files of a run by their names; none of them need be there.

    Attributes:
        path: `output_dir`.
        export_path: `export.path`; None where the export lies in the output directory.
    """

    path: Path
    export_path: str | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "RunDir":
        """Name the files of the run of a configuration."""
        return cls(Path(config.output_dir), config.export.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """Return the file of the resolved configuration."""
        return self.path / RUN_CONFIG

    @property
    def metrics(self) -> Path:
        """Return the file with a line for each logged step and evaluation."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """Return the folder with a folder for each saved step."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of TensorBoard's files and of profiles."""
        return self.path / BOARD

    @property
    def loss_plot(self) -> Path:
        """Return the picture of the losses."""
        return self.path / "training_loss.png"

    @property
    def eval_results(self) -> Path:
        """Return the file of the final evaluation."""
        return self.path / "eval_results.json"

    @property
    def view(self) -> Path:
        """Return the page of the command that shows the run."""
        return self.path / "view.html"

    @property
    def export(self) -> Path:
        """Return the folder of the export."""
        return Path(self.export_path or self.path / "export")

    @property
    def tracker_id(self) -> Path:
        """Return the file with the name that a tracker knows the run by."""
        return self.path / "tracker_id"

    @property
    def pushed(self) -> Path:
        """Return the file that says what was uploaded to the hub."""
        return self.path / "pushed.json"

    @property
    def lock(self) -> Path:
        """Return the file that is there as long as a process trains."""
        return self.path / LOCK_FILE


def fresh_path(path: str) -> str:
    """Return the first of `path`, `path-2`, `path-3` and so on that is not there."""
    named = os.path.basename(path.rstrip("/")) not in ("", ".", "..")
    base = os.path.normpath(path) if named else os.path.abspath(path)
    beside = (f"{base}-{number}" for number in count(2))
    return next(place for place in chain([path], beside) if not os.path.lexists(place))


def run_config(run: RunDir, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the resolved configuration of a run, with words of a command line over it."""
    check_run_dir(str(run), "--run")
    return load_config(run.config, overrides)


MANIFEST = "dsjax_export.json"
"""Says that an export is ours and what it is of."""


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Read what the export in a folder says it is; None if there is none of ours."""
    file = out / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None
