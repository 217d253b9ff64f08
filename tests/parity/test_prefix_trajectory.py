# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of prefix-tuning from a PEFT prefix on disk are those of torch and PEFT."""

from pathlib import Path

import numpy as np
import peft_adapters
import pytest
import runs
import tiny
import torch_reference

pytestmark = pytest.mark.parity

STEPS, TOKENS = 20, 5
# As in test_lora_trajectory.
LOSS_BOUND = 2e-5
LOGIT_BOUND = 1e-4


@pytest.mark.parametrize(
    ("variant", "pieces", "remat"),
    [
        ("llama_mha", 1, "none"),
        ("qwen2", 2, "full"),
        ("llama_mqa", 1, "full"),
        pytest.param("qwen3", 1, "none", marks=pytest.mark.slow),
        pytest.param("llama_head_dim", 1, "dots", marks=pytest.mark.slow),
        pytest.param("qwen2_window", 1, "none", marks=pytest.mark.slow),
    ],
)
def test_losses_and_export_are_those_of_peft(
    variant: str, pieces: int, remat: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = peft_adapters.build_prefix(checkpoint, tmp_path / "adapter", TOKENS)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=38)
    config = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "adapter": {"peft_type": "PREFIX_TUNING", "path": str(adapter)},
        "data": {"train": [str(data)], "format": "tokens", "packing": False, "shuffle": False},
        "optimizer": {
            "learning_rate": 1e-2,
            "weight_decay": 0.5,
            "max_grad_norm": 0.05,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
        },
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "gradient_accumulation_steps": pieces,
            "gradient_checkpointing": remat,
        },
        "logging": {"logging_steps": 1, "report_to": []},
        "export": {"format": "peft"},
    }
    model = peft_adapters.trainable_prefix(checkpoint, adapter, TOKENS)
    expected = torch_reference.train(model, torch_reference.read_rows(data), config)

    steps = runs.train(run_cli, config, tmp_path)

    assert runs.largest_difference(steps, expected, "loss") < LOSS_BOUND
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ids = tiny.random_ids(288)
    exported = peft_adapters.load_strictly(checkpoint, tmp_path / "run" / "export")
    np.testing.assert_allclose(
        peft_adapters.logits(exported, ids),
        peft_adapters.logits(model, ids),
        rtol=0,
        atol=LOGIT_BOUND,
    )
