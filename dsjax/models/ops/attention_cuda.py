# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over packed rows on CUDA, as Pallas kernels for Triton.

In: queries, keys and values by head, and the segment of every token. Out: the attended values, and
through them gradients; scores exist for one block of queries and keys at a time (FlashAttention-2,
arXiv 2307.08691). Not done here: windows, prefixes, caches, choosing the kernel (`attention`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_FLOOR = -1e30
"""Score of a key that is not seen: finite, so that a block of such keys gives no NaN."""

_NOBODY = -1
"""Segment of places beyond the row's end."""

_LEAST = 16
"""Triton multiplies matrices of no fewer rows or columns."""


class Rows(NamedTuple):
    """Where tokens stand.

    Attributes:
        q_segment_BT: segment of each query's token.
        segment_BS: segment of each key's token.
        start_1: place in its row of the first query.
    """

    q_segment_BT: Int[Array, "B T"]
    segment_BS: Int[Array, "B S"]
    start_1: Int[Array, " 1"]


def whole_rows(segment_BT: Int[Array, "B T"]) -> Rows:
    """Return where tokens stand whose queries and keys are the same rows."""
    return Rows(segment_BT, segment_BT, jnp.zeros(1, jnp.int32))


class _Tile(NamedTuple):
    """How many queries and keys a program holds at a time, and how many warps it has."""

    queries: int
    keys: int
    warps: int


def attend_cuda(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    segment_BT: Int[Array, "B T"],
    scale: float,
    name: str | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """Grouped-query attention: each token sees its own segment, up to its own place in the row.

    Padding, segment 0, is a segment like any other. Scores and the softmax are float32; the
    weights are multiplied with the values in the values' dtype.

    Args:
        q_BTNH: queries.
        k_BTKH: keys, of the queries' head size.
        v_BTKV: values, of any head size.
        segment_BT: segment of each token, 0 or more.
        scale: of the scores before the softmax.
        name: under which a remat policy may keep what the gradients need of the kernel.
        interpret: run without a GPU, slowly.
    """
    return _attend(q_BTNH, k_BTKH, v_BTKV, whole_rows(segment_BT), scale, name, interpret)


def attend_part_cuda(
    q_MTNH: Float[Array, "M T N H"],
    k_MSKH: Float[Array, "M S K H"],
    v_MSKV: Float[Array, "M S K V"],
    q_segment_MT: Int[Array, "M T"],
    segment_MS: Int[Array, "M S"],
    part: Int[Array, ""],
    scale: float,
    name: str | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "M T N V"]:
    """`attend_cuda` for the queries of a part of each row.

    Args:
        q_MTNH: queries: of each row the tokens from place `part` * T on.
        k_MSKH: keys of whole rows.
        v_MSKV: values of whole rows.
        q_segment_MT: segment of each query's token.
        segment_MS: segment of each token.
        part: which part of its row the queries are, from 0.
        scale: of the scores.
        name: as in `attend_cuda`.
        interpret: as in `attend_cuda`.
    """
    start_1 = jnp.asarray(part * q_MTNH.shape[1], jnp.int32)[None]
    rows = Rows(q_segment_MT, segment_MS, start_1)
    return _attend(q_MTNH, k_MSKH, v_MSKV, rows, scale, name, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTNH, k_BSKH, v_BSKV, rows, scale, name, interpret):
    return _forward(q_BTNH, k_BSKH, v_BSKV, rows, scale, name, interpret)[0]


def _forward(q_BTNH, k_BSKH, v_BSKV, rows, scale, name, interpret):
    out_BTNV, log_BNT = forward(q_BTNH, k_BSKH, v_BSKV, rows, scale, interpret)
    if name is not None:
        out_BTNV, log_BNT = checkpoint_name(out_BTNV, name), checkpoint_name(log_BNT, name)
    return out_BTNV, (q_BTNH, k_BSKH, v_BSKV, rows, out_BTNV, log_BNT)


def forward(q_BTNH, k_BSKH, v_BSKV, rows: Rows, scale, interpret=False):
    """Return the attended values, and the log2 of each query's sum over the keys it sees."""
    batch, length, heads, _ = q_BTNH.shape
    tile = _tile(128, 64, 8, q_BTNH)
    first_BQ, _ = _reach(rows, tile)
    return pl.pallas_call(
        functools.partial(_attend_queries, scale=scale * math.log2(math.e), tile=tile),
        grid=(first_BQ.shape[1], heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, heads, v_BSKV.shape[3]), v_BSKV.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=2),
        name="attention",
        interpret=interpret,
    )(q_BTNH, k_BSKH, v_BSKV, *rows, first_BQ)


def _attend_queries(
    q_ref, k_ref, v_ref, q_segment_ref, segment_ref, start_ref, first_ref, out_ref, log_ref,
    *, scale, tile: _Tile,
):  # fmt: skip
    """One block of queries of one head; `log` is the binary logarithm of the softmax's sum."""
    # Late queries see the most keys: they begin first, so that none is left alone at the end.
    block = first_ref.shape[1] - 1 - pl.program_id(0)
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = head // (q_ref.shape[2] // k_ref.shape[2])
    place_M = block * tile.queries + jnp.arange(tile.queries)
    q, segment_M = _read(q_ref, row, place_M, head), _segments(q_segment_ref, row, place_M)
    row_place_M = start_ref[0] + place_M

    def step(number, carry):
        out, top_M, sum_M = carry
        place_S = number * tile.keys + jnp.arange(tile.keys)
        segment_S = _segments(segment_ref, row, place_S)
        sees_MS = _sees(row_place_M[:, None], segment_M[:, None], place_S[None], segment_S[None])
        score_MS = _multiply(q, _read(k_ref, row, place_S, kv_head)) * scale
        score_MS = jnp.where(sees_MS, score_MS, _FLOOR)
        new_top_M = jnp.maximum(top_M, score_MS.max(1))
        weight_MS, kept_M = jnp.exp2(score_MS - new_top_M[:, None]), jnp.exp2(top_M - new_top_M)
        more = _times(weight_MS, _read(v_ref, row, place_S, kv_head))
        out = tuple(a * kept_M[:, None] + b for a, b in zip(out, more, strict=True))
        return out, new_top_M, sum_M * kept_M + weight_MS.sum(1)

    none_M = jnp.zeros(tile.queries, jnp.float32)
    start = _zeros(tile.queries, v_ref), none_M + _FLOOR, none_M
    keys = lax.min(start_ref[0] + (block + 1) * tile.queries, k_ref.shape[1])
    end = lax.div(keys + tile.keys - 1, tile.keys)
    out, top_M, sum_M = lax.fori_loop(first_ref[row, block], end, step, start)
    # Each token sees at least itself, so the sum is not zero.
    _write(out_ref, row, place_M, head, tuple(a / sum_M[:, None] for a in out))
    plgpu.store(
        log_ref.at[row, head, place_M],
        top_M + jnp.log2(sum_M),
        mask=place_M < q_ref.shape[1],
    )


def _backward(scale, name, interpret, residuals, dout_BTNV):
    del name
    q_BTNH, k_BSKH, v_BSKV, rows, out_BTNV, log_BNT = residuals
    gradients = backward(
        q_BTNH, k_BSKH, v_BSKV, rows, out_BTNV, log_BNT, dout_BTNV, scale, interpret
    )
    return *gradients, None


def backward(
    q_BTNH, k_BSKH, v_BSKV, rows: Rows, out_BTNV, log_BNT, dout_BTNV, scale, interpret=False
):
    """Return the gradients of queries, keys, values, from the result and `forward`'s logarithm."""
    product_BTN = jnp.sum(out_BTNV.astype(jnp.float32) * dout_BTNV.astype(jnp.float32), -1)
    arrays = (q_BTNH, k_BSKH, v_BSKV, dout_BTNV, *rows, log_BNT, product_BTN)
    dq_BTNH = _query_gradient(arrays, rows, scale, interpret)
    return dq_BTNH, *_key_gradients(arrays, rows, scale, interpret)


_attend.defvjp(_forward, _backward)


def _query_gradient(
    arrays: tuple[jax.Array, ...], rows: Rows, scale: float, interpret: bool
) -> jax.Array:
    q_BTNH = arrays[0]
    tile = _tile(64, 64, 8, q_BTNH)
    first_BQ, _ = _reach(rows, tile)
    return pl.pallas_call(
        functools.partial(_differentiate_queries, scale=scale, tile=tile),
        grid=(first_BQ.shape[1], q_BTNH.shape[2], q_BTNH.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=2),
        name="attention_query_gradient",
        interpret=interpret,
    )(*arrays, first_BQ)


def _differentiate_queries(
    q_ref, k_ref, v_ref, dout_ref, q_segment_ref, segment_ref, start_ref, log_ref, product_ref,
    first_ref, dq_ref, *, scale, tile: _Tile,
):  # fmt: skip
    """One block of queries of one head."""
    block = first_ref.shape[1] - 1 - pl.program_id(0)
    head, row = pl.program_id(1), pl.program_id(2)
    kv_head = head // (q_ref.shape[2] // k_ref.shape[2])
    place_M = block * tile.queries + jnp.arange(tile.queries)
    q, dout = (_read(ref, row, place_M, head) for ref in (q_ref, dout_ref))
    segment_M, within_M = _segments(q_segment_ref, row, place_M), place_M < q_ref.shape[1]
    row_place_M = start_ref[0] + place_M
    log_M = plgpu.load(log_ref.at[row, head, place_M], mask=within_M, other=0.0)
    product_M = plgpu.load(product_ref.at[row, place_M, head], mask=within_M, other=0.0)

    def step(number, dq):
        place_S = number * tile.keys + jnp.arange(tile.keys)
        segment_S = _segments(segment_ref, row, place_S)
        sees_MS = _sees(row_place_M[:, None], segment_M[:, None], place_S[None], segment_S[None])
        k = _read(k_ref, row, place_S, kv_head)
        score_MS = _multiply(q, k) * (scale * math.log2(math.e))
        weight_MS = jnp.exp2(jnp.where(sees_MS, score_MS, _FLOOR) - log_M[:, None])
        dweight_MS = _multiply(dout, _read(v_ref, row, place_S, kv_head))
        more = _times(weight_MS * (dweight_MS - product_M[:, None]), k)
        return tuple(a + b for a, b in zip(dq, more, strict=True))

    keys = lax.min(start_ref[0] + (block + 1) * tile.queries, k_ref.shape[1])
    end = lax.div(keys + tile.keys - 1, tile.keys)
    dq = lax.fori_loop(first_ref[row, block], end, step, _zeros(tile.queries, q_ref))
    _write(dq_ref, row, place_M, head, tuple(a * scale for a in dq))


def _key_gradients(
    arrays: tuple[jax.Array, ...], rows: Rows, scale: float, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    k_BSKH, v_BSKV = arrays[1], arrays[2]
    tile = _tile(32, 64, 8, k_BSKH)
    _, end_BR = _reach(rows, tile)
    dk_BSKH, dv_BSKV = pl.pallas_call(
        functools.partial(_differentiate_keys, scale=scale, tile=tile),
        grid=(end_BR.shape[1], k_BSKH.shape[2], k_BSKH.shape[0]),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKV)),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=2),
        name="attention_key_gradients",
        interpret=interpret,
    )(*arrays, end_BR)
    return dk_BSKH, dv_BSKV


def _differentiate_keys(
    q_ref, k_ref, v_ref, dout_ref, q_segment_ref, segment_ref, start_ref, log_ref, product_ref,
    end_ref, dk_ref, dv_ref, *, scale, tile: _Tile,
):  # fmt: skip
    """One block of keys and values of one head; the queries of all heads that share it add up."""
    block, kv_head, row = (pl.program_id(axis) for axis in range(3))
    place_S = block * tile.keys + jnp.arange(tile.keys)
    k, v = (_read(ref, row, place_S, kv_head) for ref in (k_ref, v_ref))
    segment_S = _segments(segment_ref, row, place_S)
    group = q_ref.shape[2] // k_ref.shape[2]
    begin = lax.div(lax.max(block * tile.keys - start_ref[0], 0), tile.queries)
    count = lax.max(end_ref[row, block] - begin, 0)

    def step(number, carry):
        dk, dv = carry
        head = kv_head * group + lax.div(number, count)
        place_M = (begin + lax.rem(number, count)) * tile.queries + jnp.arange(tile.queries)
        within_M = place_M < q_ref.shape[1]
        q, dout = (_read(ref, row, place_M, head) for ref in (q_ref, dout_ref))
        log_M = plgpu.load(log_ref.at[row, head, place_M], mask=within_M, other=0.0)
        product_M = plgpu.load(product_ref.at[row, place_M, head], mask=within_M, other=0.0)
        segment_M, row_place_M = _segments(q_segment_ref, row, place_M), start_ref[0] + place_M
        sees_SM = _sees(row_place_M[None], segment_M[None], place_S[:, None], segment_S[:, None])
        score_SM = _multiply(k, q) * (scale * math.log2(math.e))
        weight_SM = jnp.exp2(jnp.where(sees_SM, score_SM, _FLOOR) - log_M[None])
        dweight_SM = _multiply(v, dout)
        more_v = _times(weight_SM, dout)
        more_k = _times(weight_SM * (dweight_SM - product_M[None]), q)
        dv = tuple(a + b for a, b in zip(dv, more_v, strict=True))
        return tuple(a + b for a, b in zip(dk, more_k, strict=True)), dv

    start = _zeros(tile.keys, k_ref), _zeros(tile.keys, v_ref)
    dk, dv = lax.fori_loop(0, count * group, step, start)
    _write(dk_ref, row, place_S, kv_head, tuple(a * scale for a in dk))
    _write(dv_ref, row, place_S, kv_head, dv)


def _reach(rows: Rows, tile: _Tile) -> tuple[jax.Array, jax.Array]:
    """Which blocks can meet: those that share a segment's number, or lie between such.

    Returns:
        The first block of keys for each block of queries, and for each block of keys the block of
        queries after the last; 0 where no query meets it.
    """

    def ends(segment_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the lowest and highest segment of each block, and its last place."""
        padded_BT = jnp.pad(segment_BT, ((0, 0), (0, -segment_BT.shape[1] % size)), mode="edge")
        blocks_BXS = padded_BT.reshape(len(padded_BT), -1, size)
        last_X = (jnp.arange(blocks_BXS.shape[1]) + 1) * size - 1
        return blocks_BXS.min(2), blocks_BXS.max(2), last_X

    q_low_BQ, q_high_BQ, q_last_Q = ends(rows.q_segment_BT, tile.queries)
    k_low_BR, k_high_BR, k_last_R = ends(rows.segment_BS, tile.keys)
    causal_QR = k_last_R - tile.keys < rows.start_1 + q_last_Q[:, None]
    meet_BQR = (q_low_BQ[:, :, None] <= k_high_BR[:, None]) & causal_QR
    meet_BQR &= k_low_BR[:, None] <= q_high_BQ[:, :, None]
    end_BR = meet_BQR.shape[1] - jnp.argmax(meet_BQR[:, ::-1], 1)
    end_BR = jnp.where(meet_BQR.any(1), end_BR, 0)
    return jnp.argmax(meet_BQR, 2).astype(jnp.int32), end_BR.astype(jnp.int32)


def _sees(q_place: Any, q_segment: Any, k_place: Any, k_segment: Any) -> jax.Array:
    return (q_segment == k_segment) & (k_place <= q_place)


def _segments(ref: Any, row: Any, place_X: jax.Array) -> jax.Array:
    """Segments at places of a row; places beyond its end see one another only."""
    return plgpu.load(ref.at[row, place_X], mask=place_X < ref.shape[1], other=_NOBODY)


def _pieces(size: int) -> list[tuple[int, int]]:
    """Cut a head into (begin, width): blocks have powers of two of columns, and 192 is not one."""
    pieces, begin = [], 0
    while begin < size:
        width = max(_LEAST, 1 << ((size - begin).bit_length() - 1))
        pieces.append((begin, width))
        begin += width
    return pieces


def _columns(ref: Any, row: Any, place_X: jax.Array, head: Any) -> list[tuple[Any, jax.Array]]:
    """Return for each piece of a head its part of an array [B, T, heads, size], and what exists."""
    parts, (length, size) = [], (ref.shape[1], ref.shape[3])
    for begin, width in _pieces(size):
        column = begin + jnp.arange(width)
        exists = (place_X < length)[:, None] & (column < size)[None]
        parts.append((ref.at[row, place_X[:, None], head, column[None]], exists))
    return parts


def _read(ref: Any, row: Any, place_X: jax.Array, head: Any) -> tuple[jax.Array, ...]:
    """Rows of one head, in pieces; zeros where there is nothing."""
    parts = _columns(ref, row, place_X, head)
    return tuple(plgpu.load(part, mask=exists, other=0.0) for part, exists in parts)


def _write(ref: Any, row: Any, place_X: jax.Array, head: Any, values: tuple) -> None:
    parts = _columns(ref, row, place_X, head)
    for (part, exists), value in zip(parts, values, strict=True):
        plgpu.store(part, value.astype(ref.dtype), mask=exists)


def _zeros(rows: int, ref: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in _pieces(ref.shape[3]))


def _multiply(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """Multiply a by b^T, summed over the pieces."""
    products = [plgpu.dot(x, y, trans_b=True, allow_tf32=False) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, products)


def _times(weight: jax.Array, b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """weight b for each piece; the weights are rounded to b's dtype."""
    return tuple(plgpu.dot(weight.astype(x.dtype), x, allow_tf32=False) for x in b)


def _tile(queries: int, keys: int, warps: int, like: jax.Array) -> _Tile:
    """Blocks for float16 and bfloat16; wider numbers and short rows have smaller ones."""
    share = max(1, like.dtype.itemsize // 2)
    most = max(_LEAST, pl.next_power_of_2(like.shape[1]))
    return _Tile(min(queries // share, most), min(keys // share, most), warps)
