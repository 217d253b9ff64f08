# SPDX-License-Identifier: Apache-2.0
"""The grouped matrix product and its weights' gradient on CUDA, as Pallas kernels for Triton.

In: rows sorted by group, a matrix for each group, and where each tile of rows lies. Out: the
products, summed in float32. XLA for CUDA would copy the rows once for each group. Not done here:
finding the tiles, choosing the kernel (`grouped_matmul`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

TILE_ROWS = 64
"""Rows that one program of the kernels multiplies at a time."""

_INNER = 32
_LEAST = 16
"""Triton multiplies matrices of no fewer rows or columns."""


def multiply(
    x_ZK: Float[Array, "Z K"],
    weight: Float[Array, "E N K"] | Float[Array, "E K N"],
    group_Q: Int[Array, " Q"],
    begin_Q: Int[Array, " Q"],
    end_Q: Int[Array, " Q"],
    *,
    transposed: bool,
    dtype: Any,
    interpret: bool = False,
) -> Float[Array, "Z N"]:
    """Multiply each tile of rows by its group's matrix; rows of no tile give anything.

    Args:
        x_ZK: rows.
        weight: matrices, [E, N, K], or [E, K, N] where not `transposed`.
        group_Q: the matrix of each tile.
        begin_Q: the first row of each tile.
        end_Q: the row after the last of each tile; a tile without rows does nothing.
        transposed: whether x W^T is wanted, not x W.
        dtype: of the result.
        interpret: run without a GPU, slowly.
    """
    rows, inner = x_ZK.shape
    columns = weight.shape[1 if transposed else 2]
    wide = _block(columns, 128)
    return pl.pallas_call(
        functools.partial(
            _multiply_tile, inner=inner, columns=columns, wide=wide, transposed=transposed
        ),
        grid=(pl.cdiv(columns, wide), group_Q.size),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="grouped_matmul",
        interpret=interpret,
    )(x_ZK, weight, group_Q, begin_Q, end_Q)


def _multiply_tile(
    x_ref, w_ref, group_ref, begin_ref, end_ref, out_ref, *, inner, columns, wide, transposed
):
    """One tile of rows by `wide` columns."""
    tile = pl.program_id(1)
    group = group_ref[tile]
    row_M = begin_ref[tile] + jnp.arange(TILE_ROWS)
    column_N = pl.program_id(0) * wide + jnp.arange(wide)
    has_row_M, has_column_N = row_M < end_ref[tile], column_N < columns

    def add(step, sum_MN):
        inner_K = step * _INNER + jnp.arange(_INNER)
        has_inner_K = inner_K < inner
        x_MK = _read(x_ref.at[row_M[:, None], inner_K[None]], has_row_M, has_inner_K)
        if transposed:
            w = _read(w_ref.at[group, column_N[:, None], inner_K[None]], has_column_N, has_inner_K)
        else:
            w = _read(w_ref.at[group, inner_K[:, None], column_N[None]], has_inner_K, has_column_N)
        w = w.astype(x_MK.dtype)
        return sum_MN + plgpu.dot(x_MK, w, trans_b=transposed, allow_tf32=False)

    zeros_MN = jnp.zeros((TILE_ROWS, wide), jnp.float32)
    sum_MN = lax.fori_loop(0, pl.cdiv(inner, _INNER), add, zeros_MN)
    plgpu.store(
        out_ref.at[row_M[:, None], column_N[None]],
        sum_MN.astype(out_ref.dtype),
        mask=has_row_M[:, None] & has_column_N[None],
    )


def weight_gradient(
    x_ZI: Float[Array, "Z I"],
    y_ZO: Float[Array, "Z O"],
    sizes_E: Int[Array, " E"],
    *,
    dtype: Any,
    interpret: bool = False,
) -> Float[Array, "E O I"]:
    """Sum y x^T over each group's rows.

    Args:
        x_ZI: the rows that were multiplied.
        y_ZO: the gradients of their products.
        sizes_E: rows of each group.
        dtype: of the result.
        interpret: run without a GPU, slowly.
    """
    (inputs, outputs), ends_E = (x_ZI.shape[1], y_ZO.shape[1]), jnp.cumsum(sizes_E)
    high, wide = _block(outputs, 128), _block(inputs, 64)
    return pl.pallas_call(
        functools.partial(_sum_over_group, outputs=outputs, inputs=inputs, high=high, wide=wide),
        grid=(pl.cdiv(inputs, wide), pl.cdiv(outputs, high), sizes_E.size),
        out_shape=jax.ShapeDtypeStruct((sizes_E.size, outputs, inputs), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="grouped_weight_gradient",
        interpret=interpret,
    )(x_ZI, y_ZO.astype(x_ZI.dtype), ends_E - sizes_E, ends_E)


def _sum_over_group(x_ref, y_ref, begin_ref, end_ref, out_ref, *, outputs, inputs, high, wide):
    """`high` by `wide` numbers of one group's gradient."""
    group = pl.program_id(2)
    begin, end = begin_ref[group], end_ref[group]
    out_O = pl.program_id(1) * high + jnp.arange(high)
    in_I = pl.program_id(0) * wide + jnp.arange(wide)
    has_out_O, has_in_I = out_O < outputs, in_I < inputs

    def add(step, sum_OI):
        row_M = begin + step * _INNER + jnp.arange(_INNER)
        has_row_M = row_M < end
        x_MI = _read(x_ref.at[row_M[:, None], in_I[None]], has_row_M, has_in_I)
        y_MO = _read(y_ref.at[row_M[:, None], out_O[None]], has_row_M, has_out_O)
        return sum_OI + plgpu.dot(y_MO, x_MI, trans_a=True, allow_tf32=False)

    zeros_OI = jnp.zeros((high, wide), jnp.float32)
    sum_OI = lax.fori_loop(0, pl.cdiv(end - begin, _INNER), add, zeros_OI)
    plgpu.store(
        out_ref.at[group, out_O[:, None], in_I[None]],
        sum_OI.astype(out_ref.dtype),
        mask=has_out_O[:, None] & has_in_I[None],
    )


def _read(ref: Any, has_row: jax.Array, has_column: jax.Array) -> jax.Array:
    return plgpu.load(ref, mask=has_row[:, None] & has_column[None], other=0.0)


def _block(size: int, most: int) -> int:
    """How many of `size` rows or columns a program takes: a power of two."""
    return max(_LEAST, min(most, pl.next_power_of_2(size)))
