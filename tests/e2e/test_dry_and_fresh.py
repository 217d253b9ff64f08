# SPDX-License-Identifier: Apache-2.0
"""--dry-run announces and compiles, and leaves no trace; --fresh goes beside what is there."""

from pathlib import Path

import pytest
import small_run

from dsjax import train
from dsjax.training import run_dir
from dsjax.training.metrics_log import read_metrics

BRIEF = ["training.max_steps=2", "training.eval_steps=null", "data.eval=null", "export.format=peft"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, by its path there."""
    found = sorted(folder.rglob("*"))
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in found}


@pytest.mark.slow
def test_a_dry_run_a_run_and_a_fresh_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = small_run.write_inputs(tmp_path, "lora")
    words = [str(config), *BRIEF]
    before = files_of(tmp_path)

    assert train.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "compiled the step in" in said and "| steps       2 (" in said
    assert said.endswith(
        "dry run: inputs are valid and the step compiles; no weights were loaded\n"
    )
    assert "reading weights" not in said
    assert files_of(tmp_path) == before

    assert train.main(words) == 0
    said = capsys.readouterr().err
    run, model = tmp_path / "run", tmp_path / "model"
    loss = read_metrics(run / "metrics.jsonl")[-1]["train_loss"]
    assert f"train loss   {loss:.4f}" in said
    assert f"python -m dsjax.generate --model {model} --adapter {run}/export --prompt TEXT" in said
    assert f"as one model: python -m dsjax.export --run {run} --format merged --out {run}/" in said
    assert f"to measure it: python -m dsjax.evaluate {run}/config.yaml data.eval=FILE\n" in said
    finished = files_of(run)

    assert train.main([*words, "optimizer.learning_rate=2e-2", "--fresh"]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"output_dir: {run}-2, since {run} exists\n")
    assert f"evaluate {run}-2/config.yaml data.eval=FILE" in said
    assert files_of(run) == finished
    assert (tmp_path / "run-2/export/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("taken", "path", "expected"),
    [
        ([], "run", "run"),
        (["run"], "run", "run-2"),
        (["run"], "./run/", "run-2"),
        (["run", "run-2"], "run", "run-3"),
    ],
)
def test_a_fresh_folder_is_numbered(
    taken: list[str],
    path: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    for name in taken:
        (tmp_path / name).mkdir()
    assert run_dir.fresh_path(path) == expected


def test_beside_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_dir.fresh_path(".") == f"{tmp_path}/here-2"
