# SPDX-License-Identifier: Apache-2.0
"""Experts over many devices compute what one device computes, whatever the routing."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
import tiny_steps

from dsjax.adapters.lora import LoraConfig
from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import Leaf, check_experts
from dsjax.errors import ConfigError
from dsjax.models import moe
from dsjax.models.ops import blocks

MESHES = {
    "expert 8": {"expert": 8},
    "expert 4, fsdp 2": {"expert": 4, "fsdp": 2},
    "expert 2, tensor 2, data 2": {"expert": 2, "tensor": 2, "data": 2},
}


def _crowded(path: str, leaf: Leaf) -> np.ndarray:
    """A correction bias that sends every token to the same experts, all of one device."""
    values = tiny_steps.random_array(path, leaf)
    if path.endswith("e_score_correction_bias"):
        values[:, 4:8] += 100
    return values


RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, crowded": {"values": _crowded},
    "lora": {
        "adapter": LoraConfig(
            r=3, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"]
        )
    },
    "lora, uneven, crowded": {"adapter": tiny_steps.UNEVEN_EXPERTS, "values": _crowded},
}


def _two_steps(recipe: str, mesh: Mapping[str, int] | None) -> tiny_steps.Outcome:
    return tiny_steps.two_steps(tiny_steps.start(tiny_steps.V3, mesh=mesh, **RECIPES[recipe]))


@functools.cache
def _one_device(recipe: str) -> tiny_steps.Outcome:
    return _two_steps(recipe, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "recipe"),
    [
        ("expert 8", "full"),
        ("expert 8", "lora, uneven, crowded"),
        ("expert 4, fsdp 2", "full, crowded"),
        ("expert 4, fsdp 2", "lora"),
        ("expert 2, tensor 2, data 2", "full"),
        ("expert 2, tensor 2, data 2", "lora, uneven, crowded"),
    ],
)
def test_a_mesh_gives_the_result_of_one_device(mesh: str, recipe: str) -> None:
    tiny_steps.assert_same(_two_steps(recipe, MESHES[mesh]), _one_device(recipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "mesh", "size"),
    [
        ("full", None, 5),  # 24 tokens in five chunks, the last of which is not full
        ("lora, uneven, crowded", {"expert": 2, "tensor": 2, "data": 2}, 10),
    ],
    ids=str,
)
def test_chunks_of_tokens_give_the_result_of_whole_rows(
    recipe: str, mesh: Mapping[str, int] | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes = _one_device(recipe), set()

    def in_blocks(x: jax.Array, size: int) -> jax.Array:
        sizes.add(size)
        return blocks.in_blocks(x, size)

    monkeypatch.setattr(moe, "in_blocks", in_blocks)
    # A token has 3 experts and 32 float32 numbers; one device has 8 rows, an expert's device the 4
    # of its own group.
    monkeypatch.setattr(moe, "CHUNK_BYTES", 5 * 8 * 3 * 32 * 4)
    tiny_steps.assert_same(_two_steps(recipe, mesh), expected)
    assert sizes == {size}


def test_experts_are_held_in_parts() -> None:
    run = tiny_steps.start(tiny_steps.V3, mesh={"expert": 4, "tensor": 2})
    weight = run.state.trainable["model.layers.mlp.experts.gate_proj.weight"]
    assert weight.shape == (2, 8, 16, 32)
    assert {shard.data.shape for shard in weight.addressable_shards} == {(2, 2, 8, 32)}


@pytest.mark.parametrize(
    ("shape", "mesh", "said"),
    [
        ({}, {"expert": 3}, r"mesh.expert: got 3, expected a divisor of n_routed_experts \(8\)"),
        ({"moe_intermediate_size": 9}, {"tensor": 2}, r"mesh.tensor: got 2, .* \(9\)"),
        ({"model_type": "llama"}, {"expert": 2}, "mesh.expert: got 2 for a model without experts"),
    ],
)
def test_a_mesh_that_does_not_divide_the_experts(
    shape: dict[str, Any], mesh: dict[str, int], said: str
) -> None:
    run = tiny_steps.start(tiny_steps.V3 | shape)
    section = MeshSection(**({"fsdp": 1} | mesh))
    devices = jax.devices()[: math.prod(mesh.values())]
    with pytest.raises(ConfigError, match=said):
        check_experts(run.config.partition.leaves, make_mesh(section, devices))
