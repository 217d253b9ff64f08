# SPDX-License-Identifier: Apache-2.0
"""From an update in float32 to parameters as they are held, with no update lost on average.

In: float32 values, and a key for each step and parameter. Out: what is stored. bfloat16 has 8 bits
of precision: an update of less than 1/512 of a parameter, as most are at usual learning rates,
would always be rounded away. So values are rounded up or down at random, such that their mean is
right (stochastic rounding, arXiv 1502.02551). The random bits depend on key and place in the array
alone: not on the mesh, and not on when a run was resumed. Not done here: the update.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def round_to(x: Float[Array, "*S"], dtype: jnp.dtype, key: jax.Array) -> Float[Array, "*S"]:
    """Cast float32 to what a parameter is held in: at random to bfloat16, as usual otherwise.

    A bfloat16 is the upper half of a float32: what is added to the lower half, evenly among all
    that it can be, carries into the upper half as often as the lower half says. A value that
    bfloat16 has stays, and so do infinities and NaN.

    Args:
        x: values.
        dtype: of the result.
        key: of this step and this array.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    # Cut by shifting: a cast of the sum might be rounded once more.
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(dtype))


def share_lost(
    old: Mapping[str, jax.Array], new: Mapping[str, jax.Array], updates: Mapping[str, jax.Array]
) -> Float[Array, ""] | None:
    """Share of the updates that changed nothing; None where nothing is narrower than float32.

    Args:
        old: parameters as they are held.
        new: the same after the update.
        updates: by path; 0 where none is wanted.
    """
    narrow = [path for path in new if new[path].dtype.itemsize < 4]
    if not narrow:
        return None
    # Counted in float32: there may be more than 2^31.
    wanted, lost = jnp.float32(0), jnp.float32(0)
    for path in narrow:
        moves = updates[path] != 0
        wanted += jnp.sum(moves, dtype=jnp.float32)
        lost += jnp.sum(moves & (new[path] == old[path]), dtype=jnp.float32)
    return lost / jnp.maximum(wanted, 1)
