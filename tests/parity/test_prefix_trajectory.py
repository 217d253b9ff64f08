# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of prefix-tuning from a PEFT prefix on disk are those of torch and PEFT."""

from pathlib import Path

import peft_adapters
import pytest
import runs
import tiny
import torch_reference
import trajectory

pytestmark = pytest.mark.parity

TOKENS = 5


@pytest.mark.parametrize(
    ("variant", "pieces", "remat"),
    [
        pytest.param("llama_mha", 1, "none", marks=pytest.mark.slow),
        pytest.param("qwen2", 2, "full", marks=pytest.mark.slow),
        pytest.param("llama_mqa", 1, "full", marks=pytest.mark.slow),
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
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    config = trajectory.make_config(
        checkpoint,
        data,
        {"peft_type": "PREFIX_TUNING", "path": str(adapter)},
        {"learning_rate": 1e-2, "warmup_steps": 3},
        gradient_accumulation_steps=pieces,
        gradient_checkpointing=remat,
    )
    model = peft_adapters.trainable_prefix(checkpoint, adapter, TOKENS)

    trajectory.train_both(model, config, run_cli, tmp_path)

    ids = tiny.random_ids(288)
    exported = peft_adapters.load_strictly(checkpoint, tmp_path / "run" / "export")
    trajectory.assert_same_logits(
        peft_adapters.logits(exported, ids), peft_adapters.logits(model, ids)
    )
