# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA steps from an adapter on disk are those of PEFT, and so is what is exported."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import peft_adapters
import pytest
import runs
import tiny
import torch
import torch_reference
import trajectory

import dsjax

pytestmark = pytest.mark.parity

CASES: dict[str, dict[str, Any]] = {
    "llama_all_linear": {
        "variant": "llama_gqa",
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "optimizer": {"warmup_ratio": 0.11},
    },
    "qwen2_q_v": {
        "variant": "qwen2",
        "adapter": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"warmup_steps": 5, "min_lr_ratio": 0.1},
    },
    "qwen3_patterns": {
        "variant": "qwen3",
        "adapter": {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": r"model\.layers\.[02]\.(self_attn\.[qko]_proj|mlp\.down_proj)",
            "rank_pattern": {"down_proj": 5, r"layers\.2\.self_attn\.q_proj": 2},
            "alpha_pattern": {r"0\.self_attn\.o_proj": 3, "down_proj": 10},
        },
        "optimizer": {"warmup_steps": 0, "lr_scheduler_type": "linear", "max_grad_norm": 1.0},
    },
    "llama_layers": {
        "variant": "llama_biases",
        "adapter": {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["k_proj", "up_proj", "down_proj"],
            "layers_to_transform": [1],
        },
        "optimizer": {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"},
    },
    "qwen2_window": {
        "variant": "qwen2_window",
        "adapter": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
        "optimizer": {
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine_with_restarts",
            "num_cycles": 3,
        },
    },
}


def _config(case: str, checkpoint: Path, adapter: Path, data: Path, pieces: int) -> dict[str, Any]:
    return trajectory.make_config(
        checkpoint,
        data,
        {"peft_type": "LORA", "path": str(adapter)},
        CASES[case]["optimizer"],
        gradient_accumulation_steps=pieces,
    )


def _build(case: str, directory: Path) -> tuple[Path, Path, Path]:
    checkpoint = tiny.build_checkpoint(directory / "model", CASES[case]["variant"])
    adapter = peft_adapters.build_lora(checkpoint, directory / "adapter", **CASES[case]["adapter"])
    data = torch_reference.write_rows(directory / "rows.jsonl", 288, count=trajectory.ROWS)
    return checkpoint, adapter, data


def _check_peft_export(checkpoint: Path, exported: Path, trained: torch.nn.Module) -> None:
    ids = tiny.random_ids(288)
    ours = peft_adapters.logits(peft_adapters.load_strictly(checkpoint, exported), ids)
    trajectory.assert_same_logits(ours, peft_adapters.logits(trained, ids))


def _check_merged_export(checkpoint: Path, adapter: Path, merged: Path) -> None:
    ids = tiny.random_ids(288)
    model = peft_adapters.load_strictly(checkpoint, adapter).merge_and_unload()
    trajectory.assert_same_logits(
        tiny.reference_logits(merged, ids), peft_adapters.logits(model, ids)
    )


@pytest.mark.parametrize(
    ("case", "pieces"),
    [
        pytest.param("llama_all_linear", 1, marks=pytest.mark.slow),
        pytest.param("qwen2_q_v", 2, marks=pytest.mark.slow),
        pytest.param("qwen3_patterns", 4, marks=pytest.mark.slow),
        pytest.param("llama_layers", 1, marks=pytest.mark.slow),
        pytest.param("qwen2_window", 2, marks=pytest.mark.slow),
    ],
)
def test_losses_and_exports_are_those_of_peft(
    case: str, pieces: int, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint, adapter, data = _build(case, tmp_path)
    config = _config(case, checkpoint, adapter, data, pieces)
    model = peft_adapters.trainable_lora(checkpoint, adapter)

    trajectory.train_both(model, config, run_cli, tmp_path)

    exported = tmp_path / "run" / "export"
    _check_peft_export(checkpoint, exported, model)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")
    _check_merged_export(checkpoint, exported, merged)


@pytest.mark.slow
def test_a_fresh_adapter_loads_in_peft_as_the_yaml_says(
    run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "llama_mqa")
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=8)
    config = _config("qwen2_q_v", checkpoint, tmp_path, data, pieces=1)
    config["adapter"] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["v_proj", "down_proj", "k_proj"],
        "layers_to_transform": 1,
        "alpha_pattern": {"v_proj": 9},
    }
    config["training"]["max_steps"], config["optimizer"]["warmup_steps"] = 2, 0
    runs.train(run_cli, config, tmp_path)

    exported = tmp_path / "run" / "export"
    model = peft_adapters.load_strictly(checkpoint, exported)
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (4, 3)
    assert set(settings.target_modules) == {"v_proj", "down_proj", "k_proj"}
    assert settings.alpha_pattern == {"v_proj": 9}
    assert {name.split(".")[4] for name, _ in model.named_parameters() if "lora_" in name} == {"1"}
    ids = tiny.random_ids(288)
    ours = dsjax.load_pretrained(str(checkpoint), adapter=str(exported), dtype="float32")
    trajectory.assert_same_logits(ours(jnp.asarray(ids)), peft_adapters.logits(model, ids))


@pytest.mark.slow
def test_a_bfloat16_source_is_merged_in_float32_and_rounded_once(
    run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "qwen2_bfloat16")
    adapter = peft_adapters.build_lora(
        checkpoint, tmp_path / "adapter", r=4, lora_alpha=8, target_modules="all-linear"
    )
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=8)
    config = _config("qwen2_q_v", checkpoint, adapter, data, pieces=1)
    config["training"]["max_steps"], config["optimizer"]["warmup_steps"] = 2, 0
    runs.train(run_cli, config, tmp_path)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")

    exported = peft_adapters.load_strictly(checkpoint, tmp_path / "run" / "export")
    expected = exported.merge_and_unload().state_dict()
    tensors = runs.read_tensors(merged)
    assert set(tensors) == set(runs.read_tensors(checkpoint))
    changed = total = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        rounded = expected[name].to(torch.bfloat16)
        # A sum in another order may fall on the other side of a tie: one unit of bfloat16, rarely.
        torch.testing.assert_close(tensor, rounded, rtol=2**-7, atol=1e-6, msg=name)
        changed += int((tensor != rounded).sum())
        total += tensor.numel()
    assert changed < total / 1000
