# SPDX-License-Identifier: Apache-2.0
"""Tokens in blocks, and the precision of what is computed with them.

In: activations [B, T, ...]. Out: blocks of their tokens to scan over, and back. Not done here: what
is computed in a block.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32, which TPUs and GPUs otherwise multiply in fewer bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def in_blocks(x: Shaped[Array, "B T *rest"], size: int) -> Shaped[Array, "blocks B size *rest"]:
    """Cut the tokens of every row into blocks, the last one filled up with zeros."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def out_of_blocks(x: Shaped[Array, "blocks B size *rest"]) -> Shaped[Array, "B T *rest"]:
    """Put the blocks of every row together again, the last one's filling included."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
