# SPDX-License-Identifier: Apache-2.0
"""Twenty steps from PiSSA's and OLoRA's first values are those of PEFT, which changes the base.

Each export is a plain LoRA of twice the rank, for the base as it is.
"""

from pathlib import Path
from typing import Any

import peft_adapters
import pytest
import runs
import tiny
import torch
import torch_reference
import trajectory
from peft import LoraConfig, get_peft_model

pytestmark = pytest.mark.parity

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "pissa": (
        "llama_gqa",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "init_lora_weights": "pissa",
            "rank_pattern": {"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 2},
        },
        1,
    ),
    "olora": (
        "qwen2",
        {
            "target_modules": ["k_proj", "o_proj", "up_proj"],
            "init_lora_weights": "olora",
            "use_rslora": True,
            "layers_to_transform": [0, 2],
        },
        2,
    ),
    "pissa_dora": (
        "deepseek_v3",
        {
            "target_modules": ["q_b_proj", "kv_b_proj", "o_proj"],
            "init_lora_weights": "pissa",
            "use_dora": True,
        },
        1,
    ),
}
"""Name -> a variant of tests/tiny.py, PEFT's fields, microbatches."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_exports_are_those_of_peft(
    case: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    variant, fields, pieces = CASES[case]
    fields = {"r": 4, "lora_alpha": 6} | fields
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    config = trajectory.make_config(
        checkpoint,
        data,
        {"peft_type": "LORA"} | fields,
        # Else Adam makes whole steps of the rounding of a gradient that is nearly zero.
        {"learning_rate": 1e-3, "adam_epsilon": 1e-4, "warmup_steps": 2, "weight_decay": 0.1},
        gradient_accumulation_steps=pieces,
    )
    model = get_peft_model(
        tiny.reference_model(checkpoint), LoraConfig(task_type="CAUSAL_LM", **fields)
    )
    ids = tiny.random_ids(288)
    base = tiny.logits(tiny.reference_model(checkpoint), ids)
    trajectory.assert_same_logits(peft_adapters.logits(model.eval(), ids), base, 2e-5)

    trajectory.train_both(model, config, run_cli, tmp_path)

    exported = tmp_path / "run" / "export"
    trained = peft_adapters.logits(model, ids)
    plain = peft_adapters.load_strictly(checkpoint, exported)
    assert plain.peft_config["default"].init_lora_weights is True
    assert plain.peft_config["default"].r == 8
    trajectory.assert_same_logits(peft_adapters.logits(plain, ids), trained)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")
    trajectory.assert_same_logits(tiny.reference_logits(merged, ids), trained)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian"])
def test_the_first_logits_are_the_bases(start: str, run_cli: runs.RunCli, tmp_path: Path) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "deepseek_v3")
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=8)
    section = {
        "peft_type": "LORA",
        "r": 3,
        "init_lora_weights": start,
        "target_modules": ["o_proj", "q_a_proj", "down_proj"],
    }
    optimizer = {"learning_rate": 1e-30, "weight_decay": 0.0}
    config = trajectory.make_config(checkpoint, data, section, optimizer, steps=1)
    runs.train(run_cli, config, tmp_path)

    exported, ids = tmp_path / "run" / "export", tiny.random_ids(288)
    ours = peft_adapters.logits(peft_adapters.load_strictly(checkpoint, exported), ids)
    trajectory.assert_same_logits(ours, tiny.reference_logits(checkpoint, ids), 1e-6)
    updates = {
        name: tensor for name, tensor in runs.read_tensors(exported).items() if ".lora_A." in name
    }
    assert all(torch.count_nonzero(tensor) for tensor in updates.values())


@pytest.mark.slow
def test_a_run_that_goes_on_counts_from_its_first_values(
    run_cli: runs.RunCli, tmp_path: Path
) -> None:
    """They come from the checkpoint: another decomposition, of other signs, would change what was
    learnt."""
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "llama_gqa")
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=16)
    section = {
        "peft_type": "LORA",
        "r": 3,
        "init_lora_weights": "pissa_niter_2",
        "target_modules": "all-linear",
        "use_dora": True,
        "loraplus_lr_ratio": 4,
    }
    optimizer = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    config = trajectory.make_config(checkpoint, data, section, optimizer, steps=4)
    runs.train(run_cli, config, whole)
    config["training"]["max_steps"] = 2
    runs.train(run_cli, config, parts)
    config["training"]["max_steps"] = 4
    runs.train(run_cli, config, parts)
    once, again = (runs.read_tensors(folder / "run" / "export") for folder in (whole, parts))
    assert all(runs.as_bytes(again[name]) == runs.as_bytes(once[name]) for name in once)
