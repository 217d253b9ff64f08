# SPDX-License-Identifier: Apache-2.0
"""A run's output directory: the names of its files.

In: the configuration. Out: `RunDir`, which knows where everything lies; what the folder says it is
of. Of a run in a bucket the small files lie in a working copy on this machine (`working_copy`),
checkpoints and the export in the bucket. Not done here: the folder's lock (`run_lock`), the files'
contents (`checkpoint`, `metrics_log`, `eval_results`, `export`), an earlier run's (`resume`). jax
is not imported, so that a command which only looks at a run starts at once.
"""

import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from dsjax.buckets import Bucket, Place, open_place, scratch_folder
from dsjax.config import RunConfig, load_config
from dsjax.config.inputs import check_run_dir
from dsjax.config.paths import METRICS, RUN_CONFIG, is_url
from dsjax.distributed.lock_file import LOCK_FILE

CHECKPOINTS = "checkpoints"
"""Folder of the saved steps."""
BOARD = "tensorboard"
"""Folder of TensorBoard's files and of profiles."""


@dataclass(frozen=True)
class RunDir:
    """The files of a run by their names; none of them need be there.

    Attributes:
        path: `output_dir`; of one in a bucket, the working copy.
        export_path: `export.path`; None where the export lies in the output directory.
        url: `output_dir` of a run in a bucket, else None.
    """

    path: Path
    export_path: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "RunDir":
        """Name the files of the run of a configuration."""
        return cls.at(config.output_dir, config.export.path)

    @classmethod
    def at(cls, place: str, export_path: str | None = None) -> "RunDir":
        """Name the files of the run in a folder, or behind a URL."""
        if not is_url(place):
            return cls(Path(place), export_path)
        url = place.rstrip("/")
        return cls(scratch_folder(url), export_path, url)

    def __str__(self) -> str:
        return self.url or str(self.path)

    @property
    def name(self) -> str:
        """Return what the folder is called."""
        return self.url.rpartition("/")[2] if self.url else self.path.absolute().name

    @property
    def bucket(self) -> Bucket | None:
        """Return the folder in a bucket; None for one on a file system."""
        return Bucket.open(self.url, "output_dir") if self.url else None

    def shown(self, file: Place) -> str:
        """Name a file of the run for messages: where it lies in the end."""
        if self.url and isinstance(file, Path) and file.is_relative_to(self.path):
            return f"{self.url}/{file.relative_to(self.path).as_posix()}"
        return str(file)

    @property
    def config(self) -> Path:
        """Return the file of the resolved configuration."""
        return self.path / RUN_CONFIG

    @property
    def metrics(self) -> Path:
        """Return the file with a line for each logged step and evaluation."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Place:
        """Return the folder with a folder for each saved step."""
        return self._inside(CHECKPOINTS)

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
    def export(self) -> Place:
        """Return the folder of the export."""
        if self.export_path:
            return open_place(self.export_path, "export.path")
        return self._inside("export")

    def _inside(self, name: str) -> Place:
        bucket = self.bucket
        return bucket.folder(name) if bucket else self.path / name

    @property
    def tracker_id(self) -> Path:
        """Return the file with the name that a tracker knows the run by."""
        return self.path / "tracker_id"

    @property
    def pushed(self) -> Path:
        """Return the file that says what was uploaded to the hub."""
        return self.path / "pushed.json"

    @property
    def small_files(self) -> set[str]:
        """Return the names of the files that a start, or a look at the run, reads."""
        files = (self.config, self.metrics, self.loss_plot, self.eval_results)
        return {file.name for file in (*files, self.tracker_id, self.pushed)}

    @property
    def lock(self) -> Path:
        """Return the file that is there as long as a process trains."""
        return self.path / LOCK_FILE


def fresh_path(path: str) -> str:
    """Return the first of `path`, `path-2`, `path-3` and so on that is not there."""
    if is_url(path):
        beside = (f"{path.rstrip('/')}-{number}" for number in count(2))
        return next(url for url in chain([path], beside) if not _is_bucket_folder(url))
    named = os.path.basename(path.rstrip("/")) not in ("", ".", "..")
    base = os.path.normpath(path) if named else os.path.abspath(path)
    beside = (f"{base}-{number}" for number in count(2))
    return next(place for place in chain([path], beside) if not os.path.lexists(place))


def _is_bucket_folder(url: str) -> bool:
    folder = Bucket.open(url, "output_dir")
    return bool(folder.files() or folder.folders())


def run_config(run: RunDir, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the resolved configuration of a run, with words of a command line over it."""
    check_run_dir(run.path, "--run", str(run))
    return load_config(run.config, overrides)


MANIFEST = "dsjax_export.json"
"""Says that an export is ours and what it is of."""


def read_manifest(out: Place) -> dict[str, Any] | None:
    """Read what the export in a folder says it is; None if there is none of ours."""
    if isinstance(out, Bucket):
        text = out.read_if_there(MANIFEST)
    else:
        file = out / MANIFEST
        text = file.read_bytes() if file.is_file() else None
    try:
        manifest = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None
