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

from dsjax.distributed.sharding import Layout
from dsjax.models.ops import attention_cudnn
from dsjax.models.ops.attention_cuda import attend_cuda
from dsjax.models.ops.attention_cudnn import attend_cudnn
from dsjax.models.ops.attention_tpu import attend_tpu
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
    """

    fits: Callable[[Any, int, int], bool]
    attend: Kernel


KERNELS: tuple[KernelFor, ...] = (
    KernelFor(lambda device, *_: device.platform == "tpu", attend_tpu),
    KernelFor(attention_cudnn.takes, attend_cudnn),
    KernelFor(lambda device, *_: device.platform == "gpu", attend_cuda),
)
"""The first that fits is taken; where none does, attention is plain."""


def kernel_for(device: Any, size: int, value_size: int) -> Kernel | None:
    """Choose by a device of the mesh, which may be one to compile for only, and by head sizes."""
    fitting = (one.attend for one in KERNELS if one.fits(device, size, value_size))
    return next(fitting, None)


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
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    query: Tokens,
    key: Tokens,
    window: Int[Array, ""] | int | None,
    scale: float,
    selection: SparseMask | None = None,
    layout: Layout | None = None,
) -> Float[Array, "B T N V"]:
    """Grouped-query attention; the softmax is float32 and cast back, as in the reference.

    Whole rows that only see themselves, in 16 bits, go through a kernel for the mesh's devices.

    Args:
        q_BTNH: queries.
        k_BSKH: keys, of the queries' head size.
        v_BSKV: values, of any head size.
        query: tokens that ask.
        key: tokens that may be seen.
        window: see `attention_mask`.
        scale: of the scores before the softmax.
        selection: leaves fewer keys to each query than it may see.
        layout: of the mesh; None where keys are not the queries' own rows (a cache, a prefix).
    """
    if layout is not None and window is None and selection is None and q_BTNH.itemsize == 2:
        device = next(iter(layout.rows.device_set))
        kernel = kernel_for(device, q_BTNH.shape[3], v_BSKV.shape[3])
        if kernel is not None:
            return _by_kernel(kernel, q_BTNH, k_BSKH, v_BSKV, query.segment, scale, layout)

    # Wide outside of the blocks, so that these add up the gradients of keys and values in float32.
    wide_k, wide_v = (x.astype(jnp.float32) for x in (k_BSKH, v_BSKV))

    def block(piece):
        q, tokens, query_inputs = piece
        k_BSKH, v_BSKV = (x.astype(q.dtype) for x in (wide_k, wide_v))
        mask = attention_mask(tokens, key, window)
        if selection is not None:
            mask = selection.select(query_inputs, mask)
        return _attend_block(q, k_BSKH, v_BSKV, mask, scale)

    query_inputs = None if selection is None else selection.query_inputs
    if q_BTNH.shape[1] <= QUERY_BLOCK:
        return block((q_BTNH, query, query_inputs))
    pieces = jax.tree.map(lambda x: in_blocks(x, QUERY_BLOCK), (q_BTNH, query, query_inputs))
    return out_of_blocks(jax.lax.map(jax.checkpoint(block), pieces))[:, : q_BTNH.shape[1]]


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
    heads, kv_heads, shards = q_BTNH.shape[2], k_BTKH.shape[2], layout.shards("heads")
    axis = "heads" if heads % shards == 0 else None
    if axis is not None and kv_heads % shards:
        k_BTKH, v_BTKV = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k_BTKH, v_BTKV))
    by_head = layout.spec(None, axis, None, leading_rows=True)
    return jax.shard_map(
        lambda *arrays: kernel(*arrays, scale, KERNEL_NAME),
        mesh=layout.rows.mesh,
        in_specs=(by_head, by_head, by_head, layout.rows.spec),
        out_specs=by_head,
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKV, segment_BT)


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
