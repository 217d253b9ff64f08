# SPDX-License-Identifier: Apache-2.0
"""A run's output directory: what an earlier run left there, and what may follow it.

In: the configuration and what the data are. Out: how far an earlier run came, or a refusal. Not
done here: the files' contents (`checkpoint`, `metrics`, `export`).
"""

import fcntl
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsjax import config as configuration
from dsjax.assembly import CHECKPOINTS
from dsjax.checkpoint import Checkpointer
from dsjax.config import RunConfig, load_config
from dsjax.coordinator import numbered
from dsjax.errors import ConfigError, files_of
from dsjax.export_folder import check_replaceable, export_marker, is_exported
from dsjax.folders import check_possible
from dsjax.hosts import Hosts
from dsjax.metrics import METRICS_FILE, read_metrics

SHARED_WITHIN = 20.0
"""Seconds after which a file that one process wrote must be there for the others."""

CONFIG_FILE, EVAL_RESULTS = "config.yaml", "eval_results.json"


@dataclass(frozen=True)
class Earlier:
    """What an earlier run has done: its steps, and what loss and tokens summed up to."""

    step: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)


def earlier_run(
    run: Path, config: RunConfig, form: str | None, total: int, fingerprint: str
) -> Earlier:
    """Look at what lies in the output directory; nothing is written yet.

    Raises:
        ConfigError: another configuration's run, more steps than wanted, a checkpoint that cannot
            be read, or a foreign folder where the export goes.
    """
    check_possible(run, "output_dir")
    file = run / CONFIG_FILE
    if file.is_file():
        changed = configuration.differing_keys(earlier_config(file), config)
        if changed:
            raise ConfigError(
                f"output_dir: got {str(run)!r}, which holds a run with other {', '.join(changed)}, "
                "expected the same configuration; choose another output_dir, or remove that one"
            )
    if form is not None:
        check_replaceable(export_path(config), config)
    if not (run / CHECKPOINTS).is_dir():
        return Earlier()
    reader = Checkpointer(run / CHECKPOINTS, config.checkpoint, read_only=True)
    done = reader.latest()
    meta = reader.meta(done) if done is not None else {}
    reader.close()
    if done is None:
        return Earlier()
    if not file.is_file():  # of what configuration, nobody knows
        raise ConfigError(
            f"output_dir: got {str(run)!r}, which holds checkpoints without {CONFIG_FILE}, "
            "expected a run's or a new directory; choose another output_dir"
        )
    if done > total:
        raise ConfigError(
            f"training.max_steps: got {total} steps, expected at least the {done} that the run in "
            f"{str(run)!r} has done; choose another output_dir"
        )
    if meta["data"] != fingerprint:
        raise ConfigError(
            f"data.train: got {fingerprint}, expected {meta['data']}, the rows that the run in "
            f"{str(run)!r} has been trained on; restore the files, or choose another output_dir"
        )
    return Earlier(done, meta["meter"]["run"])


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
        above = next(number for number, place in enumerate(places) if place.exists())
        name = f".dsjax-{uuid.uuid4().hex}"
        (places[above] / name).touch()
        return above, name

    above, name = hosts.decide(leave)
    token, deadline = places[above] / name, time.monotonic() + within
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = hosts.exchange(json.dumps(token.exists()))
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
def claimed(run: Path, hosts: Hosts | None = None) -> Iterator[None]:
    """Make the output directory, after `earlier_run` found nothing against it, and lock it.

    Of several processes the first does so, for all. The lock goes with it, however it ends.

    Raises:
        ConfigError: another process is training there.
    """
    hosts = hosts or Hosts()
    if not hosts.primary:
        hosts.barrier()
        _await_folder(run / CHECKPOINTS)
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY)
    try:
        _lock(folder, run)
        if hosts.count > 1:
            (run / CHECKPOINTS).mkdir(exist_ok=True)
        hosts.barrier()
        yield
    finally:
        os.close(folder)


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


def _lock(folder: int, run: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"output_dir: got {str(run)!r}, in which another process is training, expected none; "
            "wait for it, or choose another output_dir"
        ) from error
    except OSError as error:  # a mounted bucket may have no locks
        print(f"{run}: cannot be locked ({error.strerror}); start no second run", file=sys.stderr)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    with files_of(file):
        beside.write_text(text, "utf-8")
        os.replace(beside, file)


def is_complete(
    config: RunConfig, evaluates: bool, form: str | None, earlier: Earlier, total: int
) -> bool:
    """Whether an earlier run has finished all that takes a model: steps, evaluation, export."""
    run = Path(config.output_dir)
    if earlier.step < total or (evaluates and not is_evaluated(run / EVAL_RESULTS, total)):
        return False
    if form is not None:
        marker = export_marker(config, form, total, earlier.sums)
        return is_exported(export_path(config), marker)
    rows = read_metrics(run / METRICS_FILE)
    return any("train_loss" in row and row["step"] == total for row in rows)


def export_path(config: RunConfig) -> Path:
    """Where the export goes."""
    return Path(config.export.path or Path(config.output_dir) / "export")


def is_evaluated(file: Path, total: int) -> bool:
    """Whether a file holds the evaluation of a finished run."""
    try:
        return json.loads(file.read_text("utf-8"))["step"] == total
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not there, or damaged: it is made again
