# SPDX-License-Identifier: Apache-2.0
"""Whether the disks have room for what a run is going to write, asked before it takes long.

In: the configuration and the run's model, no array. Out: a refusal with the numbers. A checkpoint
and the export count by their tensors; headers, tokenizer, logs are small beside them. Not done
here: writing, and what a disk refuses all the same (`errors.system_fault`).
"""

import math
from pathlib import Path

import jax

from dsjax.buckets import Bucket
from dsjax.config import RunConfig
from dsjax.distributed.processes import Hosts
from dsjax.export.run import export_bytes
from dsjax.training.orbax_store import half_written
from dsjax.training.run_dir import RunDir
from dsjax.training.setup import Assembly
from dsjax.training.state import StepConfig, abstract_state
from dsjax.weights.folders import check_room, leftovers_of, written_at


def check_disk(
    config: RunConfig,
    setup: Assembly,
    step: StepConfig,
    form: str | None,
    saves: bool,
    hosts: Hosts,
) -> None:
    """Refuse to begin where a checkpoint, if one is to follow, and the export have no room.

    Raises:
        ConfigError: with the numbers.
    """
    if not hosts.primary:
        return
    run, needs = RunDir.of(config), dict[Path, dict[str, int]]()
    folder = run.checkpoints
    half_saved = [] if isinstance(folder, Bucket) else half_written(folder)
    half_exported = () if form is None else leftovers_of(run.export)
    saves = saves and run.url is None
    if saves:
        leaves = jax.tree.leaves(abstract_state(step))
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        needs[run.path] = {"a checkpoint": size}
    if form is not None:
        place = run.path if config.export.path is None else written_at(run.export)
        needs.setdefault(place, {})["the export"] = export_bytes(config, setup, form)
    for place, wanted in needs.items():
        field = "output_dir" if place == run.path else "export.path"
        check_room(place, wanted, field, [*half_saved, *half_exported])
    if saves:  # what is left of an export is removed only when the next one begins
        check_room(
            run.path, {"a checkpoint": needs[run.path]["a checkpoint"]}, "output_dir", half_saved
        )
