# SPDX-License-Identifier: Apache-2.0
"""Causal attention of packed rows on TPU: jax's splash attention, which never holds T x T scores.

In: queries, keys and values by head, the segment of every token. Out: the attended values. Not done
here: choosing between kernels, sharding (`attention`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Queries and keys that the kernel takes at a time; of shorter rows it takes all."""

LANES = 128
"""The kernel's blocks are multiples of this."""


def attend_tpu(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    segment_BT: Int[Array, "B T"],
    scale: float,
    name: str | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """Attend to the tokens of the same segment up to oneself.

    Scores and softmax are float32. The queries are scaled before the product, in their own dtype,
    since the kernel has no scale: one rounding that the reference has not.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKV: values.
        segment_BT: segment of each token.
        scale: of the scores.
        name: under which a remat policy may keep what the backward pass needs of the kernel.
        interpret: run without a TPU, slowly.
    """
    length = q_BTNH.shape[1]
    padded = -(-length // LANES) * LANES
    block = BLOCK if padded > BLOCK else padded
    padded = -(-padded // block) * block
    q_BTNH, k_BTKH, v_BTKV, segment_BT = (
        _padded(x, padded) for x in (q_BTNH, k_BTKH, v_BTKV, segment_BT)
    )
    kernel = _kernel(q_BTNH.shape[2], padded, block, 1, name, interpret)
    ids = splash.SegmentIds(segment_BT, segment_BT)
    return _run(kernel, q_BTNH, k_BTKH, v_BTKV, ids, scale)[:, :length]


def attend_part_tpu(
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
    """`attend_tpu` for the queries of a part of each row.

    Args:
        q_MTNH: queries: of each row the tokens from place `part` * T on, T a multiple of `LANES`
            and S one of T.
        k_MSKH: keys of whole rows.
        v_MSKV: values of whole rows.
        q_segment_MT: segment of each query's token.
        segment_MS: segment of each token.
        part: which part of its row the queries are, from 0.
        scale: of the scores.
        name: as in `attend_tpu`.
        interpret: as in `attend_tpu`.
    """
    (length, heads), whole = q_MTNH.shape[1:3], k_MSKH.shape[1]
    parts = whole // length
    kernel = _kernel(heads, whole, math.gcd(length, BLOCK), parts, name, interpret)

    # What the kernel knows of which blocks meet has as many rows for every part.
    def of_part(x: np.ndarray) -> jax.Array:
        axis = min(1, x.ndim - 1)
        size = x.shape[axis] // parts
        return lax.dynamic_slice_in_dim(x, part * size, size, axis)

    of_queries = jax.tree.map(of_part, kernel)
    ids = splash.SegmentIds(q_segment_MT, segment_MS)
    return _run(of_queries, q_MTNH, k_MSKH, v_MSKV, ids, scale)


class _CausalMask(masks.CausalMask):
    """jax's, which computes every block; of 65,536 at 131,072 tokens that takes a minute."""

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        queries, keys = idx
        shape = queries.stop - queries.start, keys.stop - keys.start
        if keys.stop <= queries.start:
            return _all_of(shape, True)
        if keys.start >= queries.stop:
            return _all_of(shape, False)
        return super().__getitem__(idx)


@functools.lru_cache(maxsize=2)
def _all_of(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)


@functools.lru_cache(maxsize=8)
def _kernel(
    heads: int, length: int, block: int, parts: int, name: str | None, interpret: bool
) -> Any:
    """Make the kernel for whole rows of keys, and for queries in `parts`.

    It is kept: a program is traced several times. Its arrays are numpy's, of no trace and device.
    """
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([_CausalMask((length, length))] * heads),
            block_sizes=_blocks(block),
            head_shards=1,
            q_seq_shards=parts,
            residual_checkpoint_name=name,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)


def _run(
    kernel: Any,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKV: jax.Array,
    segments_B: splash.SegmentIds,
    scale: float,
) -> jax.Array:
    """Each row by the kernel, which has the heads first."""
    scaled = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSV = (jnp.moveaxis(x, 2, 1) for x in (scaled, k_BSKH, v_BSKV))

    def row(q_NTH, k_KSH, v_KSV, segments):
        return kernel(q_NTH, k_KSH, v_KSV, segment_ids=segments)

    return jnp.moveaxis(jax.vmap(row)(q_BNTH, k_BKSH, v_BKSV, segments_B), 1, 2)


def _blocks(size: int) -> splash.BlockSizes:
    """Use the same block everywhere."""
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def _padded(x: jax.Array, length: int) -> jax.Array:
    """Fill the tokens up with zeros; causal attention of the others does not see them."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
