# SPDX-License-Identifier: Apache-2.0
"""Every mesh computes what one device computes, and holds each array in its parts."""

import functools
from collections.abc import Mapping
from typing import Any

import in_memory
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax import sharding
from dsjax.adapters import attach
from dsjax.adapters.lora import LoraSpec
from dsjax.adapters.prefix import PrefixSpec
from dsjax.config import MeshSection
from dsjax.errors import ConfigError
from dsjax.partition import Leaf, decide

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4, data 2": {"tensor": 4, "data": 2},
    "fsdp 2, tensor 2, data 2": {"fsdp": 2, "tensor": 2, "data": 2},
}

# Two kv heads and one do not divide over tensor 4; 61 tokens over nothing.
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {
        "shape": {"model_type": "qwen2"},
        "adapter": LoraSpec(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"],
            rank_pattern={"layers.1.self_attn.k_proj": 2},
        ),
    },
    "full": {
        "shape": {"num_key_value_heads": 1, "vocab_size": 61, "tie_word_embeddings": True},
        "optimizer": {"weight_decay": 0.1},
    },
    "prefix": {"shape": {"model_type": "qwen3"}, "adapter": PrefixSpec(3)},
}


def _two_steps(recipe: str, mesh: Mapping[str, int] | None) -> in_memory.Outcome:
    run = in_memory.start(mesh=mesh, **RECIPES[recipe])
    outcome = in_memory.two_steps(run, RECIPES[recipe]["shape"].get("vocab_size", 64))
    for path, array in run.state.trainable.items():
        leaf = run.config.partition.leaves[path]
        assert array.sharding == sharding.leaf_sharding(leaf, run.config.mesh), path
    return outcome


@functools.cache
def _one_device(recipe: str) -> in_memory.Outcome:
    return _two_steps(recipe, None)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mesh_gives_the_result_of_one_device(recipe: str, mesh: str) -> None:
    in_memory.assert_same(_two_steps(recipe, MESHES[mesh]), _one_device(recipe))


def _lora_leaves(**shape: Any) -> Mapping[str, Leaf]:
    model = in_memory.model_of(**shape)
    attach(model, LoraSpec(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"]))
    return decide(model).leaves


def _mesh(**axes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshSection(**axes))


def test_every_leaf_has_the_sharding_of_its_axes() -> None:
    leaves = _lora_leaves(attention_bias=True, model_type="qwen3")

    shardings = sharding.leaf_shardings(leaves, _mesh(fsdp=2, tensor=2, data=2))

    attention, mlp = "model.layers.self_attn", "model.layers.mlp"
    shards = ("fsdp", "expert")
    column, row = P(None, ("tensor", *shards), None), P(None, shards, "tensor")
    assert {path: s.spec for path, s in shardings.items()} == {
        "model.embed_tokens.weight": P("tensor", shards),
        "model.layers.input_layernorm.weight": P(None, None),
        "model.layers.post_attention_layernorm.weight": P(None, None),
        f"{attention}.q_proj.weight": column,
        f"{attention}.k_proj.weight": column,
        f"{attention}.v_proj.weight": column,
        f"{attention}.o_proj.weight": row,
        f"{attention}.q_proj.bias": P(None, "tensor"),
        f"{attention}.k_proj.bias": P(None, "tensor"),
        f"{attention}.v_proj.bias": P(None, "tensor"),
        f"{attention}.o_proj.bias": P(None, None),
        f"{attention}.q_norm.weight": P(None, None),
        f"{attention}.k_norm.weight": P(None, None),
        f"{mlp}.gate_proj.weight": column,
        f"{mlp}.up_proj.weight": column,
        f"{mlp}.down_proj.weight": row,
        "model.norm.weight": P(None),
        "lm_head.weight": P("tensor", shards),
        f"{attention}.q_proj.adapter.lora_A": P(None, shards, None),
        f"{attention}.q_proj.adapter.lora_B": column,
        f"{attention}.q_proj.adapter.scaling": P(None),
        f"{mlp}.down_proj.adapter.lora_A": row,
        f"{mlp}.down_proj.adapter.lora_B": P(None, shards, None),
        f"{mlp}.down_proj.adapter.scaling": P(None),
        "lm_head.adapter.lora_A": P(shards, None),
        "lm_head.adapter.lora_B": P("tensor", shards),
        "lm_head.adapter.scaling": P(),
    }


def test_moments_are_sharded_like_their_parameters_and_counters_are_replicated() -> None:
    run = in_memory.start(mesh={"fsdp": 4, "tensor": 2})
    leaves, mesh = run.config.partition.leaves, run.config.mesh

    adam, _, schedule = run.state.opt_state

    for moments in (adam.mu, adam.nu):
        assert set(moments) == set(run.config.partition.trainable) == set(leaves)
        for path, moment in moments.items():
            assert moment.sharding == sharding.leaf_sharding(leaves[path], mesh), path
            assert moment.dtype == jnp.float32, path
    rest = (adam.count, schedule.count, run.state.step, run.state.rng, *run.state.loss_scale)
    assert all(array.sharding == sharding.replicated(mesh) for array in rest)
    matrix = adam.mu["model.layers.mlp.up_proj.weight"]
    assert matrix.addressable_shards[0].data.size == matrix.size // 8


def test_dimensions_that_cannot_be_divided_are_reported() -> None:
    leaves = _lora_leaves(vocab_size=61)

    lines = sharding.undivided(leaves, _mesh(tensor=4, fsdp=2))

    reason = "vocab 61 is replicated, mesh.tensor 4 does not divide it"
    assert lines == [
        f"lm_head.adapter.lora_B: {reason}",
        f"lm_head.weight: {reason}",
        f"model.embed_tokens.weight: {reason}",
    ]
    assert sharding.undivided(leaves, _mesh(data=8, fsdp=1)) == []


def test_a_mesh_fills_its_free_axis() -> None:
    mesh = _mesh(tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "expert": 1, "sequence": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.batch_shards(mesh) == 4
    assert sharding.make_mesh(MeshSection(), jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": -1}, "mesh: got data -1, fsdp -1, .*expected at most one axis of -1"),
        ({"fsdp": 3}, r"mesh: got data 1, fsdp 3, .*the number of devices \(8\); set one axis"),
        ({"fsdp": 16}, r"mesh: got data 1, fsdp 16, .*the number of devices \(8\)"),
        ({"tensor": 3}, r"mesh: got data 1, fsdp -1, tensor 3, .*number of devices \(8\)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _mesh(**axes)


def test_a_batch_has_to_divide() -> None:
    mesh = _mesh(fsdp=2, data=2, tensor=2)
    sharding.check_batch(24, 3, mesh)
    message = (
        r"training.batch_size: got 20, expected a multiple of 12 = "
        r"training.gradient_accumulation_steps \(3\) x mesh.data x mesh.fsdp x mesh.expert "
        r"\(4\); 24 would do"
    )
    with pytest.raises(ConfigError, match=message):
        sharding.check_batch(20, 3, mesh)
