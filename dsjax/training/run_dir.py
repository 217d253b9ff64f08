# SPDX-License-Identifier: Apache-2.0
"""A run's output directory: the names of its files, and the lock that one process holds on it.

In: the configuration. Out: `RunDir`, which knows where everything lies; a directory that all
processes of the run share, and that no other run changes meanwhile. Not done here: the files'
contents (`checkpoint`, `metrics_log`, `eval_results`, `export`), an earlier run's (`resume`).
"""

import json
import os.path
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from dsjax import signals
from dsjax.config import RunConfig, load_config
from dsjax.distributed.coordinator import numbered
from dsjax.distributed.lock_file import LOCK_FILE, locked
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.weights.folders import check_possible

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
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Return the file with a line for each logged step and evaluation."""
        return self.path / "metrics.jsonl"

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


def run_config(run: RunDir) -> RunConfig:
    """Read the resolved configuration of a run."""
    if not run.config.is_file():
        raise ConfigError(
            f"--run: got {str(run)!r}, expected the output_dir of a run; no {run.config}"
        )
    return load_config(run.config)


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


SHARED_WITHIN = 20.0
"""Seconds after which a file that one process wrote must be there for the others."""


def check_shared(run: RunDir, hosts: Hosts, within: float = SHARED_WITHIN) -> None:
    """Prove that the output directory is one and the same for all processes of the run.

    Process 0 leaves a file where the directory is, or is going to be, for as long as it takes.

    Raises:
        ConfigError: some process does not see it.
    """
    if hosts.count == 1:
        return
    check_possible(run.path, "output_dir")
    places = (run.path.absolute(), *run.path.absolute().parents)

    def leave() -> tuple[int, str]:
        name = f".dsjax-{uuid.uuid4().hex}"
        for above, place in enumerate(places):
            with suppress(FileNotFoundError, NotADirectoryError):
                (place / name).touch()
                return above, name
        raise FileNotFoundError(run.path)

    above, name = hosts.broadcast_from_primary(leave)
    # Where the working directory is not as deep as process 0's, the folder may be another's.
    place = places[min(above, len(places) - 1)]
    token, deadline = place / name, time.monotonic() + within
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = hosts.all_gather_text(json.dumps(token.exists()))
    if hosts.primary:
        token.unlink()
    blind = [process for process, answer in enumerate(seen) if not json.loads(answer)]
    if blind:
        raise ConfigError(
            f"output_dir: got {str(run)!r}, which is another folder for {numbered(blind)} than for "
            "process 0, expected one that all share; use an absolute path on NFS, Filestore, "
            "Lustre or a mounted bucket"
        )


@contextmanager
def locked_run_dir(run: RunDir, hosts: Hosts | None = None, keep: bool = True) -> Iterator[None]:
    """Make the output directory and lock it, before anything in it is looked at, to the end.

    Of several processes the first does so, for all. A run that is refused leaves no folder that was
    not there before.

    Args:
        run: the run's files.
        hosts: this process among those of the run; None for a process alone.
        keep: False leaves no such folder either where nothing is refused.

    Raises:
        ConfigError: another process is training there, or no folder can be made.
    """
    hosts = hosts or Hosts()
    check_possible(run.path, "output_dir")
    check_shared(run, hosts)
    if not hosts.primary:
        hosts.barrier()
        _await_folder(run.path)
        yield
        return
    made = [
        place for place in (run.path.absolute(), *run.path.absolute().parents) if not place.exists()
    ]
    refusal = (
        f"output_dir: got {str(run)!r}, in which another process is training, expected none; "
        "wait for it, or choose another output_dir"
    )
    checkpoints = [run.checkpoints] if made else []
    with (
        _removed_if_refused(made, keep),
        locked(run.lock, refusal),
        _removed_if_refused(checkpoints, keep),  # while it is locked: they could be another's
    ):
        hosts.barrier()
        yield


@contextmanager
def _removed_if_refused(folders: Sequence[Path], keep: bool) -> Iterator[None]:
    """Remove folders, as far as they are empty, if an error or a signal ends the block.

    Or whatever ends it, unless they are to be kept.
    """

    def remove() -> None:
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            for folder in folders:
                folder.rmdir()

    try:
        with signals.undone(remove):
            yield
    except Exception:
        remove()
        raise
    if not keep:
        remove()


def make_for_all(folder: Path, hosts: Hosts) -> None:
    """Make a folder as process 0; the others wait until they see it."""
    if hosts.primary:
        folder.mkdir(exist_ok=True)
    hosts.barrier()
    _await_folder(folder)


def _await_folder(folder: Path, within: float = 90.0) -> None:
    """Wait for what process 0 has made: NFS remembers for a while that it was not there."""
    deadline = time.monotonic() + within
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"output_dir: got no {str(folder)!r} here {within:g} s after process 0 made it, "
                "expected a folder that all processes share"
            )
        time.sleep(0.1)
