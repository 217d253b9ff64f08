# SPDX-License-Identifier: Apache-2.0
"""Ten steps of full fine-tuning, whole or with frozen parts, are those of torch."""

import re
from pathlib import Path

import pytest
import runs
import tiny
import torch
import torch_reference
import trajectory

pytestmark = pytest.mark.parity

STEPS = 10

FREEZE = {
    "nothing": [],
    "embedding and norms": [r"embed_tokens", r"\w*norm"],
    "first layers and heads": [r"model\.layers\.[01]", r"lm_head"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "frozen", "pieces"),
    [
        ("qwen2", "nothing", 1),
        ("llama_gqa", "embedding and norms", 2),
        ("llama_tied_bin_head_copy", "nothing", 1),
        ("llama_tied", "nothing", 2),
        ("qwen3", "first layers and heads", 1),
        ("llama_biases", "nothing", 1),
    ],
)
def test_losses_and_weights_are_those_of_torch(
    variant: str, frozen: str, pieces: int, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=22)
    config = trajectory.make_config(
        checkpoint,
        data,
        {"peft_type": None},
        {
            "learning_rate": 1e-3,
            "max_grad_norm": 0.5,
            # A key bias hardly has a gradient: else Adam makes whole steps of its rounding.
            "adam_epsilon": 1.0e-6,
            "warmup_steps": 2,
        },
        "merged",
        STEPS,
        gradient_accumulation_steps=pieces,
        freeze=FREEZE[frozen],
    )
    config["model"]["param_dtype"] = "float32"
    model = tiny.reference_model(checkpoint)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(re.search(p, name) for p in FREEZE[frozen])

    trajectory.train_both(model, config, run_cli, tmp_path)

    exported = tmp_path / "run" / "export"
    _check_weights(model, checkpoint, exported)
    ids = tiny.random_ids(288)
    trained = tiny.logits(model, ids)
    trajectory.assert_same_logits(tiny.reference_logits(exported, ids), trained, 1e-3)


def _check_weights(model: torch.nn.Module, checkpoint: Path, exported: Path) -> None:
    source, tensors = runs.read_tensors(checkpoint), runs.read_tensors(exported)
    assert set(tensors) == set(source)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert runs.as_bytes(tensors[name]) != runs.as_bytes(source[name]), name
            torch.testing.assert_close(tensors[name], parameter.data, rtol=0, atol=2e-5, msg=name)
        else:
            assert runs.as_bytes(tensors[name]) == runs.as_bytes(source[name]), name
