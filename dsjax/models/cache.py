# SPDX-License-Identifier: Apache-2.0
"""What attention keeps of the tokens before: one cache for all stacks, grown in place.

In: a cache and what new tokens add to it. Out: the grown parts. Not done here: which arrays a
family's attention keeps (`cache_shapes`), making an empty cache (`CausalLM.init_cache`).
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from dsjax.models.ops.attention import Tokens


class Cache(NamedTuple):
    """What attention keeps of the tokens seen so far.

    Attributes:
        stacks: for each stack the arrays of its attention, [L, B, S, ...].
        tokens: where those tokens stand.
        length: how many there are.
    """

    stacks: tuple[Any, ...]
    tokens: Tokens
    length: Int[Array, ""]


def append_to_cache(
    cache: tuple[jax.Array, ...] | None, new: tuple[jax.Array, ...], length: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Write new tokens at the end of one layer's cache; return them alone without a cache."""
    if cache is None or length is None:
        return new
    return tuple(
        jax.lax.dynamic_update_slice(old, x, (0, length, *(0,) * (x.ndim - 2)))
        for old, x in zip(cache, new, strict=True)
    )


def key_tokens(query: Tokens, cache: Cache | None) -> Tokens:
    """Places of the keys: the queries' own, or the cache's with the queries' written in."""
    if cache is None:
        return query
    start = (0, cache.length)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, start), cache.tokens, query
    )
