# SPDX-License-Identifier: Apache-2.0
"""A run whose checkpoint lies behind a URL is the run of the checkpoint's directory."""

from pathlib import Path

import memory_bucket
import pytest
import small_run

from dsjax import train
from dsjax.config import load_config

URL = "memory://bucket/model"


@pytest.mark.slow
def test_a_run_from_a_bucket_is_the_run_from_the_directory(tmp_path: Path) -> None:
    files = {
        name: small_run.write_inputs(tmp_path / name, "lora", training={"max_steps": 2})
        for name in ("here", "there")
    }
    words = ["training.eval_steps=null", "data.eval=null"]
    assert train.main(["--config", str(files["here"]), *words]) == 0
    there = ["--config", str(files["there"]), *words, f"model.path={URL}"]
    with memory_bucket.opened() as store:
        assert store.upload(tmp_path / "there" / "model") == URL
        assert train.main(there) == 0
        assert train.main(there) == 0  # nothing to do
    runs = [tmp_path / name / "run" for name in files]
    assert small_run.metrics(runs[0]) == small_run.metrics(runs[1])
    exports = [small_run.contents(run / "export") for run in runs]
    assert exports[0].keys() == exports[1].keys()
    differing = {name for name in exports[0] if exports[0][name] != exports[1][name]}
    assert differing == {"README.md", "dsjax_export.json"}  # they name the checkpoint
    assert load_config(runs[1] / "config.yaml").model.path == URL
