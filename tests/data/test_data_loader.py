# SPDX-License-Identifier: Apache-2.0
"""The plan loses and doubles nothing, batches do not depend on who asks, positions are exact."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import DataSection
from dsjax.data import Batch, Example, Loader
from dsjax.data.packing import PackingPlan, best_fit, consecutive_fit
from dsjax.data.store import ExampleStore

CAPACITY = 16
lengths_lists = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def store(lengths: list[int]) -> ExampleStore:
    """Examples whose tokens tell them apart: the k-th token of example i is 100·i + k + 1."""
    made = ExampleStore()
    for number, length in enumerate(lengths):
        ids = (100 * number + np.arange(1, length + 1)).astype(np.int32)
        weights = np.full(length, 1 + number, np.float32)
        weights[length // 2] = 0
        made.append(Example(ids, ids, weights))
    made.finalize()
    return made


def section(**fields) -> DataSection:
    return DataSection(train=["x"], max_length=CAPACITY, **fields)


def loader(lengths: list[int], batch_size: int = 4, **fields) -> Loader:
    return Loader(store(lengths), section(**fields), batch_size, seed=7)


def segments(batch: Batch) -> list[list[int]]:
    """The tokens of every segment of a batch, in order."""
    found = []
    for ids, numbers in zip(batch.input_ids, batch.segment_ids, strict=True):
        for number in range(1, numbers.max() + 1):
            found.append(ids[numbers == number].tolist())
    return found


def epoch_of(made: Loader, epoch: int) -> list[list[int]]:
    steps = made.steps_in_epoch(epoch)
    batches = made.iterate(epoch * steps, (epoch + 1) * steps)
    return [tokens for batch in batches for tokens in segments(batch)]


@given(lengths=lengths_lists, packing=st.booleans(), shuffle=st.booleans(), epoch=st.integers(0, 3))
def test_every_example_comes_once_in_every_epoch(lengths, packing, shuffle, epoch):
    plan = PackingPlan(np.array(lengths), CAPACITY, packing, shuffle, seed=1)
    rows = plan.epoch(epoch)
    assert sorted(rows.examples.tolist()) == list(range(len(lengths)))
    assert rows.starts[0] == 0 and rows.starts[-1] == len(lengths)
    assert len(rows.starts) == plan.rows + 1 and (np.diff(rows.starts) > 0).all()
    for index in range(plan.rows):
        members = rows.row(index)
        assert np.array(lengths)[members].sum() <= CAPACITY
        assert packing or len(members) == 1


@given(lengths=lengths_lists)
def test_best_fit_takes_the_fullest_bin_with_room(lengths):
    bins = best_fit(np.array(lengths), CAPACITY)
    used: list[int] = []
    for length, chosen in zip(lengths, bins.tolist(), strict=True):
        rooms = [CAPACITY - total for total in used if CAPACITY - total >= length]
        if chosen == len(used):
            assert not rooms
            used.append(0)
        else:
            assert CAPACITY - used[chosen] == min(rooms)
        used[chosen] += length


@given(lengths=lengths_lists)
def test_consecutive_fit_keeps_the_order(lengths):
    bins = consecutive_fit(np.array(lengths), CAPACITY)
    assert bins[0] == 0 and set(np.diff(bins).tolist()) <= {0, 1}
    for start in np.flatnonzero(np.diff(bins)) + 1:
        before = np.array(lengths)[bins == bins[start] - 1].sum()
        assert before + lengths[start] > CAPACITY


@given(lengths=lengths_lists, packing=st.booleans(), batch_size=st.integers(1, 5))
@settings(max_examples=20)
def test_batches_hold_whole_examples(lengths, packing, batch_size):
    made = loader(lengths, batch_size, packing=packing, shuffle=True)
    expected = [(100 * i + np.arange(1, n + 1)).tolist() for i, n in enumerate(lengths)]
    for epoch in (0, 1):
        assert sorted(epoch_of(made, epoch)) == sorted(expected)


@given(lengths=lengths_lists, packing=st.booleans())
@settings(max_examples=20)
def test_segments_positions_and_targets(lengths, packing):
    made = loader(lengths, packing=packing)
    examples = store(lengths)
    for step in range(made.steps_in_epoch()):
        batch = made.batch(step)
        assert {field.shape for field in batch} == {(4, made.sequence_length)}
        assert [field.dtype.name for field in batch] == ["int32", "int32", "float32"] + [
            "int32"
        ] * 2
        padding = batch.segment_ids == 0
        assert not any(field[padding].any() for field in batch)
        assert not (batch.targets[batch.loss_weights == 0]).any()
        for row in range(4):
            for number in range(1, batch.segment_ids[row].max() + 1):
                inside = batch.segment_ids[row] == number
                ids = batch.input_ids[row, inside]
                example = examples[int(ids[0]) // 100]
                weights = batch.loss_weights[row, inside]
                assert weights.tolist() == [*example.loss_weights[1:], 0]
                shifted = np.where(weights != 0, np.append(ids[1:], 0), 0)
                assert batch.targets[row, inside].tolist() == shifted.tolist()
                assert batch.position_ids[row, inside].tolist() == list(range(len(ids)))


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("packing", [True, False])
def test_processes_share_the_batch_of_one(processes, packing):
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 50).tolist()
    examples, settings_ = store(lengths), section(packing=packing)
    alone = Loader(examples, settings_, 6, seed=3)
    # Not in a row: a process has the rows of its devices, wherever these are in the mesh.
    rows = [range(index, 6, processes) for index in range(processes)]
    parts = [Loader(examples, settings_, 6, 3, own) for own in rows]
    stop = 2 * alone.steps_in_epoch() + 1
    for whole, *shares in zip(
        alone.iterate(0, stop), *(part.iterate(0, stop) for part in parts), strict=True
    ):
        for field, pieces in zip(whole, zip(*shares, strict=True), strict=True):
            for own, piece in zip(rows, pieces, strict=True):
                np.testing.assert_array_equal(field[own], piece)


def test_a_run_continues_where_it_stopped():
    made = loader([3, 5, 9, 2, 8, 16, 7, 1], batch_size=2)
    whole = list(made.iterate(0, 11))
    for start in (0, 1, 4, 10):
        again = loader([3, 5, 9, 2, 8, 16, 7, 1], batch_size=2).iterate(start, 11)
        for expected, batch in zip(whole[start:], again, strict=True):
            assert all(map(np.array_equal, expected, batch))


def test_epochs_differ_and_seeds_differ():
    made = loader([4] * 40)
    assert epoch_of(made, 0) != epoch_of(made, 1)
    other = Loader(store([4] * 40), section(), 4, seed=8)
    assert epoch_of(made, 0) != epoch_of(other, 0)


def test_the_order_stays_the_same_for_good():
    # A resumed run relies on it: this order must not change with numpy or with this package.
    rows = PackingPlan(np.array([2, 3, 5, 7, 2, 3, 5, 7]), 9, True, True, seed=42).epoch(1)
    assert rows.examples.tolist() == [6, 5, 3, 4, 2, 1, 7, 0]
    assert rows.starts.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("packing", [True, False])
def test_without_shuffle_files_keep_their_order(packing):
    made = loader([5, 7, 4, 9, 1, 16, 2], packing=packing, shuffle=False)
    for epoch in (0, 1):
        assert [tokens[0] // 100 for tokens in epoch_of(made, epoch)] == [0, 1, 2, 3, 4, 5, 6]


def test_rows_in_file_order_as_the_contract_says():
    made = loader([3, 2, 5, 4, 1], batch_size=2, packing=False, shuffle=False)
    assert made.sequence_length == 8
    batch = made.batch(1)
    assert batch.input_ids.tolist() == [
        [201, 202, 203, 204, 205, 0, 0, 0],
        [301, 302, 303, 304, 0, 0, 0, 0],
    ]
    last = made.batch(2)
    assert last.input_ids[:, 0].tolist() == [401, 0] and not last.segment_ids[1].any()


@pytest.mark.parametrize(
    ("lengths", "packing", "expected"),
    [([3], True, 16), ([3], False, 8), ([8, 1], False, 8), ([9], False, 16), ([15], False, 16)],
)
def test_sequence_length_is_one_for_all_batches(lengths, packing, expected):
    assert loader(lengths, packing=packing).sequence_length == expected


@pytest.mark.parametrize(("multiple", "expected"), [(1, 8), (4, 8), (16, 16), (12, 24), (96, 48)])
def test_sequence_length_is_a_multiple_of_what_the_mesh_asks_for(multiple, expected):
    """At most `max_length`, which is checked to be one."""
    whole = DataSection(train=["x"], max_length=48, packing=False)
    assert Loader(store([5]), whole, 1, seed=0, multiple=multiple).sequence_length == expected


def test_sequence_length_never_exceeds_max_length():
    odd = DataSection(train=["x"], max_length=13, packing=False)
    assert Loader(store([13]), odd, 1, seed=0).sequence_length == 13


def test_steps_and_positions():
    made = loader([CAPACITY] * 10)  # 10 rows in batches of 4
    assert made.rows_in_epoch == 10
    assert [made.steps_in_epoch(epoch) for epoch in (0, 5)] == [3, 3]
    assert made.position(0) == {"epoch": 0, "row": 0}
    assert made.position(5) == {"epoch": 1, "row": 8}
    assert made.epoch(3) == 1.0
    totals = [(1, None, 3), (2.5, None, 8), (0.1, None, 1), (0.5, 7, 7), (3, None, 9)]
    for epochs, most, expected in totals:
        assert made.total_steps(epochs, most) == expected
    ten = loader([CAPACITY] * 40)
    assert ten.total_steps(1.1, None) == 11


def test_no_steps_give_no_batches():
    assert list(loader([3]).iterate(5, 5)) == []


def test_closing_early_stops_the_threads():
    before = threading.active_count()
    batches = loader([4] * 40).iterate(0, 10_000)
    next(batches)
    batches.close()
    for thread in threading.enumerate()[before:]:
        thread.join(timeout=10)
    assert threading.active_count() <= before
