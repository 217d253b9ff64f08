# SPDX-License-Identifier: Apache-2.0
"""Evaluate: the loss of a model over files, exact to the token, as JSON on stdout.

    python -m dsjax.evaluate FILE.yaml [section.key=value ...]
    python -m dsjax.evaluate --model DIR [--adapter DIR] --data FILE [--data FILE ...]

With FILE.yaml (or `--config FILE`): `data.eval`, with the newest checkpoint of the run in
`output_dir` if it has one, else with the model as configured; stderr says which. Not done here: the
sums (`training.evaluation`), generation.
"""

if __name__ == "__main__":
    from dsjax.signals import end_at_once

    end_at_once()  # what is imported below takes seconds

    from dsjax.config.evaluate_options import answered
    from dsjax.config.stage_clock import import_clock
    from dsjax.errors import answer_early

    answer_early(answered)
    imports = import_clock("jax, flax, orbax, transformers").start()

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import jax
from absl import flags

from dsjax.config import (
    AdapterSection,
    DataSection,
    ModelSection,
    RunConfig,
    TrainingSection,
    load_config,
)
from dsjax.config.evaluate_options import OPTIONS, parse_words, word_problems
from dsjax.config.inputs import may_download
from dsjax.data import Examples, load_evaluation
from dsjax.distributed.bootstrap import refuse_several
from dsjax.distributed.compilation_cache import keep_compiled
from dsjax.distributed.sharding import Params
from dsjax.errors import ConfigError, raise_all, renamed, run_command
from dsjax.objectives import objective_of
from dsjax.training.checkpoint import Checkpointer, from_newest
from dsjax.training.console import Loading, working
from dsjax.training.continuation import differing_keys
from dsjax.training.evaluation import evaluate_loss, make_eval_step
from dsjax.training.restore import check_frozen, read_meta, restore_trained
from dsjax.training.run_data import make_loader, read_rows
from dsjax.training.run_dir import RunDir
from dsjax.training.setup import Assembly, assemble, load_frozen, load_trainable
from dsjax.training.state import step_config
from dsjax.training.working_copy import fetched

BATCH_SIZE = 8
"""Rows at a time without a configuration, rounded up to the number of devices."""


def main(argv: Sequence[str]) -> int:
    """Evaluate what the command line names."""
    words = parse_words(argv)
    raise_all(word_problems(words))
    refuse_several("dsjax.evaluate", os.environ)
    keep_compiled(os.environ)
    if words.config is not None:
        print_results(evaluate_run(load_config(words.config, words.overrides)))
    else:
        with renamed(OPTIONS):
            print_results(evaluate_model(_config_of(words)))
    return 0


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint, or the model that the run would start from."""
    if config.data.eval is None and config.data.val_size is None:
        raise ConfigError(
            "data.eval: got null, expected files or hub datasets to evaluate on; add data.eval=FILE"
        )
    # What is of use in training only, such as the module for multi-token prediction, stays out.
    options = objective_of(config.objective).for_evaluation(config.objective)
    here = not may_download(config.model.path)
    with working("opening the checkpoint", here, at_once=False):
        setup = assemble(config.model_copy(update={"objective": options}))
    step, meta = from_newest(lambda: newest_checkpoint(config))
    examples = read_examples(config, setup, datetime.fromisoformat(meta["started"]))
    if step is None:
        print(f"no checkpoint in {config.output_dir}: the model as configured", file=sys.stderr)
        frozen = load_frozen(setup, config.training.seed, Loading())
        trainable = load_trainable(setup, frozen, config.training.seed, Loading())
    else:
        print(f"the checkpoint of step {step} in {config.output_dir}", file=sys.stderr)
        with working(f"restoring step {step:,}", at_once=False):
            step, trainable, _ = restore_trained(config, setup)
        frozen = load_frozen(setup, config.training.seed, Loading())
        with working("summing the weights that stay", at_once=False):
            check_frozen(frozen, meta["frozen"], RunDir.of(config))
    return {"step": step, **measure(config, setup, trainable, frozen, examples)}


def evaluate_model(config: RunConfig) -> dict[str, Any]:
    """Evaluate a checkpoint, with an adapter or without."""
    here = not may_download(config.model.path)
    with working("opening the checkpoint", here, at_once=False):
        setup = assemble(config)
    if setup.spec is None:
        # Nothing trains here: hold the weights as they are computed with, not as float32 masters.
        setup = replace(setup, partition=setup.partition.for_inference(config.model.dtype))
    examples = read_examples(config, setup, datetime.now())
    frozen = load_frozen(setup, config.training.seed, Loading())
    trainable = load_trainable(setup, frozen, config.training.seed)
    return measure(config, setup, trainable, frozen, examples)


def newest_checkpoint(config: RunConfig) -> tuple[int | None, dict[str, Any]]:
    """Return the step of the run's newest complete checkpoint, and what was saved beside its state.

    Raises:
        ConfigError: the run is one of another model or adapter, whose arrays are not this one's.
    """
    run = RunDir.of(config)
    with fetched(run):
        return _newest_checkpoint(run, config)


def _newest_checkpoint(run: RunDir, config: RunConfig) -> tuple[int | None, dict[str, Any]]:
    nothing = {"started": datetime.now().isoformat(), "frozen": {}}
    checkpointer = Checkpointer(run.checkpoints, config.checkpoint, read_only=True)
    step = checkpointer.latest()
    meta = nothing if step is None else read_meta(checkpointer, step)
    checkpointer.close()
    if step is not None and run.config.is_file():
        held = ("model.dtype", "model.param_dtype", "model.attention")
        trains = ("training.freeze", "objective.bias_update_speed")
        changed = [
            key
            for key in differing_keys(load_config(run.config), config)
            if key.startswith(("model.", "adapter.", *trains)) and key not in held
        ]
        if changed:
            raise ConfigError(
                f"output_dir: got {config.output_dir!r}, which holds a run with other "
                f"{', '.join(changed)}, expected the run of this configuration"
            )
    return step, meta


def read_examples(config: RunConfig, setup: Assembly, today: datetime) -> Examples:
    """Tokenise the rows, once the batch is known to fit the devices; print what became of them."""
    with working("reading rows") as tell:
        load = partial(load_evaluation, progress=lambda name, rows: tell(f"{rows:,} of {name}"))
        examples, _ = read_rows(config, setup, today, load)
    assert examples is not None
    for line in examples.report.lines():
        print(line, file=sys.stderr)
    return examples


def measure(
    config: RunConfig, setup: Assembly, trainable: Params, frozen: Params, examples: Examples
) -> dict[str, Any]:
    """Run over all examples; returns what is printed."""
    loader = make_loader(config, setup, examples, shuffle=False)
    length = loader.sequence_length
    step = step_config(config, setup.partition, setup.mesh, total_steps=1, length=length)
    eval_step, batches = make_eval_step(step), loader.steps_in_epoch(0)
    with working("evaluating") as far:
        values = evaluate_loss(
            step.objective,
            eval_step,
            trainable,
            frozen,
            loader,
            setup.mesh,
            progress=lambda done: far(f"batch {done:,} of {batches:,}"),
        )
    report = examples.report
    return {
        **{name.removeprefix("eval_"): value for name, value in values.items()},
        "trained_tokens": report.trained_tokens,
        "rows": report.rows,
        "sequences": report.sequences,
        "truncated": report.truncated,
        "dropped": report.dropped,
        "model": config.model.path,
        "adapter": config.adapter.path,
        "data": list(config.data.eval or config.data.train),
    }


def print_results(results: dict[str, Any]) -> None:
    """Print JSON; a number that JSON cannot hold becomes null, and stderr says which."""
    shown = {}
    for name, value in results.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if not finite:
            print(f"{name}: got {value}, which JSON cannot hold; null is written", file=sys.stderr)
        shown[name] = value if finite else None
    print(json.dumps(shown, indent=2, ensure_ascii=False))


def _config_of(words: argparse.Namespace) -> RunConfig:
    """Return the configuration that the options stand for."""
    devices = jax.device_count()
    default = math.ceil(BATCH_SIZE / devices) * devices
    length = {} if words.max_length is None else {"max_length": words.max_length}
    return RunConfig(
        model=ModelSection(path=words.model, dtype=words.dtype or "bfloat16"),
        adapter=AdapterSection(path=words.adapter) if words.adapter else AdapterSection(),
        data=DataSection(
            train=words.data, eval=words.data, format=words.format or "auto", **length
        ),
        training=TrainingSection(batch_size=words.batch_size or default),
        output_dir=".",  # asked for by the class; nothing is written
    )


if __name__ == "__main__":
    imports.stop()
    flags.FLAGS.mark_as_parsed()  # grain's workers ask for them
    run_command(main)
