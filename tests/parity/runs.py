# SPDX-License-Identifier: Apache-2.0
"""Run dsjax as a user does, and read what the run wrote.

In: config dictionaries. Out: metrics, exported folders and their tensors.
Not here: the reference (torch_reference.py), checkpoints (tests/tiny.py).
"""

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]

RunCli = Callable[..., subprocess.CompletedProcess[str]]


def call(run_cli: RunCli, module: str, *words: str | Path) -> str:
    """Run a command that must succeed, on one device; return its stdout."""
    result = run_cli(module, *words)
    assert result.returncode == 0, f"{module}: {result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def train(run_cli: RunCli, config: Mapping[str, Any], directory: Path) -> list[dict[str, float]]:
    """Run `dsjax.train` on `config` into `directory/run`; return the logged steps in order."""
    config = {**config, "output_dir": str(directory / "run")}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    call(run_cli, "train", "--config", path)
    return read_steps(directory / "run")


def read_steps(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def export(run_cli: RunCli, run: Path, out: Path, form: str) -> Path:
    call(run_cli, "export", "--run", run, "--out", out, "--format", form)
    return out


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the weight files in `directory`, safetensors or bin."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(directory.glob("pytorch_model*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def largest_difference(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str
) -> float:
    """The largest |difference| of `key` over the steps, which must be the same number."""
    assert len(ours) == len(theirs)
    return max(abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True))
