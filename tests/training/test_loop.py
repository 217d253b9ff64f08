# SPDX-License-Identifier: Apache-2.0
"""The loop runs few steps ahead, counts finished ones, and stops soon after a signal."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import small_run

from dsjax import train
from dsjax.config import LoggingSection
from dsjax.distributed.processes import Hosts
from dsjax.training import loop
from dsjax.training.console import Progress

LONG = 30
"""Products of a step that takes a while, some tenths of a second."""


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make each step's report come late; returns the reports' arrays, in order of dispatch."""
    dispatched: list[Any] = []
    compile_step = train.compile_step

    @jax.jit
    def late(x: jax.Array) -> jax.Array:
        busy = jnp.full((512, 512), x / 512)
        busy = jax.lax.fori_loop(0, LONG, lambda _, y: jnp.cos(y @ y), busy)
        return x + 0 * busy[0, 0]

    late(jnp.float32(1)).block_until_ready()

    def compile_slow(*arguments: Any) -> Any:
        compiled, policy = compile_step(*arguments)

        def step(*arrays: Any) -> Any:
            state, told = compiled(*arrays)
            slow = late(told.sums["loss"].addressable_data(0))
            dispatched.append(slow)
            return state, told._replace(sums=told.sums | {"loss": slow})

        return step, policy

    monkeypatch.setattr(train, "compile_step", compile_slow)
    return dispatched


def words(tmp_path: Path, *more: str) -> list[str]:
    """Of a run that logs seldom, does not evaluate, and exports nothing."""
    config = small_run.write_inputs(tmp_path, "lora", training={"eval_steps": None})
    keys = ["data.eval=null", "logging.logging_steps=100", "export.format=null", "mesh.fsdp=1"]
    return ["--config", str(config), "mesh.data=8", *keys, *more]


@pytest.mark.slow
def test_few_steps_are_in_flight_and_the_bar_counts_finished_ones(
    tmp_path: Path, slow_steps: list[Any], monkeypatch: pytest.MonkeyPatch
):
    in_flight, behind, advance = [], [], Progress.advance
    to_devices = loop.to_devices

    def note_dispatch(*arguments: Any) -> Any:
        in_flight.append(sum(not report.is_ready() for report in slow_steps))
        return to_devices(*arguments)

    def note_advance(self: Progress, step: int) -> None:
        assert slow_steps[step - 1].is_ready()
        behind.append(len(slow_steps) - step)
        advance(self, step)

    monkeypatch.setattr(loop, "to_devices", note_dispatch)
    monkeypatch.setattr(Progress, "advance", note_advance)
    assert train.main(words(tmp_path, "training.max_steps=8")) == 0
    assert len(behind) == 8 and max(behind) == 1
    assert max(in_flight) == 1  # and the one that is dispatched next


@pytest.mark.parametrize(
    ("asked", "total", "every"),
    [("auto", 8, 1), ("auto", 25, 2), ("auto", 5000, 10), (10, 8, 10), (1, 5000, 1)],
)
def test_a_short_run_is_logged_often_enough_for_a_picture(asked: Any, total: int, every: int):
    assert loop.logging_steps(LoggingSection(logging_steps=asked), total) == every


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_signal_is_answered_at_once_and_obeyed_two_steps_later(
    tmp_path: Path, slow_steps: list[Any], capsys: pytest.CaptureFixture[str], again: bool
):
    sent: list[int] = []

    def send() -> None:
        while len(slow_steps) < 3:
            time.sleep(0.01)
        for _ in range(1 + again):  # `timeout` signals the process and its group
            os.kill(os.getpid(), signal.SIGTERM)
        sent.append(len(slow_steps))

    thread = threading.Thread(target=send)
    thread.start()
    given = words(tmp_path, "training.max_steps=8")
    assert train.main(given) == 143
    thread.join()
    done = len(slow_steps)
    assert done <= sent[0] + 2
    said = capsys.readouterr().err
    saved = tmp_path / "run" / "checkpoints" / str(done)
    assert saved.is_dir()
    assert f"stopping after step {done}; a second Ctrl-C or SIGTERM stops at once\n" in said
    assert f"stopped by SIGTERM; step {done} is saved in {saved}\n" in said


@pytest.mark.slow
def test_a_signal_during_the_last_exchange_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What was announced is done, also where the loop has just been told that nobody asked."""
    stop_wanted = Hosts.any_preemption

    def signalled_meanwhile(self: Hosts) -> int | None:
        answer = stop_wanted(self)
        os.kill(os.getpid(), signal.SIGTERM)
        while self._asked is None:
            time.sleep(0.001)
        return answer

    monkeypatch.setattr(Hosts, "any_preemption", signalled_meanwhile)
    assert train.main(words(tmp_path, "training.max_steps=2")) == 143
    said = capsys.readouterr().err
    assert "stopping after step 2; a second Ctrl-C or SIGTERM stops at once\n" in said
    assert "stopped by SIGTERM; step 2 is saved in " in said
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_the_share_of_lost_updates_is_logged(tmp_path: Path):
    brief = {"max_steps": 2, "eval_steps": None, "gradient_accumulation_steps": 1}
    config = small_run.write_inputs(tmp_path, "full", training=brief, data={"eval": None})
    keys = ["model.param_dtype=bfloat16", "optimizer.learning_rate=1e-5", "export.format=null"]
    assert train.main(["--config", str(config), "logging.logging_steps=1", *keys]) == 0
    first, second = (row["updates_lost"] for row in small_run.metrics(tmp_path / "run"))
    assert first == 0 and 0.1 < second < 1  # the first has learning rate 0: none is wanted
