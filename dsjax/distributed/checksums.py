# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays, taken where the arrays lie, and of the small texts that are kept of them.

In: a pytree of jax arrays, or a value that JSON can hold. Out: a short text for each leaf that
depends on its bits and on their places, never on how it lies over devices or processes; a digest.
Not done here: keeping them, and comparing (`checkpoint`, `training.restore`).

The checksum of an array is a sum modulo 2^32 over its elements, each word first mixed with a hash
of its index by a bijection. So it is exact in any order and on any mesh, one changed element always
changes it, and others pass unseen once in 2^32. An array is read once, by its own devices.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: PyTree[jax.Array]) -> dict[str, str]:
    """Give the checksum of each leaf by its dotted path.

    Of several processes all call this with the same tree, and all get the same.
    """
    # One after the other: CPU devices that have several sums between them under way can starve.
    return {
        name: f"{int(_checksum(_plain(leaf))):08x}" for name, leaf in named_leaves(tree).items()
    }


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Give each leaf its dotted path as name, in the pytree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    assert len(names) == len(leaves), "two leaves of the tree have the same dotted path"
    return names


def digest(value: Any) -> str:
    """Give the BLAKE2b digest of a value that JSON can hold; the order of keys says nothing."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    return jnp.sum(_mixed(words ^ _places(x.shape)), dtype=jnp.uint32)


def _places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Return a hash of every index. It is made of one for each axis: a stack has more than 2^32."""
    places = jnp.uint32(0)
    for axis, size in enumerate(shape):
        salt = jnp.uint32(0x9E3779B9 * (axis + 1) % 2**32)
        of_axis = _mixed(jnp.arange(size, dtype=jnp.uint32) + salt)
        places += of_axis.reshape([size if a == axis else 1 for a in range(len(shape))])
    return places


def _mixed(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Take MurmurHash3's last step: a bijection in which each bit reaches every other."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _plain(leaf: jax.Array) -> jax.Array:
    """Return a random key as the words that it is made of."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
