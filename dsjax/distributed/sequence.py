# SPDX-License-Identifier: Apache-2.0
"""Rows that are divided along their tokens, by `mesh.sequence`.

In: arrays [B, T, ...] of a batch's rows, each row in n contiguous parts on n devices. Out: the same
tokens with the M = n B parts in the place of rows, [M, T / n, ...], so that what works on rows
works on parts of rows and knows no difference. Where rows lie whole nothing is changed. Not done
here: what tokens of several parts have to do with one another (`models.ops.attention`).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from dsjax.distributed.mesh import BATCH_AXES
from dsjax.distributed.sharding import Layout

Tree = TypeVar("Tree")


def sequence_shards(layout: Layout | None) -> int:
    """Return n, the number of parts that a row is divided into."""
    return 1 if layout is None else layout.rows.mesh.shape["sequence"]


def split_rows(tree: Tree, layout: Layout | None) -> Tree:
    """Put the parts of rows in the place of rows: [B, T, ...] -> [M, T / n, ...].

    The first parts of all rows come first. No token moves between devices.
    """
    count = sequence_shards(layout)
    if layout is None or count == 1:
        return tree

    def split(x: jax.Array) -> jax.Array:
        x = _place(x.reshape(x.shape[0], count, -1, *x.shape[2:]), layout, BATCH_AXES, "sequence")
        return _rows_of_parts(jnp.moveaxis(x, 1, 0), layout)

    return jax.tree.map(split, tree)


def join_rows(x: Shaped[Array, "M t *rest"], layout: Layout | None) -> Shaped[Array, "B T *rest"]:
    """Put the parts of rows together again: the inverse of `split_rows`."""
    count = sequence_shards(layout)
    if layout is None or count == 1:
        return x
    x = jnp.moveaxis(x.reshape(count, -1, *x.shape[1:]), 0, 1)
    x = _place(x, layout, BATCH_AXES, "sequence")
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def copy_rows(tree: Tree, layout: Layout | None) -> Tree:
    """Give every part of a row the whole row: [B, S, ...] -> [M, S, ...].

    Devices bring the parts of their rows together; gradients of the copies are summed, and each
    device keeps those of its part.
    """
    count = sequence_shards(layout)
    if layout is None or count == 1:
        return tree

    def copy(x: jax.Array) -> jax.Array:
        x = _place(x, layout, BATCH_AXES, "sequence")
        x = _place(jnp.broadcast_to(x, (count, *x.shape)), layout, "sequence", BATCH_AXES)
        return _rows_of_parts(x, layout)

    return jax.tree.map(copy, tree)


def exchange_halves(tree: Tree, layout: Layout | None) -> Tree:
    """Make causal attention the same work for all parts: [B, T, ...] -> [B, T, ...].

    The second half of part i changes places with that of part n - 1 - i, so that a part has the
    halves 2 i and 2 n - 1 - 2 i of its row: few tokens stand before one and many before the other.
    It is its own inverse.
    """
    count = sequence_shards(layout)
    if layout is None or count == 1:
        return tree

    def exchange(x: jax.Array) -> jax.Array:
        halves = x.reshape(x.shape[0], count, 2, -1, *x.shape[2:])
        mixed = jnp.stack([halves[:, :, 0], jnp.flip(halves[:, :, 1], axis=1)], axis=2)
        return _place(mixed, layout, BATCH_AXES, "sequence").reshape(x.shape)

    return jax.tree.map(exchange, tree)


def _rows_of_parts(x: jax.Array, layout: Layout) -> jax.Array:
    return _place(x.reshape(-1, *x.shape[2:]), layout, layout.parts)


def _place(x: jax.Array, layout: Layout, *axes: str | tuple[str, ...]) -> jax.Array:
    sharding = NamedSharding(layout.rows.mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(x, sharding)
