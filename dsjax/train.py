# SPDX-License-Identifier: Apache-2.0
"""Train: from a YAML file to an exported model. Read this file first.

    python -m dsjax.train --config FILE [section.key=value ...]

The run in ten stages: devices, model, data, earlier run, announcement, step, parameters, state,
loop, results. Nothing is written before every input has been checked; running the same command
again resumes, or finishes what is missing.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dsjax import adapters, optimizer
from dsjax import config as configuration
from dsjax.assembly import CHECKPOINTS, Assembly, assemble, load_frozen, load_trainable
from dsjax.checkpoint import Checkpointer
from dsjax.config import RunConfig, load_config, split_arguments
from dsjax.convert import EMBEDDING, HEAD
from dsjax.data import Loader, decode_sample, find_tokenizer, load_examples
from dsjax.errors import ConfigError, run_command
from dsjax.export import card_facts, check_dtype, export_trained
from dsjax.export_folder import export_marker
from dsjax.loop import Loop, finish_evaluation
from dsjax.metrics import (
    METRICS_FILE,
    PICTURE,
    Meter,
    MetricsLog,
    device_peak_flops,
    plot_loss,
    read_metrics,
    train_flops_per_token,
)
from dsjax.partition import Leaf, has_experts, report
from dsjax.run_folder import (
    CONFIG_FILE,
    claimed,
    earlier_run,
    export_path,
    is_complete,
    write_whole,
)
from dsjax.sharding import check_batch, undivided
from dsjax.step import (
    StepConfig,
    abstract_state,
    init_state,
    lower_train_step,
    make_eval_step,
    step_config,
)
from dsjax.terminal import Loading, Progress, banner, trainable_table

USAGE = """usage: python -m dsjax.train --config FILE [section.key=value ...]

--config FILE     YAML of the sections below; words `section.key=value` override it
--print-config    print the resolved configuration, and stop
--schema          print its JSON schema, for editors, and stop
--help            print this, and stop

"""


def main(argv: Sequence[str]) -> int:
    """Print what was asked for, or run."""
    path, overrides, wanted = split_arguments(argv)
    if "--help" in wanted:
        print(USAGE + configuration.describe())
        return 0
    if "--schema" in wanted:
        print(json.dumps(configuration.json_schema(), indent=2))
        return 0
    config = load_config(path, overrides)
    if "--print-config" in wanted:
        print(configuration.to_yaml(config), end="")
        return 0
    return train(config)


def train(config: RunConfig) -> int:
    """Run a configuration to its end, or to where SIGTERM stops it.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        ConfigError: an input is wrong.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"processes: got {jax.process_count()}, expected 1; runs of several hosts are not "
            "supported yet"
        )
    # ---- 1. Devices and 2. model: the checkpoint against its config.json, the adapter, the parts
    parts = assemble(config)
    check_dtype(config, parts)
    form = configuration.export_format(config.export, parts.spec.peft_type if parts.spec else None)
    if form == "peft" and parts.spec is not None:
        adapters.check_peft_form(parts.model, parts.spec)

    # ---- 3. Data: rows to tokens, order and packing of the whole run
    data = read_data(config, parts)
    total = data.train.total_steps(config.training.num_train_epochs, config.training.max_steps)

    # ---- 4. An earlier run in the same place: the same, or refused
    run = Path(config.output_dir)
    earlier = earlier_run(run, config, form, total, data.fingerprint)
    start = earlier.step

    # ---- 5. Announcement: what will happen, before it takes long
    table = announce(config, parts, data, total)
    if is_complete(config, data.eval is not None, form, earlier, total):
        if not (run / PICTURE).is_file():
            plot_loss(run)
        print(f"nothing to do: {total} steps and all results are there", file=sys.stderr)
        return 0

    # ---- 6. The step: one function, compiled before there is anything to hold
    step = step_config(config, parts.partition, parts.mesh, total)
    train_step = compile_step(step, data.train) if start < total else None
    eval_step = make_eval_step(step) if data.eval else None

    # ---- 7. Parameters: from the files onto the devices
    frozen = load_frozen(parts, config.training.seed, Loading())
    trainable = {} if start else load_trainable(parts, config.training.seed, Loading())

    with claimed(run):
        # ---- 8. State: the newest complete checkpoint's, or the first
        checkpointer = Checkpointer(run / CHECKPOINTS, config.checkpoint)
        meter = Meter(*flops(parts, config, data.train))
        if start:
            state = checkpointer.restore(start, abstract_state(step))
            meter.restore(checkpointer.meta(start)["meter"])
            print(f"resuming after step {start} of {total}", file=sys.stderr)
        else:
            state = init_state(trainable, step, config.training.seed)
        del trainable
        write_whole(run / CONFIG_FILE, configuration.to_yaml(config))

        # ---- 9. The loop
        loop = Loop(
            config,
            parts,
            data.train,
            data.eval,
            data.fingerprint,
            total,
            frozen,
            train_step,
            eval_step,
            checkpointer,
        )
        with MetricsLog(run, config.logging, start) as log, Progress(total, start) as progress:
            log.log_start(configuration.to_yaml(config), table)
            state, stopped = loop.run(state, start, meter, log, progress)
            if stopped is not None:
                print(f"stopped by signal {stopped}; run again to continue", file=sys.stderr)
                return 128 + stopped
            finish_evaluation(run, loop, state, log, progress)
            log.log_summary(total, meter.summary())

        # ---- 10. Results: the picture and the export
        plot_loss(run)
        if form is not None:
            facts = card_facts(config, parts, form, total, read_metrics(run / METRICS_FILE))
            out, marker = export_path(config), export_marker(config, form, total, meter.run_sums())
            export_trained(parts, state.trainable, frozen, out, marker, facts, Loading("writing"))
            print(f"exported {form} to {out}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Loader
    eval: Loader | None
    lines: list[str]
    sample: str
    fingerprint: str


def read_data(config: RunConfig, parts: Assembly) -> Data:
    """Tokenise all rows and plan their order.

    Raises:
        ConfigError: a row, a file, or a batch that the devices do not divide.
    """
    training, section = config.training, config.data
    check_batch(training.batch_size, training.gradient_accumulation_steps, parts.mesh)
    tokenizer = find_tokenizer(parts.source.directory, section.format)
    vocabulary = parts.model.config.vocab_size
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    examples = load_examples(section.train, section, tokenizer, vocabulary, "data.train")
    loader = Loader(examples, section, training.batch_size, training.seed, **processes)
    lines, evaluation = examples.report.lines(), None
    if section.eval:
        held_out = load_examples(section.eval, section, tokenizer, vocabulary, "data.eval")
        ordered = section.model_copy(update={"shuffle": False})
        evaluation = Loader(held_out, ordered, training.batch_size, training.seed, **processes)
        lines += held_out.report.lines()
    sample = decode_sample(examples[0], tokenizer)
    return Data(loader, evaluation, lines, sample, examples.fingerprint)


def announce(config: RunConfig, parts: Assembly, data: Data, total: int) -> str:
    """Print what the run is; returns the table of what trains."""
    trained, everything = parts.partition.counts()
    training, loader = config.training, data.train
    facts = {
        "model": f"{config.model.path} ({parts.model.config.model_type})",
        "parameters": f"{everything:,}, of which {trained:,} train",
        "compute": f"{config.model.dtype}, remat {training.gradient_checkpointing}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items() if size > 1)
        or "1 device",
        "memory": f"{_state_bytes(parts) / 2**20:,.1f} MiB per device, activations apart",
        "rows": f"{loader.rows_in_epoch:,} of {loader.sequence_length:,} tokens per epoch",
        "batch": f"{training.batch_size} rows in {training.gradient_accumulation_steps} portions",
        "steps": f"{total:,} ({loader.epoch(total):.2f} epochs)",
        "output": config.output_dir,
    }
    banner(facts)
    for line in data.lines + undivided(parts.partition.leaves, parts.mesh):
        print(line, file=sys.stderr)
    if parts.carried:
        shown = ", ".join(parts.carried[:8]) + (", ..." if len(parts.carried) > 8 else "")
        kept = f"{len(parts.carried)} tensors are kept but not computed with: {shown}"
        print(kept, file=sys.stderr)
    longest = parts.model.config.max_position_embeddings
    if loader.sequence_length > longest:
        print(
            f"rows of {loader.sequence_length} tokens are longer than the model's "
            f"max_position_embeddings ({longest})",
            file=sys.stderr,
        )
    unused = adapters.unused_keys(config.adapter, parts.spec)
    unused += optimizer.unused_keys(config.optimizer)
    if config.objective.aux_loss_alpha and not has_experts(parts.partition.leaves):
        unused.append("objective.aux_loss_alpha")
    if parts.spec is not None and config.model.param_dtype is not None:
        unused.append("model.param_dtype")
    if unused:
        print(f"not used by this kind of training: {', '.join(unused)}", file=sys.stderr)
    print(f"one row, the trained part marked:\n{data.sample}", file=sys.stderr)
    return trainable_table(report(parts.partition), everything)


def _state_bytes(parts: Assembly) -> float:
    """Bytes per device of parameters, gradients and two moments."""
    total = 0.0
    for path, leaf in parts.partition.leaves.items():
        local = math.prod(parts.shardings[path].shard_shape(leaf.shape))
        learns = path in parts.partition.learnt
        total += local * (leaf.dtype.itemsize + (12 if learns else 0))
    return total


def flops(parts: Assembly, config: RunConfig, loader: Loader) -> tuple[float, float | None]:
    """FLOPs of a training token, and the devices' peak, None if unknown."""
    c, leaves = parts.model.config, parts.partition.leaves
    matmuls = {p: leaf for p, leaf in leaves.items() if len(leaf.shape) >= 2}
    embedding = leaves[EMBEDDING].count
    active = sum(_met(leaf.count, leaf, c) for leaf in matmuls.values())
    if parts.model.lm_head is not None:
        active -= embedding
    partition = parts.partition
    trained = sum(_met(partition.trainable_count(p), leaves[p], c) for p in partition.learnt)
    layers = c.num_hidden_layers
    if parts.model.mtp is not None:  # one more layer, after which the head runs again
        head = EMBEDDING if parts.model.lm_head is None else HEAD
        layers, active = layers + 1, active + leaves[head].count
        trained += partition.trainable_count(head) if head in partition.learnt else 0
    width = layers * c.num_attention_heads * c.qk_and_v_head_dim
    per_token = train_flops_per_token(active, trained, width, float(loader.sequence_length))
    peak = device_peak_flops(jax.devices()[0].device_kind, config.model.dtype)
    return per_token, None if peak is None else peak * jax.device_count()


def _met(count: int, leaf: Leaf, model: Any) -> float:
    """How many of a leaf's parameters one token meets: all, or those of its experts."""
    if "experts" not in leaf.axes:
        return float(count)
    return count * model.router.num_experts_per_tok / model.router.n_routed_experts


def compile_step(step: StepConfig, loader: Loader) -> Any:
    """Compile the step ahead of the loop, so that its time and memory are seen as what they are."""
    began = time.monotonic()
    rows, length = loader.batch_size, loader.sequence_length
    compiled = lower_train_step(step, rows, length).compile()
    used = compiled.memory_analysis()
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes
    print(
        f"compiled the step in {time.monotonic() - began:.1f} s; it needs {peak / 2**30:.2f} GiB "
        "per device",
        file=sys.stderr,
    )
    return compiled


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain's workers ask for them
    run_command(main)
