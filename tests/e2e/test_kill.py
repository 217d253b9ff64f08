# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, at any moment and any number of times, ends as if nothing had happened.

The same command is started again after each SIGKILL. In the end every exported byte, every logged
number and the evaluation are those of an undisturbed run. SIGTERM and SIGINT save before they end.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_run

from dsjax.config import LoggingSection
from dsjax.training.metrics_log import MetricsLog
from dsjax.training.run_dir import RunDir

MEASURED = (*(f"train/{key}" for key in small_run.MEASURED), "train/train_")
# What is left to do is a step and a save, each well under a second; the rest is for a busy machine.
SECONDS_TO_STOP = 30


def assert_same_end(run: Path, reference: Path) -> None:
    """Compare everything that training determines."""
    assert small_run.metrics(run) == small_run.metrics(reference)
    assert small_run.contents(run / "export") == small_run.contents(reference / "export")
    results = "eval_results.json"
    assert (run / results).read_bytes() == (reference / results).read_bytes()
    assert shown(run) == shown(reference)
    assert (run / "training_loss.png").stat().st_size > 1000
    left = [str(path) for path in run.rglob("*") if "partial" in path.name or "tmp" in path.name]
    assert left == []


def shown(run: Path) -> set[tuple[str, int, float]]:
    """TensorBoard's numbers, without what is MEASURED."""
    return {row for row in small_run.scalars(run) if not row[0].startswith(MEASURED)}


def writes_checkpoint(run: Path) -> Callable[[], bool]:
    """Whether a checkpoint is being written at this moment."""
    return lambda: any((run / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def writes_export(run: Path) -> Callable[[], bool]:
    """Whether the export is being written at this moment."""
    return (run / ".export.partial").exists


def evaluates_at_the_end(run: Path, total: int) -> Callable[[], bool]:
    """Whether all steps are done and the results are not there yet."""
    return lambda: (
        (run / "checkpoints" / str(total)).exists() and not (run / "eval_results.json").exists()
    )


def stopped_in_time(process, number: signal.Signals) -> int:
    """Send a signal to the whole group, as a terminal or a scheduler does; return the exit code."""
    began = time.monotonic()
    os.killpg(process.pid, number)
    code = process.wait(120)
    assert time.monotonic() - began < SECONDS_TO_STOP
    return code


def kill_after(config: Path, said: str, seconds: float) -> None:
    """Start a run and SIGKILL it that long after it has said something on stderr."""
    before = len(small_run.log_of(config))
    process = small_run.start(config)
    assert small_run.wait_for(process, lambda: said in small_run.log_of(config)[before:])
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_and_stopped_run_ends_like_an_undisturbed_one(tmp_path: Path):
    config = small_run.write_inputs(tmp_path, "lora", training={"max_steps": 40})
    whole, run = tmp_path / "whole", tmp_path / "run"
    small_run.finish(config, f"output_dir={whole}")

    process = small_run.start(config)
    small_run.wait_for(process, lambda: small_run.logged_steps(run) >= 4)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    process = small_run.start(config)
    small_run.wait_for(process, lambda: small_run.logged_steps(run) >= 10)
    assert stopped_in_time(process, signal.SIGTERM) == 143
    done = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert 20 <= done < 40

    small_run.finish(config)
    assert f"resuming after step {done} of 40" in small_run.log_of(config)
    assert_same_end(run, whole)


def test_logged_points_are_on_disk_at_once(tmp_path: Path):
    """Nothing may be lost of a step that a checkpoint has passed."""
    log = MetricsLog(RunDir(tmp_path), LoggingSection(), 0)
    log.log_eval(3, {"eval_loss": 0.5, "eval_perplexity": 2.0, "eval_tokens": 7})
    assert ("eval/loss", 3, 0.5) in set(small_run.scalars(tmp_path))
    log.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("prefix", "llama_gqa"),
        ("full", "deepseek_v3"),
    ],
)
def test_kills_everywhere(tmp_path: Path, kind: str, variant: str):
    total = 60
    config = small_run.write_inputs(
        tmp_path,
        kind,
        variant=variant,
        training={"max_steps": total, "eval_steps": 10},
        logging={"logging_steps": 1},
        checkpoint={"save_steps": 7, "save_total_limit": 2},
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    small_run.finish(config, f"output_dir={whole}")

    chance = random.Random(kind)
    early, late = chance.randrange(8, 20), chance.randrange(22, 36)
    starting, compiling, compiled = "", "one row, the trained part marked", "compiled the step"
    for said in (starting, compiling, compiled, f"step {early}/{total}", f"step {late}/{total}"):
        kill_after(config, said, chance.uniform(0, 0.5))
    # Saving at every step, which may change between runs, leaves hardly a moment without a save.
    often = small_run.start(config, "checkpoint.save_steps=1")
    assert small_run.kill_while(often, writes_checkpoint(run)), "not caught in time"
    for moment in (evaluates_at_the_end(run, total), writes_export(run)):
        assert small_run.kill_while(small_run.start(config), moment), "not caught in time"
    small_run.finish(config)
    assert_same_end(run, whole)


@pytest.mark.slow
def test_interrupt_from_the_keyboard(tmp_path: Path):
    config = small_run.write_inputs(tmp_path, "lora", training={"max_steps": 400})
    run = tmp_path / "run"
    process = small_run.start(config)
    small_run.wait_for(process, lambda: small_run.logged_steps(run) >= 3)
    assert stopped_in_time(process, signal.SIGINT) == 130
    assert "Traceback" not in small_run.log_of(config)
    assert list((run / "checkpoints").iterdir())


@pytest.mark.slow
def test_terminated_during_an_evaluation(tmp_path: Path):
    """An evaluation may take longer than a scheduler waits: it is left out, and made up for."""
    words = {"training": {"max_steps": 12, "eval_steps": 6}}
    config = small_run.write_inputs(tmp_path, "lora", eval_rows=8_000, **words)
    whole, run = tmp_path / "whole", tmp_path / "run"
    small_run.finish(config, f"output_dir={whole}")
    began_evaluation = lambda: small_run.logged_steps(run) == 3  # noqa: E731
    process = small_run.start(config)
    small_run.wait_for(process, began_evaluation)
    assert stopped_in_time(process, signal.SIGTERM) == 143
    assert [row for row in small_run.metrics(run) if "eval_loss" in row] == []
    small_run.finish(config)
    assert_same_end(run, whole)
