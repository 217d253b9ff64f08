# SPDX-License-Identifier: Apache-2.0
"""The commands of a clumsy user: the files of one run that would work, for a test to spoil one.

In: a good checkpoint. Out: a `CliRunner` that starts the real command on its files, in this process
for speed, and gives what it says. The message has to name the field, file, row or tensor, what was
found there and what is expected; nothing may be left behind.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clock_lines import without_clocks
from safetensors.numpy import load_file, save_file

from dsjax import train
from dsjax.errors import run_command

YAML = """\
model:
  path: {model}
  dtype: float32
adapter:
  peft_type: LORA
  r: 4
data:
  train: {rows}
  max_length: 64
training:
  batch_size: 8
  max_steps: 2
output_dir: {run}
"""
LAYERS = range(3)
HIDDEN = 48
Q_PROJ = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


class CliRunner:
    """The files of one run that would work, for a test to spoil."""

    def __init__(self, folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch):
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        self.model, self.rows = folder / "model", folder / "rows.jsonl"
        self.adapter, self.run = folder / "adapter", folder / "run"
        self.yaml = folder / "run.yaml"
        shutil.copytree(checkpoint, self.model)
        self.write_rows(*[{"input_ids": [5, 6, 7, 8]}] * 8)
        self.yaml.write_text(YAML.format(model=self.model, rows=self.rows, run=self.run))

    def refusal(self, *overrides: str, announced: bool = False) -> str:
        """Run `python -m dsjax.train` as its last lines do; returns what it says.

        Args:
            overrides: words of the command line.
            announced: the run has told what it will do before it finds the fault.
        """
        before, message = self.refused(train.main, "--config", self.yaml, *overrides)
        assert without_clocks(before).strip() in ("", "reading rows") or announced
        assert ("+- dsjax" in before) == announced
        assert not self.run.is_dir()
        return message

    def refused(self, command: Callable[[Sequence[str]], int], *words: object) -> tuple[str, str]:
        """Run a command as its last lines do; returns what it says before its error, and that."""
        self.monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_command(command)
        said = self.capsys.readouterr()
        assert end.value.code == 2
        assert said.out == ""
        before, mark, message = f"\n{said.err}".partition("\nerror: ")
        assert mark
        return before, message

    def edit_yaml(self, old: str, new: str) -> None:
        """Replace a part of the YAML file."""
        text = self.yaml.read_text()
        assert old in text
        self.yaml.write_text(text.replace(old, new))

    def edit_config(self, **changes: Any) -> None:
        """Set keys of config.json; a value of `...` removes the key."""
        file = self.model / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    def edit_tensors(self, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Change the tensors; the checkpoint becomes a single file without an index."""
        tensors = {}
        for file in self.model.glob("model*"):
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            file.unlink()
        edit(tensors)
        save_file(tensors, self.model / "model.safetensors", metadata={"format": "pt"})

    def write_rows(self, *rows: Any) -> None:
        """Write rows, each an object, or a string that stands in its line as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.rows.write_text("".join(f"{line}\n" for line in lines))

    def write_adapter(self, edit=lambda tensors: None, **changes: Any) -> str:
        """Write a PEFT adapter on q_proj, spoilt; returns the override that names it."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "bias": "none",
        }
        tensors = {}
        for layer in LAYERS:
            tensors[Q_PROJ.format(layer, "A")] = np.ones((2, HIDDEN), np.float32)
            tensors[Q_PROJ.format(layer, "B")] = np.zeros((HIDDEN, 2), np.float32)
        edit(tensors)
        self.adapter.mkdir()
        (self.adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(tensors, self.adapter / "adapter_model.safetensors")
        self.edit_yaml("  peft_type: LORA\n  r: 4\n", f"  path: {self.adapter}\n")
        return f"adapter.path={self.adapter}"


def assert_says(message: str, *parts: str) -> None:
    """Every part stands in the message."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
