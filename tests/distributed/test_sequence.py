# SPDX-License-Identifier: Apache-2.0
"""Rows that devices divide along their tokens give what whole rows give."""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from jax.sharding import PartitionSpec as P

from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import MeshSection
from dsjax.distributed import sequence
from dsjax.distributed.mesh import check_length, make_mesh, num_microbatches
from dsjax.distributed.sharding import Layout, Leaf, leaf_sharding, make_layout
from dsjax.errors import ConfigError
from dsjax.models.ops import attention
from dsjax.models.ops.attention import KernelFor, Tokens, dot_product_attention
from dsjax.models.ops.attention_cuda import attend_cuda, attend_part_cuda

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
    "v3, full, token after the next": {
        "shape": tiny_steps.V3 | {"num_nextn_predict_layers": 1},
        "objective": {"mtp_loss_weight": 0.3, "aux_loss_alpha": 0.1},
    },
    "v3, lora": {
        "shape": tiny_steps.V3,
        "adapter": LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_b_proj", "kv_b_proj", "o_proj", "shared_experts.down_proj"],
            lora_dropout=0.5,
        ),
    },
    "v3.2, full": {"shape": V32},
}

SLOW = pytest.mark.slow

CASES = [
    ("llama, full", {"sequence": 8}),
    pytest.param("qwen2, lora with dropout", {"sequence": 4, "tensor": 2}, marks=SLOW),
    pytest.param("llama, full", {"sequence": 2, "fsdp": 2, "tensor": 2}, marks=SLOW),
    pytest.param("qwen2 with a window, lora on the head", {"sequence": 4, "fsdp": 2}, marks=SLOW),
    pytest.param("prefix", {"sequence": 4, "data": 2}, marks=SLOW),
    pytest.param("v3, full, token after the next", {"sequence": 4, "expert": 2}, marks=SLOW),
    pytest.param("v3, lora", {"sequence": 2, "expert": 2, "tensor": 2}, marks=SLOW),
    pytest.param("v3.2, full", {"sequence": 8}, marks=SLOW),
]


def _two_steps(recipe: str, mesh: Mapping[str, int] | None) -> tiny_steps.Outcome:
    return tiny_steps.two_steps(tiny_steps.start(mesh=mesh, **RECIPES[recipe]))


@functools.cache
def _one_device(recipe: str) -> tiny_steps.Outcome:
    return _two_steps(recipe, None)


@pytest.mark.parametrize(("recipe", "mesh"), CASES, ids=str)
def test_a_mesh_gives_the_result_of_one_device(recipe: str, mesh: dict[str, int]) -> None:
    tiny_steps.assert_same(_two_steps(recipe, mesh), _one_device(recipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "mesh"),
    [
        ("qwen2, lora with dropout", {"sequence": 2, "fsdp": 4}),
        ("v3.2, full", {"sequence": 4, "expert": 2}),
    ],
    ids=str,
)
def test_rows_that_are_not_packed_too(recipe: str, mesh: dict[str, int]) -> None:
    whole, divided = (
        tiny_steps.two_steps(tiny_steps.start(mesh=axes, **RECIPES[recipe]), packed=False)
        for axes in (None, mesh)
    )
    tiny_steps.assert_same(divided, whole)


def _layout(**sizes: int) -> Layout:
    devices = jax.devices()[: math.prod(sizes.values())]
    return make_layout(make_mesh(MeshSection(**({"fsdp": 1} | sizes)), devices))


def test_parts_take_the_place_of_rows_and_come_back() -> None:
    layout, x = _layout(sequence=4, fsdp=2), jnp.arange(4 * 16 * 3).reshape(4, 16, 3)
    parts, back, copies, whole = jax.jit(
        lambda x: (
            sequence.split_rows(x, layout),
            sequence.join_rows(sequence.split_rows(x, layout), layout),
            sequence.copy_rows(x, layout),
            sequence.split_rows(x, None),
        )
    )(x)
    np.testing.assert_array_equal(parts, np.concatenate(np.split(x, 4, axis=1)))
    np.testing.assert_array_equal(copies, np.concatenate([x] * 4))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(whole, x)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_every_part_has_the_same_work_in_causal_attention(shards: int) -> None:
    layout, places = _layout(sequence=shards), jnp.arange(4 * shards)[None]
    mixed = jax.jit(lambda x: sequence.exchange_halves(x, layout))(places)
    seen = np.asarray(mixed).reshape(shards, -1) + 1
    assert len(set(seen.sum(1))) == 1
    np.testing.assert_array_equal(
        jax.jit(lambda x: sequence.exchange_halves(x, layout))(mixed), places
    )


def test_tokens_cross_devices_only_where_they_have_to() -> None:
    """Splitting moves nothing, halves change places in pairs, copies are gathered once."""
    layout = _layout(sequence=4, fsdp=2)
    x = jax.device_put(jnp.zeros((4, 64, 3)), layout.rows)

    def moves(function: Callable[[jax.Array], jax.Array]) -> dict[str, int]:
        text = jax.jit(function).lower(x).compile().as_text() or ""
        found = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)\(", text)
        return dict(Counter(found))

    assert moves(lambda x: sequence.split_rows(x, layout)) == {}
    assert moves(lambda x: sequence.join_rows(sequence.split_rows(x, layout), layout)) == {}
    assert moves(lambda x: sequence.exchange_halves(x, layout)) == {"collective-permute": 1}
    assert moves(lambda x: sequence.copy_rows(x, layout)) == {"all-gather": 1}


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"sequence": 4}, marks=pytest.mark.slow),
        {"sequence": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_every_device_runs_the_kernel_on_its_parts_and_heads(
    mesh: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = attention_cases.Shape(2, 24, 4, 2, 8, 8)
    arrays, layout = attention_cases.arrays_of(shape, jnp.bfloat16), _layout(**mesh)
    segment_BT = jnp.asarray([[1] * 7 + [2] * 15 + [0] * 2, [1] * 24], jnp.int32)
    tokens = Tokens(jnp.broadcast_to(jnp.arange(24), (2, 24)), segment_BT)
    part = functools.partial(attend_part_cuda, interpret=True)
    kernel = KernelFor(lambda *_: True, attend_cuda, part)
    monkeypatch.setattr(attention, "KERNELS", (kernel,))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = sequence.copy_rows((k, v), layout)
        args = (tokens, tokens, None, 8**-0.5)
        return dot_product_attention(q, k, v, *args, layout=layout, own_rows=True)

    ours = jax.jit(functools.partial(attention_cases.with_gradients, attend))(*arrays)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    for got, want in zip(ours, attention_cases.expected(wide, segment_BT), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        # Results and gradients are rounded, those of a kv head once for each part of its rows.
        assert tiny_steps.distance(got, want) < float(jnp.finfo(jnp.bfloat16).eps)


def test_a_kernel_is_taken_only_where_it_can_do_parts_of_this_size() -> None:
    whole = KernelFor(lambda *_: True, attend_cuda)
    able = KernelFor(lambda *_: True, attend_cuda, attend_part_cuda, part_multiple=128)
    device = jax.devices()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "KERNELS", (whole, able))
        assert attention.kernel_for(device, 8, 8) is attend_cuda
        assert attention.kernel_for(device, 8, 8, 256) is attend_part_cuda
        assert attention.kernel_for(device, 8, 8, 64) is None


def test_matrices_are_divided_by_the_axis_too() -> None:
    leaf = Leaf((2, 64, 32), ("layers", "mlp", "embed"), jnp.dtype(jnp.float32), "base", 4096)
    mesh = _layout(sequence=2, fsdp=4).rows.mesh
    assert leaf_sharding(leaf, mesh).spec == P(None, ("tensor", "fsdp", "sequence"), None)


@pytest.mark.parametrize(("length", "said"), [(24, "32 would do"), (8, "16 would do")])
def test_rows_that_devices_do_not_divide_are_refused(length: int, said: str) -> None:
    mesh = _layout(sequence=8).rows.mesh
    check_length(48, mesh)
    with pytest.raises(ConfigError, match=rf"data.max_length: got {length}, .* 16 = .*; {said}"):
        check_length(length, mesh)


def test_auto_counts_the_tokens_of_a_part() -> None:
    mesh = _layout(sequence=4).rows.mesh
    assert num_microbatches("auto", 8, 2048, mesh) == 2
    assert num_microbatches("auto", 8, 32_768, mesh) == 8
