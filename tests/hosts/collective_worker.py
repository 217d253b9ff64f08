# SPDX-License-Identifier: Apache-2.0
"""One of several processes: it does what they do together, and fails where that is not so.

Run by `test_hosts_together.py`, which says how many there are and on which meshes. The same data
is laid out by all processes, brought together on every device, and compared with the whole.
"""

import json
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import DataSection, MeshSection
from dsjax.config.train_options import split_process_options
from dsjax.data import Batch, Example, Loader
from dsjax.data.store import ExampleStore
from dsjax.distributed.arrays import host_array, host_part
from dsjax.distributed.bootstrap import detect_process
from dsjax.distributed.mesh import make_mesh, process_rows, replicated
from dsjax.distributed.processes import Hosts, process_group
from dsjax.errors import run_command
from dsjax.training.evaluation import to_devices

BATCH = 8


def main(argv: Sequence[str]) -> int:
    """Take the meshes as JSON, a word each."""
    given, words = split_process_options(argv)
    with process_group(detect_process(given, os.environ)) as hosts:
        talk(hosts)
        for word in words:
            mesh = make_mesh(MeshSection(**json.loads(word)))
            compare_batches(mesh)
            compare_parts(mesh)
    return 0


def talk(hosts: Hosts) -> None:
    """Everybody hears everybody, and process 0 decides."""
    assert hosts.all_gather_text(f"from {hosts.index}") == [f"from {i}" for i in range(hosts.count)]
    assert hosts.broadcast_from_primary(lambda: ["decided by", hosts.index]) == ["decided by", 0]
    hosts.assert_equal({"same": 1})


def store() -> ExampleStore:
    """29 examples, of which tokens tell which each is: no batch size divides their rows."""
    made = ExampleStore()
    for number in range(29):
        ids = (100 * number + np.arange(1, 4 + number % 5)).astype(np.int32)
        made.append(Example(ids, ids, np.ones(len(ids), np.float32)))
    made.finalize()
    return made


def compare_batches(mesh: jax.sharding.Mesh) -> None:
    """Over two epochs, the devices hold the batches of a process alone, row by row."""
    examples = store()
    section = DataSection(train=["x"], max_length=12)
    alone = Loader(examples, section, BATCH, seed=3)
    here = Loader(examples, section, BATCH, 3, process_rows(mesh, BATCH))
    bring = jax.jit(lambda batch: batch, out_shardings=replicated(mesh))
    seen = []
    for step in range(2 * alone.steps_in_epoch()):
        found = bring(to_devices(here.batch(step), mesh, here))
        whole = Batch(*(np.asarray(field) for field in found))
        assert all(map(np.array_equal, whole, alone.batch(step))), (mesh.shape, step)
        starts = (whole.position_ids == 0) & (whole.segment_ids > 0)
        seen += (whole.input_ids[starts] // 100).tolist()
    assert sorted(seen) == sorted(2 * list(range(29))), "a row is lost or repeated"


def compare_parts(mesh: jax.sharding.Mesh) -> None:
    """Every part of a sharded array comes to every host as it is, bit by bit."""
    whole = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
    whole[0, 0, :3] = np.nan, -0.0, np.inf
    for spec in ((None, "fsdp", "tensor"), (None, ("expert", "fsdp")), ("data",), ()):
        names = [name for part in spec if part for name in np.atleast_1d(part)]
        if any(whole.shape[0] % mesh.shape[name] for name in names if spec[0] == name):
            continue
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        array = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
        for index in ((1,), (2, slice(3, 7)), (0, slice(0, 5), slice(2, 11)), (slice(1, 3),), ()):
            same(host_part(array, index), whole[index])
        kept = host_array(array)
        assert kept is not None
        same(kept, whole)
        half = array.astype(jax.numpy.bfloat16)
        same(host_part(half, (0,)), whole.astype(jax.numpy.bfloat16)[0])


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare bits."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


if __name__ == "__main__":
    print(sys.argv, file=sys.stderr)
    run_command(main)
