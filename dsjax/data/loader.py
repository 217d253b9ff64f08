# SPDX-License-Identifier: Apache-2.0
"""Examples -> this process's batch of any optimizer step.

In: examples, the `data` section, the batch size, the seed, the rows that this process provides.
Out: `Batch`es of one static shape, in which labels are shifted by one: `targets`. A step's batch
depends on (seed, step) alone: any position is reached without replay, and the processes' batches
together are the batch of a single process. Padding is known by length (`segment_ids` 0), never by a
token's value: most DeepSeek tokenizers pad with EOS, which is trained. Not here: device placement,
microbatches (`dsjax.training.step`).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jax import Array
from jaxtyping import Float32, Int32

from dsjax.config import DataSection
from dsjax.data.packing import EpochRows, PackingPlan
from dsjax.data.store import ExampleStore

# Threads, not processes: a batch is a few copies out of the page cache and takes about a
# millisecond, less than sending it between processes. Eight steps ahead cover any hiccup.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(NamedTuple):
    """Packed rows as arrays of numpy or jax."""

    input_ids: Int32[Array | np.ndarray, "B T"]
    targets: Int32[Array | np.ndarray, "B T"]
    """The token to predict at t, shifted within each segment; 0 where the weight is 0."""
    loss_weights: Float32[Array | np.ndarray, "B T"]
    """Weight of predicting `targets[t]`; 0: not trained."""
    segment_ids: Int32[Array | np.ndarray, "B T"]
    """From 1 within a row; 0 is padding."""
    position_ids: Int32[Array | np.ndarray, "B T"]
    """From 0 in every segment."""


class Loader:
    """Batches of a run over `examples`; steps are 0-based optimizer steps, epochs without end.

    Args:
      examples: what `load_examples` returned.
      section: `max_length`, `packing`, `shuffle`.
      batch_size: packed rows per step over all processes.
      seed: of the order.
      rows: which rows of each batch this process provides, sorted; all, if None.
      multiple: what divides `max_length`, and has to divide T.

    Attributes:
      batch_size: as given.
      rows: as given.
      sequence_length: T of every batch: `max_length` with packing; else the longest example,
        rounded up to a multiple of 8 and of `multiple`, at most `max_length`.
      rows_in_epoch: packed rows, the same in every epoch.
      sequences: examples in an epoch, one or more in a row.
    """

    def __init__(
        self,
        examples: ExampleStore,
        section: DataSection,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
        multiple: int = 1,
    ) -> None:
        self._examples = examples
        self.sequences = len(examples)
        self.batch_size = batch_size
        self.rows = tuple(range(batch_size) if rows is None else rows)
        self.sequence_length = _sequence_length(examples, section, multiple)
        self._plan = PackingPlan(
            examples.lengths, section.max_length, section.packing, section.shuffle, seed
        )
        self.rows_in_epoch = self._plan.rows
        # Two: prefetching threads work on both sides of an epoch's end.
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._plan.epoch)

    def steps_in_epoch(self, epoch: int = 0) -> int:
        """Return the steps of an epoch; the last batch may be short of rows, none is dropped."""
        del epoch  # every epoch has the same number of packed rows
        return -(-self.rows_in_epoch // self.batch_size)

    def total_steps(self, num_train_epochs: int | float, max_steps: int | None) -> int:
        """Return the length of a run: `max_steps` if given, else that of the epochs."""
        if max_steps is not None:
            return max_steps
        # Rounded first: 1.1 epochs of 10 steps are 11 steps, not the 12 of 11.000000000000002.
        return math.ceil(round(num_train_epochs * self.steps_in_epoch(), 6))

    def position(self, step: int) -> dict[str, int]:
        """Return where in the data a step starts: the epoch and its first packed row."""
        epoch, place = divmod(step, self.steps_in_epoch())
        return {"epoch": epoch, "row": place * self.batch_size}

    def epoch(self, step: int) -> float:
        """Return how many epochs are done after `step` steps."""
        return step / self.steps_in_epoch()

    def iterate(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield this process's numpy batches of the steps from `start_step` to before `stop_step`.

        Batches are made ahead by grain's threads. Closing the iterator early stops them.
        """
        if start_step >= stop_step:
            return
        steps = grain.MapDataset.range(start_step, stop_step)
        batches = iter(steps.map(self.batch).to_iter_dataset(READ_OPTIONS))
        try:
            yield from batches
        finally:
            batches.close()

    def batch(self, step: int) -> Batch:
        """Build this process's batch of one step."""
        shape = (len(self.rows), self.sequence_length)
        batch = Batch(
            input_ids=np.zeros(shape, np.int32),
            targets=np.zeros(shape, np.int32),
            loss_weights=np.zeros(shape, np.float32),
            segment_ids=np.zeros(shape, np.int32),
            position_ids=np.zeros(shape, np.int32),
        )
        place = self.position(step)
        rows = self._epoch_rows(place["epoch"])
        for index, offset in enumerate(self.rows):
            if place["row"] + offset < self.rows_in_epoch:
                self._fill(batch, index, rows, place["row"] + offset)
        return batch

    def _fill(self, batch: Batch, index: int, rows: EpochRows, row: int) -> None:
        """Write the examples of one packed row, one segment each."""
        start = 0
        for segment, number in enumerate(rows.row(row).tolist(), 1):
            ids, labels, weights = self._examples[number]
            stop = start + len(ids)
            batch.input_ids[index, start:stop] = ids
            # The last position of a segment predicts nothing: its next token is another example's.
            batch.targets[index, start : stop - 1] = np.where(weights[1:] != 0, labels[1:], 0)
            batch.loss_weights[index, start : stop - 1] = weights[1:]
            batch.segment_ids[index, start:stop] = segment
            batch.position_ids[index, start:stop] = np.arange(len(ids))
            start = stop


def _sequence_length(examples: ExampleStore, section: DataSection, multiple: int) -> int:
    if section.packing:
        return section.max_length
    longest, step = int(examples.lengths.max()), math.lcm(8, multiple)
    return min(section.max_length, -(-longest // step) * step)
