# SPDX-License-Identifier: Apache-2.0
"""Run folders as `dsjax.train` leaves them, made by the parts that write them, without training.

In: a folder, steps, overrides. Out: `config.yaml`, `metrics.jsonl` and `eval_results.json`. Not
here: what a page has to make of them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.config import load_config, to_yaml
from dsjax.training.eval_results import evaluation_manifest, write_results
from dsjax.training.metrics_log import MetricsLog
from dsjax.training.run_dir import RunDir

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def make_run(
    folder: Path,
    *overrides: str,
    steps: int = 100,
    every: int = 2,
    ended: bool = True,
    more: Mapping[str, Any] | None = None,
) -> RunDir:
    """Write a run of some steps, evaluated twice, and its end; `more` goes into its first line."""
    config = load_config(
        QUICKSTART, [f"output_dir={folder}", f"training.max_steps={steps}", *overrides]
    )
    run = RunDir.of(config)
    run.path.mkdir()
    run.config.write_text(to_yaml(config))
    with MetricsLog(run, config.logging.model_copy(update={"report_to": []}), 0) as log:
        for step in range(every, steps + 1, every):
            log.log(step, line(step) | (dict(more or {}) if step == every else {}))
            if step in (steps // 2, steps) and ended:
                log.log_eval(step, evaluation(step))
        if ended:
            log.log_summary(steps, {"train_loss": 1.25, "train_runtime": 3723.4})
            write_results(run.path, evaluation_manifest(steps, {}, "9 rows"), evaluation(steps))
    return run


def line(step: int) -> dict[str, Any]:
    """A training line, with the keys of a run on a CPU."""
    loss = 3 * math.exp(-step / 30) + 0.1 * math.sin(step)
    rates = {"learning_rate": 1e-3 / step, "grad_norm": 1 + math.cos(step) / 3}
    speed = {"tokens": 512 * step, "tokens_per_second": 2e4 + step, "mfu": None, "step_time": 0.5}
    return {"epoch": step / 40, "loss": loss, "accuracy": 1 - loss / 4, **rates, **speed}


def evaluation(step: int) -> dict[str, Any]:
    loss = 2.5 * math.exp(-step / 40)
    perplexity = {"eval_perplexity": math.exp(loss), "eval_tokens": 77}
    return {"eval_loss": loss, **perplexity, "eval_accuracy": 1 - loss / 4}
