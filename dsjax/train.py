# SPDX-License-Identifier: Apache-2.0
"""Train: from a YAML file to an exported model. Read this file first.

    python -m dsjax.train FILE.yaml [section.key=value ...]
    dsjax.finetune(FILE or dict), the same from Python

Several processes, one a host, run it together (`distributed`). The run in ten stages: devices,
model, data, earlier run, announcement, step, parameters, state, loop, results. Nothing is written
before every input has been checked; running the same command again resumes, or finishes what is
missing.
"""

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what is imported below takes seconds

    import os

    from dsjax.config.stage_clock import import_clock
    from dsjax.config.train_options import answered
    from dsjax.errors import answer_early

    answer_early(lambda argv: answered(argv, os.environ))
    imports = import_clock("jax, flax, orbax, transformers").start()

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import jax
from absl import flags

import dsjax
from dsjax import config as configuration
from dsjax.config import RunConfig, load_run, make_config, split_arguments
from dsjax.config.inputs import may_download
from dsjax.config.train_options import split_process_options
from dsjax.data import Loader
from dsjax.distributed.bootstrap import detect_process
from dsjax.distributed.compilation_cache import keep_compiled
from dsjax.distributed.devices import GPU_MEMORY_SHARE, peak_flops
from dsjax.distributed.processes import Hosts, process_group
from dsjax.distributed.sharding import Params
from dsjax.errors import ConfigError, files_of, orbax_muted, run_command
from dsjax.export.disk_space import check_disk
from dsjax.export.folder import Output, check_continues, check_outputs, is_complete
from dsjax.export.push import check_push, is_pushed, push_export
from dsjax.export.run import Trained, check_export, export_trained
from dsjax.training import optimizer
from dsjax.training.announcement import announce
from dsjax.training.checkpoint import Checkpointer
from dsjax.training.compilation import compile_evaluation, compile_step
from dsjax.training.conclusion import FinetuneResult, conclude
from dsjax.training.console import Loading, Progress, exporting, working
from dsjax.training.eval_results import evaluation_manifest
from dsjax.training.flops import token_flops
from dsjax.training.loop import Loop, Reporting, finish_evaluation
from dsjax.training.loss_plot import plot_loss
from dsjax.training.meter import Meter
from dsjax.training.metrics_log import MetricsLog
from dsjax.training.reporters import check_reporters
from dsjax.training.restore import check_frozen, frozen_sums
from dsjax.training.resume import find_resume_point
from dsjax.training.run import Programs, Run
from dsjax.training.run_data import read_as_before
from dsjax.training.run_dir import RunDir, fresh_path
from dsjax.training.run_lock import locked_run_dir, make_for_all
from dsjax.training.setup import Assembly, assemble, load_frozen, load_trainable
from dsjax.training.state import (
    StepConfig,
    TrainState,
    abstract_state,
    init_state,
    policies_of,
    step_config,
)
from dsjax.weights.folders import write_atomic


def main(argv: Sequence[str]) -> int:
    """Run what the command line names; its other questions are answered before."""
    given, words = split_process_options(argv)
    path, overrides, wanted = split_arguments(words)
    with process_group(detect_process(given, os.environ)) as hosts:
        config = load_run(path, overrides)
        if "--fresh" in wanted:
            config = beside_earlier(config, hosts)
        code = train(config, hosts, dry_run="--dry-run" in wanted)
        if code:
            place = f"output_dir={config.output_dir}"
            again = [place if word == "--fresh" else word for word in sys.orig_argv]
            hosts.log_once(f"to continue: {shlex.join(again)}")
        return code


def finetune(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
) -> FinetuneResult:
    """Run a configuration as the command does: the same checks, output, resumption and results.

    Args:
        config: a YAML file, what it holds as a dict of sections, or what `load_config` gave.

    Returns:
        Where the results lie, with the run's metrics.

    Raises:
        ConfigError: an input is wrong; the command's message.
        KeyboardInterrupt: the run was interrupted and its state saved; the same call resumes. A
            second interrupt ends the process at once.
        SystemExit: the same, by SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "finetune: got another thread, expected the main one, which alone hears of signals"
        )
    prepare_process()
    with orbax_muted(), files_of("a file"):
        with process_group(detect_process({}, os.environ)) as hosts:
            if isinstance(config, Mapping):
                config = make_config(config)
            elif not isinstance(config, RunConfig):
                config = load_run(os.fspath(config))
            code = train(config, hosts)
        if code:
            raise KeyboardInterrupt if code == 128 + signal.SIGINT else SystemExit(code)
        return FinetuneResult.of(RunDir.of(config))


def prepare_process() -> None:
    """Set what libraries look at before they begin."""
    flags.FLAGS.mark_as_parsed()  # grain's workers ask for them
    # What plans count on; jax reads it when it first looks for GPUs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))


def train(config: RunConfig, hosts: Hosts | None = None, *, dry_run: bool = False) -> int:
    """Run a configuration to its end, or to where SIGTERM stops it.

    Args:
        config: what to run.
        hosts: this process among those of the run; None for a process alone.
        dry_run: check, announce and compile only: no weights are loaded, nothing is written.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        ConfigError: an input is wrong.
    """
    hosts = hosts or Hosts()
    with working("starting the devices", hosts.primary, at_once=False):
        hosts.assert_equal(launch_fingerprint(config))
    if hosts.count == 1:
        keep_compiled(os.environ)
    check_outputs(config)
    check_reporters(config.logging, hosts.primary)
    # Locked, so that nobody else changes what is looked at.
    with locked_run_dir(RunDir.of(config), hosts, keep=not dry_run) as publish:
        if not is_pushed(RunDir.of(config), config.export):
            check_push(config.export, hosts.primary)
        return _train(config, hosts, dry_run, publish)


def _train(config: RunConfig, hosts: Hosts, dry_run: bool, publish: Callable[[], None]) -> int:
    """Go through the stages of a run, alone in its output directory."""
    seed, primary = config.training.seed, hosts.primary
    # ---- 1. Devices and 2. model: the checkpoint against its config.json, the adapter, what trains
    here = primary and not may_download(config.model.path)
    with working("opening the checkpoint", here, at_once=False):
        setup = assemble(config)
    form = export_form(config, setup)

    # ---- 3. Data: rows to tokens, order and packing of the whole run
    earlier = find_resume_point(config)
    start, started = earlier.step, hosts.broadcast_from_primary(lambda: earlier.started)
    config, data = read_as_before(config, earlier, setup, datetime.fromisoformat(started), hosts)
    total = data.train.total_steps(config.training.num_train_epochs, config.training.max_steps)
    contents = {**setup.contents(), "data.train": data.fingerprint}
    hosts.assert_equal({**contents, **data.digests()})
    run = Run(config, setup, data, total, started, contents, hosts)

    # ---- 4. An earlier run in the same place: the same, or refused
    optimizer.check_rates(config.optimizer, total, bool(setup.partition.router_biases))
    check_continues(earlier, config, form, total, contents)
    hosts.assert_equal({"output_dir": f"a run of {start} steps"})

    # ---- 5. Announcement: what will happen, before it takes long
    table = announce(run) if hosts.primary else ""
    eval_rows = data.eval_fingerprint
    complete = partial(is_complete, config, eval_rows, form, earlier, total, contents)
    if hosts.broadcast_from_primary(complete):
        return finish_complete(run, form, dry_run)

    # ---- 6. The step: one function, compiled before there is anything to hold
    step_of = partial(step_config, config, setup.partition, setup.mesh, total)
    step_cfg = step_of(data.train.sequence_length)
    check_disk(config, setup, step_cfg, form, start < total, hosts)
    auto = config.training.gradient_checkpointing == "auto"
    programs = compile_programs(run, step_of, start, earlier.meta.get("remat") if start else None)
    if dry_run:
        hosts.log_once("dry run: inputs are valid and the step compiles; no weights were loaded")
        return 0

    # ---- 7. Parameters: from the files onto the devices
    frozen = load_frozen(setup, seed, Loading(primary=primary))
    hosts.barrier()  # the first exchange between devices gives up on a late process after 30 s
    if start:
        check_frozen(frozen, earlier.meta["frozen"], run.directory)
    with working("summing the weights that stay", primary, at_once=False):
        began = {"started": started, "contents": contents, "frozen": frozen_sums(frozen)}
        # What a user chose says nothing of what fits.
        began["remat"] = programs.remat if auto else None
    with working("initialising the adapter", primary and setup.spec is not None, at_once=False):
        trainable = {} if start else load_trainable(setup, frozen, seed, Loading(primary=primary))

    # ---- 8. State: the newest complete checkpoint's, or the first
    meter = Meter(run.objective, *mfu_inputs(setup, config, data.train))
    checkpointer, state = open_state(run, step_cfg, start, trainable, meter)
    del trainable
    if primary:
        write_atomic(run.directory.config, configuration.to_yaml(configuration.located(config)))

    # ---- 9. The loop
    with (
        MetricsLog(run.directory, config.logging, start, primary, config.model_dump()) as log,
        Progress(run.objective, total, start, primary) as progress,
    ):
        log.log_start(configuration.to_yaml(config), table)
        reporting = Reporting(meter, log, progress)
        loop = Loop(run, programs, frozen, checkpointer, began, reporting, publish)
        state, stopped = loop.steps(state, start)
        if stopped is not None:
            return 128 + stopped
        state = release(state)  # it is saved; evaluation and proof need the room
        sums = meter.run_sums()
        manifest = evaluation_manifest(total, sums, data.eval_fingerprint)
        failures = [finish_evaluation(loop, state, manifest)]
        summary = meter.summary()
        log.log_summary(total, summary)
    publish()  # before there is an export, which says that all is done
    del loop, programs  # they take room on the devices too

    # ---- 10. Results: the export, which nothing before it may prevent, and the picture
    try:
        if form is not None:
            check_disk(config, setup, step_cfg, form, False, hosts)  # others write there too
            output = Output(config, form, total, sums, contents)
            failures.append(export_run(output, Trained(setup, state.trainable, frozen), hosts))
    finally:
        if primary:
            plot_loss(run.directory.path)
    hosts.barrier()  # an error that is raised from here on ends the other processes
    raise_failures(failures)
    if primary:
        conclude(run, summary, form)
    return 0


def compile_programs(
    run: Run, step_of: Callable[[int], StepConfig], start: int, remat: str | None
) -> Programs:
    """Compile what the run still has to do; `remat` is the policy of an earlier start, if any."""
    train_step, eval_step, data = None, None, run.data
    if start < run.total:
        policies = policies_of(run.config.training, remat)
        step = step_of(data.train.sequence_length)
        train_step, remat = compile_step(step, policies, data.train, run.hosts)
    if data.eval:
        eval_step = compile_evaluation(step_of(data.eval.sequence_length), data.eval, run.hosts)
    return Programs(train_step, eval_step, remat)


def open_state(
    run: Run, step_cfg: StepConfig, start: int, trainable: Params, meter: Meter
) -> tuple[Checkpointer, TrainState]:
    """Open the run's checkpoints; restore the state of step `start`, or make the first one."""
    what = "restoring the state" if start else "making the first state"
    with working(what, run.hosts.primary, at_once=False):
        make_for_all(run.directory.checkpoints, run.hosts)
        checkpointer = Checkpointer(run.directory.checkpoints, run.config.checkpoint)
        if not start:
            return checkpointer, init_state(trainable, step_cfg, run.config.training.seed)
        state = checkpointer.restore(start, abstract_state(step_cfg))
        meter.restore(checkpointer.meta(start)["meter"])
    run.hosts.log_once(f"resuming after step {start} of {run.total}")
    return checkpointer, state


def export_run(output: Output, trained: Trained, hosts: Hosts) -> Exception | None:
    """Export a finished run, and upload what is proven.

    Returns:
        Why the proof did not run, or the upload failed, for the caller to raise.
    """
    with exporting(hosts.primary) as written:
        done = export_trained(output, trained, hosts, written)
    hosts.log_once(f"exported {output.form} to {output.path}{done}")
    if done.failure is None:
        return push_export(output.run, output.config.export, hosts)
    if output.config.export.push_to_hub is not None:
        hosts.log_once("export.push_to_hub: what is unproven is not uploaded")
    return done.failure


def finish_complete(run: Run, form: str | None, dry_run: bool) -> int:
    """End a run that an earlier start finished; what takes no model may still be missing."""
    config, hosts, files = run.config, run.hosts, run.directory
    if hosts.primary and not files.loss_plot.is_file():
        plot_loss(files.path)
    pushed = partial(is_pushed, files, config.export)
    if form is None or hosts.broadcast_from_primary(pushed):
        hosts.log_once(f"nothing to do: {run.total} steps and all results are there")
    elif dry_run:
        hosts.log_once(f"dry run: {files.export} is not uploaded")
    else:
        raise_failures([push_export(files, config.export, hosts)])
    return 0


def release(state: TrainState) -> TrainState:
    """Give up what a finished run holds on the devices besides its weights."""
    for array in jax.tree.leaves(state._replace(trainable={})):
        array.delete()
    return state


def raise_failures(failures: Sequence[Exception | None]) -> None:
    """Raise what went wrong in the last stages, none of which keeps the others from being done."""
    found = [failure for failure in failures if failure is not None]
    if len(found) > 1:
        raise ExceptionGroup("evaluation and export", found)
    if found:
        raise found[0]


def beside_earlier(config: RunConfig, hosts: Hosts) -> RunConfig:
    """Give a run a new output directory if there is one of its name: `--fresh`."""
    new = hosts.broadcast_from_primary(lambda: fresh_path(config.output_dir))
    if new != config.output_dir:
        hosts.log_once(f"output_dir: {new}, since {config.output_dir} exists")
    return config.model_copy(update={"output_dir": new})


def launch_fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return what has to be the same on all processes before anything is read."""
    keys = {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    devices = jax.local_devices()
    versions = {"dsjax": dsjax.__version__, "jax": jax.__version__}
    return keys | versions | {"devices": f"{len(devices)} x {devices[0].device_kind}"}


def export_form(config: RunConfig, setup: Assembly) -> str | None:
    """Return what to export.

    Raises:
        ConfigError: this model or adapter has no such form.
    """
    form = configuration.export_format(config.export, setup.spec.peft_type if setup.spec else None)
    check_export(config, setup, form, "export.format")
    return form


def mfu_inputs(setup: Assembly, config: RunConfig, loader: Loader) -> tuple[float, float | None]:
    """FLOPs that a training token needs, and the devices' peak, None if unknown."""
    # What is computed again is not among the FLOPs that are needed.
    flops = token_flops(setup.model, setup.partition, loader.sequence_length, remat="none")
    peak = peak_flops(jax.devices()[0].device_kind, config.model.dtype)
    return flops.needed, None if peak is None else peak * jax.device_count()


if __name__ == "__main__":
    imports.stop()
    prepare_process()
    run_command(main)
