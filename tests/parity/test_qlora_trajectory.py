# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA steps over an NF4 base are those of PEFT over bitsandbytes', and so is the export.

bitsandbytes leaves embedding, head, routers and routed experts as they are; so does the run here.
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

import dsjax

pytestmark = pytest.mark.parity

# Input sizes are multiples of 64; bitsandbytes for CPU wants output sizes that are multiples of 32.
WEIGHT_BOUND = 2e-6
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
LATENT = deepseek_variants.BLOCKS_OF_64

CASES: dict[str, tuple[str, dict[str, int], Any, int]] = {
    "llama": ("llama_gqa", SHAPE, "all-linear", 1),
    "qwen2": ("qwen2", SHAPE, ["q_proj", "v_proj", "down_proj"], 2),
    "v2": (
        "deepseek_v2_groups",
        LATENT,
        ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        1,
    ),
    "v3": (
        "deepseek_v3",
        LATENT,
        ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"],
        2,
    ),
}
"""Name -> a variant of tests/tiny.py, its sizes, the targets, microbatches."""


def _quantized(checkpoint: Path) -> torch.nn.Module:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=nf4, device_map="cpu"
    )


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_losses_and_export_are_those_of_peft(
    case: str, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    variant, shape, targets, pieces = CASES[case]
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant, **shape)
    adapter = peft_adapters.build_lora(
        checkpoint,
        tmp_path / "adapter",
        r=4,
        lora_alpha=8,
        target_modules=targets,
    )
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    section = {"peft_type": "LORA", "path": str(adapter)}
    config = trajectory.make_config(checkpoint, data, section, {"warmup_steps": 2})
    config["training"]["gradient_accumulation_steps"] = pieces
    config["model"] |= {"quantization": "nf4", "quantization_experts": False}
    model = PeftModel.from_pretrained(_quantized(checkpoint), adapter, is_trainable=True)

    trajectory.train_both(model, config, run_cli, tmp_path)

    exported = tmp_path / "run" / "export"
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = runs.read_tensors(exported)
    assert set(tensors) == set(trained)
    # Not their logits, which amplify rounding (`test_moe_lora_trajectory`).
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=WEIGHT_BOUND, msg=name)
    ids = tiny.random_ids(288)
    ours = dsjax.load_pretrained(
        checkpoint,
        adapter=exported,
        dtype="float32",
        quantization="nf4",
        quantization_experts=False,
    )
    theirs = PeftModel.from_pretrained(_quantized(checkpoint), exported).eval()
    trajectory.assert_same_logits(ours(ids), peft_adapters.logits(theirs, ids))
