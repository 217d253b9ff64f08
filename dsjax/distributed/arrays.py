# SPDX-License-Identifier: Apache-2.0
"""Parts of arrays that no process holds whole, on the host.

In: an array, and which part of it. Out: the part as numpy, the same on every process; all of them
call alike, since each adds what its devices hold. Host and device memory grow with the part, not
with the array. Not done here: which parts, and in which order.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PIECE_BYTES = 64 * 2**20
"""Most bytes of a parameter that are on the host at a time."""


def row_pieces(
    shape: tuple[int, ...], itemsize: int, multiple: int = 1
) -> Iterator[tuple[slice, ...]]:
    """Slices of the first axis that cut a tensor into pieces of at most PIECE_BYTES.

    Args:
        shape: of the tensor.
        itemsize: bytes of one number.
        multiple: rows that must not be parted, even if they are more.
    """
    if not shape:
        yield ()
        return
    rows = PIECE_BYTES // max(1, itemsize * math.prod(shape[1:]))
    rows = max(1, rows // multiple) * multiple
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)


Index = tuple[int | slice, ...]


def is_here(array: Any) -> bool:
    """Whether this process holds the whole array."""
    return isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated


def host_part(array: Any, index: Index = ()) -> np.ndarray:
    """Return the part of an array that integers and slices of step 1 select.

    Args:
        array: of jax, whatever its sharding, or of numpy; on every process the same.
        index: for the leading dimensions; the others are taken whole.
    """
    if is_here(array):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            array = array.addressable_data(0)  # of the copies that all processes hold, one here
        return np.asarray(array[index])
    bounds = _bounds(index, array.shape)
    sizes = tuple(stop - start for start, stop in bounds)
    bits = np.dtype(f"uint{8 * array.dtype.itemsize}")
    part = np.zeros(sizes, bits)
    for shard in array.addressable_shards:
        held = _bounds(shard.index, array.shape)
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, held, strict=True)]
        if shard.replica_id or any(start >= stop for start, stop in both):
            continue
        # Not `shard.data[...]`: every other slice would be another program.
        starts = [start - first for (start, _), (first, _) in zip(both, held, strict=True)]
        values = jax.lax.dynamic_slice(shard.data, starts, [stop - start for start, stop in both])
        place = tuple(
            slice(start - first, stop - first)
            for (start, stop), (first, _) in zip(both, bounds, strict=True)
        )
        part[place] = np.asarray(values).view(bits)
    whole = _sum_of_processes(part).view(array.dtype)
    return whole.reshape(
        [
            size
            for size, at in zip(sizes, [*index, *(slice(None),) * array.ndim], strict=False)
            if isinstance(at, slice)
        ]
    )


def host_array(array: jax.Array, keep: bool = True) -> np.ndarray | None:
    """Bring a whole array here piece by piece; without `keep`, take part for the others: None."""
    if is_here(array):
        return np.asarray(array) if keep else None
    whole = np.empty(array.shape, array.dtype) if keep else None
    for rows in row_pieces(array.shape, array.dtype.itemsize):
        piece = host_part(array, rows)
        if whole is not None:
            whole[rows] = piece
    return whole


def _bounds(index: Sequence[Any], shape: Sequence[int]) -> list[tuple[int, int]]:
    """First and last + 1 in every dimension."""
    slices = [at if isinstance(at, slice) else slice(at, at + 1) for at in index]
    slices += [slice(None)] * (len(shape) - len(slices))
    return [at.indices(size)[:2] for at, size in zip(slices, shape, strict=True)]


def _sum_of_processes(part: np.ndarray) -> np.ndarray:
    """Return the sum of what the processes hold, where at most one of them is not 0."""
    mesh = _process_mesh()
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    stacked = jax.make_array_from_callback(
        (mesh.devices.shape[0], *part.shape), sharding, lambda index: part[None]
    )
    return np.asarray(_sum(mesh)(stacked))


@lru_cache(maxsize=1)
def _process_mesh() -> Mesh:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))


@lru_cache(maxsize=1)
def _sum(mesh: Mesh) -> Any:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), out_shardings=everywhere)
