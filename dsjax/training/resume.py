# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left in the output directory, and what may follow it.

In: the configuration. Out: how far an earlier run came, or a refusal; the configuration by which
its rows are split as before. Not done here: the files' names (`run_dir`), which keys may differ
(`continuation`), the restored arrays (`checkpoint`, `restore`).
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from dsjax.config import RunConfig, load_config
from dsjax.distributed.processes import Hosts
from dsjax.errors import ConfigError
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.continuation import differing_keys
from dsjax.training.metrics_log import read_metrics
from dsjax.training.run_dir import RunDir, read_manifest


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
        """Return what loss and tokens summed up to."""
        return self.meta["meter"]["run"] if self.meta else {}


def find_resume_point(config: RunConfig) -> ResumePoint:
    """Look at what lies in the output directory.

    A run that ended before its first checkpoint left nothing to go on with and nothing to protect:
    another configuration may begin in its place.

    Raises:
        ConfigError: another configuration's run, or a checkpoint that cannot be read.
    """
    run = RunDir.of(config)
    old = earlier_config(run.config) if run.config.is_file() else None
    open_reader = partial(Checkpointer, run.checkpoints, config.checkpoint, read_only=True)
    with closing(open_reader()) as reader:
        done = reader.latest()
    if old is not None and (done is not None or _has_results(run, old)):
        _check_same(old, config)
    if done is None:
        return ResumePoint(0, datetime.now().isoformat(timespec="seconds"))
    if old is None:  # of what configuration, nobody knows
        raise ConfigError(
            f"output_dir: got {str(run)!r}, which holds checkpoints without {run.config.name}, "
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
            f"{', '.join(changed)}, expected the same configuration; choose another output_dir, "
            "as --fresh does, or remove that one"
        )


def _has_results(run: RunDir, earlier: RunConfig) -> bool:
    """Tell whether a run came to its end, and left more than checkpoints."""
    export = RunDir.of(earlier).export
    rows = read_metrics(run.metrics)
    return read_manifest(export) is not None or any("train_loss" in row for row in rows)


def split_as_before(config: RunConfig, earlier: ResumePoint, hosts: Hosts) -> RunConfig:
    """Return the configuration by which a run's rows are split as when it began.

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
    """Read the configuration that a run left in its output directory."""
    try:
        return load_config(file)
    except ConfigError as error:
        raise ConfigError(
            f"output_dir: got {str(file.parent)!r}, whose {file.name} is not one that a run wrote, "
            f"expected a run's or a new directory; choose another output_dir\n{error}"
        ) from error
