# SPDX-License-Identifier: Apache-2.0
"""What cuDNN is told: which rows go where, where segments lie, and by which of jax's private names.

cuDNN itself runs on a GPU only. Here it is stood in for by dense attention that reads the arrays as
cuDNN does, at the places it is given; benchmarks/gpu.py holds the real one against float32.
"""

import functools
import inspect
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Shape, arrays_of, expected, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsjax.distributed.jax_internals import cudnn_attention
from dsjax.models.ops import attention_cuda, attention_cudnn
from dsjax.models.ops.attention import kernel_for
from dsjax.models.ops.attention_cuda import attend_cuda
from dsjax.models.ops.attention_cudnn import attend_cudnn, cuts_of, find_segments, route
from dsjax.models.ops.attention_tpu import attend_tpu

PRIVATE = cudnn_attention()

ROOM = 70


def _rows(lengths: list[list[int]], tokens: int) -> np.ndarray:
    """Rows of segments 1, 2, ... of these lengths, and padding behind them."""
    rows = [np.repeat(np.arange(len(row)) + 1, row)[:tokens] for row in lengths]
    return np.stack([np.pad(row, (0, tokens - len(row))) for row in rows]).astype(np.int32)


# ---- Segments and the choice between branches


_find_segments = jax.jit(functools.partial(find_segments, room=ROOM))


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(1, 34), max_size=34), min_size=2, max_size=2))
def test_segments_are_found_where_they_lie(lengths: list[list[int]]) -> None:
    rows = _rows(lengths, 34)
    new = np.ones(rows.shape, bool)
    new[:, 1:] = rows[:, 1:] != rows[:, :-1]
    count = int(new.sum())
    found = _find_segments(rows)

    assert int(found.count) == count
    np.testing.assert_array_equal(found.start_S[:count], np.flatnonzero(new))
    assert (np.asarray(found.start_S[count:]) == rows.size).all()
    assert not np.asarray(found.length_S[count:]).any()
    # There and back: each segment's number, as often as it has tokens.
    again = np.repeat(np.arange(ROOM), np.asarray(found.length_S))
    np.testing.assert_array_equal(found.number_BT, again.reshape(rows.shape))


def test_more_segments_than_there_is_room_for_are_counted() -> None:
    found = find_segments(jnp.arange(1, 65)[None], 10)
    assert int(found.count) == 64
    np.testing.assert_array_equal(found.start_S, np.arange(10))


@pytest.mark.parametrize(
    "rows, number",
    [
        ([[1] * 20 + [2] * 12], 0),
        ([[1] * 20 + [2] * 6 + [0] * 6], 0),
        ([list(range(1, 9)) + [8] * 24], 0),  # as many as there is room for
        ([[*range(1, 15), *[15] * 9, *[16] * 9]], 1),  # twice the room, of half the length
        ([[*range(1, 18), *[18] * 8, *[19] * 7]], 2),
        ([list(range(1, 33))], 2),
        ([[*range(1, 15), *[15] * 9, *[16] * 9], [1] * 16 + [2] * 16], 1),  # rows share the room
        ([[*range(1, 15), *[15] * 18]], 3),  # too many for one piece, too long for two
        ([[1] * 8 + [2] * 8 + [1] * 16], 3),  # a segment that comes back
        ([[1] * 8 + [0] * 8 + [2] * 16], 3),
    ],
    ids=str,
)
def test_packed_rows_take_the_first_cut_that_they_fit_into(
    rows: list[list[int]], number: int
) -> None:
    cuts = cuts_of((len(rows), 32, 2, 8), 2, 8)
    assert [cut.room for cut in cuts] == [len(rows) * 8 * pieces for pieces in (1, 2, 4)]
    segment_BT = jnp.asarray(rows, jnp.int32)
    segments = find_segments(segment_BT, cuts[-1].room)
    assert int(route(segment_BT, segments, cuts)) == number


@pytest.mark.parametrize(
    "rows, whole",
    [
        ([[1, 1, 1]], True),
        ([[1, 1, 1], [1, 0, 0]], True),
        ([[0, 0, 0]], True),
        ([[1, 1, 1], [1, 1, 2]], False),
        ([[0, 1, 1]], False),
        ([[1, 0, 1]], False),
    ],
    ids=str,
)
def test_whole_rows_are_known(rows: list[list[int]], whole: bool) -> None:
    assert bool(attention_cudnn._are_whole(jnp.asarray(rows))) == whole


@pytest.mark.parametrize(
    "shape, kv_heads, rooms",
    [
        ((4, 2048, 32, 128), 32, [32, 64, 128]),  # 128 MiB for each segment of a row
        ((4, 8192, 32, 128), 32, [8, 16, 32]),
        ((4, 2048, 32, 128), 8, [16, 32, 64]),  # gradients of keys and values as well
        ((1, 131072, 32, 128), 32, []),  # one takes 2 GiB
        ((3, 9, 4, 8), 4, [24]),  # cannot be cut
    ],
    ids=str,
)
def test_the_room_for_segments_is_bounded_by_memory(
    shape: tuple[int, ...], kv_heads: int, rooms: list[int]
) -> None:
    assert [cut.room for cut in cuts_of(shape, kv_heads, shape[3])] == rooms


def test_packed_rows_of_latent_attention_are_not_for_cudnn() -> None:
    assert cuts_of((4, 2048, 16, 192), 16, 128) == []


# ---- Values and gradients, with a stand-in for cuDNN


def _read(x: jax.Array, place_S: jax.Array, tokens: int) -> jax.Array:
    """[S, tokens, heads, size]: as many tokens from each place in memory on; what lies there."""
    width = math.prod(x.shape[2:])
    at = place_S[:, None, None] + jnp.arange(tokens)[:, None] * width + jnp.arange(width)
    return x.ravel()[jnp.minimum(at, x.size - 1)].reshape(len(place_S), tokens, *x.shape[2:])


def _write(shape: tuple[int, ...], place_S: Any, length_S: Any, values: jax.Array) -> jax.Array:
    """The inverse for those tokens that a segment has; elsewhere nothing is written."""
    tokens, width = values.shape[1], math.prod(shape[2:])
    at = place_S[:, None, None] + jnp.arange(tokens)[:, None] * width + jnp.arange(width)
    at = jnp.where((jnp.arange(tokens) < length_S[:, None])[..., None], at, math.prod(shape))
    memory = jnp.full(math.prod(shape), jnp.nan).at[at.ravel()].set(values.ravel(), mode="drop")
    return memory.reshape(shape)


@functools.partial(jax.jit, static_argnames="scale")
def _dense(qkv: Any, place: Any, length_S: jax.Array, more: Any, scale: float) -> Any:
    """Causal attention inside each segment, or its gradients if there is something `more`."""
    (q, _, v), tokens, group = qkv, qkv[0].shape[1], qkv[0].shape[2] // qkv[1].shape[2]
    qs, ks, vs = (_read(x, place[name], tokens) for x, name in zip(qkv, "qkv", strict=True))
    ks, vs = (jnp.repeat(x, group, axis=2) for x in (ks, vs))
    live = jnp.arange(tokens) < length_S[:, None]
    sees = (jnp.tri(tokens, dtype=bool) & live[:, None] & live[:, :, None])[:, None]
    multiply = functools.partial(jnp.einsum, precision="highest")
    score = jnp.where(sees, multiply("stnh,sunh->sntu", qs, ks) * scale, -1e30)
    if not more:
        log = jax.nn.logsumexp(score, axis=-1)
        out = multiply("sntu,sunv->stnv", jnp.exp(score - log[..., None]), vs)
        shape = (*q.shape[:3], v.shape[3])
        return _write(shape, place["o"], length_S, out), jnp.where(live[:, None], log, jnp.nan)
    log, *pair = more
    out, dout = (_read(x, place["o"], tokens) for x in pair)
    weight = jnp.where(sees, jnp.exp(score - log[..., None]), 0)
    product = jnp.sum(out * dout, -1).swapaxes(1, 2)[..., None]
    dscore = jnp.where(sees, weight * (multiply("stnv,sunv->sntu", dout, vs) - product), 0) * scale
    dk, dv = multiply("sntu,stnh->sunh", dscore, qs), multiply("sntu,stnv->sunv", weight, dout)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (dk, dv))
    found = multiply("sntu,sunh->stnh", dscore, ks), dk, dv
    kinds = zip(qkv, "qkv", found, strict=True)
    return tuple(_write(x.shape, place[name], length_S, dx) for x, name, dx in kinds)


class _StandIn:
    """Takes the operands of one of jax's primitives for cuDNN, and reads them as cuDNN does."""

    def bind(self, *operands: Any, **words: Any) -> Any:
        """Compute at once."""
        q, k, v, bias, q_length, k_length, q_place, k_place, page_k, page_v, *more = operands
        assert bias.size == page_k.size == page_v.size == 0
        assert words["layout"] == PRIVATE.AttentionLayout.BTNH.value
        assert ("is_training" in words) == (not more)
        rows, tokens = q.shape[:2]
        if q_place.size:
            assert words["mask_type"] == PRIVATE.MaskType.PADDING_CAUSAL
            assert q_place.shape == k_place.shape == (rows, q_length.shape[1] + 1)
            assert q_length.shape == k_length.shape and len(q_length) == rows
            length_S = q_length.ravel()
            at_q, at_k = (x.ravel()[: length_S.size] for x in (q_place, k_place))
            # Of the four arrays cuDNN is told the places of two.
            place = {"q": at_q, "k": at_k, "v": at_k, "o": at_q}
        else:
            assert words["mask_type"] == PRIVATE.MaskType.CAUSAL
            length_S = jnp.full(rows, tokens)
            sizes = {"q": q.shape, "k": k.shape, "v": v.shape, "o": (*q.shape[:3], v.shape[3])}
            place = {n: jnp.arange(rows) * math.prod(x[1:]) for n, x in sizes.items()}
        return _dense((q, k, v), place, length_S, more, words["scale"])


class _Eager:
    """`jax.lax`, of which only those branches are run, and compiled, that are taken."""

    @staticmethod
    def cond(condition: Any, then: Any, otherwise: Any, *operands: Any) -> Any:
        return then(*operands) if condition else otherwise(*operands)

    @staticmethod
    def switch(number: Any, branches: Any, *operands: Any) -> Any:
        TAKEN.append(int(number))
        return branches[int(number)](*operands)


TAKEN: list[int] = []


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what needs a GPU; the kernels for Triton are interpreted."""
    TAKEN.clear()
    monkeypatch.setattr(attention_cudnn, "lax", _Eager)
    for way in ("fwd", "bwd"):
        monkeypatch.setattr(PRIVATE, f"_dot_product_attention_{way}_p", _StandIn())
    for name, scale in (("forward", 4), ("backward", 7)):
        interpreted = functools.partial(getattr(attention_cuda, name), interpret=True)
        compiled = jax.jit(interpreted, static_argnums=scale)
        monkeypatch.setattr(attention_cuda, name, compiled)


GROUPED, LATENT = Shape(2, 64, 4, 2, 8, 8), Shape(2, 64, 2, 2, 24, 16)
ROWS: dict[str, tuple[list[list[int]], list[int]]] = {
    "whole": ([[64], [64]], []),
    "whole, then padding": ([[64], [50]], []),
    "five, ragged": ([[3, 20, 1, 30, 10], [1, 1, 40, 2, 15]], [0]),
    "one-token segments": ([[1] * 7 + [57], [33, *[1] * 6, 25]], [0]),
    "short, into two pieces": ([[*[2] * 16, 32], [*[1] * 10, 30, 20]], [1]),
    "shorter, into four": ([[*[2] * 24, 16], [*[1] * 20, 11, 12, 13]], [2]),
    "64 segments": ([[1] * 64, [1] * 64], [3]),
    "64 segments beside a whole row": ([[1] * 64, [64]], [3]),
}
"""Name -> lengths of segments in two rows, and the branches that they take."""


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ROWS)
def test_packed_rows_are_attended_to_as_by_the_plain_path(name: str) -> None:
    lengths, branches = ROWS[name]
    _check(GROUPED, jnp.asarray(_rows(lengths, 64)))
    assert branches * 2 == TAKEN  # forward and backward


@pytest.mark.usefixtures("stand_in")
def test_64_segments_of_one_token_fit_if_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cudnn, "MOST_SEGMENTS", 64)
    _check(GROUPED, jnp.asarray(_rows([[1] * 64, [1] * 30 + [34]], 64)))
    assert TAKEN == [0, 0]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["whole, then padding", "five, ragged"])
def test_latent_attention_is_cudnns_in_whole_rows(name: str) -> None:
    lengths, branches = ROWS[name]
    _check(LATENT, jnp.asarray(_rows(lengths, 64)))
    assert len(TAKEN) == 2 * len(branches)


@pytest.mark.usefixtures("stand_in")
def test_segments_that_come_back_are_attended_to_as_well() -> None:
    _check(GROUPED, jnp.asarray([[1] * 20 + [2] * 20 + [1] * 24, [1] * 64]))
    assert TAKEN == [3, 3]


def _check(shape: Shape, segment_BT: jax.Array) -> None:
    """Compare all tokens and the gradients that they give: of padding nothing is asked."""
    real_BT = np.asarray(segment_BT) > 0
    q, k, v, dout = arrays_of(shape)
    arrays = q, k, v, jnp.where(real_BT[:, :, None, None], dout, 0)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_cudnn(q, k, v, segment_BT, shape.size**-0.5, "kept")

    pairs = zip(with_gradients(attend, *arrays), expected(arrays, segment_BT), strict=True)
    for (got, want), bound in zip(pairs, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        got, want = (np.asarray(x)[real_BT] for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)


# ---- Which devices; jax's private names


def _device(platform: str, capability: str | None = None) -> Any:
    kind = {} if capability is None else {"compute_capability": capability}
    return types.SimpleNamespace(platform=platform, **kind)


@pytest.mark.parametrize(
    "device, sizes, kernel",
    [
        (_device("gpu", "9.0"), (128, 128), attend_cudnn),
        (_device("gpu", "9.0"), (192, 128), attend_cudnn),
        (_device("gpu", "10.0"), (128, 128), attend_cudnn),
        (_device("gpu", "9.0"), (320, 320), attend_cuda),  # more than cuDNN takes
        (_device("gpu", "9.0"), (100, 100), attend_cuda),
        (_device("gpu", "8.9"), (128, 128), attend_cuda),
        (_device("gpu", "8.0"), (128, 128), attend_cuda),
        (_device("gpu"), (128, 128), attend_cuda),  # one that does not say
        (_device("tpu"), (128, 128), attend_tpu),
        (_device("cpu"), (128, 128), None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_kernel_is_chosen_by_the_meshs_device(
    device: Any, sizes: tuple[int, int], kernel: Any
) -> None:
    assert kernel_for(device, *sizes) is kernel


OPERANDS = (
    "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v".split()
)
WORDS = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length".split()
SINCE_0_12 = {"score_mod_args", "score_mod_name", "score_mod_jaxpr"}


def test_jaxs_private_entry_is_what_it_was() -> None:
    """A jax that changes it fails here and not on a GPU."""
    new = SINCE_0_12 if jax.__version_info__ >= (0, 12) else set()
    results = ["activation", "fwd_output", "grad_output"]
    for way, known in (
        ("fwd", [*OPERANDS, *WORDS, "is_training"]),
        ("bwd", [*OPERANDS, *results, *WORDS]),
    ):
        rule = getattr(PRIVATE, f"_dot_product_attention_{way}_cuda_lowering")
        names = list(inspect.signature(rule).parameters)
        assert [name for name in names if name not in new] == ["ctx", *known]
        assert new <= set(names)


@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_forward_and_gradients_are_cudnns_on_cuda(kind: str) -> None:
    """Lowered without a GPU: what is asked for does not depend on the device at hand."""
    shape = Shape(2, 64, 4, 2, 16, 16)
    arrays = arrays_of(shape, jnp.bfloat16)
    segments = None if kind == "whole" else find_segments(jnp.ones((2, 64), jnp.int32), 16)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, log = attention_cudnn._fused_forward((q, k, v), segments, 0.2)
        return attention_cudnn._fused_backward((q, k, v, out, log, dout), segments, 0.2)

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert text.count(f"@{name}(") == 1
    assert ("PADDING_CAUSAL" in text) == (kind == "packed")
    assert f"max_seg_per_batch\\22: {8 if kind == 'packed' else 1}" in text
