# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: metrics.jsonl, and the reporters that the user asked for.

In: values and texts that the run has already computed. Out: `metrics.jsonl` in the output
directory; the same values for TensorBoard and trackers (`reporters`). Not done here: sums
(`meter`), the loss picture (`loss_plot`), the terminal (`console`), and deciding which process
reports (callers pass `primary`).

Order that a caller keeps: the lines of step s are logged before the checkpoint of step s is saved,
and `Meter.state()` is saved with it. Then a resumed run neither loses nor repeats a line.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsjax.config import LoggingSection
from dsjax.config.json_file import parse
from dsjax.errors import ConfigError, files_of
from dsjax.training.reporters import ReportedRun, Reporter, open_reporter
from dsjax.training.run_dir import RunDir


class MetricsLog:
    """Appends to `metrics.jsonl` and tells the reporters; a context manager.

    Args:
        run: the run's files; their folder must exist.
        section: the config's `logging` section.
        resume_step: the optimizer step that the run continues from, 0 for a new run. Lines of later
            steps, which a killed run left behind, are cut; so is a half-written last line.
        primary: whether this process reports; the others write nothing.
        config: the run's resolved configuration, which trackers show.
    """

    def __init__(
        self,
        run: RunDir,
        section: LoggingSection,
        resume_step: int,
        primary: bool = True,
        config: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._start_step = resume_step
        self._file = None
        self._reporters: list[Reporter] = []
        self._path = path = run.metrics
        # By every process: all must come to the same answer on what is left to evaluate.
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        self._summarised = {row["step"] for row in rows if "train_loss" in row}
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}
        if not primary:
            return
        reported = ReportedRun(run, resume_step, config)
        with ExitStack() as opened:
            opened.callback(self.close, failed=True)
            with files_of(path):
                cut_lines(path, resume_step)
                self._file = path.open("a", encoding="utf-8")
            for name in dict.fromkeys(section.report_to):
                self._reporters.append(open_reporter(name, reported))
            opened.pop_all()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Close all; nothing can be logged afterwards. Trackers show whether the run failed."""
        with files_of(self._path):
            if self._file is not None:
                self._file.close()  # which writes what could not be written before
        for reporter in self._reporters:
            reporter.close(failed)

    def log(self, step: int, values: Mapping[str, object]) -> None:
        """Write the training line of a step."""
        assert "loss" in values, f"not a training line: {list(values)}"
        self._write(step, values, lambda key: f"train/{key}")

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of a step is logged, by this or an earlier process of the run."""
        return step in self._evaluated

    def forget_evaluation(self, step: int) -> None:
        """Let the evaluation of a step be logged again: it was of other rows."""
        self._evaluated.discard(step)

    def log_eval(self, step: int, values: Mapping[str, object]) -> None:
        """Write an evaluation line, once a step."""
        assert "eval_loss" in values, f"not an evaluation: {list(values)}"
        assert all(key.startswith("eval_") for key in values), f"not eval_*: {list(values)}"
        if step not in self._evaluated:
            self._evaluated.add(step)
            self._write(step, values, lambda key: f"eval/{key.removeprefix('eval_')}")

    def log_summary(self, step: int, values: Mapping[str, object]) -> None:
        """Write the closing line, unless an earlier process of this run wrote it at this step."""
        assert "train_loss" in values and "loss" not in values, f"not a summary: {list(values)}"
        if step not in self._summarised:
            self._summarised.add(step)
            self._write(step, dict(values), lambda key: f"train/{key}")

    def log_start(self, config_text: str, trainable_text: str) -> None:
        """Report the resolved config (YAML) and the table of what trains."""
        for reporter in self._reporters:
            reporter.text(self._start_step, "config", f"```yaml\n{config_text}\n```")
            reporter.text(self._start_step, "trainable", f"```\n{trainable_text}\n```")

    def _write(self, step: int, values: Mapping[str, object], tag: Callable[[str], str]) -> None:
        if self._file is None:
            return
        row = {key: _json_value(step, key, value) for key, value in values.items()}
        with files_of(self._path):
            line = {"step": step} | row | {"time": _now()}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        shown = {tag(k): v for k, v in row.items() if isinstance(v, int | float)}
        for reporter in self._reporters:
            reporter.scalars(step, shown)


def _now() -> str:
    """Return when a line is written: in UTC, so that lines of hosts elsewhere compare."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json_value(step: int, key: str, value: Any) -> Any:
    """Return a number as Python's own, at full precision; what JSON cannot say becomes null."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and not math.isfinite(plain):
        message = f"warning: step {step}: {key} is {plain}, written to metrics.jsonl as null"
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
