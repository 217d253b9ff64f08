# SPDX-License-Identifier: Apache-2.0
"""docs/finetune.ipynb: run as Jupyter runs it, in a folder of its own."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/finetune.ipynb"


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tools'}")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The clone is looked for above the notebook's folder; here it is in the middle of nowhere.
    (tmp_path / "dsjax").symlink_to(ROOT)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    run = tmp_path / "runs/notebook"
    losses = [
        json.loads(line)["loss"]
        for line in (run / "pretrain/metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0] / 2
    assert (run / "lora/export/adapter_model.safetensors").is_file()
    assert (run / "merged/config.json").is_file()
    said = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert "eval_loss" in said and " -> " in said and "(1, " in said
