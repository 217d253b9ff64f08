# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA+ steps are those of PEFT's `create_loraplus_optimizer`: B, and DoRA's vectors, learn
at a multiple of the rate."""

from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import runs
import tiny
import torch
import torch_reference
import trajectory
from peft import get_peft_model_state_dict

pytestmark = pytest.mark.parity

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("llama_gqa", {"target_modules": "all-linear"}, 16.0),
    "dora": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}, 3.5),
    "v3": ("deepseek_v3", {"target_modules": ["q_b_proj", "o_proj"], "use_rslora": True}, 4.0),
}
"""Name -> a variant of tests/tiny.py, PEFT's fields, the ratio."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_adapters_are_those_of_peft(
    case: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    variant, fields, ratio = CASES[case]
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = peft_adapters.build_lora(checkpoint, tmp_path / "adapter", r=4, **fields)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    section = {"peft_type": "LORA", "path": str(adapter), "loraplus_lr_ratio": ratio}
    rates = {"learning_rate": 5e-4, "warmup_steps": 2}
    config = trajectory.make_config(checkpoint, data, section, rates)
    model = peft_adapters.trainable_lora(checkpoint, adapter)

    trajectory.train_both(model, config, run_cli, tmp_path)

    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = runs.read_tensors(tmp_path / "run" / "export")
    assert set(ours) == set(trained)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, trained[name], rtol=2e-6, atol=2e-6, msg=name)
