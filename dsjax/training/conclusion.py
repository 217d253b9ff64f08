# SPDX-License-Identifier: Apache-2.0
"""What a finished run was, where its results lie, and what can be done with them next.

In: the run and its summary. Out: text on stderr; for a caller in Python a `FinetuneResult`. Not
done here: the results.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsjax.buckets import Bucket
from dsjax.config.sections import UNMERGED
from dsjax.config.stage_clock import clock
from dsjax.training.console import banner
from dsjax.training.metrics_log import read_metrics
from dsjax.training.run import Run
from dsjax.training.run_dir import RunDir
from dsjax.training.working_copy import fetched


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left behind.

    Attributes:
        output_dir: the run's directory, or its URL.
        export: the exported checkpoint or adapter, or its URL; None if none was asked for.
        metrics: the run's closing numbers by name (`train_loss`, `train_runtime` in seconds, ...),
            and its last evaluation's (`eval_loss`, ...).
        history: every line of metrics.jsonl: `step` with `loss`, `learning_rate` and so on.
    """

    output_dir: Path | str
    export: Path | str | None
    metrics: dict[str, Any]
    history: list[dict[str, Any]]

    @classmethod
    def of(cls, run: RunDir) -> "FinetuneResult":
        """Read the results of a run that is finished."""
        with fetched(run):
            history = read_metrics(run.metrics)
        closing = [row for row in history if "eval_loss" in row or "train_loss" in row]
        metrics = {key: value for row in closing for key, value in row.items() if key != "time"}
        export = run.export
        there = bool(export.files()) if isinstance(export, Bucket) else export.is_dir()
        place = str(export) if isinstance(export, Bucket) else export
        return cls(run.url or run.path, place if there else None, metrics, history)


def conclude(run: Run, summary: Mapping[str, float | None], form: str | None) -> None:
    """Print the end of a run, with the commands that a user may want next.

    Args:
        run: the run.
        summary: the closing line of its metrics.
        form: of its export; None if there is none.
    """
    files, loss = run.directory, summary["train_loss"]
    board = f", {files.tensorboard.name}/" if "tensorboard" in run.config.logging.report_to else ""
    facts = {
        "train loss": "none: no token was trained" if loss is None else f"{loss:.4f}",
        "runtime": f"{clock(summary['train_runtime'] or 0)}, "
        f"{summary['train_tokens_per_second'] or 0:,.0f} tokens/s",
        "losses": f"{files.shown(files.loss_plot)}, {files.metrics.name}{board}",
        "checkpoints": files.checkpoints,
    }
    if form is not None:
        facts["export"] = f"{files.export} ({form})"
    banner(facts, "done")
    for purpose, command in _next_commands(run, form).items():
        print(f"{purpose}: python -m dsjax.{shlex.join(command)}", file=sys.stderr)


def _next_commands(run: Run, form: str | None) -> dict[str, list[str]]:
    """Return the commands that may come next: what for -> the words."""
    files, data = run.directory, run.config.data
    exported, kind = str(files.export), run.setup.spec.peft_type if run.setup.spec else None
    commands = {"to look at it": ["view", str(files)]}
    if form == "merged":
        commands["to try it"] = ["generate", "--model", exported, "--prompt", "TEXT"]
    elif form == "peft":
        model = ["--model", run.config.model.path, "--adapter", exported]
        commands["to try it"] = ["generate", *model, "--prompt", "TEXT"]
    if form != "merged" and kind not in UNMERGED:
        out = files.shown(files.path / "merged")
        merged = ["export", "--run", str(files), "--format", "merged", "--out", out]
        commands["as one model"] = merged
    if data.eval is None and data.val_size is None and files.url is None:
        commands["to measure it"] = ["evaluate", str(files.config), "data.eval=FILE"]
    return commands
