# SPDX-License-Identifier: Apache-2.0
"""Rows and arrays over processes: nothing is lost or repeated, whatever the mesh."""

import itertools
import json
from pathlib import Path

import jax
import multi_process
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import MeshSection
from dsjax.distributed.mesh import batch_shards, make_mesh, process_rows, rows_sharding

SHAPES = [
    dict(zip(("data", "fsdp", "tensor", "expert"), sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(sizes) == 8
]
MESHES = [
    {"fsdp": 4},
    {"data": 2, "fsdp": 2},
    {"tensor": 2, "fsdp": 2},
    {"tensor": 4, "fsdp": 1},
    {"tensor": 2, "fsdp": 1, "expert": 2},
    {"sequence": 4, "fsdp": 1},
]


@given(
    shape=st.sampled_from(SHAPES),
    owners=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    portion=st.integers(1, 3),
)
def test_rows_of_any_processes_make_the_batch(shape, owners, portion):
    mesh = make_mesh(MeshSection(**shape))
    batch = batch_shards(mesh) * portion
    held = rows_sharding(mesh).devices_indices_map((batch,))
    union = set()
    for process in set(owners):
        devices = [d for d, owner in zip(jax.devices(), owners, strict=True) if owner == process]
        rows = process_rows(mesh, batch, devices)
        wanted = [range(batch)[held[device][0]] for device in devices]
        assert list(rows) == sorted(set(itertools.chain(*wanted)))
        for need in wanted:  # what a device holds lies together in what its process provides
            first = rows.index(need[0])
            assert list(rows[first : first + len(need)]) == list(need)
        union |= set(rows)
    assert union == set(range(batch))
    assert process_rows(mesh, batch) == tuple(range(batch))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_batches_and_arrays_over_processes(tmp_path: Path, processes: int, devices: int):
    words = [str(Path(__file__).with_name("collective_worker.py")), *map(json.dumps, MESHES)]
    run = multi_process.start(tmp_path, words, processes, devices)
    assert run.codes() == [0] * processes, [run.said(i)[-3000:] for i in range(processes)]
