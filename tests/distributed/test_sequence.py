# SPDX-License-Identifier: Apache-2.0
"""Rows that devices divide along their tokens give what whole rows give."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps

from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import MeshSection
from dsjax.distributed import sequence
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import Layout, make_layout
from dsjax.models.ops import attention

V32 = tiny_steps.V3 | {
    "model_type": "deepseek_v32",
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 6,
}

RECIPES: dict[str, dict[str, Any]] = {
    "llama, full": {},
    "qwen2, lora with dropout": {
        "shape": {"model_type": "qwen2"},
        "adapter": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5),
    },
    "qwen2 with a window, lora on the head": {
        "shape": {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        "adapter": LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"]),
    },
    "prefix": {"shape": {"model_type": "qwen3"}, "adapter": PrefixConfig(3)},
    "v3, full, with the token after the next and a balance loss": {
        "shape": tiny_steps.V3 | {"num_nextn_predict_layers": 1},
        "objective": {"mtp_loss_weight": 0.3, "aux_loss_alpha": 0.1},
    },
    "v3, lora with dropout and experts": {
        "shape": tiny_steps.V3,
        "adapter": LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_b_proj", "kv_b_proj", "o_proj", "shared_experts.down_proj"],
            lora_dropout=0.5,
        ),
    },
    "v3, lora of uneven experts": {
        "shape": tiny_steps.V3,
        "adapter": tiny_steps.UNEVEN_EXPERTS,
    },
    "v3.2, full": {"shape": V32},
}

CASES = [
    ("llama, full", {"sequence": 8}),
    ("llama, full", {"sequence": 2, "fsdp": 2, "tensor": 2}),
    ("qwen2, lora with dropout", {"sequence": 4, "tensor": 2}),
    ("qwen2, lora with dropout", {"sequence": 2, "data": 2, "fsdp": 2}),
    ("qwen2 with a window, lora on the head", {"sequence": 4, "fsdp": 2}),
    ("prefix", {"sequence": 4, "data": 2}),
    ("v3, full, with the token after the next and a balance loss", {"sequence": 4, "expert": 2}),
    ("v3, lora with dropout and experts", {"sequence": 2, "expert": 2, "tensor": 2}),
    ("v3, lora of uneven experts", {"sequence": 2, "expert": 4}),
    ("v3.2, full", {"sequence": 8}),
]


def _two_steps(
    recipe: str, mesh: Mapping[str, int] | None, pieces: int = 1, packed: bool = True
) -> tiny_steps.Outcome:
    training = {"batch_size": 8, "gradient_accumulation_steps": pieces}
    run = tiny_steps.start(mesh=mesh, training=training, **RECIPES[recipe])
    return tiny_steps.two_steps(run)


@functools.cache
def _one_device(recipe: str) -> tiny_steps.Outcome:
    return _two_steps(recipe, None)


@pytest.mark.parametrize(("recipe", "mesh"), CASES, ids=str)
def test_a_mesh_gives_the_result_of_one_device(recipe: str, mesh: dict[str, int]) -> None:
    tiny_steps.assert_same(_two_steps(recipe, mesh), _one_device(recipe))
