# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over packed rows: who sees whom, and the weighted sum.

In: queries, keys and values by head, with position and segment of every token. Out: the attended
values. Scores and mask are never stored for a whole long row: a platform's kernel makes them piece
by piece, and where there is none a block of queries is taken at a time. Not done here: projections,
rope, caches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsjax.distributed.sequence import (
    copy_rows,
    exchange_halves,
    join_rows,
    sequence_shards,
    split_rows,
)
from dsjax.distributed.sharding import Layout
from dsjax.models.ops import attention_cudnn
from dsjax.models.ops.attention_cuda import attend_cuda, attend_part_cuda
from dsjax.models.ops.attention_cudnn import attend_cudnn
from dsjax.models.ops.attention_tpu import LANES, attend_part_tpu, attend_tpu
from dsjax.models.ops.blocks import in_blocks, out_of_blocks, precision

PREFIX_SEGMENT = -1
"""Segment of trained prefix keys: every token of every segment sees them."""

QUERY_BLOCK = 1024
"""Rows longer than this are attended to in blocks of this many queries."""


KERNEL_NAME = "attention_kernel"
"""What a remat policy calls the kernels' outputs and statistics."""

Kernel = Callable[..., Float[Array, "B T N V"]]


class KernelFor(NamedTuple):
    """A kernel for causal attention of packed rows in 16 bits.

    Attributes:
        fits: (a device of the mesh, head size, value head size) -> whether it is for them.
        attend: what `attend_cuda` does.
        attend_part: what `attend_part_cuda` does: queries of a part of each row; None: it cannot.
        part_multiple: what divides the number of these queries.
    """

    fits: Callable[[Any, int, int], bool]
    attend: Kernel
    attend_part: Kernel | None = None
    part_multiple: int = 1


KERNELS: tuple[KernelFor, ...] = (
    KernelFor(lambda device, *_: device.platform == "tpu", attend_tpu, attend_part_tpu, LANES),
    KernelFor(attention_cudnn.takes, attend_cudnn),
    KernelFor(lambda device, *_: device.platform == "gpu", attend_cuda, attend_part_cuda),
)
"""The first that fits is taken; where none does, attention is plain."""


def kernel_for(device: Any, size: int, value_size: int, part: int | None = None) -> Kernel | None:
    """Choose a kernel.

    Args:
        device: of the mesh, which may be one to compile for only.
        size: of a head.
        value_size: of a value's head.
        part: tokens of the parts of rows that queries are; None where they are whole rows.
    """
    fitting = (one for one in KERNELS if one.fits(device, size, value_size))
    if part is None:
        return next((one.attend for one in fitting), None)
    able = (one.attend_part for one in fitting if part % one.part_multiple == 0)
    return next((attend_part for attend_part in able if attend_part is not None), None)


class Tokens(NamedTuple):
    """Where tokens stand: `position` counts inside each segment, `segment` is 0 for padding."""

    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]


class SparseMask(NamedTuple):
    """A sparse attention's choice of keys.

    Attributes:
        select: (`query_inputs` of a block of queries, the mask of keys it may see) -> a mask with
            fewer keys.
        query_inputs: arrays [B, T, ...] that `select` is given block by block.
    """

    select: Callable[[Any, Bool[Array, "B T S"]], Bool[Array, "B T S"]]
    query_inputs: Any


def attention_mask(
    query: Tokens, key: Tokens, window: Int[Array, ""] | int | None
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: its own segment (or a prefix), no later, inside the window.

    Args:
        query: tokens that ask.
        key: tokens that may be seen.
        window: number of positions a token looks back over, itself included; None is no limit.
    """
    q_pos, k_pos = query.position[:, :, None], key.position[:, None, :]
    q_seg, k_seg = query.segment[:, :, None], key.segment[:, None, :]
    mask_BTS = ((q_seg == k_seg) | (k_seg == PREFIX_SEGMENT)) & (k_pos <= q_pos)
    if window is not None:
        mask_BTS &= q_pos - k_pos < window
    return mask_BTS


def dot_product_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_MSKH: Float[Array, "M S K H"],
    v_MSKV: Float[Array, "M S K V"],
    query: Tokens,
    key: Tokens,
    window: Int[Array, ""] | int | None,
    scale: float,
    selection: SparseMask | None = None,
    layout: Layout | None = None,
    own_rows: bool = False,
) -> Float[Array, "B T N V"]:
    """Grouped-query attention; the softmax is float32 and cast back, as in the reference.

    Whole rows that only see themselves, in 16 bits, go through a kernel for the mesh's devices.

    Args:
        q_BTNH: queries.
        k_MSKH: keys, of the queries' head size, one copy of each row for every part that the mesh
            divides it into (`sequence.copy_rows`); so where it does not, of B rows.
        v_MSKV: values, of any head size, as the keys.
        query: tokens that ask.
        key: tokens [B, S] that may be seen.
        window: see `attention_mask`.
        scale: of the scores before the softmax.
        selection: leaves fewer keys to each query than it may see.
        layout: of the mesh; None on one device.
        own_rows: whether keys are the queries' own rows, not a cache's, nor a prefix before them.
    """
    shards, sizes = sequence_shards(layout), (q_BTNH.shape[3], v_MSKV.shape[3])
    narrow = q_BTNH.itemsize == 2 and window is None and selection is None
    if layout is not None and own_rows and narrow:
        device = next(iter(layout.rows.device_set))
        part = None if shards == 1 else q_BTNH.shape[1] // (2 * shards)
        kernel = kernel_for(device, *sizes, part)
        if kernel is not None:
            by_kernel = _by_kernel if part is None else _parts_by_kernel
            return by_kernel(kernel, q_BTNH, k_MSKH, v_MSKV, query.segment, scale, layout)

    query_inputs = None if selection is None else selection.query_inputs
    queries = split_rows((q_BTNH, query, query_inputs), layout)
    key = copy_rows(key, layout)
    # Wide outside of the blocks, so that these add up the gradients of keys and values in float32.
    wide_k, wide_v = (x.astype(jnp.float32) for x in (k_MSKH, v_MSKV))

    def block(piece):
        q, tokens, query_inputs = piece
        k_MSKH, v_MSKV = (x.astype(q.dtype) for x in (wide_k, wide_v))
        mask = attention_mask(tokens, key, window)
        if selection is not None:
            mask = selection.select(query_inputs, mask)
        return _attend_block(q, k_MSKH, v_MSKV, mask, scale)

    length = queries[0].shape[1]
    if length <= QUERY_BLOCK:
        return join_rows(block(queries), layout)
    pieces = jax.tree.map(lambda x: in_blocks(x, QUERY_BLOCK), queries)
    out_MTNV = out_of_blocks(jax.lax.map(jax.checkpoint(block), pieces))[:, :length]
    return join_rows(out_MTNV, layout)


def _by_kernel(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    segment_BT: jax.Array,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """Every device runs the kernel on its rows and its heads."""

    def attend(q_BTNH, k_BTKH, v_BTKV, segment_BT):
        return kernel(q_BTNH, k_BTKH, v_BTKV, segment_BT, scale, KERNEL_NAME)

    return _by_device(attend, q_BTNH, k_BTKH, v_BTKV, layout, segment_BT)


def _parts_by_kernel(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_MSKH: jax.Array,
    v_MSKV: jax.Array,
    segment_BT: jax.Array,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """Every device runs the kernel on two parts of its rows' queries, one early and one late."""
    last = 2 * sequence_shards(layout) - 1
    mixed = exchange_halves((q_BTNH, segment_BT), layout)
    q_MTNH, segment_MT = split_rows(mixed, layout)

    def attend(q_MTNH, k_MSKH, v_MSKV, segment_MT, segment_MS):
        shard = jax.lax.axis_index("sequence")
        halves = zip(*(jnp.split(x, 2, axis=1) for x in (q_MTNH, segment_MT)), strict=True)
        outs = [
            kernel(q, k_MSKH, v_MSKV, segment, segment_MS, part, scale, KERNEL_NAME)
            for part, (q, segment) in zip((2 * shard, last - 2 * shard), halves, strict=True)
        ]
        return jnp.concatenate(outs, axis=1)

    segments = segment_MT, copy_rows(segment_BT, layout)
    out_MTNV = _by_device(attend, q_MTNH, k_MSKH, v_MSKV, layout, *segments)
    return exchange_halves(join_rows(out_MTNV, layout), layout)


def _by_device(
    attend: Callable[..., jax.Array],
    q_MTNH: jax.Array,
    k_MSKH: jax.Array,
    v_MSKV: jax.Array,
    layout: Layout,
    *segments: jax.Array,
) -> jax.Array:
    """Run on every device with its rows, or parts of rows, and its heads."""
    heads, kv_heads, shards = q_MTNH.shape[2], k_MSKH.shape[2], layout.shards("heads")
    axis = "heads" if heads % shards == 0 else None
    if axis is not None and kv_heads % shards:
        k_MSKH, v_MSKV = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_MSKH, v_MSKV))
    by_head = layout.spec(None, axis, None, leading_parts=True)
    by_row = layout.spec(leading_parts=True)
    return jax.shard_map(
        attend,
        mesh=layout.rows.mesh,
        in_specs=(by_head, by_head, by_head, *[by_row] * len(segments)),
        out_specs=by_head,
        check_vma=False,
    )(q_MTNH, k_MSKH, v_MSKV, *segments)


def _attend_block(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T N V"]:
    batch, queries, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, queries, kv_heads, heads // kv_heads, size)
    exact = precision(q_BTNH.dtype)
    scores_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts",
        q_BTKGH,
        k_BSKH,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    # A finite floor: a query that sees nothing (padding in a cache) must not turn into NaN.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * scale, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKV.dtype)
    out_BTKGV = jnp.einsum("bkgts,bskv->btkgv", weights_BKGTS, v_BSKV, precision=exact)
    return out_BTKGV.reshape(batch, queries, heads, v_BSKV.shape[-1])
