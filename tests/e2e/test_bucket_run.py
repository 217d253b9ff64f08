# SPDX-License-Identifier: Apache-2.0
"""A run that lives in a bucket is the run of a folder: its numbers, its bytes, its commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import object_store
import pytest
import small_run

from dsjax import train
from dsjax.errors import ConfigError
from dsjax.export.command import main as export
from dsjax.training.run_dir import MANIFEST
from dsjax.view.command import main as view

URL = "store://bucket/runs/first"


def start(config: Path, store: Path, *overrides: str, share: float = 0) -> subprocess.Popen[str]:
    """Start a run in the bucket on one device; its stderr goes to `<store>.log`."""
    told = ["--config", str(config), f"output_dir={URL}", *overrides]
    with store.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *object_store.words(store, "dsjax.train", *told, share=share)],
            stdin=subprocess.DEVNULL,
            stderr=log,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(small_run.ROOT)},
            text=True,
        )


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_ends_as_one_in_a_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """One request in twenty goes wrong; the run is killed once on the way."""
    store, reference = tmp_path / "store", finished.parent / "run"
    (store / "bucket").mkdir(parents=True)
    rows = "store://bucket/train.jsonl"
    (store / "bucket" / "train.jsonl").write_bytes((finished.parent / "train.jsonl").read_bytes())
    run, log = store / "bucket" / "runs" / "first", store.with_suffix(".log")
    process = start(finished, store, f"data.train={rows}", share=0.05)
    assert small_run.wait_for(process, (run / "checkpoints" / "5" / "record.json").exists)
    process.kill()
    process.wait()
    process = start(finished, store, f"data.train={rows}", share=0.05)
    assert process.wait(300) == 0, log.read_text()[-4000:]
    said = log.read_text()
    assert "resuming after step 5 of 12" in said or "resuming after step 10 of 12" in said
    assert "; again in 0 s" in said and "Traceback" not in said
    assert small_run.metrics(run) == small_run.metrics(reference)
    assert set(small_run.scalars(run)).issuperset(
        row for row in small_run.scalars(reference) if "/loss" in row[0]
    )
    assert (run / "eval_results.json").read_bytes() == (
        reference / "eval_results.json"
    ).read_bytes()
    exports = [small_run.contents(place / "export") for place in (run, reference)]
    assert exports[0].keys() == exports[1].keys()
    assert {n for n in exports[0] if exports[0][n] != exports[1][n]} <= {"README.md", MANIFEST}
    names = {path.name for path in run.iterdir() if path.is_file()}
    assert names == {path.name for path in reference.iterdir() if path.is_file()}

    object_store.register(store)
    monkeypatch.chdir(tmp_path)
    before = small_run.states(run)
    assert train.main(["--config", str(finished), f"output_dir={URL}", f"data.train={rows}"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert small_run.states(run) == before
    assert export(["--run", URL, "--out", "store://bucket/adapter", "--format", "peft"]) == 0
    assert json.loads((store / "bucket" / "adapter" / MANIFEST).read_text())["step"] == 12
    assert view([URL, "--no-browser"]) == 0
    assert "12 of 12" in (tmp_path / "dsjax-first.html").read_text()
    other = ["--config", str(finished), f"output_dir={URL}", "optimizer.learning_rate=1"]
    with pytest.raises(ConfigError, match=f"^output_dir: got '{URL}', which holds a run with"):
        train.main(other)
