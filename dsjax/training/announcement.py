# SPDX-License-Identifier: Apache-2.0
"""What a run will do, in words, before it takes long.

In: everything that is known before a parameter is loaded. Out: the banner, and what of the
configuration is not used. Not done here: how it looks (`console`).
"""

import sys
from collections.abc import Mapping

import jax

from dsjax import adapters, objectives
from dsjax.data import Loader
from dsjax.data import unused_keys as unused_data_keys
from dsjax.distributed.compilation_cache import place_of_programs
from dsjax.distributed.sharding import replication_report
from dsjax.training import optimizer
from dsjax.training.console import banner, trainable_table
from dsjax.training.partition import report
from dsjax.training.run import Run
from dsjax.training.state import (
    state_bytes,
    step_config,
)

LARGE = 1_000_000_000
"""Parameters of a model that is hardly meant for a CPU."""


def announce(run: Run) -> str:
    """Print what the run is; returns the table of what trains."""
    config, setup, data, total = run.config, run.setup, run.data, run.total
    trained, everything = setup.partition.counts()
    training, loader = config.training, data.train
    length = loader.sequence_length
    step = step_config(config, setup.partition, setup.mesh, total, length)
    classes = state_bytes(step, training.batch_size, length)
    facts = {
        "model": f"{config.model.path} ({setup.model.config.model_type})",
        "parameters": f"{everything:,}, of which {trained:,} train",
        "compute": f"{config.model.dtype}, remat {training.gradient_checkpointing}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1)
        or "1 device",
        "memory": _memory_text(classes, config.model.quantization),
        "rows": _rows_text(loader),
        "batch": _batch_text(training.batch_size, step.accumulation),
        "evaluation": _evaluation_text(data.eval),
        "steps": f"{total:,} ({loader.epoch(total):.2f} epochs of {loader.rows_in_epoch:,} rows, "
        f"{training.batch_size} a step)",
        "output": config.output_dir,
        "programs": f"kept in {place_of_programs() or 'memory alone'}",
    }
    few = []
    if not training.max_steps:
        rows, sequences = loader.rows_in_epoch, loader.sequences
        few = optimizer.few_steps(total, rows, training.batch_size, sequences)
    for line in (
        large_on_cpu(everything, jax.devices()[0].platform)
        + data.lines
        + adapters.notes(setup.model, setup.spec)
        + replication_report(setup.partition.leaves, setup.mesh)
        + few
    ):
        print(line, file=sys.stderr)
    if setup.carried:
        shown = ", ".join(setup.carried[:8]) + (", ..." if len(setup.carried) > 8 else "")
        kept = f"{len(setup.carried)} tensors are kept as they are, and not computed with: {shown}"
        print(kept, file=sys.stderr)
    longest = setup.model.config.max_position_embeddings
    if length > longest:
        print(
            f"rows of {length} tokens are longer than the model's "
            f"max_position_embeddings ({longest})",
            file=sys.stderr,
        )
    unused = adapters.unused_keys(config.adapter, setup.spec)
    unused += optimizer.unused_keys(config.optimizer) + unused_data_keys(config.data)
    unused += objectives.unused_keys(config.objective, setup.partition.leaves)
    if "hub_private_repo" in config.export.model_fields_set and not config.export.push_to_hub:
        unused.append("export.hub_private_repo")
    if setup.spec is not None and config.model.param_dtype is not None:
        unused.append("model.param_dtype")
    if unused:
        print(f"not used by this kind of training: {', '.join(unused)}", file=sys.stderr)
    print(f"one row, the trained part marked:\n{data.sample}", file=sys.stderr)
    table = trainable_table(report(setup.partition), everything)
    banner(facts)  # last: what follows fits beside it on a small screen
    return table


def large_on_cpu(parameters: int, platform: str) -> list[str]:
    """Return a line if a model is so large that a CPU will hardly train it."""
    if platform != "cpu" or parameters < LARGE:
        return []
    return [
        f"WARNING: {parameters / 1e9:.1f} billion parameters on a CPU, where a step takes minutes "
        "or hours: no GPU or TPU was found; if one is here, pip install 'jax[cuda13]' or 'jax[tpu]'"
    ]


def _memory_text(classes: Mapping[str, int], quantization: str | None) -> str:
    held = f"{sum(classes.values()) / 2**20:,.1f} MiB per device, without gradients and activations"
    if quantization is None:
        return held
    part = f"{classes['quantized weights'] / 2**20:,.1f} MiB of it weights in {quantization}"
    return f"{held}; {part}"


def _rows_text(loader: Loader) -> str:
    rows, length = loader.rows_in_epoch, loader.sequence_length
    if loader.sequences == rows:
        return f"{rows:,}, a sequence each, padded to {length:,} tokens"
    return f"{loader.sequences:,} sequences packed into {rows:,} rows of {length:,} tokens"


def _batch_text(batch_size: int, microbatches: int) -> str:
    rows = f"{batch_size} rows over all devices"
    return rows if microbatches == 1 else f"{rows}, in {microbatches} microbatches"


def _evaluation_text(loader: Loader | None) -> str:
    if loader is None:
        return "none"
    batches = loader.steps_in_epoch()
    return f"{loader.rows_in_epoch:,} of {loader.sequence_length:,} tokens in {batches:,} batches"
