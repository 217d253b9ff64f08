# SPDX-License-Identifier: Apache-2.0
"""Batches without one trained token: they count as nothing, are told of, and end no run."""

import json
from pathlib import Path

import pytest
import small_run
import yaml

from dsjax import train
from dsjax.training.metrics_log import read_metrics

TOKENS = list(range(5, 20))
IDLE = [-100] * 15


def write_batches(path: Path, batches: list[list[int]]) -> None:
    """Write eight rows for each of the labels, a batch of the eight devices."""
    rows = [{"input_ids": TOKENS, "labels": labels} for labels in batches for _ in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A run of four batches in order, of which the second and third train nothing."""
    config = small_run.write_inputs(tmp_path_factory.mktemp("untrained"), "lora", eval_rows=0)
    write_batches(config.parent / "train.jsonl", [TOKENS, IDLE, IDLE, TOKENS])
    tree = yaml.safe_load(config.read_text())
    tree["data"] |= {"packing": False, "shuffle": False, "eval": None}
    tree["training"] = {"batch_size": 8, "num_train_epochs": 1}
    tree["logging"] = {"logging_steps": 1}
    config.write_text(yaml.safe_dump(tree))
    return config


@pytest.mark.slow
def test_batches_without_a_trained_token_have_no_loss(config, capsys):
    assert train.main(["--config", str(config)]) == 0
    said = capsys.readouterr().err
    assert "16 without a trained token" in said and " is nan" not in said
    assert said.count("had a batch without one trained token") == 1
    assert "\nonly 4 steps: 32 rows, 8 in each step; for more, raise training.num_train" in said
    lines = read_metrics(Path(yaml.safe_load(config.read_text())["output_dir"]) / "metrics.jsonl")
    steps, summary = lines[:4], lines[4]
    assert [line["loss"] is None for line in steps] == [False, True, True, False]
    assert [line.get("untrained_steps") for line in steps] == [None, 1, 2, 2]
    assert steps[1]["grad_norm"] == steps[2]["grad_norm"] == 0.0
    assert summary["untrained_steps"] == 2
    assert summary["train_loss"] == pytest.approx((steps[0]["loss"] + steps[3]["loss"]) / 2)


@pytest.mark.slow
def test_a_window_is_the_mean_of_what_trains(config, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_batches(rows, [TOKENS, IDLE, IDLE])
    overrides = [f"output_dir={tmp_path / 'run'}", f"data.train={rows}", "logging.logging_steps=3"]
    assert train.main(["--config", str(config), *overrides]) == 0
    assert " is nan" not in capsys.readouterr().err
    line, summary = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (line["untrained_steps"], summary["untrained_steps"]) == (2, 2)
    assert line["loss"] == pytest.approx(summary["train_loss"])
