# SPDX-License-Identifier: Apache-2.0
"""Ten steps of full fine-tuning, whole or with frozen parts, are those of torch."""

import re
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
import torch_reference

pytestmark = pytest.mark.parity

STEPS = 10
# As in test_lora_trajectory.
LOSS_BOUND = 2e-5

FREEZE = {
    "nothing": [],
    "embedding and norms": [r"embed_tokens", r"\w*norm"],
    "first layers and heads": [r"model\.layers\.[01]", r"lm_head"],
}


@pytest.mark.parametrize(
    ("variant", "frozen", "pieces"),
    [
        ("qwen2", "nothing", 1),
        ("llama_gqa", "embedding and norms", 2),
        ("llama_tied_bin_head_copy", "nothing", 1),
        pytest.param("llama_tied", "nothing", 2, marks=pytest.mark.slow),
        pytest.param("qwen3", "first layers and heads", 1, marks=pytest.mark.slow),
        pytest.param("llama_biases", "nothing", 1, marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_of_torch(
    variant: str, frozen: str, pieces: int, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=22)
    config = {
        "model": {"path": str(checkpoint), "dtype": "float32", "param_dtype": "float32"},
        "adapter": {"peft_type": None},
        "data": {"train": [str(data)], "format": "tokens", "packing": False, "shuffle": False},
        "optimizer": {
            "learning_rate": 1e-3,
            "weight_decay": 0.5,
            "max_grad_norm": 0.5,
            # A key bias hardly has a gradient: else Adam makes whole steps of its rounding.
            "adam_epsilon": 1.0e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
        },
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "gradient_accumulation_steps": pieces,
            "freeze": FREEZE[frozen],
        },
        "logging": {"logging_steps": 1, "report_to": []},
        "export": {"format": "merged"},
    }
    model = tiny.reference_model(checkpoint)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(re.search(p, name) for p in FREEZE[frozen])
    expected = torch_reference.train(model, torch_reference.read_rows(data), config)

    steps = runs.train(run_cli, config, tmp_path)

    assert runs.largest_difference(steps, expected, "loss") < LOSS_BOUND
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    exported = tmp_path / "run" / "export"
    _check_weights(model, checkpoint, exported)
    ids = tiny.random_ids(288)
    trained = tiny.logits(model, ids)
    np.testing.assert_allclose(tiny.reference_logits(exported, ids), trained, rtol=0, atol=1e-3)


def _check_weights(model: torch.nn.Module, checkpoint: Path, exported: Path) -> None:
    source, tensors = runs.read_tensors(checkpoint), runs.read_tensors(exported)
    assert set(tensors) == set(source)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert runs.as_bytes(tensors[name]) != runs.as_bytes(source[name]), name
            torch.testing.assert_close(tensors[name], parameter.data, rtol=0, atol=2e-5, msg=name)
        else:
            assert runs.as_bytes(tensors[name]) == runs.as_bytes(source[name]), name
