# SPDX-License-Identifier: Apache-2.0
"""An unfinished run started again: resumed from its newest whole checkpoint, on whatever mesh.

Each test starts the real command on a copy of one run, in this process for speed: its eight devices
are another mesh than the run began on.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import small_run
import yaml
from begun_run import LOSS_BOUND, TOTAL, refused, restored_meta, unfinish

from dsjax import train
from dsjax.distributed.compiled import Memory, memory_of
from dsjax.errors import ConfigError
from dsjax.training import compilation, run_data
from dsjax.training.loop import Loop


@pytest.mark.slow
def test_resumes_on_another_mesh(again, run: Path, finished: Path):
    unfinish(run)
    said = again("mesh.data=2", "mesh.fsdp=2", "mesh.sequence=2")
    assert f"resuming after step 10 of {TOTAL}" in said
    rows, original = small_run.metrics(run), small_run.metrics(finished.parent / "run")
    assert len(rows) == len(original)
    for row, expected in zip(rows, original, strict=True):
        assert row == pytest.approx(expected, rel=LOSS_BOUND), row


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(again, run: Path):
    said = again("training.max_steps=14", "logging.logging_steps=1", "checkpoint.save_steps=7")
    assert f"resuming after step {TOTAL} of 14" in said
    steps = [row["step"] for row in small_run.metrics(run) if "loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12, 13, 14]
    assert json.loads((run / "eval_results.json").read_text())["step"] == 14
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["max_steps"] == 14


@pytest.mark.slow
def test_the_same_contents_may_lie_elsewhere(again, run: Path, finished: Path, tmp_path: Path):
    """Moved to another disk, with a config.json that was saved again by another version."""
    unfinish(run)
    moved = shutil.copytree(finished.parent / "model", tmp_path / "elsewhere")
    told = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(told | {"transformers_version": "9"}))
    rows = shutil.copy(finished.parent / "train.jsonl", tmp_path / "rows.jsonl")
    said = again(f"model.path={moved}", f"data.train={rows}", "data.overlong=error")
    assert f"resuming after step 10 of {TOTAL}" in said


@pytest.mark.slow
def test_what_changes_no_number_may_change(again, run: Path, finished: Path):
    """Above all what troubleshooting.md advises to a run that is out of memory."""
    unfinish(run)
    said = again(
        *("training.gradient_accumulation_steps=1", "training.gradient_checkpointing=full"),
        *("training.eval_steps=4", f"data.eval={finished.parent / 'train.jsonl'}"),
    )
    assert f"resuming after step 10 of {TOTAL}" in said
    losses = [row["loss"] for row in small_run.metrics(run) if "loss" in row]
    original = [row["loss"] for row in small_run.metrics(finished.parent / "run") if "loss" in row]
    assert losses == pytest.approx(original, rel=LOSS_BOUND)


@pytest.mark.slow
def test_more_epochs_go_on(again, run: Path):
    said = again("training.max_steps=null", "training.num_train_epochs=7")
    assert f"resuming after step {TOTAL} of " in said


@pytest.mark.slow
def test_templates_show_the_day_on_which_the_run_began(again, run: Path, monkeypatch):
    """Another day would make other tokens of the same rows, which are refused."""
    days, read = [], run_data.read_data

    def note_day(config: Any, setup: Any, today: datetime, *primary: bool) -> Any:
        days.append(today)
        return read(config, setup, today, *primary)

    monkeypatch.setattr(run_data, "read_data", note_day)
    again()
    assert days == [datetime.fromisoformat(restored_meta(run)["started"])]


@pytest.mark.slow
def test_a_later_start_takes_the_policy_that_fitted(
    finished: Path, tmp_path: Path, monkeypatch, capsys
):
    """Devices have a byte less than the step needs that computes nothing again."""
    peaks, log = [], Loop._log

    def note_peak(program: Any, platform: str) -> Memory:
        peaks.append(memory_of(program, platform))
        return peaks[-1]

    def log_and_stop(self: Loop, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        log(self, *arguments)

    def begin() -> tuple[int, list[str]]:
        words = [f"output_dir={tmp_path}", "data.eval=null", "training.eval_steps=null"]
        code = train.main(["--config", str(finished), *words, "export.format=null"])
        said = capsys.readouterr().err
        return code, re.findall("compiled the step in .* s with remat (.*); it needs", said)

    monkeypatch.setattr(compilation, "memory_of", note_peak)
    monkeypatch.setattr(compilation, "memory_limit", lambda _: peaks[0].peak - 1)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", log_and_stop)
        code, tried = begin()
    assert code == 128 + signal.SIGTERM and tried[0] == "none" and len(tried) > 1
    assert restored_meta(tmp_path)["remat"] == tried[-1]
    assert begin() == (0, tried[-1:])
    losses = [row["loss"] for row in small_run.metrics(tmp_path) if "loss" in row]
    whole = [row["loss"] for row in small_run.metrics(finished.parent / "run") if "loss" in row]
    assert losses == pytest.approx(whole, rel=LOSS_BOUND)


def damage_largest_file(checkpoint: Path, how: Callable[[bytes], bytes]) -> None:
    """Change the file that holds most of a checkpoint's arrays."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: bytes(len(data)), id="zeros", marks=pytest.mark.slow),
    ],
)
def test_damaged_newest_checkpoint_is_refused_by_name(again, run: Path, how):
    unfinish(run)
    damage_largest_file(run / "checkpoints" / "10", how)
    before = small_run.contents(run)
    message = refused(again)
    assert f"{run}/checkpoints/10: got a damaged checkpoint" in message
    assert "delete this folder to continue from step 5" in message
    assert small_run.contents(run) == before


@pytest.mark.slow
def test_unfinished_checkpoint_is_not_used(again, run: Path, finished: Path):
    unfinish(run)
    checkpoints = run / "checkpoints"
    shutil.move(checkpoints / "10", checkpoints / "10.orbax-checkpoint-tmp-1")
    assert f"resuming after step 5 of {TOTAL}" in again()
    original = small_run.metrics(finished.parent / "run")
    steps = [row["step"] for row in small_run.metrics(run)]
    assert steps == [row["step"] for row in original]


@pytest.mark.slow
def test_a_diverged_state_is_not_saved(finished: Path, tmp_path: Path):
    """However seldom a line is logged, good checkpoints are not pushed out by useless ones."""
    words = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=2", "checkpoint.save_steps=1"]
    words += ["logging.logging_steps=100", "training.eval_steps=null", "training.max_steps=50"]
    with pytest.raises(ConfigError, match="loss: got .* lower optimizer.learning_rate"):
        train.main(["--config", str(finished), f"output_dir={tmp_path}", *words])
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert saved and max(saved) <= 3
