# SPDX-License-Identifier: Apache-2.0
"""Every mesh computes what one device computes, and holds each array in its parts."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax.adapters import attach
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import MeshSection
from dsjax.distributed import sharding
from dsjax.distributed.compiled import collectives_of
from dsjax.distributed.mesh import (
    batch_shards,
    check_batch,
    make_mesh,
    num_microbatches,
    replicated,
)
from dsjax.distributed.sharding import Leaf
from dsjax.errors import ConfigError
from dsjax.objectives import cross_entropy
from dsjax.training.partition import make_partition

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
        "adapter": LoraConfig(
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
    "prefix": {"shape": {"model_type": "qwen3"}, "adapter": PrefixConfig(3)},
}
FAST = {("lora", "fsdp 2, tensor 2, data 2"), ("full", "tensor 4, data 2"), ("prefix", "fsdp 8")}


def _two_steps(recipe: str, mesh: Mapping[str, int] | None) -> tiny_steps.Outcome:
    run = tiny_steps.start(mesh=mesh, **RECIPES[recipe])
    outcome = tiny_steps.two_steps(run, RECIPES[recipe]["shape"].get("vocab_size", 64))
    for path, array in run.state.trainable.items():
        leaf = run.config.partition.leaves[path]
        assert array.sharding == sharding.leaf_sharding(leaf, run.config.mesh), path
    return outcome


@functools.cache
def _one_device(recipe: str) -> tiny_steps.Outcome:
    return _two_steps(recipe, None)


@pytest.mark.parametrize(
    ("recipe", "mesh"),
    [
        pytest.param(*both, marks=[] if both in FAST else pytest.mark.slow)
        for both in itertools.product(RECIPES, MESHES)
    ],
)
def test_a_mesh_gives_the_result_of_one_device(recipe: str, mesh: str) -> None:
    tiny_steps.assert_same(_two_steps(recipe, MESHES[mesh]), _one_device(recipe))


DROPPING: dict[str, dict[str, Any]] = {
    "dense": {
        "adapter": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5)
    }
    | {"shape": {"model_type": "qwen2"}},
    "head": {
        "adapter": LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], lora_dropout=0.3)
    },
    "v3": {
        "shape": tiny_steps.V3,
        "adapter": LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_b_proj", "kv_b_proj", "o_proj", "shared_experts.down_proj"],
            lora_dropout=0.5,
        ),
    },
}


@functools.cache
def _dropped(recipe: str) -> tiny_steps.Outcome:
    return tiny_steps.two_steps(tiny_steps.start(**DROPPING[recipe]))


@pytest.mark.parametrize(
    ("recipe", "mesh", "pieces"),
    [
        pytest.param("dense", None, 4, marks=pytest.mark.slow),
        pytest.param("dense", {"data": 2, "fsdp": 2, "tensor": 2}, 2, marks=pytest.mark.slow),
        ("head", {"fsdp": 4}, 2),
        pytest.param("v3", {"expert": 2, "data": 2}, 2, marks=pytest.mark.slow),
        pytest.param("v3", {"fsdp": 2, "expert": 2, "tensor": 2}, 1, marks=pytest.mark.slow),
    ],
)
def test_dropout_is_the_same_on_every_mesh_and_in_any_number_of_portions(
    monkeypatch: pytest.MonkeyPatch, recipe: str, mesh: dict[str, int] | None, pieces: int
) -> None:
    monkeypatch.setattr(cross_entropy, "TOKENS_PER_CHUNK", 32)
    training = {"batch_size": 8, "gradient_accumulation_steps": pieces}
    run = tiny_steps.start(**DROPPING[recipe], mesh=mesh, training=training)
    tiny_steps.assert_same(tiny_steps.two_steps(run), _dropped(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_dropout_sends_nothing(mesh: dict[str, int]) -> None:
    sent = {}
    for p in (0.0, 0.5):
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=p)
        run = tiny_steps.start(adapter=adapter, mesh=mesh)
        text = run.lower(tiny_steps.batch()).compile().as_text() or ""
        sent[p] = {c.kind: c.bytes for c in collectives_of(text).by_kind}
    assert sent[0.0] and sent[0.0] == sent[0.5]


def _lora_leaves(**shape: Any) -> Mapping[str, Leaf]:
    model = tiny_steps.model_of(**shape)
    attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"]))
    return make_partition(model).leaves


def _mesh(**axes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshSection(**axes))


def test_every_leaf_has_the_sharding_of_its_axes() -> None:
    leaves = _lora_leaves(attention_bias=True, model_type="qwen3")

    shardings = sharding.leaf_shardings(leaves, _mesh(fsdp=2, tensor=2, data=2))

    attention, mlp = "model.layers.self_attn", "model.layers.mlp"
    shards = "fsdp"
    column, row = P(None, ("tensor", shards), None), P(None, shards, "tensor")
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


def _leaf(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Leaf:
    return Leaf(shape, axes, jnp.dtype("float32"), "base", math.prod(shape))


BOTH = ("fsdp", "expert")


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        # The first dimension that divides, after what a rule puts there; no layers, no vocabulary.
        ((8, 24, 16), ("layers", "mlp", "embed"), P(None, ("tensor", *BOTH), None)),
        ((8, 6, 16), ("layers", "mlp", "embed"), P(None, "tensor", BOTH)),
        ((8, 16), ("vocab", "embed"), P("tensor", BOTH)),
        # Where both axes fit nowhere, one of them, and of the two fsdp.
        ((8, 6, 2), ("layers", None, "embed"), P(None, "fsdp", None)),
        ((8, 3, 6), ("layers", None, "embed"), P(None, None, "fsdp")),
        ((8, 3, 5), ("layers", None, "embed"), P(None, None, None)),
        # Experts are dealt out already.
        (
            (8, 4, 6, 10),
            ("layers", "experts", "mlp", "embed"),
            P(None, BOTH[::-1], "tensor", None),
        ),
        (
            (8, 2, 6, 10),
            ("layers", "experts", "mlp", "embed"),
            P(None, "expert", "tensor", "fsdp"),
        ),
        # No matrix: a norm, a bias.
        ((8, 16), ("layers", "embed"), P(None, None)),
        ((16,), ("embed",), P(None)),
    ],
    ids=str,
)
def test_a_matrix_is_divided_for_memory_where_it_can_be(
    shape: tuple[int, ...], axes: tuple[str | None, ...], expected: P
) -> None:
    mesh = _mesh(fsdp=2, expert=2, tensor=2)
    assert sharding.leaf_sharding(_leaf(shape, axes), mesh).spec == expected


def test_a_matrix_that_fsdp_does_not_divide_is_divided_by_expert() -> None:
    leaf = _leaf((2, 5, 6), ("layers", None, "embed"))
    assert sharding.leaf_sharding(leaf, _mesh(fsdp=4, expert=2)).spec == P(None, None, "expert")


def test_what_is_divided_for_memory_is_computed_with_whole() -> None:
    leaf, mesh = _leaf((2, 24, 16), ("layers", "mlp", "embed")), _mesh(fsdp=2, expert=2, tensor=2)
    assert sharding.computed_sharding(leaf, mesh).spec == P(None, "tensor", None)


@pytest.mark.parametrize(
    ("shape", "axes", "divided"),
    [
        ((24, 16), ("mlp", "embed"), P(("tensor", *BOTH), None)),
        ((6, 16), ("mlp", "embed"), P("tensor", BOTH)),
        ((3, 6), (None, "embed"), P(None, "fsdp")),
        ((4, 6, 10), ("experts", "mlp", "embed"), P(("expert", "fsdp"), "tensor", None)),
        ((3, 5), (None, "embed"), P(None, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layers_matrix_is_gathered_and_its_gradient_divided_again(
    shape: tuple[int, ...], axes: tuple[str | None, ...], divided: P, dtype: type
) -> None:
    mesh = _mesh(fsdp=2, expert=2, tensor=2)
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    held = sharding.leaf_sharding(_leaf(shape, axes), mesh)
    assert held.spec == divided
    gather = sharding.make_layout(mesh).gather

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = gather(x, axes, jnp.dtype(dtype))
        return jnp.sum(jnp.sin(whole) * weights), whole

    both = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=held)
    (_, whole), gradient = both(jax.device_put(x, held))

    computed = sharding.computed_sharding(_leaf(shape, axes), mesh)
    assert whole.sharding.is_equivalent_to(computed, x.ndim)
    assert gradient.sharding.is_equivalent_to(held, x.ndim)
    # What travels is in `dtype`; the gradient is not.
    sent = x if held.is_equivalent_to(computed, x.ndim) else x.astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(whole, sent)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, jnp.cos(sent) * weights, rtol=1e-6)


def test_one_device_gathers_nothing() -> None:
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    x = jnp.ones((4, 6))
    assert sharding.make_layout(mesh).gather(x, ("mlp", "embed"), jnp.dtype(jnp.bfloat16)) is x


def test_moments_are_sharded_like_their_parameters_and_counters_are_replicated() -> None:
    run = tiny_steps.start(mesh={"fsdp": 4, "tensor": 2})
    leaves, mesh = run.config.partition.leaves, run.config.mesh

    adam, _, schedule = run.state.opt_state

    for moments in (adam.mu, adam.nu):
        assert set(moments) == set(run.config.partition.trainable) == set(leaves)
        for path, moment in moments.items():
            assert moment.sharding == sharding.leaf_sharding(leaves[path], mesh), path
            assert moment.dtype == jnp.float32, path
    rest = (adam.count, schedule.count, run.state.step, run.state.rng, *run.state.loss_scale)
    assert all(array.sharding == replicated(mesh) for array in rest)
    matrix = adam.mu["model.layers.mlp.up_proj.weight"]
    assert matrix.addressable_shards[0].data.size == matrix.size // 8


def test_dimensions_that_cannot_be_divided_are_reported() -> None:
    leaves = _lora_leaves(vocab_size=61)

    lines = sharding.replication_report(leaves, _mesh(tensor=4, fsdp=2))

    reason = "vocab 61 is replicated, mesh.tensor 4 does not divide it"
    assert lines == [
        f"lm_head.adapter.lora_B: {reason}",
        f"lm_head.weight: {reason}",
        f"model.embed_tokens.weight: {reason}",
    ]
    assert sharding.replication_report(leaves, _mesh(data=8, fsdp=1)) == []


def test_matrices_that_are_held_more_than_once_are_reported() -> None:
    leaves = {
        "both": _leaf((2, 3, 8), ("layers", None, "embed")),
        "one": _leaf((2, 3, 6), ("layers", None, "embed")),
        "none": _leaf((2, 3, 5), ("layers", None, "embed")),
        "experts": _leaf((2, 6, 9, 5), ("layers", "experts", "mlp", "embed")),
        "norm": _leaf((2, 5), ("layers", "embed")),
    }
    named = "mesh.fsdp 4 x mesh.expert 2 divides none of its dimensions"
    assert sharding.replication_report(leaves, _mesh(fsdp=4, expert=2)) == [
        f"one: 2 x 3 x 6 is held 4 times, {named}",
        f"none: 2 x 3 x 5 is held 8 times, {named}",
        "experts: 2 x 6 x 9 x 5 is held 4 times, mesh.fsdp 4 divides none of its dimensions",
    ]


def test_a_mesh_fills_its_free_axis() -> None:
    mesh = _mesh(tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "expert": 1, "sequence": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_shards(mesh) == 4
    assert make_mesh(MeshSection(), jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": -1}, "mesh: got data -1, fsdp -1, .*expected at most one axis of -1"),
        ({"fsdp": 3}, r"mesh: got data 1, fsdp 3, .*devices \(8\); set .*, or take mesh.fsdp=8$"),
        ({"fsdp": 3, "expert": 12}, r"or take mesh.fsdp=2 mesh.expert=4, or mesh.fsdp=8$"),
        ({"fsdp": 16}, r"mesh: got data 1, fsdp 16, .*the number of devices \(8\)"),
        ({"tensor": 3}, r"mesh: got data 1, fsdp -1, tensor 3, .*number of devices \(8\)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _mesh(**axes)


@pytest.mark.parametrize(
    ("asked", "batch_size", "max_length", "expected"),
    [
        (3, 24, 4096, 3),
        ("auto", 64, 4096, 16),  # a row at a time to each device
        ("auto", 64, 2048, 16),
        ("auto", 64, 1024, 8),
        ("auto", 64, 600, 8),  # three rows would do, and do not divide sixteen
        ("auto", 64, 16, 1),
        ("auto", 20, 1024, 5),  # five rows: two do not divide them
        ("auto", 4, 64, 1),
        ("auto", 1, 4096, 1),
    ],
)
def test_auto_leaves_few_tokens_at_a_time(asked, batch_size, max_length, expected) -> None:
    mesh = _mesh(fsdp=2, data=2, tensor=2)
    assert num_microbatches(asked, batch_size, max_length, mesh) == expected


def test_a_batch_has_to_divide() -> None:
    mesh = _mesh(fsdp=2, data=2, tensor=2)
    check_batch(24, 3, mesh)
    message = (
        r"training.batch_size: got 20, expected a multiple of 12 = "
        r"training.gradient_accumulation_steps \(3\) x mesh.data x mesh.fsdp x mesh.expert "
        r"\(4\); 24 would do"
    )
    with pytest.raises(ConfigError, match=message):
        check_batch(20, 3, mesh)
