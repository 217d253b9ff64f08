# SPDX-License-Identifier: Apache-2.0
"""Causal attention of packed rows on TPU: jax's splash attention, which never holds T x T scores.

In: queries, keys and values by head, the segment of every token. Out: the attended values. Not done
here: choosing between kernels, sharding (`attention`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Queries and keys that the kernel takes at a time; of shorter rows it takes all."""

_LANES = 128
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
    padded = -(-length // _LANES) * _LANES
    block = BLOCK if padded > BLOCK else padded
    padded = -(-padded // block) * block
    scaled = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTV = (
        jnp.moveaxis(_padded(x, padded), 2, 1) for x in (scaled, k_BTKH, v_BTKV)
    )
    kernel: Any = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * q_BTNH.shape[2]),
        block_sizes=_blocks(block),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )

    def row(q_NTH, k_KTH, v_KTV, segment_T):
        ids = splash.SegmentIds(segment_T, segment_T)
        return kernel(q_NTH, k_KTH, v_KTV, segment_ids=ids)

    out_BNTV = jax.vmap(row)(q_BNTH, k_BKTH, v_BKTV, _padded(segment_BT, padded))
    return jnp.moveaxis(out_BNTV, 1, 2)[:, :length]


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
