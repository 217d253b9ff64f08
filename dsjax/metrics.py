# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run on disk: metrics.jsonl, TensorBoard, the loss picture; and their sums.

In: sums and texts that the run has already computed. Out: `metrics.jsonl`, `tensorboard/` and
`training_loss.png` in the output directory. Not done here: computing a loss, printing to the
terminal (terminal.py), the model card (model_card.py), and deciding which process reports (callers
pass `primary`).

Order that a caller keeps: the lines of step s are logged before the checkpoint of step s is saved,
and `Meter.state()` is saved with it. Then a resumed run neither loses nor repeats a line.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsFloat, SupportsInt

from dsjax.config import LoggingSection
from dsjax.errors import ConfigError, files_of
from dsjax.json_file import parse

METRICS_FILE, PICTURE, BOARD = "metrics.jsonl", "training_loss.png", "tensorboard"
TRAIN_KEYS = (
    "epoch",
    "loss",
    "accuracy",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "mfu",
)
EVAL_KEYS = ("eval_loss", "eval_perplexity", "eval_tokens")


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard; a context manager.

    Args:
        output_dir: the run's directory; it must exist.
        section: the config's `logging` section.
        resume_step: the optimizer step that the run continues from, 0 for a new run. Lines of later
            steps, which a killed run left behind, are cut; so is a half-written last line.
        primary: whether this process reports; the others write nothing.
    """

    def __init__(
        self, output_dir: Path, section: LoggingSection, resume_step: int, primary: bool = True
    ) -> None:
        self._start_step = resume_step
        self._file = None
        self._board = None
        self._path = path = output_dir / METRICS_FILE
        # By every process: all must come to the same answer on what is left to evaluate.
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        self._summarised = {row["step"] for row in rows if "train_loss" in row}
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}
        if not primary:
            return
        with files_of(path):
            cut_lines(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        if "tensorboard" in section.report_to:
            # Imported here: it takes seconds, which a run that does not report would pay as well.
            from dsjax.tensorboard_file import EventFile

            self._board = EventFile(output_dir / BOARD, resume_step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; nothing can be logged afterwards."""
        with files_of(self._path):
            if self._file is not None:
                self._file.close()  # which writes what could not be written before
        if self._board is not None:
            self._board.close()

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Write the training line of a step: all of TRAIN_KEYS first, then what else is given."""
        ordered = {key: values[key] for key in TRAIN_KEYS} | dict(values)
        self._write(step, ordered, lambda key: f"train/{key}")

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of a step is logged, by this or an earlier process of the run."""
        return step in self._evaluated

    def forget_evaluation(self, step: int) -> None:
        """Let the evaluation of a step be logged again: it was of other rows."""
        self._evaluated.discard(step)

    def log_eval(self, step: int, values: Mapping[str, object]) -> None:
        """Write an evaluation line, once a step: all of EVAL_KEYS, then other `eval_*` keys."""
        ordered = {key: values[key] for key in EVAL_KEYS} | dict(values)
        assert all(key.startswith("eval_") for key in ordered), f"not eval_*: {list(ordered)}"
        if step not in self._evaluated:
            self._evaluated.add(step)
            self._write(step, ordered, lambda key: f"eval/{key.removeprefix('eval_')}")

    def log_summary(self, step: int, values: Mapping[str, object]) -> None:
        """Write the closing line, unless an earlier process of this run wrote it at this step."""
        assert "train_loss" in values and "loss" not in values, f"not a summary: {list(values)}"
        if step not in self._summarised:
            self._summarised.add(step)
            self._write(step, dict(values), lambda key: f"train/{key}")

    def log_start(self, config_text: str, trainable_text: str) -> None:
        """Put the resolved config (YAML) and the table of what trains into TensorBoard."""
        if self._board is not None:
            self._board.text(self._start_step, "config", f"```yaml\n{config_text}\n```")
            self._board.text(self._start_step, "trainable", f"```\n{trainable_text}\n```")

    def _write(self, step: int, values: Mapping[str, object], tag: Callable[[str], str]) -> None:
        if self._file is None:
            return
        row = {key: _json_value(step, key, value) for key, value in values.items()}
        with files_of(self._path):
            self._file.write(json.dumps({"step": step} | row, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            shown = {tag(k): v for k, v in row.items() if isinstance(v, int | float)}
            self._board.scalars(step, shown)


def _json_value(step: int, key: str, value: Any) -> Any:
    """Return a number as Python's own, at full precision; what JSON cannot say becomes null."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        message = f"warning: step {step}: {key} is {plain}, written to {METRICS_FILE} as null"
        print(message, file=sys.stderr)
        return None
    return plain


def read_metrics(path: Path) -> list[dict]:
    """Return the whole lines of a `metrics.jsonl` as dicts; a missing file has none.

    Raises:
        ConfigError: a line is none that a run writes.
    """
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each line with its values, but for the last where a kill left it half written."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    read = [(line, _parse(line)) for line in lines]
    for number, (_, row) in enumerate(read[:-1], 1):
        if row is None:
            raise ConfigError(
                f"{path}:{number}: got a line that is not one of a run's, expected an object with "
                "a step and numbers; remove the line"
            )
    return [(line, row) for line, row in read if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's values; None if it is none of a run's."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    losses = [row.get("loss"), row.get("eval_loss")]  # what is computed with
    return row if all(type(loss) in (float, int, type(None)) for loss in losses) else None


def cut_lines(path: Path, resume_step: int) -> None:
    """Remove the lines after `resume_step` (all, if it is 0) and half-written ones, atomically."""
    if not path.exists():
        return
    kept = [line for line, row in _lines(path) if resume_step and row["step"] <= resume_step]
    if sum(map(len, kept)) < path.stat().st_size:
        beside = path.with_name(path.name + ".tmp")
        with beside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


@dataclass
class _Sums:
    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    tokens: int = 0

    def add(self, loss: float, weight: float, correct: float, tokens: int) -> None:
        self.loss += loss
        self.weight += weight
        self.correct += correct
        self.tokens += tokens


class Meter:
    """Sums what the steps return and gives the values of a training line.

    Sums are kept as Python floats in step order, so a resumed run that restores `state()` logs the
    very numbers of an unbroken one.

    Args:
        flops_per_token: what a token needs (`throughput.token_flops`); None gives no `mfu`.
        peak_flops: of all devices together; None gives no `mfu`.
    """

    def __init__(
        self, flops_per_token: float | None = None, peak_flops: float | None = None
    ) -> None:
        self._mfu_per_rate = None
        if flops_per_token is not None and peak_flops is not None:
            self._mfu_per_rate = flops_per_token / peak_flops
        self._since_log, self._run = _Sums(), _Sums()
        self._ahead: tuple[float, float] | None = None  # loss and weight since the last log
        self._untrained = 0  # steps of the run whose batch had no trained token
        self._timed_tokens = self._tokens_here = self._steps_here = 0
        self._started = self._clock = time.monotonic()

    def start(self) -> None:
        """Start the clocks: what came before the first step is not its time."""
        self._started = self._clock = time.monotonic()

    def add(
        self,
        loss_sum: SupportsFloat,
        weight_sum: SupportsFloat,
        correct: SupportsFloat,
        tokens: SupportsInt,
        ahead: tuple[SupportsFloat, SupportsFloat] | None = None,
    ) -> None:
        """Take one optimizer step's sums over the whole batch.

        Args:
            loss_sum: sum of weight x loss over the trained tokens.
            weight_sum: sum of the weights.
            correct: sum of the weights where the most likely token was the target.
            tokens: real tokens in the batch, padding excluded, trained or not.
            ahead: sums of loss and weight of the token after the next, where it is predicted.
        """
        step = float(loss_sum), float(weight_sum), float(correct), int(tokens)
        self._since_log.add(*step)
        self._run.add(*step)
        # A step that float16 skipped tells of no token at all.
        self._untrained += step[3] > 0 and step[1] == 0
        self._timed_tokens += step[3]
        self._tokens_here += step[3]
        self._steps_here += 1
        if ahead is not None:
            loss, weight = self._ahead or (0.0, 0.0)
            self._ahead = loss + float(ahead[0]), weight + float(ahead[1])

    def values(self) -> dict[str, float | int | None]:
        """Return means since the last call and `tokens` of the whole run; start the next interval.

        A mean over no trained token is None. `mtp_loss` is there where steps told of it, and
        `untrained_steps`, of the whole run, where a batch had no trained token.
        """
        now = time.monotonic()
        rate = self._timed_tokens / max(now - self._clock, 1e-9)
        sums, self._since_log = self._since_log, _Sums()
        self._clock, self._timed_tokens = now, 0
        ahead = {} if self._ahead is None else {"mtp_loss": _mean(*self._ahead)}
        self._ahead = None
        return {
            "loss": _mean(sums.loss, sums.weight),
            "accuracy": _mean(sums.correct, sums.weight),
            "tokens": self._run.tokens,
            "tokens_per_second": rate,
            "mfu": None if self._mfu_per_rate is None else self._mfu_per_rate * rate,
            **ahead,
            **self._told_untrained(),
        }

    def summary(self) -> dict[str, float | None]:
        """Return the closing line: the loss of the whole run, the speed of this process's part."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return {
            "train_loss": _mean(self._run.loss, self._run.weight),
            "train_runtime": seconds,
            "train_steps_per_second": self._steps_here / seconds,
            "train_tokens_per_second": self._tokens_here / seconds,
            **self._told_untrained(),
        }

    def _told_untrained(self) -> dict[str, int]:
        return {"untrained_steps": self._untrained} if self._untrained else {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (an evaluation, a compilation) out of `tokens_per_second`."""
        stopped = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - stopped

    def state(self) -> dict[str, Any]:
        """Return the sums for the checkpoint; exact through JSON, not through float32 arrays."""
        state = {"since_log": asdict(self._since_log), "run": asdict(self._run)}
        if self._ahead is not None:
            state["ahead"] = {"loss": self._ahead[0], "weight": self._ahead[1]}
        return state | self._told_untrained()

    def run_sums(self) -> dict[str, float]:
        """Return the sums over the whole run."""
        return self.state()["run"]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._since_log = _Sums(**state["since_log"])
        self._run = _Sums(**state["run"])
        ahead = state.get("ahead")
        self._ahead = None if ahead is None else (ahead["loss"], ahead["weight"])
        self._untrained = state.get("untrained_steps", 0)


def _mean(total: float, weight: float) -> float | None:
    return total / weight if weight else None


def plot_loss(output_dir: Path) -> Path | None:
    """Draw `training_loss.png` from `metrics.jsonl`; None, and no file, if no loss was logged."""
    rows = read_metrics(output_dir / METRICS_FILE)
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    evals = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    if not train:
        return None
    # Imported here: a second that no other command should pay. Not pyplot: it is global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    points, label = _binned(train, "training")
    steps, losses = zip(*points, strict=True)
    marker = "o" if len(train) <= 30 else None
    axes.plot(steps, losses, color="#9db7d5", linewidth=1.2, marker=marker, ms=3, label=label)
    axes.plot(steps, _smooth(losses), color="#1f4e8c", linewidth=2, label="training, smoothed")
    if evals:
        points, label = _binned(evals, "evaluation")
        axes.plot(*zip(*points, strict=True), "o-", color="#d1495b", ms=5, label=label)
    axes.set(title="Training loss", xlabel="optimizer step", ylabel="loss per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    path = output_dir / PICTURE
    beside = path.with_name("training_loss.tmp.png")
    with files_of(path):
        figure.savefig(beside)
        beside.replace(path)
    return path


MOST_POINTS = 1000
"""Points of a curve, about as many as the picture has columns; memory grows with their square."""


def _binned(
    points: Sequence[tuple[int, float]], name: str
) -> tuple[list[tuple[float, float]], str]:
    """Return at most MOST_POINTS means of as many points each, and a label that says so."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return [(float(step), float(loss)) for step, loss in points], name
    bins = [points[place : place + size] for place in range(0, len(points), size)]
    means = [
        (sum(step for step, _ in part) / len(part), sum(loss for _, loss in part) / len(part))
        for part in bins
    ]
    return means, f"{name}, means of {size} lines"


def _smooth(losses: Sequence[float]) -> list[float]:
    """Return centred means over about a fifteenth of the points; a trailing mean would lag."""
    reach = max(len(losses) // 30, 1)
    windows = [losses[max(place - reach, 0) : place + reach + 1] for place in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
