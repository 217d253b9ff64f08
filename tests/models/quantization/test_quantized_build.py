# SPDX-License-Identifier: Apache-2.0
"""Which matrices are quantized, and which names and sizes are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_steps

from dsjax.errors import ConfigError
from dsjax.models import Quantization, build, stored_linears

ROOT = Path(__file__).parents[3]
V3 = tiny_steps.SHAPE | tiny_steps.V3
BLOCKS: dict[str, Any] = {
    **V3,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "v_head_dim": 16,
}
EXPERTS = {f"model.layers.mlp.experts.{name}_proj.weight" for name in ("gate", "up", "down")}


def stored(config: dict[str, Any], *words: Any, **named: Any) -> set[str]:
    return set(stored_linears(build(config, "float32", Quantization(*words, **named))))


def test_linear_maps_of_all_layers_are_and_nothing_else_is() -> None:
    paths = stored(BLOCKS, "nf4")
    assert paths >= EXPERTS | {
        "model.dense_layers.mlp.down_proj.weight",
        "model.layers.mlp.shared_experts.up_proj.weight",
        "model.layers.self_attn.kv_a_proj_with_mqa.weight",
    }
    assert not [path for path in paths if "norm" in path or ".gate.weight" in path]
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & paths


def test_experts_and_named_modules_may_stay() -> None:
    every = stored(BLOCKS, "nf4")
    assert stored(BLOCKS, "nf4", experts=False) == every - EXPERTS
    left = stored(BLOCKS, "int8", skip_modules=["shared_experts", "self_attn.o_proj"])
    assert {path for path in every - left} == {
        *(f"model.layers.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"model.{stack}.self_attn.o_proj.weight" for stack in ("dense_layers", "layers")),
    }


def test_every_size_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        stored(BLOCKS | {"kv_lora_rank": 40}, "nf4", True, skip_modules=["o_prj"])
    assert str(raised.value).splitlines() == [
        "model.quantization: got nf4 for model.layers.0.self_attn.kv_b_proj.weight of shape "
        "[96, 40], expected an input size that 64 divides; keep it as it is, with "
        "model.quantization_skip_modules=[kv_b_proj], or take int8",
        "model.quantization: got nf4 for model.layers.1.self_attn.kv_b_proj.weight of shape "
        "[96, 40], expected an input size that 64 divides; keep it as it is, with "
        "model.quantization_skip_modules=[kv_b_proj], or take int8",
        "model.quantization_skip_modules: got 'o_prj', which is in no linear map's path; did you "
        "mean o_proj or down_proj or up_proj?",
    ]
    skipping = stored(BLOCKS | {"kv_lora_rank": 40}, "nf4", skip_modules=["kv_b_proj"])
    assert "model.layers.self_attn.kv_b_proj.weight" not in skipping


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model", sorted(p.name for p in (ROOT / "tests/model_configs").iterdir()))
def test_it_fits_the_models_of_the_recipes(model: str, kind: str) -> None:
    config = json.loads((ROOT / "tests/model_configs" / model / "config.json").read_text())
    assert stored(config, kind)
