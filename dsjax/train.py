# SPDX-License-Identifier: Apache-2.0
"""Train: from a YAML file to an exported model. Read this file first.

    python -m dsjax.train --config FILE [section.key=value ...]

The run in ten stages: devices, model, data, earlier run, announcement, step, parameters, state,
loop, results. Nothing is written before every input has been checked; running the same command
again resumes, or finishes what is missing.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from absl import flags
from transformers import PreTrainedTokenizerFast

from dsjax import config as configuration
from dsjax.adapters import unused_keys
from dsjax.assembly import CHECKPOINTS, Assembly, assemble, load_frozen, load_trainable
from dsjax.checkpoint import Checkpointer
from dsjax.config import DataSection, RunConfig, load_config, split_arguments
from dsjax.data import Loader, decode_sample, load_examples, load_tokenizer
from dsjax.errors import ConfigError, run_command
from dsjax.evaluation import StoppedError, evaluate_loss, to_devices
from dsjax.export import card_facts, export_trained
from dsjax.export_folder import check_replaceable, export_marker, read_marker
from dsjax.folders import check_possible
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
from dsjax.partition import Params, report
from dsjax.sharding import check_batch, rows_sharding, undivided
from dsjax.step import (
    StepConfig,
    StepReport,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    step_config,
)
from dsjax.terminal import Loading, Progress, banner, trainable_table

CONFIG_FILE, EVAL_RESULTS = "config.yaml", "eval_results.json"


def main(argv: Sequence[str]) -> int:
    """Print what was asked for, or run."""
    path, overrides, wanted = split_arguments(argv)
    if "--help" in wanted:
        print(configuration.describe())
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
    # ---- 1. Devices and 2. model: the checkpoint against its config.json, the adapter, the parts
    parts = assemble(config)
    form = configuration.export_format(config.export, parts.spec.peft_type if parts.spec else None)

    # ---- 3. Data: rows to tokens, order and packing of the whole run
    data = read_data(config, parts)
    total = data.train.total_steps(config.training.num_train_epochs, config.training.max_steps)

    # ---- 4. An earlier run in the same place: the same, or refused
    run = Path(config.output_dir)
    earlier = earlier_run(run, config, form, total)
    start = earlier.step

    # ---- 5. Announcement: what will happen, before it takes long
    table = announce(config, parts, data, total)
    if is_complete(config, data, form, earlier, total):
        if not (run / PICTURE).is_file():
            plot_loss(run)
        print(f"nothing to do: {total} steps and all results are there", file=sys.stderr)
        return 0

    # ---- 6. The step: one function, compiled before there is anything to hold
    step = step_config(config, parts.partition, parts.mesh, total)
    train_step = compile_step(step, parts, data.train) if start < total else None
    eval_step = make_eval_step(step) if data.eval else None

    # ---- 7. Parameters: from the files onto the devices
    frozen = load_frozen(parts, config.training.seed, Loading())
    trainable = {} if start else load_trainable(parts, config.training.seed, Loading())

    # ---- 8. State: the newest complete checkpoint's, or the first
    checkpointer = open_run(run, config)
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
    loop = Loop(config, parts, data, total, frozen, train_step, eval_step, checkpointer)
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


def read_data(config: RunConfig, parts: Assembly) -> Data:
    """Tokenise all rows and plan their order.

    Raises:
        ConfigError: a row, a file, or a batch that the devices do not divide.
    """
    training, section = config.training, config.data
    check_batch(training.batch_size, training.gradient_accumulation_steps, parts.mesh)
    tokenizer = read_tokenizer(section, parts.source.directory)
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
    return Data(loader, evaluation, lines, decode_sample(examples[0], tokenizer))


def read_tokenizer(section: DataSection, directory: Path) -> PreTrainedTokenizerFast | None:
    """The checkpoint's tokenizer; None for rows that are tokens already."""
    missing = not (directory / "tokenizer.json").is_file()
    if section.format == "tokens" or (section.format == "auto" and missing):
        return None
    return load_tokenizer(directory)


@dataclass(frozen=True)
class Earlier:
    """What an earlier run has done: its steps, and what loss and tokens summed up to."""

    step: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)


def earlier_run(run: Path, config: RunConfig, form: str | None, total: int) -> Earlier:
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
    sums = reader.meta(done)["meter"]["run"] if done is not None else {}
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
    return Earlier(done, sums)


def earlier_config(file: Path) -> RunConfig:
    """The configuration that a run left in its output directory."""
    try:
        return load_config(file)
    except ConfigError as error:
        raise ConfigError(
            f"output_dir: got {str(file.parent)!r}, whose {file.name} is not one that a run wrote, "
            f"expected a run's or a new directory; choose another output_dir\n{error}"
        ) from error


def open_run(run: Path, config: RunConfig) -> Checkpointer:
    """Make the output directory, after `earlier_run` found nothing against it."""
    run.mkdir(parents=True, exist_ok=True)
    return Checkpointer(run / CHECKPOINTS, config.checkpoint)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, "utf-8")
    os.replace(beside, file)


def is_complete(
    config: RunConfig, data: Data, form: str | None, earlier: Earlier, total: int
) -> bool:
    """Whether an earlier run has finished all that takes a model: steps, evaluation, export."""
    run = Path(config.output_dir)
    if earlier.step < total or not (data.eval is None or _evaluated(run / EVAL_RESULTS, total)):
        return False
    if form is not None:
        marker = export_marker(config, form, total, earlier.sums)
        return read_marker(export_path(config)) == marker
    rows = read_metrics(run / METRICS_FILE)
    return any("train_loss" in row and row["step"] == total for row in rows)


def export_path(config: RunConfig) -> Path:
    """Where the export goes."""
    return Path(config.export.path or Path(config.output_dir) / "export")


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
    unused = unused_keys(config.adapter, parts.spec)
    if unused:
        print(f"not used by this kind of training: {', '.join(unused)}", file=sys.stderr)
    print(f"one row, the trained part marked:\n{data.sample}", file=sys.stderr)
    return trainable_table(report(parts.partition), everything)


def _state_bytes(parts: Assembly) -> float:
    """Bytes per device of parameters, gradients and two moments."""
    total = 0.0
    for path, leaf in parts.partition.leaves.items():
        local = math.prod(parts.shardings[path].shard_shape(leaf.shape))
        trains = path in parts.partition.trainable
        total += local * (leaf.dtype.itemsize + (12 if trains else 0))
    return total


def flops(parts: Assembly, config: RunConfig, loader: Loader) -> tuple[float, float | None]:
    """FLOPs of a training token, and the devices' peak, None if unknown."""
    c, leaves = parts.model.config, parts.partition.leaves
    matmuls = {p: leaf for p, leaf in leaves.items() if len(leaf.shape) >= 2}
    embedding = leaves["model.embed_tokens.weight"].count
    active = sum(leaf.count for leaf in matmuls.values())
    if parts.model.lm_head is not None:
        active -= embedding
    trained = sum(parts.partition.trainable_count(p) for p in parts.partition.trainable)
    width = c.num_hidden_layers * c.num_attention_heads * 2 * c.head_dim
    per_token = train_flops_per_token(active, trained, width, float(loader.sequence_length))
    peak = device_peak_flops(jax.devices()[0].device_kind, config.model.dtype)
    return per_token, None if peak is None else peak * jax.device_count()


def compile_step(step: StepConfig, parts: Assembly, loader: Loader) -> Any:
    """Compile the step ahead of the loop, so that its time and memory are seen as what they are."""
    began = time.monotonic()
    sharding, shardings = rows_sharding(parts.mesh), parts.shardings
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] * jax.process_count(), *x.shape[1:]), x.dtype, sharding=sharding
        ),
        loader.batch(0),
    )
    frozen = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in parts.partition.leaves.items()
        if path in parts.partition.frozen
    }
    state = abstract_state(step)
    compiled = make_train_step(step, state).lower(state, frozen, batch).compile()
    used = compiled.memory_analysis()
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes
    print(
        f"compiled the step in {time.monotonic() - began:.1f} s; it needs {peak / 2**30:.2f} GiB "
        "per device",
        file=sys.stderr,
    )
    return compiled


@dataclass(frozen=True)
class Loop:
    """The steps of a run, with what happens between them."""

    config: RunConfig
    parts: Assembly
    data: Data
    total: int
    frozen: Params
    train_step: Any
    eval_step: Any
    checkpointer: Checkpointer

    def run(
        self, state: TrainState, start: int, meter: Meter, log: MetricsLog, progress: Progress
    ) -> tuple[TrainState, int | None]:
        """Run the steps from `start`; returns the state and the signal that ended them early."""
        with signals_caught() as caught:
            # Inside: a save that still runs is waited for before a signal can end the process, and
            # also when a step raises.
            with closing(self.checkpointer):
                state = self._steps(state, start, meter, log, progress, caught)
            return state, caught[0] if caught else None

    def _steps(
        self,
        state: TrainState,
        start: int,
        meter: Meter,
        log: MetricsLog,
        progress: Progress,
        caught: list[int],
    ) -> TrainState:
        """Run the steps until the last, or until a signal is caught."""
        every = self.config.logging.logging_steps
        # A signal may have cut off the evaluation that belongs to the step before.
        self._evaluate_if_due(state, start, meter, log, progress, caught)
        if caught:
            return state
        for step, batch in enumerate(self.data.train.iterate(start, self.total), start + 1):
            rows = to_devices(batch, self.parts.mesh)
            state, told = self.train_step(state, self.frozen, rows)
            meter.add(told.sums.loss, told.sums.weight, told.sums.correct, told.sums.tokens)
            progress.advance(step)
            if step % every == 0 or step == self.total:
                self._check_finite(step, told)
                values = self._values(step, meter, told)
                log.log(step, values)
                progress.log(step, values)
            self._evaluate_if_due(state, step, meter, log, progress, caught)
            if step == self.total or caught or self.checkpointer.due(step):
                self._check_finite(step, told)
                self._save(step, state, meter)
            if caught:
                break
        return state

    def _values(self, step: int, meter: Meter, told: StepReport) -> dict[str, Any]:
        """The line of a step."""
        values = meter.values() | {
            "epoch": self.data.train.epoch(step),
            "learning_rate": float(told.learning_rate),
            "grad_norm": float(told.grad_norm),
        }
        if self.config.model.dtype == "float16":
            values |= {"loss_scale": float(told.loss_scale), "skipped_steps": int(told.skipped)}
        return values

    def _check_finite(self, step: int, told: StepReport) -> None:
        """Look at a step before it is logged or saved.

        Raises:
            ConfigError: the run has diverged. A float16 step may overflow as long as the scale of
                the loss can still be lowered.
        """
        norm, sums = float(told.grad_norm), told.sums
        scalable = self.config.model.dtype == "float16" and float(told.loss_scale) > 1
        if not math.isfinite(norm) and not scalable:
            loss = float(sums.loss) / (float(sums.weight) or 1.0)
            raise ConfigError(
                f"loss: got {loss} with gradient norm {norm} at step {step}, expected finite "
                "numbers; lower optimizer.learning_rate, or look at the data of that step. "
                "Checkpoints of earlier steps are kept"
            )

    def _save(self, step: int, state: TrainState, meter: Meter) -> None:
        meta = {"position": self.data.train.position(step), "meter": meter.state()}
        self.checkpointer.save(step, state, meta, force=True)

    def _evaluate_if_due(
        self,
        state: TrainState,
        step: int,
        meter: Meter,
        log: MetricsLog,
        progress: Progress,
        caught: list[int],
    ) -> None:
        """Evaluate where `eval_steps` says; a signal cuts it off, and the next run makes up for it.

        An evaluation can last far longer than whoever sends SIGTERM waits before SIGKILL.
        """
        every = self.config.training.eval_steps
        due = every and 0 < step < self.total and step % every == 0
        if due and not log.evaluated(step):
            with meter.paused(), suppress(StoppedError):
                self.evaluate(state, step, log, progress, lambda: bool(caught))

    def evaluate(
        self,
        state: TrainState,
        step: int,
        log: MetricsLog,
        progress: Progress,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Evaluate and log.

        Raises:
            StoppedError: `stop()` became true first.
        """
        assert self.data.eval is not None
        values = evaluate_loss(
            self.eval_step, state.trainable, self.frozen, self.data.eval, self.parts.mesh, stop
        )
        log.log_eval(step, values)
        progress.log_eval(step, values)
        return values


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; the loop looks after each step."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: caught.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish_evaluation(
    run: Path, loop: Loop, state: TrainState, log: MetricsLog, progress: Progress
) -> None:
    """Evaluate the final weights, unless a finished run did."""
    file = run / EVAL_RESULTS
    if loop.data.eval is None or _evaluated(file, loop.total):
        return
    results = {"step": loop.total, **loop.evaluate(state, loop.total, log, progress)}
    write_whole(file, json.dumps(results, indent=2) + "\n")


def _evaluated(file: Path, total: int) -> bool:
    return file.is_file() and json.loads(file.read_text("utf-8"))["step"] == total


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain's workers ask for them
    run_command(main)
