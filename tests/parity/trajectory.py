# SPDX-License-Identifier: Apache-2.0
"""A run of dsjax beside the same run in torch: its configuration, and how their steps compare.

In: a checkpoint, an adapter, what is particular to the case. Out: a configuration that both are
given, the steps of ours, compared with theirs. Not here: the runs (runs.py, torch_reference.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch_reference

STEPS, BATCH = 20, 4

ROWS = 38
"""So many that the tenth batch is short, and the eleventh starts the file again."""

# Rounding is 1e-6 on a loss near 8; twenty steps of Adam make up to 1e-5 of it (measured).
LOSS_BOUND = 2e-5
LOGIT_BOUND = 1e-4

OPTIMIZER = {
    "learning_rate": 5e-3,
    "weight_decay": 0.5,
    "max_grad_norm": 0.05,
    "lr_scheduler_type": "cosine",
}


def make_config(
    checkpoint: Path,
    data: Path,
    adapter: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    form: str = "peft",
    steps: int = STEPS,
    **training: Any,
) -> dict[str, Any]:
    """Return the configuration of a run in float32 over the rows of a file in their order."""
    return {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "adapter": dict(adapter),
        "data": {"train": [str(data)], "format": "tokens", "packing": False, "shuffle": False},
        "optimizer": OPTIMIZER | dict(optimizer),
        "training": {"max_steps": steps, "batch_size": BATCH, **training},
        "logging": {"logging_steps": 1, "report_to": []},
        "export": {"format": form},
    }


def train_both(
    model: torch.nn.Module, config: Mapping[str, Any], run_cli: runs.RunCli, directory: Path
) -> None:
    """Train the torch model in place and ours in `directory/run`; every step must be the same."""
    rows = torch_reference.read_rows(Path(config["data"]["train"][0]))
    expected = torch_reference.train(model, rows, config)
    steps = runs.train(run_cli, config, directory)
    assert [step["step"] for step in steps] == list(range(1, config["training"]["max_steps"] + 1))
    assert runs.largest_difference(steps, expected, "loss") < LOSS_BOUND
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def assert_same_logits(ours: Any, theirs: Any, bound: float = LOGIT_BOUND) -> None:
    """Compare logits by their largest difference."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)
