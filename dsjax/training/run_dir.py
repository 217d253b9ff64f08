# SPDX-License-Identifier: Apache-2.0
"""A run's output directory: what an earlier run left there, and what may follow it.

In: the configuration and what the data are. Out: how far an earlier run came, or a refusal. Not
done here: the files' contents (`checkpoint`, `metrics_log`, `export`).
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from dsjax import signals
from dsjax.config import RunConfig, load_config
from dsjax.distributed.coordinator import numbered
from dsjax.distributed.lock_file import LOCK_FILE, locked
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training.checkpoint import CHECKPOINTS, Checkpointer
from dsjax.training.continuation import differing_keys
from dsjax.training.metrics_log import METRICS_FILE, read_metrics
from dsjax.weights.folders import check_possible


def run_config(run: Path) -> RunConfig:
    """The resolved configuration of a run."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"--run: got {str(run)!r}, expected the output_dir of a run; no {file}")
    return load_config(file)


MANIFEST = "dsjax_export.json"
"""Says that an export is ours and what it is of."""


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What the export in a folder says it is; None if there is none of ours."""
    file = out / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8")) if file.is_file() else None
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


SHARED_WITHIN = 20.0
"""Seconds after which a file that one process wrote must be there for the others."""

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class ResumePoint:
    """What an earlier run has done, and what it began with; of a new run, nothing and now.

    Attributes:
        step: the optimizer steps that are done.
        started: when the first of its starts was.
        meta: what its newest checkpoint holds beside the state.
        val_size: of its configuration.
    """

    step: int
    started: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    val_size: int | float | None = None

    @property
    def sums(self) -> Mapping[str, float]:
        """What loss and tokens summed up to."""
        return self.meta["meter"]["run"] if self.meta else {}


def find_resume_point(run: Path, config: RunConfig) -> ResumePoint:
    """Look at what lies in the output directory.

    A run that ended before its first checkpoint left nothing to go on with and nothing to protect:
    another configuration may begin in its place.

    Raises:
        ConfigError: another configuration's run, or a checkpoint that cannot be read.
    """
    file, folder = run / CONFIG_FILE, run / CHECKPOINTS
    old = earlier_config(file) if file.is_file() else None
    open_reader = partial(Checkpointer, folder, config.checkpoint, read_only=True)
    done = None
    if folder.is_dir():
        with closing(open_reader()) as reader:
            done = reader.latest()
    if old is not None and (done is not None or _has_results(run, old)):
        _check_same(old, config)
    if done is None:
        return ResumePoint(0, datetime.now().isoformat(timespec="seconds"))
    if old is None:  # of what configuration, nobody knows
        raise ConfigError(
            f"output_dir: got {str(run)!r}, which holds checkpoints without {CONFIG_FILE}, "
            "expected a run's or a new directory; choose another output_dir"
        )
    with closing(open_reader()) as reader:
        meta = reader.meta(done)
    return ResumePoint(done, meta["started"], meta, old.data.val_size)


def _check_same(old: RunConfig, new: RunConfig) -> None:
    changed = differing_keys(old, new)
    if changed:
        raise ConfigError(
            f"output_dir: got {new.output_dir!r}, which holds a run with other "
            f"{', '.join(changed)}, expected the same configuration; choose another output_dir, or "
            "remove that one"
        )


def _has_results(run: Path, config: RunConfig) -> bool:
    """Whether a run came to its end, and left more than checkpoints."""
    rows = read_metrics(run / METRICS_FILE)
    return read_manifest(export_path(config)) is not None or any(
        "train_loss" in row for row in rows
    )


def split_as_before(config: RunConfig, earlier: ResumePoint, hosts: Hosts) -> RunConfig:
    """The configuration by which a run's rows are parted as when it began.

    A start that leaves out `data.val_size` leaves out the evaluation, and nothing else: what was
    held out stays out of the training, which is told. Any other gets what it gave, the same object.
    """
    data, held = config.data, earlier.val_size
    if held is None or data.val_size is not None or data.eval is not None:
        return config
    hosts.log_once(
        f"data.val_size: the rows that the run began to hold out ({held}) stay out of its "
        "training, and are not evaluated"
    )
    return config.model_copy(update={"data": data.model_copy(update={"val_size": held})})


def earlier_config(file: Path) -> RunConfig:
    """The configuration that a run left in its output directory."""
    try:
        return load_config(file)
    except ConfigError as error:
        raise ConfigError(
            f"output_dir: got {str(file.parent)!r}, whose {file.name} is not one that a run wrote, "
            f"expected a run's or a new directory; choose another output_dir\n{error}"
        ) from error


def check_shared(run: Path, hosts: Hosts, within: float = SHARED_WITHIN) -> None:
    """Prove that the output directory is one and the same for all processes of the run.

    Process 0 leaves a file where the directory is, or is going to be, for as long as it takes.

    Raises:
        ConfigError: some process does not see it.
    """
    if hosts.count == 1:
        return
    check_possible(run, "output_dir")
    places = (run.absolute(), *run.absolute().parents)

    def leave() -> tuple[int, str]:
        name = f".dsjax-{uuid.uuid4().hex}"
        for above, place in enumerate(places):
            with suppress(FileNotFoundError, NotADirectoryError):
                (place / name).touch()
                return above, name
        raise FileNotFoundError(run)

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
def locked_run_dir(run: Path, hosts: Hosts | None = None) -> Iterator[None]:
    """Make the output directory and lock it, before anything in it is looked at, to the end.

    Of several processes the first does so, for all. A run that is refused leaves no folder that was
    not there before.

    Raises:
        ConfigError: another process is training there, or no folder can be made.
    """
    hosts = hosts or Hosts()
    check_possible(run, "output_dir")
    check_shared(run, hosts)
    if not hosts.primary:
        hosts.barrier()
        _await_folder(run)
        yield
        return
    made = [place for place in (run.absolute(), *run.absolute().parents) if not place.exists()]
    refusal = (
        f"output_dir: got {str(run)!r}, in which another process is training, expected none; "
        "wait for it, or choose another output_dir"
    )
    checkpoints = [run / CHECKPOINTS] if made else []
    with (
        _removed_if_refused(made),
        locked(run / LOCK_FILE, refusal),
        _removed_if_refused(checkpoints),  # while it is locked: they could be another's
    ):
        hosts.barrier()
        yield


@contextmanager
def _removed_if_refused(folders: Sequence[Path]) -> Iterator[None]:
    """Remove folders, as far as they are empty, if an error or a signal ends the block."""

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


def export_path(config: RunConfig) -> Path:
    """Where the export goes."""
    return Path(config.export.path or Path(config.output_dir) / "export")
