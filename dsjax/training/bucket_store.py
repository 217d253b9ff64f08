# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in an object store, which every process writes its own part of.

In: arrays by name, and a record of them that JSON can hold. Out: under `<step>/` objects with
pieces of arrays as plain bytes, one after the other; `<process>.json`, which says which lie where;
and, once all are there, `record.json`, without which nothing is a checkpoint. The arrays again, in
the shardings asked for. Written in the background, with no exchange between processes. Not done
here: which steps are saved, and proving that what is read was saved (`checkpoint`); requests and
their retries (`buckets`).

Why not Orbax: it writes to gs:// and to no other store, by three libraries each with its own way
to find credentials.
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from dsjax.buckets import Bucket
from dsjax.distributed.arrays import PIECE_BYTES, row_pieces
from dsjax.errors import ConfigError

RECORD = "record.json"
"""The last object of a checkpoint: it says that all others are there."""

_OURS = re.compile(r"\d+\.json|\d+/\d+|" + re.escape(RECORD))
"""What lies in a step's folder."""

PATIENCE = 1800.0
"""Seconds that process 0 waits, its own part being there, for those of the others."""


class Piece(NamedTuple):
    """A box of an array, and where its numbers lie.

    Attributes:
        start: its first index of each dimension.
        shape: its extent.
        object: name below the step's folder.
        offset: bytes before it in the object.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    object: str
    offset: int


def is_from_bucket(folder: Path) -> bool:
    """Whether checkpoints in a folder of a file system were copied there from a bucket."""
    return any(folder.glob(f"[0-9]*/{RECORD}"))


class Box(NamedTuple):
    """What one process writes of an array: its name, the first index of each dimension, numbers."""

    name: str
    start: tuple[int, ...]
    values: np.ndarray


class BucketStore:
    """The checkpoints in one folder of a bucket; see `OrbaxStore`, whose methods these are.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the newest; None for all.
        read_only: neither writes nor removes.
    """

    def __init__(self, folder: Bucket, keep: int | None, *, read_only: bool = False) -> None:
        self._folder, self._keep = folder, keep
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        found = self.steps_there()
        self._steps = [step for step in sorted(found) if self._is_complete(step)]
        unfinished = sorted(found.difference(self._steps))
        for step in unfinished:
            self._check_own(step)
        if not read_only and self._process == 0:
            for step in unfinished:
                place = self.place(step)
                print(f"{place}: an unfinished checkpoint, not used and removed", file=sys.stderr)
                self._remove(step)

    def place(self, step: int) -> str:
        """Name a checkpoint for messages."""
        return f"{self._folder}/{step}"

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, as far as this process knows them."""
        return list(self._steps)

    def steps_there(self) -> set[int]:
        """List the steps of which anything is there now, whoever wrote it."""
        return {int(name) for name in self._folder.folders() if name.isdecimal()}

    def save(self, step: int, leaves: Mapping[str, jax.Array], record: Mapping[str, Any]) -> None:
        """Start saving; wait for an earlier save first, and raise if that one failed.

        The arrays may be donated or deleted when this returns: what this process writes of them is
        on the host, where jax does not reuse what is still looked at.
        """
        self.wait()
        boxes = [box for name, leaf in leaves.items() for box in _boxes(name, _plain(leaf))]
        self._saving = self._pool.submit(self._write, step, boxes, dict(record))

    def _write(
        self,
        step: int,
        boxes: Sequence[Box],
        record: dict[str, Any],
    ) -> None:
        """Write this process's part; process 0 then waits for all others', and completes it."""
        folder = self._folder.folder(str(step))

        def put(numbered: tuple[int, Sequence[Box]]) -> list[list[Any]]:
            number, group = numbered
            name, index, offset = f"{self._process}/{number}", list[list[Any]](), 0
            for box in group:
                index.append([box.name, *Piece(box.start, box.values.shape, name, offset)])
                offset += box.values.nbytes
            folder.write(name, b"".join(box.values.tobytes() for box in group))
            return index

        parts = self._folder.at_once(put, list(enumerate(_groups(boxes))))
        index = [entry for part in parts for entry in part]
        folder.write(f"{self._process}.json", json.dumps(index).encode())
        if self._process == 0:
            pieces = [piece for part in self._all_parts(folder, step) for piece in part]
            whole = {**record, "pieces": pieces}
            if not folder.create(RECORD, json.dumps(whole).encode()):
                raise ConfigError(
                    f"{self.place(step)}: got a checkpoint that another process has completed, "
                    "expected none; another process trains here: stop one, or choose another "
                    "output_dir"
                )
            self._steps = sorted({*self._steps, step})
            self._remove_old()
        else:
            self._steps = sorted({*self._steps, step})

    def _all_parts(self, folder: Bucket, step: int) -> list[list[Any]]:
        """Read what every process says it has written, once all have."""
        deadline, parts = time.monotonic() + PATIENCE, dict[int, list[Any]]()
        while len(parts) < self._processes:
            for process in set(range(self._processes)) - parts.keys():
                text = folder.read_if_there(f"{process}.json")
                if text is not None:
                    parts[process] = json.loads(text)
            if len(parts) < self._processes:
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self._processes)) - parts.keys())
                    raise ConfigError(
                        f"{self.place(step)}: got no part of processes {missing} in "
                        f"{PATIENCE:g} s, expected every process's; see what they print"
                    )
                time.sleep(0.5)
        return [parts[process] for process in range(self._processes)]

    def read_record(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the arrays."""
        record = self._read(step)
        del record["pieces"]
        return record

    def read_leaves(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool
    ) -> dict[str, jax.Array]:
        """Read arrays into their shardings; no others are read in any case."""
        pieces: dict[str, list[Piece]] = {name: [] for name in wanted}
        for name, start, shape, place, offset in self._read(step)["pieces"]:
            if name in wanted:
                pieces[name].append(Piece(tuple(start), tuple(shape), place, offset))
        folder = self._folder.folder(str(step))
        return {name: _read_leaf(folder, leaf, pieces[name]) for name, leaf in wanted.items()}

    def wait(self) -> None:
        """Wait until a running save is complete, and raise if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Wait as `wait` does, then end the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _read(self, step: int) -> dict[str, Any]:
        return dict(json.loads(self._folder.read(f"{step}/{RECORD}")))

    def _is_complete(self, step: int) -> bool:
        return self._folder.holds(f"{step}/{RECORD}")

    def _check_own(self, step: int) -> None:
        """Refuse what looks like a checkpoint and is none of ours: it would be removed.

        Raises:
            ConfigError: somebody's files, or a checkpoint that was written on a file system.
        """
        names = self._folder.folder(str(step)).sizes()
        foreign = next((name for name in names if not _OURS.fullmatch(name)), None)
        if foreign is not None:
            raise ConfigError(
                f"output_dir: got {self.place(step)}/{foreign}, expected a run that was trained in "
                "this bucket, or a new place; choose another output_dir, or copy that run to a "
                "file system and go on there"
            )

    def _remove_old(self) -> None:
        if self._keep is not None:
            self._steps, old = self._steps[-self._keep :], self._steps[: -self._keep]
            for step in old:
                self._remove(step)

    def _remove(self, step: int) -> None:
        folder = self._folder.folder(str(step))
        folder.remove([RECORD])  # first: from here on it is none
        folder.remove(list(folder.sizes()))


def _groups(boxes: Sequence[Box]) -> Iterator[list[Box]]:
    """Put boxes together for one object each, of PIECE_BYTES at most: a request takes its time."""
    group, size = list[Box](), 0
    for box in boxes:
        if group and size + box.values.nbytes > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(box)
        size += box.values.nbytes
    if group:
        yield group


def _boxes(name: str, leaf: jax.Array) -> Iterator[Box]:
    """Yield what this process writes of an array.

    Of the copies of a box that several devices hold, one is written, in pieces of bounded size.
    """
    for shard in leaf.addressable_shards:
        if shard.replica_id or not shard.data.size:
            continue
        values = np.asarray(shard.data)
        start = tuple(index.start or 0 for index in shard.index)
        for rows in row_pieces(values.shape, values.dtype.itemsize):
            first = rows[0].start if rows else 0
            yield Box(name, (start[0] + first, *start[1:]) if rows else (), values[rows])


def _read_leaf(folder: Bucket, leaf: jax.ShapeDtypeStruct, pieces: Sequence[Piece]) -> jax.Array:
    """Read an array; each device's part is made on the host, one at a time."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    plain = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
    sharding = leaf.sharding
    assert isinstance(sharding, Sharding)
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    buffers = []
    for device, index in sharding.addressable_devices_indices_map(plain.shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), plain.shape, strict=True)
        )
        if bounds not in parts:
            parts[bounds] = _read_box(folder, bounds, np.dtype(plain.dtype), pieces)
        place = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        buffers.append(jax.device_put(parts[bounds], place))
    array = jax.make_array_from_single_device_arrays(plain.shape, sharding, buffers)
    return jax.random.wrap_key_data(array) if is_key else array


def _read_box(
    folder: Bucket,
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
    pieces: Sequence[Piece],
) -> np.ndarray:
    """Put a box of an array together from the pieces that lie over it."""
    box = np.empty([stop - start for start, stop in bounds], dtype)

    def read(piece: Piece) -> int:
        both = [
            (max(start, first), min(stop, first + extent))
            for (start, stop), first, extent in zip(bounds, piece.start, piece.shape, strict=True)
        ]
        if any(start >= stop for start, stop in both):
            return 0
        held = [
            slice(a - first, b - first) for (a, b), first in zip(both, piece.start, strict=True)
        ]
        place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, bounds, strict=True))
        box[place] = _read_rows(folder, piece, dtype, held)
        return math.prod(stop - start for start, stop in both)

    covered = sum(folder.at_once(read, pieces))
    if covered != box.size:
        raise ValueError(f"{covered} of {box.size} numbers are there")
    return box


def _read_rows(folder: Bucket, piece: Piece, dtype: np.dtype, held: Sequence[slice]) -> np.ndarray:
    """Read a part of a piece: whole rows of it by one request, of which the columns are kept."""
    row = dtype.itemsize * math.prod(piece.shape[1:])
    first, last = (held[0].start, held[0].stop) if held else (0, 1)
    data = folder.read(piece.object, piece.offset + first * row, piece.offset + last * row)
    shape = (last - first, *piece.shape[1:]) if held else ()
    rows = np.frombuffer(data, dtype).reshape(shape)
    return rows[(slice(None), *held[1:])] if held else rows


def _plain(leaf: jax.Array) -> jax.Array:
    """Return a random key as the words that it is made of."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
