# SPDX-License-Identifier: Apache-2.0
"""A run that was moved with its model and data is exported, evaluated and resumed there."""

import json
import shutil
from pathlib import Path

import pytest
import small_run

from dsjax import evaluate, train
from dsjax.errors import ConfigError
from dsjax.export import command as export
from dsjax.training.metrics_log import read_metrics


@pytest.mark.slow
def test_a_moved_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = small_run.write_inputs(tmp_path / "before", "lora", export={"format": None})
    words = ["training.max_steps=2", "training.eval_steps=null", "checkpoint.save_steps=2"]
    assert train.main([str(config), *words]) == 0
    trained = read_metrics(tmp_path / "before/run/metrics.jsonl")
    loss = next(row["eval_loss"] for row in trained if "eval_loss" in row)
    shutil.move(tmp_path / "before", tmp_path / "after")
    run, out = tmp_path / "after/run", tmp_path / "adapter"
    capsys.readouterr()

    assert export.main(["--run", str(run), "--out", str(out), "--format", "peft"]) == 0
    assert (out / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    assert evaluate.main([str(run / "config.yaml")]) == 0
    said = capsys.readouterr()
    assert f"the checkpoint of step 2 in {run}" in said.err
    assert json.loads(said.out)["loss"] == pytest.approx(loss, rel=1e-6)

    again = [str(run / "config.yaml"), "training.max_steps=4"]
    with pytest.raises(ConfigError, match=f"add output_dir={run} to go on with that run, which"):
        train.main(again)
    assert train.main([*again, f"output_dir={run}"]) == 0
    assert "resuming after step 2 of 4" in capsys.readouterr().err
    assert not (tmp_path / "before").exists()

    # Its model alone lies elsewhere: it is named, and the command line says where it is.
    shutil.move(tmp_path / "after/model", tmp_path / "model")
    words = ["--run", str(run), "--out", str(tmp_path / "again"), "--format", "peft"]
    with pytest.raises(ConfigError, match=f"^model.path: got '{tmp_path}/after/model', expected"):
        export.main(words)
    assert export.main([*words, f"model.path={tmp_path}/model"]) == 0
    with pytest.raises(ConfigError, match="adapter.r=8: got it for an export, expected model.path"):
        export.main([*words, f"model.path={tmp_path}/model", "adapter.r=8"])
