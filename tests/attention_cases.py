# SPDX-License-Identifier: Apache-2.0
"""What all platforms' attention kernels are held against: arrays, and the plain path's results.

In: the sizes of rows and heads. Out: random arrays, and results with the gradients of queries, keys
and values. Not here: the kernels, which segments rows have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.models.ops.attention import Tokens, dot_product_attention

Arrays = tuple[jax.Array, ...]


class Shape(NamedTuple):
    """Rows, tokens, heads, kv heads, head size, value head size."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    value_size: int


def arrays_of(shape: Shape, dtype: Any = jnp.float32) -> Arrays:
    """Queries, keys, values and gradients of the result."""
    rng = np.random.default_rng(0)
    rows, tokens, heads, kv_heads, size, value_size = shape
    kinds = (heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size)
    return tuple(jnp.asarray(rng.normal(size=(rows, tokens, *k)), dtype) for k in kinds)


def with_gradients(function: Any, q: Any, k: Any, v: Any, dout: Any) -> Arrays:
    """The result of (q, k, v), and their gradients."""
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(dout.astype(out.dtype))


@jax.jit
def expected(arrays: Arrays, segment_BT: jax.Array) -> Arrays:
    """What `dot_product_attention` gives for rows that see themselves."""
    scale = arrays[0].shape[-1] ** -0.5
    place_BT = jnp.broadcast_to(jnp.arange(segment_BT.shape[1]), segment_BT.shape)
    tokens = Tokens(place_BT, segment_BT)
    return with_gradients(
        lambda q, k, v: dot_product_attention(q, k, v, tokens, tokens, None, scale), *arrays
    )


def by_part(kernel: Callable[..., jax.Array], parts: int, scale: float) -> Any:
    """(arrays, segments) -> results of a kernel that is given the queries in parts."""

    def run(arrays: Arrays, segment_BT: jax.Array) -> Arrays:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            pieces = zip(*(jnp.split(x, parts, axis=1) for x in (q, segment_BT)), strict=True)
            outs = [
                kernel(q, k, v, segment, segment_BT, jnp.int32(part), scale, interpret=True)
                for part, (q, segment) in enumerate(pieces)
            ]
            return jnp.concatenate(outs, axis=1)

        return with_gradients(attend, *arrays)

    return jax.jit(run)


def check(ours: Callable[..., Arrays], arrays: Arrays, segment_BT: jax.Array) -> None:
    """Hold a kernel's float32 result and gradients against `dot_product_attention`'s."""
    pairs = zip(ours(arrays, segment_BT), expected(arrays, segment_BT), strict=True)
    for (got, want), bound in zip(pairs, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)
