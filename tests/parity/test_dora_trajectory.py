# SPDX-License-Identifier: Apache-2.0
"""Twenty DoRA steps from an adapter on disk are those of PEFT, and so is what is exported.

On an NF4 base too, whose lengths are those of the decoded rows.
"""

from pathlib import Path
from typing import Any

import deepseek_variants
import peft_adapters
import pytest
import runs
import tiny
import torch
import torch_reference
import trajectory
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.parity

# Of weights near 0.1, and of lengths near 1: as of LoRA's trajectories.
WEIGHT_BOUND = 2e-6

ATTENTION = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama_gqa", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, 1),
    "biases": (
        "qwen2",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 5},
            "layers_to_transform": [1, 2],
        },
        2,
    ),
    "v2": ("deepseek_v2_groups", {"r": 4, "target_modules": ["q_proj", *ATTENTION]}, 1),
    "v3": ("deepseek_v3", {"r": 4, "target_modules": ["q_a_proj", "q_b_proj", *ATTENTION]}, 2),
}
"""Name -> a variant of tests/tiny.py, PEFT's fields, microbatches."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_exports_are_those_of_peft(
    case: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    variant, fields, pieces = CASES[case]
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    adapter = peft_adapters.build_lora(checkpoint, tmp_path / "adapter", use_dora=True, **fields)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    config = trajectory.make_config(
        checkpoint,
        data,
        {"peft_type": "LORA", "path": str(adapter), "use_dora": True},
        {"warmup_steps": 2},
        gradient_accumulation_steps=pieces,
    )
    model = peft_adapters.trainable_lora(checkpoint, adapter)

    trajectory.train_both(model, config, run_cli, tmp_path)

    exported = tmp_path / "run" / "export"
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_tensors(runs.read_tensors(exported), trained)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")
    read = peft_adapters.load_strictly(checkpoint, exported).merge_and_unload().state_dict()
    for name, tensor in runs.read_tensors(merged).items():
        torch.testing.assert_close(tensor, read.get(name, tensor), rtol=0, atol=1e-6, msg=name)


def _check_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    assert any(name.endswith(".lora_magnitude_vector") for name in ours)
    for name, tensor in ours.items():
        bound = WEIGHT_BOUND * max(1.0, float(theirs[name].abs().max()))
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=bound, msg=name)


@pytest.mark.slow
def test_losses_over_an_nf4_base_are_those_of_peft(run_cli: runs.RunCli, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128}
    checkpoint = tiny.build_checkpoint(tmp_path / "model", "llama_gqa", **shape)
    adapter = peft_adapters.build_lora(
        checkpoint, tmp_path / "adapter", use_dora=True, r=4, target_modules="all-linear"
    )
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    section = {"peft_type": "LORA", "path": str(adapter)}
    config = trajectory.make_config(checkpoint, data, section, {"warmup_steps": 2})
    config["model"]["quantization"] = "nf4"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=nf4, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)

    trajectory.train_both(model, config, run_cli, tmp_path)

    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_tensors(runs.read_tensors(tmp_path / "run" / "export"), trained)


@pytest.mark.slow
def test_a_fresh_adapter_begins_at_the_lengths_of_the_rows(
    run_cli: runs.RunCli, tmp_path: Path
) -> None:
    variant, shape = "deepseek_v3", deepseek_variants.BLOCKS_OF_64
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant, **shape)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=8)
    section = {"peft_type": "LORA", "use_dora": True, "target_modules": ["o_proj"], "r": 2}
    config = trajectory.make_config(checkpoint, data, section, {"learning_rate": 1e-30}, steps=1)
    runs.train(run_cli, config, tmp_path)

    plain, ids = tiny.reference_model(checkpoint), tiny.random_ids(288)
    plain.load_adapter(str(tmp_path / "run" / "export"))
    trajectory.assert_same_logits(tiny.logits(plain, ids), tiny.reference_logits(checkpoint, ids))
    weights = runs.read_tensors(checkpoint)
    for name, tensor in runs.read_tensors(tmp_path / "run" / "export").items():
        module, _, kind = name.removeprefix("base_model.model.").rpartition(".")
        if kind == "lora_magnitude_vector":
            length = torch.linalg.norm(weights[f"{module}.weight"].float(), dim=1)
            torch.testing.assert_close(tensor, length, rtol=1e-6, atol=0, msg=name)
