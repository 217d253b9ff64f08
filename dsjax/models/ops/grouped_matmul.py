# SPDX-License-Identifier: Apache-2.0
"""The experts' matrix product: each group of rows by its own matrix, on every platform.

In: rows sorted by group, a matrix for each group, the groups' sizes. Out: the products. No platform
multiplies a row by another group's matrix: TPU has jax's megablox kernels, and `ragged_dot` where
they are not exact enough; CUDA has `grouped_matmul_cuda`; every other platform a loop over tiles
of rows. Not done here: sorting the rows.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Bool, Float, Int

from dsjax.models.ops import grouped_matmul_cuda
from dsjax.models.ops.blocks import precision

MEGABLOX_TILE = (256, 1024, 1024)
"""Rows, inner size and columns that megablox multiplies at a time. Its matrices stay in the layout
that they are held in; XLA's `ragged_dot` would copy the stacks of all layers into another one."""

Stored = Mapping[str, jax.Array]
"""Arrays that hold a matrix for each group, by name."""

Decode = Callable[[Stored, jnp.dtype], jax.Array]

LOOP_ROWS = 32
"""Rows that the loop over tiles multiplies at a time."""


def grouped_matmul(
    x_ZI: Float[Array, "Z I"],
    weight_EOI: Float[Array, "E O I"],
    sizes_E: Int[Array, " E"],
) -> Float[Array, "Z O"]:
    """Multiply each group of rows by its own matrix: x W_e^T; rows beyond all groups give zeros.

    Args:
        x_ZI: rows, sorted by group.
        weight_EOI: a matrix for each group, used in x's dtype; its gradient has its own.
        sizes_E: rows of each group.

    Returns:
        The products in x's dtype; their sums are float32.
    """
    return _product(x_ZI, weight_EOI, sizes_E)


@jax.custom_vjp
def _product(x_ZI: jax.Array, weight_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _by_rows(x_ZI, {"": weight_EOI}, sizes_E, transposed=True)


def _forward(x_ZI: jax.Array, weight_EOI: jax.Array, sizes_E: jax.Array):
    return _product(x_ZI, weight_EOI, sizes_E), (x_ZI, weight_EOI, sizes_E)


def _backward(residuals: tuple[jax.Array, ...], y_ZO: jax.Array):
    x_ZI, weight_EOI, sizes_E = residuals
    dx_ZI = _by_rows(y_ZO, {"": weight_EOI}, sizes_E, transposed=False)
    return dx_ZI, _by_weights(x_ZI, y_ZO, sizes_E, weight_EOI.dtype), None


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def stored_grouped_matmul(
    decode: Decode, x_ZI: Float[Array, "Z I"], stored: Stored, sizes_E: Int[Array, " E"]
) -> Float[Array, "Z O"]:
    """`grouped_matmul` by matrices that do not train and are held in another form.

    They are decoded again for the gradient of x. The loop over tiles decodes a group's matrix at a
    time; the kernels for TPU and CUDA take those of all groups that are here.

    Args:
        decode: (arrays, dtype) -> the matrices that they hold.
        x_ZI: rows, sorted by group.
        stored: the arrays, which all lead with E.
        sizes_E: rows of each group.
    """
    return _by_rows(x_ZI, stored, sizes_E, transposed=True, decode=decode)


def _stored_forward(decode: Decode, x_ZI: jax.Array, stored: Stored, sizes_E: jax.Array):
    return stored_grouped_matmul(decode, x_ZI, stored, sizes_E), (stored, sizes_E)


def _stored_backward(decode: Decode, residuals: tuple[Stored, jax.Array], y_ZO: jax.Array):
    stored, sizes_E = residuals
    return _by_rows(y_ZO, stored, sizes_E, transposed=False, decode=decode), None, None


stored_grouped_matmul.defvjp(_stored_forward, _stored_backward)


def _as_held(stored: Stored, dtype: jnp.dtype) -> jax.Array:
    """Decode matrices that are held as they are."""
    return stored[""]


class Tiles(NamedTuple):
    """Pieces of groups, of a fixed number of rows or fewer; Q is the most there can be.

    Attributes:
        group_Q: whose rows these are.
        begin_Q: the first row.
        end_Q: the row after the last; that of the first where there are none.
        count: tiles that have rows.
    """

    group_Q: Int[Array, " Q"]
    begin_Q: Int[Array, " Q"]
    end_Q: Int[Array, " Q"]
    count: Int[Array, ""]


def tiles_of(sizes_E: Int[Array, " E"], rows: int, tile_rows: int) -> Tiles:
    """Cut each group into tiles of `tile_rows`, the last of a group being shorter."""
    ends_E = jnp.cumsum(sizes_E)
    tiles_E = -(-sizes_E // tile_rows)
    until_E = jnp.cumsum(tiles_E)
    number_Q = jnp.arange(-(-rows // tile_rows) + sizes_E.size, dtype=sizes_E.dtype)
    group_Q = jnp.minimum((number_Q[:, None] >= until_E).sum(1), sizes_E.size - 1)
    within_Q = number_Q - (until_E - tiles_E)[group_Q]
    begin_Q = (ends_E - sizes_E)[group_Q] + within_Q * tile_rows
    end_Q = jnp.minimum(begin_Q + tile_rows, ends_E[group_Q])
    used_Q = number_Q < until_E[-1]
    group_Q, begin_Q, end_Q = (jnp.where(used_Q, a, 0) for a in (group_Q, begin_Q, end_Q))
    return Tiles(group_Q.astype(sizes_E.dtype), begin_Q, end_Q, until_E[-1])


def _by_rows(
    x_ZK: jax.Array,
    stored: Stored,
    sizes_E: jax.Array,
    *,
    transposed: bool,
    decode: Decode = _as_held,
) -> jax.Array:
    """x W^T, or x W, for each group, in x's dtype; zeros beyond the groups."""
    dtype = x_ZK.dtype

    def tpu(x_ZK, stored, sizes_E):
        weight = decode(stored, dtype).astype(dtype)
        if dtype == jnp.bfloat16:
            rows = _whole_tiles(x_ZK)
            y_ZN = gmm(rows, weight, sizes_E, dtype, MEGABLOX_TILE, transpose_rhs=transposed)
            return y_ZN[: x_ZK.shape[0]]
        contract = ((1,), (2 if transposed else 1,))
        return _ragged(x_ZK, weight, sizes_E, contract, [0], dtype)

    def cuda(x_ZK, stored, sizes_E):
        tiles = tiles_of(sizes_E, x_ZK.shape[0], grouped_matmul_cuda.TILE_ROWS)
        weight = decode(stored, dtype).astype(dtype)
        return grouped_matmul_cuda.multiply(
            x_ZK, weight, *tiles[:3], transposed=transposed, dtype=dtype
        )

    def loop(x_ZK, stored, sizes_E):
        def matrix(group: jax.Array) -> jax.Array:
            own = {name: array[group] for name, array in stored.items()}
            return decode(own, dtype).astype(dtype)

        return _loop_over_rows(x_ZK, matrix, sizes_E, transposed).astype(dtype)

    y_ZN = lax.platform_dependent(x_ZK, stored, sizes_E, tpu=tpu, cuda=cuda, default=loop)
    return jnp.where((jnp.arange(x_ZK.shape[0]) < sizes_E.sum())[:, None], y_ZN, 0)


def _by_weights(x_ZI: jax.Array, y_ZO: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """y x^T summed over the rows of each group: [E, O, I]."""

    def tpu(x_ZI, y_ZO, sizes_E):
        if x_ZI.dtype == jnp.bfloat16:
            x_ZI, y_ZO = _whole_tiles(x_ZI), _whole_tiles(y_ZO)
            return tgmm(y_ZO.T, x_ZI, sizes_E, dtype, MEGABLOX_TILE)
        return _ragged(y_ZO, x_ZI, sizes_E, ((0,), (0,)), [], dtype)

    def cuda(x_ZI, y_ZO, sizes_E):
        return grouped_matmul_cuda.weight_gradient(x_ZI, y_ZO, sizes_E, dtype=dtype)

    def loop(x_ZI, y_ZO, sizes_E):
        return _loop_over_weights(x_ZI, y_ZO, sizes_E).astype(dtype)

    return lax.platform_dependent(x_ZI, y_ZO, sizes_E, tpu=tpu, cuda=cuda, default=loop)


def _whole_tiles(x_ZK: jax.Array) -> jax.Array:
    """Add rows that no group has, up to a multiple of megablox's tile."""
    return jnp.pad(x_ZK, [(0, -x_ZK.shape[0] % MEGABLOX_TILE[0]), (0, 0)])


def _ragged(
    a: jax.Array,
    b: jax.Array,
    sizes_E: jax.Array,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    group_axes: list[int],
    dtype: Any,
) -> jax.Array:
    """XLA's grouped product; the rows of `a`, axis 0, are what is cut into groups."""
    numbers = lax.RaggedDotDimensionNumbers((contract, ((), ())), [0], group_axes)
    exact = precision(a.dtype)
    return lax.ragged_dot_general(
        a, b, sizes_E, numbers, precision=exact, preferred_element_type=dtype
    )


def _loop_over_rows(
    x_ZK: jax.Array,
    matrix: Callable[[jax.Array], jax.Array],
    sizes_E: jax.Array,
    transposed: bool,
) -> Float[Array, "Z N"]:
    """Multiply tile after tile by the matrix of its group.

    Sums stay float32: XLA for CPU would convert all of a narrower buffer.
    """
    rows = min(LOOP_ROWS, x_ZK.shape[0])
    tiles = tiles_of(sizes_E, x_ZK.shape[0], rows)
    contract = 1 if transposed else 0

    def multiply(tile, y_ZN):
        first, has_row_M = _window(tiles, tile, rows, x_ZK.shape[0])
        x_MK = lax.dynamic_slice_in_dim(x_ZK, first, rows)
        new_MN = _dot(x_MK, matrix(tiles.group_Q[tile]), 1, contract)
        old_MN = lax.dynamic_slice_in_dim(y_ZN, first, rows)
        return lax.dynamic_update_slice_in_dim(
            y_ZN, jnp.where(has_row_M[:, None], new_MN, old_MN), first, 0
        )

    width = jax.eval_shape(matrix, tiles.group_Q[0]).shape[1 - contract]
    shape = (x_ZK.shape[0], width)
    return lax.fori_loop(0, tiles.count, multiply, jnp.zeros(shape, jnp.float32))


def _loop_over_weights(
    x_ZI: jax.Array, y_ZO: jax.Array, sizes_E: jax.Array
) -> Float[Array, "E O I"]:
    rows = min(LOOP_ROWS, x_ZI.shape[0])
    tiles = tiles_of(sizes_E, x_ZI.shape[0], rows)

    def add(tile, sum_EOI):
        first, has_row_M = _window(tiles, tile, rows, x_ZI.shape[0])
        x_MI = lax.dynamic_slice_in_dim(x_ZI, first, rows)
        y_MO = lax.dynamic_slice_in_dim(y_ZO, first, rows)
        more_OI = _dot(jnp.where(has_row_M[:, None], y_MO, 0), x_MI, 0, 0)
        return sum_EOI.at[tiles.group_Q[tile]].add(more_OI)

    shape = (sizes_E.size, y_ZO.shape[1], x_ZI.shape[1])
    return lax.fori_loop(0, tiles.count, add, jnp.zeros(shape, jnp.float32))


def _window(
    tiles: Tiles, tile: jax.Array, rows: int, total: int
) -> tuple[jax.Array, Bool[Array, " M"]]:
    """Find where to read `rows` rows for a tile, all of which exist; and which are the tile's."""
    first = jnp.minimum(tiles.begin_Q[tile], total - rows)
    row_M = first + jnp.arange(rows)
    return first, (row_M >= tiles.begin_Q[tile]) & (row_M < tiles.end_Q[tile])


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
