# SPDX-License-Identifier: Apache-2.0
"""Runs of a few seconds, started, stopped and killed as processes, and what they left on disk.

In: a folder and a kind of training. Out: a config file that trains it, processes of `dsjax.train`,
and the contents of a run's folder in a form to compare. Not here: what has to be true of them.
"""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import yaml

ROOT = Path(__file__).parents[1]
EXPORT_MARKS = (".export.partial", ".export.old")
MEASURED = ("tokens_per_second", "mfu", "step_time", "device_memory_gib", "time")
"""Keys of a line that the machine and the hour decide, not the training."""

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"peft_type": "LORA", "r": 4, "lora_dropout": 0.2}},
    "full": {"training": {"freeze": ["model.embed_tokens.*"], "gradient_accumulation_steps": 2}},
    "prefix": {"adapter": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}},
}


def write_inputs(
    folder: Path,
    kind: str,
    eval_rows: int = 16,
    variant: str = "llama_gqa",
    **sections: dict[str, Any],
) -> Path:
    """Write a checkpoint, rows and a config file, and return the file; `sections` add to it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.build_checkpoint(folder / "model", variant)
    rng = np.random.default_rng(0)
    for name, count in (("train", 48), ("eval", eval_rows)):
        lines = [rng.integers(3, 250, rng.integers(8, 30)).tolist() for _ in range(count)]
        text = "".join(json.dumps({"input_ids": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    config: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "format": "tokens",
            "max_length": 64,
        },
        "training": {"batch_size": 8, "max_steps": 12, "eval_steps": 6},
        "optimizer": {"learning_rate": 1e-2},
        "logging": {"logging_steps": 2},
        "checkpoint": {"save_steps": 5},
        "output_dir": str(folder / "run"),
    }
    for name, section in [*KINDS[kind].items(), *sections.items()]:
        config[name] = config.get(name, {}) | section
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(config: Path, *overrides: str, devices: int = 1) -> subprocess.Popen[str]:
    """Start `dsjax.train` in a process group of its own; its stderr goes to `<config>.log`."""
    with config.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dsjax.train", "--config", str(config), *overrides],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )


def finish(config: Path, *overrides: str, devices: int = 1) -> None:
    """Run to the end, which must succeed."""
    process = start(config, *overrides, devices=devices)
    assert process.wait(300) == 0, log_of(config)[-6000:]


def log_of(config: Path) -> str:
    """What all runs of the config said on stderr."""
    return config.with_suffix(".log").read_text()


def wait_for(process: subprocess.Popen[str], reached: Callable[[], Any], seconds: float = 180):
    """Poll until `reached()` is true; return False if the process ended first."""
    deadline = time.monotonic() + seconds
    while not reached():
        if process.poll() is not None:
            return bool(reached())
        assert time.monotonic() < deadline, "the run never came there"
        time.sleep(0.0005)
    return True


def kill_while(process: subprocess.Popen[str], there: Callable[[], Any]) -> bool:
    """SIGKILL the process while `there()` is true; return False if it ended without being caught.

    The process is stopped before the second look, so what was seen is what the kill meets.
    """
    while wait_for(process, there):
        if process.poll() is not None:
            return False
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if there():
            process.kill()
            process.wait()
            return True
        process.send_signal(signal.SIGCONT)
    return False


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what is MEASURED and the summary, which time decides."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [
            {key: value for key, value in row.items() if key not in MEASURED}
            for row in rows
            if "train_loss" not in row
        ]
    return []


def logged_steps(run: Path) -> int:
    """The number of training lines so far; a half-written line does not count."""
    with contextlib.suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_bytes().count(b'"learning_rate"')
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of every file in a folder: equal if nothing was touched.

    Of folders the name alone counts: in that of a run the file of its lock comes and goes.
    """
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        if path.is_file()
        else (0, 0)
        for path in sorted(folder.rglob("*"))
    }


def scalars(run: Path) -> Iterator[tuple[str, int, float]]:
    """What TensorBoard shows of a run: tag, step, value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            yield tag, event.step, event.value


def traced_steps(trace: Path) -> list[int]:
    """The optimizer steps that a trace holds, in order."""
    with gzip.open(trace / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    numbers = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    return sorted(map(int, numbers))
