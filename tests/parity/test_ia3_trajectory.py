# SPDX-License-Identifier: Apache-2.0
"""Twenty IA3 steps from an adapter on disk are those of PEFT, and so is what is exported."""

from pathlib import Path
from typing import Any

import numpy as np
import peft_adapters
import pytest
import runs
import tiny
import torch_reference

pytestmark = pytest.mark.parity

STEPS, BATCH = 20, 4
LOSS_BOUND = 2e-5
LOGIT_BOUND = 1e-5

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


@pytest.mark.parametrize("variant", CASES)
def test_losses_and_exports_are_those_of_peft(
    variant: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    vocabulary = tiny.reference_model(checkpoint).config.vocab_size
    adapter = peft_adapters.build_ia3(checkpoint, tmp_path / "adapter", **CASES[variant])
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", vocabulary, count=38)
    config = {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "adapter": {"path": str(adapter)},
        "data": {"train": [str(data)], "format": "tokens", "packing": False, "shuffle": False},
        "optimizer": {
            "learning_rate": 5e-3,
            "weight_decay": 0.5,
            "max_grad_norm": 0.05,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
        },
        "training": {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "gradient_accumulation_steps": 2,
        },
        "logging": {"logging_steps": 1, "report_to": []},
        "export": {"format": "peft"},
    }
    model = peft_adapters.trainable_lora(checkpoint, adapter)
    expected = torch_reference.train(model, torch_reference.read_rows(data), config)

    steps = runs.train(run_cli, config, tmp_path)

    assert runs.largest_difference(steps, expected, "loss") < LOSS_BOUND
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ids = tiny.random_ids(vocabulary)
    exported = peft_adapters.load_strictly(checkpoint, tmp_path / "run" / "export")
    trained = peft_adapters.logits(model, ids)
    np.testing.assert_allclose(peft_adapters.logits(exported, ids), trained, rtol=0, atol=1e-4)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")
    np.testing.assert_allclose(
        tiny.reference_logits(merged, ids),
        peft_adapters.logits(exported, ids),
        rtol=0,
        atol=1e-4,
    )
