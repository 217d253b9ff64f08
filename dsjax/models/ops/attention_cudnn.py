# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over packed rows on Hopper and later GPUs: cuDNN's fused kernels.

In: queries, keys and values by head, and the segment of every token. Out: the attended values, and
through them gradients. Segments reach cuDNN as places in the arrays (ragged sequences), not as a
mask, so that it skips what no token sees. Rows that it cannot take that way go through the kernels
for Triton, which is decided on the device. Not done here: windows, prefixes, caches, choosing
between platforms (`attention`).
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.distributed.jax_internals import cudnn_attention
from dsjax.models.ops import attention_cuda

MOST_SEGMENTS = 8
"""Segments that cuDNN is asked to have room for in each piece of a row: it holds the queries'
gradients in float32 that many times, used or not."""

MOST_BYTES = 2**30
"""Of what it holds; where that would be more, there is room for fewer segments."""

PIECES = (1, 2, 4)
"""Into how many pieces rows may be cut. The more there are, the more segments have room in the same
memory, each of a piece's length at most. A segment may begin anywhere."""


class Segments(NamedTuple):
    """The segments of all rows, one after the other.

    Attributes:
        number_BT: which one a token is in.
        start_S: place of each one's first token among all rows' tokens; of those that there are
            not, the place after the last.
        length_S: tokens of each; 0 of those that there are not.
        count: how many there are, which may be more than there is room for.
    """

    number_BT: Int[Array, "B T"]
    start_S: Int[Array, " S"]
    length_S: Int[Array, " S"]
    count: Int[Array, ""]


def find_segments(segment_BT: Int[Array, "B T"], room: int) -> Segments:
    """Find the runs of equal numbers in each row.

    Args:
        segment_BT: segment of each token, 0 or more.
        room: for how many runs of all rows together.
    """
    begins_BT = jnp.diff(segment_BT, axis=1, prepend=-1) != 0
    number_BT = jnp.cumsum(begins_BT.ravel(), dtype=jnp.int32).reshape(begins_BT.shape) - 1
    # Tokens of earlier runs: a sum, where a search would be a loop of small kernels.
    start_S = jnp.sum(number_BT.ravel() < jnp.arange(room + 1)[:, None], axis=1, dtype=jnp.int32)
    return Segments(number_BT, start_S[:-1], jnp.diff(start_S), number_BT[-1, -1] + 1)


def takes(device: Any, size: int, value_size: int) -> bool:
    """Whether cuDNN has kernels for a device and for heads of these sizes.

    Args:
        device: of the mesh; it may be one to compile for only.
        size: of a query's and a key's head.
        value_size: of a value's head.
    """
    major, _, _ = str(getattr(device, "compute_capability", "")).partition(".")
    hopper = device.platform == "gpu" and major.isdigit() and int(major) >= 9
    return hopper and all(n % 8 == 0 for n in (size, value_size)) and value_size <= size <= 256


def attend_cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    segment_BT: Int[Array, "B T"],
    scale: float,
    name: str | None = None,
) -> Float[Array, "B T N V"]:
    """Grouped-query attention: each token sees its own segment, up to its own place in the row.

    The softmax is float32; the weights are multiplied with the values in the values' dtype. What a
    row's padding (segment 0, behind its tokens) sees is not said: no token sees the padding.

    Args:
        q_BTNH: queries, in 16 bits.
        k_BTKH: keys, of the queries' head size.
        v_BTKV: values, of any head size that `takes` allows.
        segment_BT: segment of each token, 0 or more.
        scale: of the scores before the softmax.
        name: under which a remat policy may keep what the gradients need of the kernel.
    """
    return _attend(q_BTNH, k_BTKH, v_BTKV, segment_BT, scale, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BTNH, k_BTKH, v_BTKV, segment_BT, scale, name):
    return _forward(q_BTNH, k_BTKH, v_BTKV, segment_BT, scale, name)[0]


def _forward(q_BTNH, k_BTKH, v_BTKV, segment_BT, scale, name):
    out_BTNV, log_BNT = _switch(
        (_whole, _packed, _by_triton), (q_BTNH, k_BTKH, v_BTKV), segment_BT, scale
    )
    if name is not None:
        out_BTNV, log_BNT = checkpoint_name(out_BTNV, name), checkpoint_name(log_BNT, name)
    return out_BTNV, (q_BTNH, k_BTKH, v_BTKV, segment_BT, out_BTNV, log_BNT)


def _backward(scale, name, residuals, dout_BTNV):
    del name
    q_BTNH, k_BTKH, v_BTKV, segment_BT, out_BTNV, log_BNT = residuals
    arrays = (q_BTNH, k_BTKH, v_BTKV, out_BTNV, log_BNT, dout_BTNV)
    branches = (_whole_gradients, _packed_gradients, _gradients_by_triton)
    return *_switch(branches, arrays, segment_BT, scale), None


_attend.defvjp(_forward, _backward)


class Cut(NamedTuple):
    """Rows cut into `pieces`, with `room` for segments of all rows together."""

    pieces: int
    room: int


def cuts_of(q_shape: tuple[int, ...], kv_heads: int, value_size: int) -> list[Cut]:
    """How cuDNN may be given packed rows; not at all where it would cost more than it gains.

    Args:
        q_shape: of the queries [B, T, N, H].
        kv_heads: heads of keys and values.
        value_size: of a value's head. Packed values lie at the keys' places, so narrower ones would
            have to be padded, and then the kernels for Triton are as fast.
    """
    rows, length, heads, size = q_shape
    # Where heads share keys, their gradients are kept for every head, in 16 bits.
    sums = 4 * math.prod(q_shape) * (1 if heads == kv_heads else 2)
    each = min(MOST_SEGMENTS, MOST_BYTES // sums)
    if each < 2 or value_size != size or math.prod(q_shape) > jnp.iinfo(jnp.int32).max:
        return []
    return [Cut(n, rows * n * each) for n in PIECES if length % n == 0]


def _switch(branches, arrays, segment_BT, scale):
    """Have the rows' own branch compute: whole rows, packed ones in the first cut that fits."""
    whole, packed, other = (functools.partial(branch, scale=scale) for branch in branches)
    q_BTNH, k_BTKH, v_BTKV = arrays[:3]
    cuts = cuts_of(q_BTNH.shape, k_BTKH.shape[2], v_BTKV.shape[3])

    def unless_whole(arrays, segment_BT):
        segments = find_segments(segment_BT, max((cut.room for cut in cuts), default=1))
        by_cut = [functools.partial(packed, cut, segments) for cut in cuts]
        return lax.switch(route(segment_BT, segments, cuts), [*by_cut, other], arrays, segment_BT)

    return lax.cond(_are_whole(segment_BT), whole, unless_whole, arrays, segment_BT)


def _are_whole(segment_BT: jax.Array) -> jax.Array:
    """Whether each row has one segment, and perhaps padding behind it."""
    return jnp.all((segment_BT[:, :-1] == segment_BT[:, 1:]) | (segment_BT[:, 1:] == 0))


def route(segment_BT: Int[Array, "B T"], segments: Segments, cuts: list[Cut]) -> Int[Array, ""]:
    """Return the number of the first cut that packed rows fit into; `len(cuts)` where none is.

    Args:
        segment_BT: segment of each token.
        segments: what was found of them.
        cuts: what rows may be cut into.
    """
    last_BT = jnp.where(segment_BT == 0, jnp.iinfo(segment_BT.dtype).max, segment_BT)
    once = jnp.all(last_BT[:, :-1] <= last_BT[:, 1:])  # else a segment may be in two runs
    longest, number = jnp.max(segments.length_S), jnp.asarray(len(cuts))
    for index, cut in reversed(list(enumerate(cuts))):
        fits = (segments.count <= cut.room) & (longest <= segment_BT.shape[1] // cut.pieces)
        number = jnp.where(once & fits, index, number)
    return number


def _whole(qkv, segment_BT, *, scale):
    del segment_BT
    return _fused_forward(qkv, None, scale)


def _whole_gradients(arrays, segment_BT, *, scale):
    del segment_BT
    return _fused_backward(arrays, None, scale)


def _packed(cut, segments, qkv, segment_BT, *, scale):
    within = _room(segments, cut)
    out, log_SNL = _fused_forward(tuple(_pieces(x, cut) for x in qkv), within, scale)
    return out.reshape(qkv[0].shape), _by_row(log_SNL, within)


def _packed_gradients(cut, segments, arrays, segment_BT, *, scale):
    q_BTNH, k_BTKH, v_BTKV, out_BTNV, log_BNT, dout_BTNV = arrays
    within, longest = _room(segments, cut), segment_BT.shape[1] // cut.pieces
    q, k, v, out, dout = (_pieces(x, cut) for x in (q_BTNH, k_BTKH, v_BTKV, out_BTNV, dout_BTNV))
    log_SNL = _by_segment(log_BNT, within.start_S, longest)
    gradients = _fused_backward((q, k, v, out, log_SNL, dout), within, scale)
    return tuple(dx.reshape(x.shape) for dx, x in zip(gradients, arrays[:3], strict=True))


def _pieces(x_BTNH: jax.Array, cut: Cut) -> jax.Array:
    rows, length, *rest = x_BTNH.shape
    return x_BTNH.reshape(rows * cut.pieces, length // cut.pieces, *rest)


def _room(segments: Segments, cut: Cut) -> Segments:
    return segments._replace(
        start_S=segments.start_S[: cut.room], length_S=segments.length_S[: cut.room]
    )


def _by_row(log_SNL: jax.Array, segments: Segments) -> jax.Array:
    """Lay numbers for each query, which begin anew with each segment, out by rows."""
    number_BT = segments.number_BT
    place_BT = jnp.arange(number_BT.size).reshape(number_BT.shape) - segments.start_S[number_BT]
    head_N = jnp.arange(log_SNL.shape[1])
    return log_SNL[number_BT[:, None], head_N[:, None], place_BT[:, None]]


def _by_segment(log_BNT: jax.Array, start_S: jax.Array, most: int) -> jax.Array:
    """Invert `_by_row` for segments of `most` tokens; behind their end stands anything."""
    rows, heads, length = log_BNT.shape
    token_SL = jnp.minimum(start_S[:, None] + jnp.arange(most), rows * length - 1)
    row_SL, place_SL = jnp.divmod(token_SL, length)
    return log_BNT[row_SL[:, None], jnp.arange(heads)[:, None], place_SL[:, None]]


def _by_triton(qkv, segment_BT, *, scale):
    q_BTNH, k_BTKH, v_BTKV = qkv
    rows = attention_cuda.whole_rows(segment_BT)
    out_BTNV, log2_BNT = attention_cuda.forward(q_BTNH, k_BTKH, v_BTKV, rows, scale)
    return out_BTNV, log2_BNT * math.log(2)


def _gradients_by_triton(arrays, segment_BT, *, scale):
    q_BTNH, k_BTKH, v_BTKV, out_BTNV, log_BNT, dout_BTNV = arrays
    rows = attention_cuda.whole_rows(segment_BT)
    return attention_cuda.backward(
        q_BTNH, k_BTKH, v_BTKV, rows, out_BTNV, log_BNT / math.log(2), dout_BTNV, scale
    )


def _fused_forward(qkv, segments, scale):
    """Return the attended values, and the logarithm of each query's sum over the keys it sees."""
    return _fused("fwd", qkv, (), segments, scale)


def _fused_backward(arrays, segments, scale):
    """Return the gradients of queries, keys and values."""
    *qkv, out, log, dout = arrays
    return _fused("bwd", qkv, (log, out, dout), segments, scale)


def _fused(way, qkv, more, segments, scale):
    """Bind jax's primitive of cuDNN's attention, `fwd` or `bwd` (`cudnn_attention` says why)."""
    cudnn = cudnn_attention()
    q_BTNH, k_BTKH, _ = qkv
    none = jnp.zeros(0, q_BTNH.dtype)
    lengths = offsets = (none, none)
    if segments is not None:
        rows = len(q_BTNH)
        lengths = (segments.length_S.reshape(rows, -1),) * 2
        # One place more than segments of each row, of which the first is the last segment's end.
        end_S = jnp.full(rows, q_BTNH.shape[0] * q_BTNH.shape[1], jnp.int32)
        place_S = jnp.concatenate([segments.start_S, end_S]).reshape(rows, -1)
        offsets = tuple(place_S * math.prod(x.shape[2:]) for x in (q_BTNH, k_BTKH))
    forward = {} if more else {"is_training": True}
    # From jax 0.12 on the primitives take a function of the scores, which we have not.
    rule = inspect.signature(cudnn._dot_product_attention_fwd_cuda_lowering).parameters
    unused = {name: None for name in ("score_mod_name", "score_mod_jaxpr") if name in rule}
    outputs = getattr(cudnn, f"_dot_product_attention_{way}_p").bind(
        *qkv, none, *lengths, *offsets, none, none, *more,
        scale=scale, seed=0, dropout_rate=0.0, variadic_args=(False, False),
        mask_type=cudnn.MaskType.CAUSAL if segments is None else cudnn.MaskType.PADDING_CAUSAL,
        layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=None, **forward, **unused,
    )  # fmt: skip
    return tuple(outputs)
