# SPDX-License-Identifier: Apache-2.0
"""NF4: four bits a weight, by QLoRA's code book (arXiv 2305.14314), with bitsandbytes' numbers.

A matrix is cut into blocks of 64 along its input. A block's largest magnitude, `absmax`, is kept
in float32; each weight, scaled by it, becomes the number of the nearest of 16 values. Codes and
values are those of bitsandbytes 0.50, bit for bit. How the codes lie is our own: two rows share
their bytes, so that a device parts them without moving columns. Not done here: reading files.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dsjax.distributed.arrays import row_pieces
from dsjax.models.storage import Index, Storage, StoredArray, TensorReader

BLOCK = 64
"""Weights that share an absmax, along the input."""

ABSMAX = "_absmax"

CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values: quantiles of a normal distribution, 0 among them (bitsandbytes'
`create_normal_map`)."""


_BOUNDS = (CODE[:-1] + CODE[1:]) / np.float32(2)
"""Half way between every two values."""

_AT_ONCE = 2**17
"""Weights whose codes are made at a time: few enough for a processor's caches, twice as fast."""

BYTES = 16
"""About how many a weight takes while it is encoded; reads are cut by it, since several run at a
time."""

_LEAST = np.float32(1e-38)
"""What a block of zeros is divided by."""


def problem(shape: tuple[int, int]) -> str:
    """Say what keeps a matrix [O, I] from being held so; empty if nothing does."""
    rows, columns = shape
    if columns % BLOCK:
        return f"an input size that {BLOCK} divides"
    return "an even output size" if rows % 2 else ""


def arrays(shape: tuple[int, int], axes: tuple[str | None, ...]) -> Mapping[str, StoredArray]:
    """Declare two codes a byte, of rows 2i (the high half) and 2i + 1; and every block's absmax."""
    rows, columns = shape
    return {
        "": StoredArray((rows // 2, columns), "uint8", axes),
        ABSMAX: StoredArray((rows, columns // BLOCK), "float32", axes),
    }


def encode(source: TensorReader, name: str, array: str, index: Index) -> np.ndarray:
    """Make a part of one of the arrays, from some rows of the tensor at a time."""
    rows, columns = _read_for(array, index)
    cut = index[1].start - columns.start // (1 if array == "" else BLOCK)
    parts = []
    for (piece,) in row_pieces((rows.stop - rows.start, columns.stop - columns.start), BYTES, 2):
        some = slice(rows.start + piece.start, rows.start + piece.stop)
        values = source.read(name, (some, columns)).astype(np.float32)
        made = pack(quantise(values)[0]) if array == "" else absmax_of(values)
        parts.append(made[:, cut : cut + index[1].stop - index[1].start])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read_for(array: str, index: Index) -> tuple[slice, slice]:
    """Rows and columns of the tensor that a part of an array is made of; blocks are read whole."""
    rows, columns = index
    if array == ABSMAX:
        return rows, slice(columns.start * BLOCK, columns.stop * BLOCK)
    whole = slice(columns.start // BLOCK * BLOCK, -(-columns.stop // BLOCK) * BLOCK)
    return slice(2 * rows.start, 2 * rows.stop), whole


def quantise(
    values: Float[np.ndarray, "O I"],
) -> tuple[UInt8[np.ndarray, "O I"], Float[np.ndarray, "O I/64"]]:
    """Return the codes of float32 numbers, and the absmax of every block.

    A code counts the bounds that the number times 1 / absmax is above: it is bitsandbytes' rule, of
    which a division, or the nearest value, would differ where a bound is within a rounding.
    """
    absmax, codes = absmax_of(values), np.empty(values.shape, np.uint8)
    rows = max(1, _AT_ONCE // values.shape[1])
    for first in range(0, len(values), rows):
        some = slice(first, first + rows)
        codes[some] = _codes(values[some], absmax[some])
    return codes, absmax


def _codes(
    values: Float[np.ndarray, "O I"], absmax: Float[np.ndarray, "O B"]
) -> UInt8[np.ndarray, "O I"]:
    inverse = np.float32(1) / np.maximum(absmax, _LEAST)
    scaled = values.reshape(*absmax.shape, BLOCK) * inverse[..., None]
    codes = np.zeros(scaled.shape, np.uint8)
    for bound in _BOUNDS:
        codes += scaled > bound
    return codes.reshape(values.shape)


def absmax_of(values: Float[np.ndarray, "O I"]) -> Float[np.ndarray, "O I/64"]:
    """Return the largest magnitude of every block."""
    blocks = values.reshape(len(values), -1, BLOCK)
    return np.abs(np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1)))


def pack(codes: UInt8[np.ndarray, "O I"]) -> UInt8[np.ndarray, "O/2 I"]:
    """Put the codes of every two rows into one row of bytes, the first row's into the high half."""
    return codes[0::2] << 4 | codes[1::2]


def decode(stored: Mapping[str, Array], dtype: jnp.dtype) -> Float[Array, "*E O I"]:
    """Return the numbers, value times absmax in float32, rounded to `dtype` once."""
    packed, absmax = stored[""], stored[ABSMAX]
    codes = jnp.stack([packed >> 4, packed & 15], axis=-2)
    values = _values(codes).reshape(*absmax.shape, BLOCK)
    whole = (*absmax.shape[:-1], absmax.shape[-1] * BLOCK)
    return (values * absmax[..., None]).astype(dtype).reshape(whole)


def _values(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Look the values up: of every pair the one that a bit of the code says, four times.

    By bits and by scalars: selections between arrays would, in a scan, be kept as 16 arrays of
    constants, and no device gathers single numbers well.
    """
    level: list[Any] = list(CODE.view(np.uint32))
    for bit in range(4):
        chosen = -(codes >> bit & 1).astype(jnp.uint32)  # all bits, or none
        pairs = zip(level[0::2], level[1::2], strict=True)
        level = [low ^ chosen & (low ^ high) for low, high in pairs]
    return jax.lax.bitcast_convert_type(level[0], jnp.float32)


NF4 = Storage(arrays, lambda source: partial(encode, source), decode, problem)
