# SPDX-License-Identifier: Apache-2.0
"""Twenty IA3 steps from an adapter on disk are those of PEFT, and so is what is exported."""

from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import runs
import tiny
import torch_reference
import trajectory

pytestmark = pytest.mark.parity

CASES: dict[str, dict[str, Any]] = {
    "llama_gqa": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "qwen2": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        "feedforward_modules": ["down_proj", "o_proj"],
    },
    "deepseek_v3": {
        "target_modules": ["q_b_proj", "kv_b_proj", "o_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama_gqa", "qwen2", "deepseek_v3"])
def test_losses_and_exports_are_those_of_peft(
    variant: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    vocabulary = tiny.reference_model(checkpoint).config.vocab_size
    adapter = peft_adapters.build_ia3(checkpoint, tmp_path / "adapter", **CASES[variant])
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", vocabulary, count=trajectory.ROWS)
    config = trajectory.make_config(
        checkpoint,
        data,
        {"path": str(adapter)},
        {"warmup_steps": 3},
        gradient_accumulation_steps=2,
    )
    model = peft_adapters.trainable_lora(checkpoint, adapter)

    trajectory.train_both(model, config, run_cli, tmp_path)

    ids = tiny.random_ids(vocabulary)
    exported = peft_adapters.load_strictly(checkpoint, tmp_path / "run" / "export")
    trained = peft_adapters.logits(model, ids)
    trajectory.assert_same_logits(peft_adapters.logits(exported, ids), trained)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")
    trajectory.assert_same_logits(
        tiny.reference_logits(merged, ids), peft_adapters.logits(exported, ids)
    )
