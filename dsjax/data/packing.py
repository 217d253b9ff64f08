# SPDX-License-Identifier: Apache-2.0
"""The global plan: which examples make up which row of the run, epoch by epoch.

In: the lengths of all examples, the `data` section, the seed. Out: for any epoch, the packed rows
in order, each a list of example indices; a pure function of (seed, epoch, lengths), so every
process comes to the same plan, whatever their number. Nothing is dropped, nothing comes twice.

With `shuffle` rows are packed best-fit-decreasing, which leaves almost no padding. Which lengths
share a row is then the same in every epoch, and so is the number of rows; which examples of these
lengths they are, and the order of the rows, is drawn anew. Without `shuffle` consecutive examples
share a row while they fit: the order is that of the files. Not here: tokens, batches (`loader`).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

Lengths = Int64[np.ndarray, " N"]
Bins = Int64[np.ndarray, " N"]


class EpochRows(NamedTuple):
    """Packed rows: row r holds `examples[starts[r] : starts[r + 1]]`."""

    examples: Int64[np.ndarray, " N"]
    starts: Int64[np.ndarray, " _"]

    def row(self, index: int) -> Int64[np.ndarray, " S"]:
        """Return the example indices of one packed row."""
        return self.examples[self.starts[index] : self.starts[index + 1]]


class PackingPlan:
    """Packed rows of every epoch; `rows` is their number, the same in each."""

    def __init__(
        self, lengths: Lengths, capacity: int, packing: bool, shuffle: bool, seed: int
    ) -> None:
        self._lengths, self._shuffle, self._seed = lengths, shuffle, seed
        self._bins = _bins(lengths, capacity, packing, shuffle)
        self.rows = int(self._bins.max()) + 1

    def epoch(self, epoch: int) -> EpochRows:
        """Plan one epoch."""
        bins = self._bins
        if not self._shuffle:
            return _grouped(np.arange(len(bins)), bins, self.rows)
        example_keys, row_keys = _keys(self._seed, epoch, len(bins), self.rows)
        # bins[i] is the row of the i-th longest example; the keys decide among equal lengths.
        examples = np.lexsort((example_keys, -self._lengths))
        place = np.empty(self.rows, np.int64)
        place[np.argsort(row_keys, kind="stable")] = np.arange(self.rows)
        return _grouped(examples, place[bins], self.rows)


def best_fit(lengths: Lengths, capacity: int) -> Bins:
    """Give each length, in order, the fullest open bin that still has room; else a new bin.

    Bins with equal room are taken last opened first. The set of rooms that occur is one integer
    used as a bit set, so the search costs no loop over bins.

    Args:
      lengths: none above `capacity`.
      capacity: size of a bin.

    Returns:
      The bin of each length; bins are numbered as they are opened.
    """
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    opened = 0
    chosen = np.empty(len(lengths), np.int64)
    for index, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            found = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, found = capacity, opened
            opened += 1
        left = room - length
        if left:
            open_bins[left].append(found)
            rooms |= 1 << left
        chosen[index] = found
    return chosen


def consecutive_fit(lengths: Lengths, capacity: int) -> Bins:
    """Fill one bin after the other with consecutive lengths, as far as each fits whole."""
    ends = np.cumsum(lengths)
    chosen = np.empty(len(lengths), np.int64)
    start, opened = 0, 0
    while start < len(lengths):
        used = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, used + capacity, side="right"))
        chosen[start:stop] = opened
        start, opened = stop, opened + 1
    return chosen


def _bins(lengths: Lengths, capacity: int, packing: bool, shuffle: bool) -> Bins:
    if not packing:
        return np.arange(len(lengths))
    if not shuffle:
        return consecutive_fit(lengths, capacity)
    return best_fit(np.sort(lengths)[::-1], capacity)


def _keys(seed: int, epoch: int, *sizes: int) -> list[UInt64[np.ndarray, " _"]]:
    """Draw sort keys. Raw bits of a bit generator: numpy keeps that stream, and only that, the
    same in all versions, so a resumed run finds its order again after an upgrade."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return [bits.random_raw(size) for size in sizes]


def _grouped(examples: Int64[np.ndarray, " N"], rows: Bins, count: int) -> EpochRows:
    """Order examples by their row, stable within a row."""
    order = np.argsort(rows, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    return EpochRows(examples[order], starts.astype(np.int64))
