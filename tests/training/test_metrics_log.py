# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl, TensorBoard and the loss picture."""

import json
import math
import os
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsjax.config import LoggingSection
from dsjax.errors import ConfigError
from dsjax.objectives import SFT
from dsjax.training.loss_plot import MOST_POINTS, _binned, _smooth, plot_loss
from dsjax.training.meter import Meter
from dsjax.training.metrics_log import MetricsLog, read_metrics
from dsjax.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]
SILENT = LoggingSection(report_to=[])
BOARD = LoggingSection(report_to=["tensorboard"])


def train_values(loss=1.5, **more):
    values = {
        "epoch": 0.5,
        "loss": loss,
        "accuracy": 0.25,
        "learning_rate": 1e-4,
        "grad_norm": np.float32(0.1),
        "tokens": 64,
        "tokens_per_second": 12.5,
        "mfu": None,
    }
    return values | more


def eval_values(loss=2.0):
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_tokens": 7}


def write_run(directory, steps, section=SILENT):
    with MetricsLog(RunDir(directory), section, 0) as log:
        for step in steps:
            log.log(step, train_values(loss=1 / step))
            log.log_eval(step, eval_values(2 / step))


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_one_loss_line_per_step_with_the_keys_in_the_order_given(tmp_path):
    write_run(tmp_path, [1, 2])
    rows = lines(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert tuple(rows[0]) == ("step", *train_values(), "time")
    assert tuple(rows[1]) == ("step", *eval_values(), "time")
    assert rows[0]["mfu"] is None


def test_every_line_says_when_it_was_written(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    write_run(tmp_path, [1])
    with MetricsLog(RunDir(tmp_path), SILENT, 1) as log:
        log.log_summary(1, {"train_loss": 1.0})
    times = [datetime.fromisoformat(row["time"]) for row in lines(tmp_path)]
    assert len(times) == 3 and times == sorted(times)
    assert before <= times[0] and times[-1] <= datetime.now(UTC)
    assert all(row["time"].endswith("+00:00") and len(row["time"]) == 25 for row in lines(tmp_path))


def test_numbers_are_written_at_full_precision(tmp_path):
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        log.log(3, train_values(loss=0.1 + 0.2, loss_scale=np.float32(1 / 3)))
    (row,) = lines(tmp_path)
    assert row["loss"] == 0.1 + 0.2
    assert np.float32(row["loss_scale"]) == np.float32(1 / 3)


def test_a_line_is_readable_as_soon_as_it_is_logged(tmp_path):
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        log.log(1, train_values())
        assert len(lines(tmp_path)) == 1


def test_a_line_waits_for_the_disk_once(tmp_path, monkeypatch):
    synced = []
    with MetricsLog(RunDir(tmp_path), BOARD, 0) as log:
        monkeypatch.setattr("os.fsync", synced.append)
        log.log(1, train_values())
        assert len(synced) == 1


def test_a_line_without_a_loss_is_our_error(tmp_path):
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        with pytest.raises(AssertionError, match="not a training line"):
            log.log(1, {"epoch": 0.0})
        with pytest.raises(AssertionError, match="not an evaluation"):
            log.log_eval(1, {"eval_accuracy": 0.0})


def test_non_finite_becomes_null_with_a_warning(tmp_path, capsys):
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        log.log(4, train_values(loss=math.nan, grad_norm=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(tmp_path)[0]["loss"] is None
    assert "step 4: loss is nan, written to metrics.jsonl as null" in capsys.readouterr().err


def test_resume_cuts_later_lines_and_keeps_the_rest_byte_for_byte(tmp_path):
    write_run(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    MetricsLog(RunDir(tmp_path), SILENT, 2).close()
    assert path.read_bytes() == b"".join(before[:4])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\n", b"\xff\n", b"[1]\n"])
def test_resume_cuts_a_torn_last_line(tmp_path, torn):
    write_run(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with MetricsLog(RunDir(tmp_path), SILENT, 2) as log:
        assert path.read_bytes() == whole
        log.log(3, train_values())
    assert [row["step"] for row in lines(tmp_path)] == [1, 1, 3]


@pytest.mark.parametrize(
    "line", [b"[1]", b"\xff", b'{"step": true}', b'{"step": 1, "loss": "x"}', b"[" * 90_000, b""]
)
def test_a_line_that_is_none_of_a_run_s_is_refused_by_its_number(tmp_path, line):
    write_run(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    for read in (read_metrics, lambda path: MetricsLog(RunDir(tmp_path), SILENT, 2)):
        with pytest.raises(ConfigError, match=rf"{path}:2: got a line that is not one of a run's"):
            read(path)


def test_resume_at_the_last_step_leaves_the_file_untouched(tmp_path):
    write_run(tmp_path, [1, 2])
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricsLog(RunDir(tmp_path), SILENT, 2).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    assert len(lines(tmp_path)) == 4


def test_a_new_start_in_the_same_directory_starts_the_file_again(tmp_path):
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        log.log_eval(0, eval_values())
    MetricsLog(RunDir(tmp_path), SILENT, 0).close()
    assert lines(tmp_path) == []


def test_summary_is_written_once_over_restarts(tmp_path):
    summary = Meter(SFT).summary()
    for resume_step in (0, 5):
        with MetricsLog(RunDir(tmp_path), SILENT, resume_step) as log:
            log.log_summary(5, summary | {"train_loss": 1.0})
    (row,) = lines(tmp_path)
    assert set(row) == {
        "step",
        "train_loss",
        "train_runtime",
        "train_steps_per_second",
        "train_tokens_per_second",
        "time",
    }


def test_other_processes_write_nothing(tmp_path):
    with MetricsLog(RunDir(tmp_path), BOARD, 0, primary=False) as log:
        log.log(1, train_values())
        log.log_start("a: 1", "table")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_scalars_and_texts(tmp_path):
    write_run(tmp_path, [1, 2], BOARD)
    with MetricsLog(RunDir(tmp_path), BOARD, 2) as log:
        log.log_start("model: {}", "module  parameters")
        log.log(3, train_values(loss=math.nan))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {
        *(f"train/{key}" for key in train_values() if key != "mfu"),
        "eval/loss",
        "eval/perplexity",
        "eval/tokens",
    }
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in board.Scalars("train/epoch")] == [1, 2, 3]
    texts = {
        tag: board.Tensors(tag)[0].tensor_proto.string_val[0] for tag in board.Tags()["tensors"]
    }
    assert b"model: {}" in texts["config/text_summary"]
    assert b"module  parameters" in texts["trainable/text_summary"]


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path):
    write_run(tmp_path, [1, 2, 3], BOARD)
    with MetricsLog(RunDir(tmp_path), BOARD, 1) as log:
        log.log(2, train_values(loss=9.0))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert seen == [(1, 1.0), (2, 9.0)]


def test_tensorboard_has_a_point_before_the_next_line_of_code(tmp_path):
    with MetricsLog(RunDir(tmp_path), BOARD, 0) as log:
        log.log(1, train_values(loss=2.0))
        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [event.value for event in board.Scalars("train/loss")] == [2.0]


def test_tensorboard_is_written_without_tensorflow(tmp_path):
    """Where it is installed, tensorboard's own file writer would import it, which takes seconds."""
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('tensorflow is imported')")
    code = f"""
from pathlib import Path
from dsjax.training.event_file import EventFile
file = EventFile(Path({str(tmp_path / "board")!r}), 0)
file.scalars(1, {{"loss": 1.0}})
file.text(1, "config", "model: {{}}")
file.close()
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)


def test_no_tensorboard_unless_asked(tmp_path):
    write_run(tmp_path, [1])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_window_without_loss_is_null_and_not_warned_of(tmp_path, capsys):
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        log.log(1, train_values(loss=None, accuracy=None))
        log.log(2, train_values(loss=2.0))
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, 2.0]
    assert capsys.readouterr().err == ""
    assert plot_loss(tmp_path) is not None


def test_picture(tmp_path):
    write_run(tmp_path, range(1, 40))
    assert plot_loss(tmp_path) == tmp_path / "training_loss.png"
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "training_loss.png",
    ]


@pytest.mark.slow
def test_a_picture_of_a_long_run_takes_little_memory(tmp_path):
    lines = [json.dumps({"step": step, "loss": 2.0 + step % 2}) for step in range(1, 20_001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    plot_loss(tmp_path)  # imports what draws
    tracemalloc.start()
    plot_loss(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 60e6  # the lines themselves: 20 MB
    tracemalloc.stop()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5000))
@settings(max_examples=20)
def test_a_curve_of_few_points_is_the_mean_of_all(losses):
    points = list(enumerate(losses, 1))
    binned, label = _binned(points, "training")
    assert len(binned) <= MOST_POINTS
    size = -(-len(points) // MOST_POINTS)
    assert label == ("training" if size == 1 else f"training, means of {size} lines")
    for index, (step, loss) in enumerate(binned):
        part = points[index * size : (index + 1) * size]
        assert step == pytest.approx(sum(step for step, _ in part) / len(part))
        assert loss == pytest.approx(sum(loss for _, loss in part) / len(part), abs=1e-9)
    assert len(binned) * size >= len(points)


def test_no_picture_without_a_loss(tmp_path):
    assert plot_loss(tmp_path) is None
    with MetricsLog(RunDir(tmp_path), SILENT, 0) as log:
        log.log(1, train_values(loss=math.nan))
    assert plot_loss(tmp_path) is None
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["step"] == 1
    assert not (tmp_path / "training_loss.png").exists()


def test_smoothing_does_not_lag_and_flattens_a_zigzag():
    assert _smooth([5.0, 4.0, 3.0, 2.0, 1.0]) == [4.5, 4.0, 3.0, 2.0, 1.5]
    smooth = _smooth([1.0 + (step % 2) for step in range(90)])
    assert max(smooth[3:-3]) - min(smooth[3:-3]) < 0.2
