# SPDX-License-Identifier: Apache-2.0
"""Which steps are traced, and what is said of those that are not."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from small_run import traced_steps

from dsjax.training.profiling import Profile


def take_steps(folder: Path, steps: list[int] | None, start: int, stop: int, total: int = 9):
    with Profile(steps, start, total, folder, primary=True) as profile:
        for step in range(start + 1, stop + 1):
            profile.reached(step, jnp.arange(step) + 1)


def traces(folder: Path) -> list[Path]:
    return list(folder.glob("plugins/profile/*"))


def test_a_trace_begins_after_the_first_number_and_ends_with_the_second(tmp_path, capsys):
    take_steps(tmp_path, [3, 5], start=3, stop=9)
    (trace,) = traces(tmp_path)
    assert traced_steps(trace) == [4, 5]
    assert capsys.readouterr().err.startswith(f"trace: {trace}; open it with")


def test_a_run_that_is_stopped_leaves_what_it_traced(tmp_path):
    take_steps(tmp_path, [2, 8], start=0, stop=4)
    (trace,) = traces(tmp_path)
    # The step that was cut off is in it: its annotation ends with the trace.
    assert traced_steps(trace) == [3, 4, 5]


@pytest.mark.parametrize(("steps", "start"), [([2, 5], 3), ([2, 10], 0)])
def test_a_trace_that_this_run_has_not_whole_is_left_out_and_said(tmp_path, capsys, steps, start):
    take_steps(tmp_path, steps, start=start, stop=9)
    said = f"got {steps}, but this run takes steps {start + 1} to 9; nothing is traced\n"
    assert capsys.readouterr().err == f"logging.profile_steps: {said}"
    assert traces(tmp_path) == []


def test_other_processes_trace_nothing_and_say_nothing(tmp_path, capsys):
    with Profile([1, 99], 0, 9, tmp_path, primary=False) as profile:
        profile.reached(1, None)
    assert traces(tmp_path) == [] and capsys.readouterr().err == ""
