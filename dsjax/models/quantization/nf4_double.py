# SPDX-License-Identifier: Apache-2.0
"""NF4 with double quantization: the blocks' absmax are held in a byte each (arXiv 2305.14314, 3).

Of a matrix's absmax their mean is taken, and every 256 of the rest, in the matrix's order, are
quantized by bitsandbytes' map of 256 values. All is as bitsandbytes has it on a CPU: 4.13 bits a
weight where NF4 alone has 4.5. The mean needs the whole tensor, which is therefore read once more.
Not done here: reading files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dsjax.distributed.arrays import row_pieces
from dsjax.distributed.sharding import WHOLE
from dsjax.models.quantization import nf4
from dsjax.models.quantization.nf4 import ABSMAX
from dsjax.models.storage import Index, Storage, StoredArray, TensorReader

GROUP = 256
"""Blocks whose absmax are scaled together."""

SCALE, OFFSET = "_nested_absmax", "_offset"

_BINS = 2**16
"""bitsandbytes for CPU looks a number's code up by its place among so many."""


def arrays(shape: tuple[int, int], axes: tuple[str | None, ...]) -> Mapping[str, StoredArray]:
    """Declare NF4's arrays, absmax as codes; the largest of every group, and the mean."""
    stored = nf4.arrays(shape, axes)
    absmax = stored[ABSMAX]
    groups = -(-absmax.shape[0] * absmax.shape[1] // GROUP)
    return {
        **stored,
        ABSMAX: StoredArray(absmax.shape, "uint8", absmax.axes),
        SCALE: StoredArray((groups,), "float32", (WHOLE,)),
        OFFSET: StoredArray((1,), "float32", (None,)),
    }


@dataclass(frozen=True)
class Encoder:
    """Makes parts of the arrays of a checkpoint's tensors.

    Attributes:
        source: the checkpoint.
        means: of the absmax of each tensor that was asked for.
    """

    source: TensorReader
    means: dict[str, np.float32] = field(default_factory=dict)

    def __call__(self, name: str, array: str, index: Index) -> np.ndarray:
        """Make a part of one of the arrays of a tensor."""
        if array == "":
            return nf4.encode(self.source, name, array, index)
        if name not in self.means:
            rows, columns = self.source.tensors[name].shape
            whole = self._absmax(name, slice(0, rows), columns)
            self.means[name] = mean(whole.reshape(-1))
        if array == OFFSET:
            return np.full(1, self.means[name])
        return self._grouped(name, array, index)

    def _grouped(self, name: str, array: str, index: Index) -> np.ndarray:
        """Quantize the groups that a part is of or in, from the rows that hold them."""
        rows, columns = self.source.tensors[name].shape
        width = columns // nf4.BLOCK
        places = index[0]  # of groups, or of rows
        of_rows = slice(places.start * width, places.stop * width)
        groups = (
            places if array == SCALE else slice(of_rows.start // GROUP, -(-of_rows.stop // GROUP))
        )
        first, last = groups.start * GROUP, min(groups.stop * GROUP, rows * width)
        read = slice(first // width, -(-last // width))
        absmax = self._absmax(name, read, columns).reshape(-1)
        own = absmax[first - read.start * width : last - read.start * width]
        codes, scales = quantise(own - self.means[name])
        if array == SCALE:
            return scales
        codes = codes[of_rows.start - first : of_rows.stop - first]
        return codes.reshape(-1, width)[:, index[1]]

    def _absmax(self, name: str, rows: slice, columns: int) -> Float[np.ndarray, "O I"]:
        parts = []
        for (piece,) in row_pieces((rows.stop - rows.start, columns), nf4.BYTES):
            some = slice(rows.start + piece.start, rows.start + piece.stop)
            parts.append(nf4.absmax_of(self.source.read(name, (some,)).astype(np.float32)))
        return np.concatenate(parts)


def mean(values: Float[np.ndarray, " N"]) -> np.float32:
    """Return the mean as torch sums it, on one thread of a CPU: its last bit is in every weight.

    Eight lanes, four rows of them at a time, are added up in blocks of blocks of blocks
    (ATen/native/cpu/SumKernel.cpp, `cascade_sum`).
    """
    lanes, at_once = 8, 4
    vectors = values[: len(values) // lanes * lanes].reshape(-1, lanes)
    count = len(vectors) // at_once
    rows = vectors[: count * at_once].reshape(count, at_once, lanes)
    block = 1 << max(4, (max(count, 1) - 1).bit_length() // 4)
    rest = []
    for _ in range(3):
        whole = len(rows) // block * block
        rest.append(rows[whole:])
        rows = _in_order(rows[:whole].reshape(-1, block, at_once, lanes).swapaxes(0, 1))
    total = _in_order(np.stack([_in_order(part) for part in (*rest, rows)]))
    total[0] = _in_order(np.concatenate([total[:1], vectors[count * at_once :]]))
    single = values[len(vectors) * lanes :]
    everything = _in_order(np.concatenate([single, _in_order(total)]))
    return np.float32(everything / np.float32(len(values)))


def _in_order(terms: np.ndarray) -> np.ndarray:
    """Add up along the first axis, one after the other."""
    total = np.zeros(terms.shape[1:], np.float32)
    for term in terms:
        total += term
    return total


@cache
def code() -> Float[np.ndarray, "256"]:
    """Return the 256 values: seven decades of either sign, each cut evenly into twice as many.

    bitsandbytes' `create_dynamic_map` (8-bit dynamic quantization, arXiv 1511.04561).
    """
    values = [np.array([0, 1], np.float32)]
    for decade in range(7):
        bounds = _linspace(2**decade + 1)
        middles = np.float32(10.0 ** (decade - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


def _linspace(count: int) -> Float[np.ndarray, " N"]:
    """Cut 0.1 .. 1 evenly as torch does: from both ends to the middle, each number rounded once."""
    number = np.arange(count)
    step = float((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
    lower, upper = float(np.float32(0.1)) + step * number, 1 - step * (count - 1 - number)
    return np.where(number < count // 2, lower, upper).astype(np.float32)


@cache
def _code_of_bin() -> UInt8[np.ndarray, "65536"]:
    middles = np.arange(_BINS, dtype=np.float32) * np.float32(2 / (_BINS - 1)) - np.float32(1)
    bounds = (code()[1:] + code()[:-1]) / np.float32(2)
    return np.searchsorted(bounds, middles).astype(np.uint8)


def quantise(
    values: Float[np.ndarray, " N"],
) -> tuple[UInt8[np.ndarray, " N"], Float[np.ndarray, " G"]]:
    """Return the codes of numbers, and the largest magnitude of every group."""
    padded = np.zeros(-(-len(values) // GROUP) * GROUP, np.float32)
    padded[: len(values)] = values
    groups = padded.reshape(-1, GROUP)
    largest = np.abs(groups).max(axis=1)
    scaled = groups * (np.float32(1) / np.where(largest > 0, largest, np.float32(1)))[:, None]
    places = np.floor((scaled + np.float32(1)) * np.float32((_BINS - 1) / 2) + np.float32(0.5))
    return _code_of_bin()[places.astype(np.int32)].reshape(-1)[: len(values)], largest


def decode(stored: Mapping[str, Array], dtype: jnp.dtype) -> Float[Array, "*E O I"]:
    """Return the numbers: the absmax first, then as `nf4.decode`."""
    codes, largest, offset = stored[ABSMAX], stored[SCALE], stored[OFFSET]
    rows, width = codes.shape[-2:]
    group = jnp.arange(rows * width).reshape(rows, width) // GROUP
    scale = jnp.take(largest, group, axis=-1)
    absmax = jnp.asarray(code())[codes] * scale + offset[..., None]
    return nf4.decode({"": stored[""], ABSMAX: absmax}, dtype)


NF4_DOUBLE = Storage(arrays, Encoder, decode, nf4.problem)
