# SPDX-License-Identifier: Apache-2.0
"""The attention kernels for CUDA compute what the plain path does; their programs are interpreted.

That the CUDA compiler takes them, and what memory they need, is tests/cuda's.
"""

import functools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from attention_cases import Shape, arrays_of, check, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.distributed.sharding import make_layout
from dsjax.models.ops import attention, attention_cuda
from dsjax.models.ops.attention import KernelFor, Tokens, dot_product_attention
from dsjax.models.ops.attention_cuda import attend_cuda, attend_part_cuda

SHAPES = {
    "latent": Shape(1, 40, 2, 2, 24, 16),  # more than a power of two, as 192 is
    "grouped": Shape(2, 150, 4, 2, 16, 16),  # blocks of 64 and of 32 keys, the last not full
    "tiny": Shape(1, 9, 3, 1, 8, 12),
    "whole blocks": Shape(1, 128, 2, 1, 16, 8),
}


def _packed(shape: Shape, ends: list[int]) -> jax.Array:
    """Segments 1, 2, ... up to each end, then padding; rows alike but for one longer segment."""
    place = np.arange(shape.tokens)
    segment = np.searchsorted(ends, place, side="right") + 1
    rows = np.stack([np.where(place < ends[-1], segment, 0)] * shape.rows)
    rows[1:, : ends[0] + 1] = 1
    return jnp.asarray(rows, jnp.int32)


@jax.jit
def _ours(arrays: tuple[jax.Array, ...], segment_BT: jax.Array) -> tuple[jax.Array, ...]:
    scale = arrays[0].shape[-1] ** -0.5

    def attend_here(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_cuda(q, k, v, segment_BT, scale, interpret=True)

    return with_gradients(attend_here, *arrays)


@pytest.mark.parametrize("name", SHAPES)
def test_packed_rows_are_attended_to_as_by_attend(name: str) -> None:
    shape = SHAPES[name]
    third = shape.tokens // 3
    check(_ours, arrays_of(shape), _packed(shape, [third, 2 * third, shape.tokens - 2]))


@pytest.mark.parametrize("name", ["grouped", "tiny"])
def test_a_row_of_one_segment_is_causal(name: str) -> None:
    shape = SHAPES[name]
    check(_ours, arrays_of(shape), jnp.ones((shape.rows, shape.tokens), jnp.int32))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        pytest.param("grouped", 2, marks=pytest.mark.slow),
        ("latent", 2),
        pytest.param("latent", 5, marks=pytest.mark.slow),
    ],
)
def test_parts_of_the_queries_are_attended_to_as_whole_rows(name: str, parts: int) -> None:
    shape = SHAPES[name]
    ours = attention_cases.by_part(attend_part_cuda, parts, shape.size**-0.5)
    for ends in ([shape.tokens // 3, shape.tokens - 2], list(range(1, shape.tokens, 2))):
        check(ours, arrays_of(shape), _packed(shape, ends))


@settings(max_examples=30)
@given(st.sampled_from(list(SHAPES)), st.data())
def test_any_segments_in_any_order_give_what_attend_gives(name: str, data: st.DataObject) -> None:
    """Also those that no packing makes: numbers that come back, and padding in between."""
    shape = SHAPES[name]
    runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, shape.tokens)), min_size=1)
    rows = [
        np.resize(np.concatenate([np.full(n, s) for s, n in data.draw(runs)]), shape.tokens)
        for _ in range(shape.rows)
    ]
    check(_ours, arrays_of(shape), jnp.asarray(np.stack(rows), jnp.int32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers_cost_no_more_than_their_rounding(dtype: str) -> None:
    shape = SHAPES["grouped"]
    arrays, segment_BT = arrays_of(shape, dtype), _packed(shape, [50, 100, 145])
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    ours, expected = _ours(arrays, segment_BT), attention_cases.expected(wide, segment_BT)
    # The weights, the scores' gradients and the result are rounded, each by half a unit of the last
    # place (eps / 2) or less. The errors are independent: their norm stays below eps.
    bound = float(jnp.finfo(dtype).eps)
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == dtype
        assert tiny_steps.distance(np.asarray(got, np.float32), np.asarray(want)) < bound


@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 2, "tensor": 2},
        {"tensor": 4},  # more than kv heads
        {"data": 2, "tensor": 3},  # does not divide the heads
    ],
    ids=str,
)
def test_every_device_runs_the_kernel_on_its_rows_and_heads(
    mesh: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(2, 20, 4, 2, 8, 8)
    arrays, segment_BT = arrays_of(shape, jnp.bfloat16), _packed(shape, [6, 18])
    kernel = functools.partial(attend_cuda, interpret=True)
    monkeypatch.setattr(attention, "KERNELS", (KernelFor(lambda *_: True, kernel),))
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    layout = make_layout(make_mesh(MeshSection(**{"fsdp": 1} | mesh), devices))
    tokens = Tokens(jnp.broadcast_to(jnp.arange(20), (2, 20)), segment_BT)

    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dot_product_attention(q, k, v, tokens, tokens, None, 8**-0.5, layout=layout)

    run = functools.partial(with_gradients, by_kernel)
    ours = jax.jit(run)(*arrays)
    for got, want in zip(ours, _ours(arrays, segment_BT), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        # A kv head's gradients, if several devices have it, are rounded before they are summed.
        assert tiny_steps.distance(got, want) < float(jnp.finfo(jnp.bfloat16).eps)


def test_padding_is_finite_and_changes_no_token() -> None:
    shape = SHAPES["grouped"]
    arrays, segment_BT = arrays_of(shape), _packed(shape, [50, 100])
    tokens_BT = np.asarray(segment_BT) > 0
    rubbish = tuple(jnp.where(tokens_BT[:, :, None, None], x, 1e4) for x in arrays[:3])
    dout_BTNV = jnp.where(tokens_BT[:, :, None, None], arrays[3], 0)  # no loss on padding
    results = [_ours((*x, dout_BTNV), segment_BT) for x in (arrays[:3], rubbish)]
    for got, want in zip(*results, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(np.asarray(got)[tokens_BT], np.asarray(want)[tokens_BT])
    for gradient in results[0][1:]:
        assert not np.asarray(gradient)[~tokens_BT].any()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.sampled_from([(16, 8), (4, 8)]))
def test_no_block_is_passed_over_that_holds_a_key_to_see(
    segments: list[int], sizes: tuple[int, int]
) -> None:
    tile = attention_cuda._Tile(*sizes, 4)
    rows = attention_cuda.whole_rows(jnp.asarray([segments], jnp.int32))
    first_BQ, end_BR = attention_cuda._reach(rows, tile)
    first, end = np.asarray(first_BQ)[0], np.asarray(end_BR)[0]
    for query, key in np.argwhere(np.tri(len(segments))):
        if segments[query] == segments[key]:
            assert first[query // tile.queries] <= key // tile.keys
            assert query // tile.queries < end[key // tile.keys]
    last = (np.arange(len(first)) + 1) * tile.queries - 1
    assert (first * tile.keys <= last).all() and (first >= 0).all()
    assert (end <= len(first)).all() and (
        end > np.arange(len(end)) * tile.keys // tile.queries
    ).all()


def test_blocks_of_other_segments_are_passed_over() -> None:
    segment_BT = jnp.asarray([np.repeat([1, 2, 3, 0], 16)], jnp.int32)
    tile = attention_cuda._Tile(8, 8, 4)
    first_BQ, end_BR = attention_cuda._reach(attention_cuda.whole_rows(segment_BT), tile)
    np.testing.assert_array_equal(first_BQ, [[0, 0, 2, 2, 4, 4, 6, 6]])
    np.testing.assert_array_equal(end_BR, [[2, 2, 4, 4, 6, 6, 8, 8]])


def test_keys_behind_a_part_of_the_queries_meet_none_of_them() -> None:
    segment_BT = jnp.asarray([np.repeat([1, 2, 2, 3], 16)], jnp.int32)
    part = attention_cuda.Rows(segment_BT[:, 16:32], segment_BT, jnp.asarray([16]))
    first_BQ, end_BR = attention_cuda._reach(part, attention_cuda._Tile(8, 8, 4))
    np.testing.assert_array_equal(first_BQ, [[2, 2]])
    np.testing.assert_array_equal(end_BR, [[0, 0, 2, 2, 0, 0, 0, 0]])


@pytest.mark.parametrize("size, widths", [(8, [16]), (24, [16, 16]), (64, [64]), (192, [128, 64])])
def test_a_head_is_cut_into_powers_of_two(size: int, widths: list[int]) -> None:
    pieces = attention_cuda._pieces(size)
    assert [width for _, width in pieces] == widths
    assert [begin for begin, _ in pieces] == list(np.cumsum([0, *widths[:-1]]))


def test_forward_and_gradients_are_kernels_on_cuda() -> None:
    q, k, v, dout = arrays_of(SHAPES["latent"])
    segment_BT = _packed(SHAPES["latent"], [20, 38])
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        return with_gradients(lambda *x: attend_cuda(*x, segment_BT, 0.2), q, k, v, dout)

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(q, k, v, dout).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") + text.count("@triton_kernel_call") == 3


def test_a_remat_policy_that_keeps_the_name_runs_the_kernel_once() -> None:
    arrays, segment_BT = arrays_of(SHAPES["tiny"])[:3], jnp.ones((1, 9), jnp.int32)

    def loss(keep: list[str], *qkv: jax.Array) -> jax.Array:
        policy = jax.checkpoint_policies.save_only_these_names(*keep)
        attention = functools.partial(attend_cuda, name="kept", interpret=True)
        block = jax.checkpoint(lambda *qkv: attention(*qkv, segment_BT, 0.3), policy=policy)
        return jnp.sum(jnp.sin(block(*qkv)))

    def loops(keep: list[str]) -> int:
        gradient = jax.jit(jax.grad(functools.partial(loss, keep), (0, 1, 2)))
        compiled = gradient.lower(*arrays).compile()
        return compiled.as_text().count(" while(")

    assert loops(["kept"]) < loops(["another"])
