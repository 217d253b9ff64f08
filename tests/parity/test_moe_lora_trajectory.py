# SPDX-License-Identifier: Apache-2.0
"""LoRA steps on DeepSeek-V2 and V3 are those of PEFT; on routed experts, those of plain torch."""

import json
from collections.abc import Mapping
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
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.utils import parametrize

import dsjax

pytestmark = [
    pytest.mark.parity,
    # It looks for patterns among modules only; those of parameters it applies all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did:RuntimeWarning"),
]

# Of weights near 0.1: twenty steps of Adam on gradients that agree within 1e-5 (measured: 5e-7).
WEIGHT_BOUND = 2e-6

FEED_FORWARD = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": [],
    "target_parameters": [
        f"{where}.{name}_proj.weight"
        for where in ("mlp", "shared_experts")
        for name in ("gate", "up", "down")
    ],
    "rank_pattern": {r"shared_experts.down_proj.weight": 3},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2_lite_feed_forward": (
        {"variant": "deepseek_v2_lite_hub", "dtype": "float32"},
        FEED_FORWARD,
    ),
    "v3_attention": (
        {"variant": "deepseek_v3"},
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"],
        },
    ),
    "v3_feed_forward": (
        {"variant": "deepseek_v3"},
        FEED_FORWARD | {"target_modules": ["o_proj"], "layers_to_transform": [0, 1]},
    ),
}


def _config(checkpoint: Path, adapter: Path, data: Path, steps: int, pieces: int) -> dict[str, Any]:
    return trajectory.make_config(
        checkpoint,
        data,
        {"peft_type": "LORA", "path": str(adapter)},
        {"warmup_ratio": 0.11},
        steps=steps,
        gradient_accumulation_steps=pieces,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "pieces"),
    [
        ("v2_lite_feed_forward", 1),
        ("v3_attention", 2),
        ("v3_feed_forward", 2),
    ],
)
def test_losses_and_exports_are_those_of_peft(
    case: str, pieces: int, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    model_fields, fields = CASES[case]
    checkpoint = tiny.build_checkpoint(tmp_path / "model", **model_fields)
    adapter = peft_adapters.build_lora(checkpoint, tmp_path / "adapter", **fields)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=trajectory.ROWS)
    config = _config(checkpoint, adapter, data, trajectory.STEPS, pieces)
    model = peft_adapters.trainable_lora(checkpoint, adapter)

    trajectory.train_both(model, config, run_cli, tmp_path)

    exported = tmp_path / "run" / "export"
    tensors = runs.read_tensors(exported)
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(tensors) == set(trained)
    # Not their logits: what rounding makes of the weights here, 1e-7, V3 makes 3e-4 of at a token
    # (noise of that size on PEFT's own weights does as much).
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=WEIGHT_BOUND, msg=name)
    ids = tiny.random_ids(288)
    ours = dsjax.load_pretrained(str(checkpoint), adapter=str(exported), dtype="float32")
    theirs = PeftModel.from_pretrained(tiny.reference_model(checkpoint), exported).eval()
    trajectory.assert_same_logits(ours(jnp.asarray(ids)), peft_adapters.logits(theirs, ids))


class OwnPairs(torch.nn.Module):
    """A weight of all experts [E, O, I] plus scale * B A, a pair for each expert and each part.

    A part is gate or up, which lie one below the other, or all of down.
    """

    def __init__(self, weight: torch.Tensor, parts: int, rank: int, scale: float, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        experts, out, width = weight.shape
        self.scale = scale
        a, b = (experts, parts, rank, width), (experts, parts, out // parts, rank)
        self.a = torch.nn.Parameter(0.1 * torch.randn(a, generator=generator))
        self.b = torch.nn.Parameter(0.1 * torch.randn(b, generator=generator))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with every expert's update."""
        updates = [torch.cat([*(b @ a)]) for a, b in zip(self.a, self.b, strict=True)]
        return weight + self.scale * torch.stack(updates)

    def as_peft_has_it(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One pair for all: rows of A by expert, columns of B by rank, then by expert."""
        experts, parts, rank, width = self.a.shape
        height = self.b.shape[2]
        a = torch.zeros(experts * parts * rank, width)
        b = torch.zeros(parts * height, parts * rank * experts)
        for e in range(experts):
            for part in range(parts):
                for k in range(rank):
                    at = part * rank + k
                    a[e * parts * rank + at] = self.a[e, part, k].detach()
                    rows = slice(part * height, (part + 1) * height)
                    b[rows, at * experts + e] = self.b[e, part, :, k].detach()
        return a, b


EXPERT_RANK = 3


def _with_own_pairs(checkpoint: Path, scale: float) -> torch.nn.Module:
    model = tiny.reference_model(checkpoint).requires_grad_(False)
    experts = [m for name, m in model.named_modules() if name.endswith("mlp.experts")]
    for number, module in enumerate(experts):
        for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
            weight = getattr(module, name)
            own = OwnPairs(weight, parts, EXPERT_RANK, scale, seed=2 * number + parts)
            parametrize.register_parametrization(module, name, own)
            module.parametrizations[name].original.requires_grad_(False)
    return model


def _save(model: torch.nn.Module, directory: Path, fields: Mapping[str, Any]) -> Path:
    """Write the pairs as a PEFT adapter, all experts of a layer in one."""
    tensors = {}
    for name, own in model.named_modules():
        if isinstance(own, OwnPairs):
            experts, _, kind = name.removesuffix(".0").partition(".parametrizations.")
            where = f"base_model.model.{experts}" + ".base_layer" * (kind == "gate_up_proj")
            a, b = own.as_peft_has_it()
            tensors |= {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "rslora"), [("deepseek_v3", True), ("deepseek_v2_groups", False)]
)
def test_routed_experts_train_as_in_torch(
    variant: str, rslora: bool, run_cli: runs.RunCli, tmp_path: Path
) -> None:
    checkpoint = tiny.build_checkpoint(tmp_path / "model", variant)
    alpha, steps = 6, 6
    scale = alpha / (EXPERT_RANK**0.5 if rslora else EXPERT_RANK)
    model = _with_own_pairs(checkpoint, scale)
    fields = {
        "r": EXPERT_RANK,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"gate_up_proj": 2 * EXPERT_RANK},
        "alpha_pattern": {"gate_up_proj": alpha * (2**0.5 if rslora else 2)},
    }
    adapter = _save(model, tmp_path / "adapter", fields)
    data = torch_reference.write_rows(tmp_path / "rows.jsonl", 288, count=20)
    config = _config(checkpoint, adapter, data, steps, pieces=1)

    trajectory.train_both(model, config, run_cli, tmp_path)

    ids = tiny.random_ids(288)
    expected_logits = peft_adapters.logits(model, ids)
    exported = tmp_path / "run" / "export"
    in_peft = PeftModel.from_pretrained(tiny.reference_model(checkpoint), exported).eval()
    trajectory.assert_same_logits(peft_adapters.logits(in_peft, ids), expected_logits)
    merged = runs.export(run_cli, tmp_path / "run", tmp_path / "merged", "merged")
    trajectory.assert_same_logits(tiny.reference_logits(merged, ids), expected_logits)
