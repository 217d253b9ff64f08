# SPDX-License-Identifier: Apache-2.0
"""What the files of a run say at one moment.

In: a run's folder; the run may be at work. Out: a `Snapshot` of plain values, which JSON can hold.
Not done here: checking the configuration, which may be one of another version; showing any of it
(`page`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dsjax.config.inputs import check_run_dir
from dsjax.config.json_file import read_object
from dsjax.config.yaml_file import read_yaml, to_text
from dsjax.distributed.lease import holder_in
from dsjax.distributed.lock_file import holder_of
from dsjax.errors import ConfigError
from dsjax.training.metrics_log import read_metrics
from dsjax.training.run_dir import RunDir

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment; numbers that JSON has no word for are texts, such as "inf".

    Attributes:
        name: what the page calls it.
        state: finished, running or stopped, as far as files tell.
        progress: the steps done, of how many.
        facts: what is said of the run as a whole, by what it is called.
        series: for each key of `metrics.jsonl`: its steps and its values, in the file's order. When
            the lines were written is left out here and below: of the last one `facts` tell it.
        evaluations: the evaluations' values, each with its step, in the file's order.
        summary: the closing line; empty if there is none.
        final: `eval_results.json`; empty if there is none.
        config: `config.yaml` key by key: section (or nothing), key, and the key's YAML.
    """

    name: str
    state: str
    progress: str
    facts: Mapping[str, str]
    series: Mapping[str, tuple[Sequence[int], Sequence[Any]]]
    evaluations: Sequence[Row]
    summary: Row
    final: Row
    config: Sequence[tuple[str, str, str]]


def read_snapshot(run: RunDir, name: str) -> Snapshot:
    """Read what a run has written so far.

    Args:
        run: the run's files.
        name: what the page calls it.

    Raises:
        ConfigError: it is no run's folder, its first line is still to come, or a file is damaged.
    """
    check_run_dir(run.path, "RUN", str(run))
    config = read_yaml(run.config)
    rows = [_in_json(row) for row in read_metrics(run.metrics)]
    if not rows:
        raise ConfigError(
            f"RUN: got {str(run)!r}, of which {run.metrics.name} has no line, expected a run that "
            "has logged a step; wait for its first line, or train it"
        )
    last = rows[-1].get("time")
    rows = [{key: value for key, value in row.items() if key != "time"} for row in rows]
    logged = [row for row in rows if "train_loss" not in row]
    summary = next((row for row in reversed(rows) if "train_loss" in row), {})
    final = read_object(run.eval_results, "RUN") if run.eval_results.is_file() else {}
    return Snapshot(
        name,
        _state(run, logged, summary),
        _progress(config, logged, summary),
        _facts(run, config, last),
        _series(logged),
        [row for row in logged if "eval_loss" in row],
        summary,
        _in_json(final),
        list(_config_lines(config)),
    )


def _in_json(row: Row) -> Row:
    """Return a row in which a number that is none, or without end, is a text."""
    return json.loads(json.dumps(row), parse_constant=str)


def _series(rows: Sequence[Row]) -> dict[str, tuple[list[int], list[Any]]]:
    """Turn lines into one series for each key, in the order in which keys come up."""
    series: dict[str, tuple[list[int], list[Any]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step":
                steps, values = series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def _state(run: RunDir, rows: Sequence[Row], summary: Row) -> str:
    """Say whether the run is at work: a lock of another host counts, for none can ask there."""
    holder = holder_in(run.bucket) if run.bucket else holder_of(run.lock)
    if holder is not None and (holder.lives_here or not holder.is_of_here):
        return "running"
    return "finished" if summary and summary["step"] >= _done(rows) else "stopped"


def _progress(config: Row, rows: Sequence[Row], summary: Row) -> str:
    """Say how many steps are done, and of how many as far as it is known before the end."""
    done = max(_done(rows), summary.get("step", 0))
    total = _value(config, "training", "max_steps")
    if summary.get("step") == done:
        return f"{done:,} of {done:,}"
    if isinstance(total, int):
        return f"{done:,} of {total:,}"
    epoch = next((row["epoch"] for row in reversed(rows) if row.get("epoch")), None)
    epochs = _value(config, "training", "num_train_epochs")
    if isinstance(epoch, int | float) and isinstance(epochs, int | float):
        return f"{done:,} of about {max(round(done / epoch * epochs), done):,}"
    return f"{done:,}"


def _done(rows: Sequence[Row]) -> int:
    return max((row["step"] for row in rows), default=0)


def _facts(run: RunDir, config: Row, last: Any) -> dict[str, str]:
    """Say what the run is of, and when its files, and its `last` line, were written."""
    facts = {
        "model": _text(_value(config, "model", "path")),
        "method": _method(config),
        "data": _text(_value(config, "data", "train")),
        "folder": str(run),
    }
    if run.url is None:  # else the file's time is that of the copy here
        facts["last start"] = f"{_written(run.config)} (time of {run.config.name})"
    return facts | {"last line": _last_line(run, last)}


def _method(config: Row) -> str:
    """Name what trains: the kind of an adapter, or the whole model."""
    kind, path = _value(config, "adapter", "peft_type"), _value(config, "adapter", "path")
    if path:
        return f"adapter {path}"
    rank = f", r {_value(config, 'adapter', 'r')}" if kind == "LORA" else ""
    return f"{kind}{rank}" if kind else "full training"


def _value(config: Row, section: str, key: str) -> Any:
    """Return a key's value; None where a file of other hands has none."""
    part = config.get(section)
    return part.get(key) if isinstance(part, dict) else None


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _last_line(run: RunDir, last: Any) -> str:
    """Say when the last line was written: as it says itself, or as its file does if it does not."""
    try:
        return _local(datetime.fromisoformat(last))
    except (TypeError, ValueError):  # a line of another version
        return f"{_written(run.metrics)} (time of {run.metrics.name})"


def _written(file: Path) -> str:
    return _local(datetime.fromtimestamp(file.stat().st_mtime))


def _local(when: datetime) -> str:
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _config_lines(config: Row) -> Iterator[tuple[str, str, str]]:
    """Yield the keys of a configuration as its file has them."""
    for name, part in config.items():
        if not isinstance(part, dict):
            yield "", str(name), to_text({name: part}).rstrip("\n")
            continue
        for key, value in part.items():
            yield str(name), str(key), to_text({key: value}).rstrip("\n")
