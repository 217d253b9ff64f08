# SPDX-License-Identifier: Apache-2.0
"""Folders that somebody else needs: a process at work, another run's export, foreign files."""

import shutil
import signal
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import small_run
from begun_run import refused, unfinish

from dsjax.export.model_card import card_facts
from dsjax.training.run_dir import MANIFEST, RunDir
from dsjax.training.run_lock import locked_run_dir


def test_a_directory_in_which_a_run_is_going_on_is_refused(again, run: Path):
    shutil.rmtree(run / "export")
    with locked_run_dir(RunDir(run)):
        assert f"output_dir: got {str(run)!r}, in which another process" in refused(again)
    assert not (run / "export").exists()
    again()
    assert (run / "export").is_dir()


def waits_to_write(config: Path, *overrides: str) -> Popen[str]:
    """Start a run and stop it where it has looked at everything and not begun to train."""
    before = len(small_run.log_of(config)) if config.with_suffix(".log").exists() else 0
    process = small_run.start(config, *overrides)
    looked = lambda: "the trained part marked" in small_run.log_of(config)[before:]  # noqa: E731
    assert small_run.wait_for(process, looked)
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("state", ["new", "unfinished"])
def test_a_run_beside_one_that_has_looked_is_refused(
    again, run: Path, finished: Path, tmp_path: Path, state: str
):
    """Between its look and its first write another would finish, and be overwritten."""
    if state == "new":
        shutil.rmtree(run)
    else:
        unfinish(run)
    first = waits_to_write(finished, f"output_dir={run}")
    before = small_run.states(run)
    message = refused(again)
    assert "in which another process is training, expected none" in message
    assert f"({run}/.dsjax.lock is held by process {first.pid} of host " in message
    assert small_run.states(run) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0
    assert (run / "export").is_dir() and list(run.glob(".*")) == []


def test_an_export_that_came_meanwhile_is_not_replaced(
    again, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"

    def another_writes(*arguments: Any) -> Any:
        (shutil.copytree(run / "export", out) / MANIFEST).write_text('{"run": "another"}')
        return card_facts(*arguments)

    (run / "eval_results.json").unlink()
    monkeypatch.setattr("dsjax.export.run.card_facts", another_writes)
    assert "export of another run" in refused(again, f"export.path={out}")
    assert (out / MANIFEST).read_text() == '{"run": "another"}'


def test_foreign_folder_in_the_export_s_place_is_refused(again, run: Path, tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    before = small_run.states(tmp_path)
    message = refused(again, f"export.path={foreign}")
    assert message.startswith("export.path: got ") and "is not empty" in message
    assert small_run.states(tmp_path) == before


def test_another_run_s_export_is_not_replaced(again, run: Path, tmp_path: Path):
    """Two runs that share an `export.path` by oversight; nor is one taken for the other's."""
    out = tmp_path / "out"
    again(f"export.path={out}")
    before = small_run.states(out)
    other = ["optimizer.learning_rate=0.02", f"output_dir={tmp_path}/other", f"export.path={out}"]
    message = refused(again, *other)
    assert message.startswith("export.path: got ") and "export of another run" in message
    assert small_run.states(out) == before
    assert not (tmp_path / "other").exists()


def test_the_export_of_the_same_configuration_on_other_data_is_not_replaced(
    again, run: Path, finished: Path, tmp_path: Path
):
    """A row was corrected, the output directory removed, and everything started anew."""
    out = shutil.copytree(run / "export", tmp_path / "out")
    rows = finished.parent / "train.jsonl"
    text = rows.read_text()
    before = small_run.contents(out)
    shutil.rmtree(run)
    lines = text.splitlines(keepends=True)
    try:
        rows.write_text("".join([*lines[1:], lines[1]]))
        assert "which holds the export of another run" in refused(again, f"export.path={out}")
    finally:
        rows.write_text(text)
    assert small_run.contents(out) == before
    assert not run.exists()
