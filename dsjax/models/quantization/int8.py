# SPDX-License-Identifier: Apache-2.0
"""INT8: a byte a weight, with a scale for every output channel.

scale = largest magnitude of the row / 127.5, code = weight / scale, rounded and cut to -128..127:
the convention of torchao and of compressed-tensors. (bitsandbytes divides by 127.) Not done here:
reading files.
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from dsjax.distributed.arrays import row_pieces
from dsjax.models.storage import Index, Storage, StoredArray, TensorReader

SCALE = "_scale"

_AT_ONCE = 2**17
"""Weights whose codes are made at a time: few enough for a processor's caches."""

BYTES = 16
"""About how many a weight takes while it is encoded; reads are cut by it."""


def arrays(shape: tuple[int, int], axes: tuple[str | None, ...]) -> Mapping[str, StoredArray]:
    """Declare codes in the matrix's shape, and a column of scales."""
    return {
        "": StoredArray(shape, "int8", axes),
        SCALE: StoredArray((shape[0], 1), "float32", (axes[0], None)),
    }


def encode(source: TensorReader, name: str, array: str, index: Index) -> np.ndarray:
    """Make a part of one of the arrays, from some whole rows of the tensor at a time."""
    rows, columns = index
    width = source.tensors[name].shape[1]
    parts = []
    for (piece,) in row_pieces((rows.stop - rows.start, width), BYTES):
        some = slice(rows.start + piece.start, rows.start + piece.stop)
        values = source.read(name, (some,)).astype(np.float32)
        parts.append((scales_of(values) if array == SCALE else quantise(values)[0])[:, columns])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def quantise(
    values: Float[np.ndarray, "O I"],
) -> tuple[Int8[np.ndarray, "O I"], Float[np.ndarray, "O 1"]]:
    """Return the codes of float32 numbers, and every row's scale."""
    scales, codes = scales_of(values), np.empty(values.shape, np.int8)
    rows = max(1, _AT_ONCE // values.shape[1])
    for first in range(0, len(values), rows):
        some = slice(first, first + rows)
        codes[some] = np.clip(np.rint(values[some] / scales[some]), -128, 127)
    return codes, scales


def scales_of(values: Float[np.ndarray, "O I"]) -> Float[np.ndarray, "O 1"]:
    """Return every row's scale; 1 for a row of zeros."""
    largest = np.maximum(values.max(axis=1, keepdims=True), -values.min(axis=1, keepdims=True))
    return np.where(largest > 0, largest / np.float32(127.5), np.float32(1))


def decode(stored: Mapping[str, Array], dtype: jnp.dtype) -> Float[Array, "*E O I"]:
    """Return the numbers, code times scale in float32, rounded to `dtype` once."""
    return (stored[""].astype(jnp.float32) * stored[SCALE]).astype(dtype)


INT8 = Storage(arrays, lambda source: partial(encode, source), decode)
