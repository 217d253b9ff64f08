# SPDX-License-Identifier: Apache-2.0
"""Checksums: of the bits and their places, and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.distributed.checksums import checksums, digest

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool", "float8_e4m3fn")


def array_of(seed, shape, dtype):
    """An array of random bits."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape))
    return np.frombuffer(rng.bytes(count * jnp.dtype(dtype).itemsize), jnp.dtype(dtype)).reshape(
        shape
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_do_not_depend_on_the_mesh(dtype):
    value = array_of(0, (16, 8), dtype)
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=auto)
    layouts = [
        SingleDeviceSharding(jax.devices()[0]),
        *(NamedSharding(mesh, PartitionSpec(*axes)) for axes in [(), ("a", "b"), (None, "a")]),
    ]
    found = {checksums({"w": jax.device_put(value, layout)})["w"] for layout in layouts}
    assert len(found) == 1


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(max_examples=25)
@given(st.integers(0, 2**32), shapes, st.sampled_from(DTYPES))
def test_every_flipped_bit_is_seen(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    value = array_of(seed, shape, dtype)
    changed = value.copy()
    octets = changed.reshape(-1).view(np.uint8)
    octets[rng.integers(octets.size)] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
    assert checksums([jnp.asarray(value)]) != checksums([jnp.asarray(changed)])


def test_places_count():
    """Equal numbers in other places: rows, columns and halves exchanged."""
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    others = [value[::-1], value[:, ::-1], np.roll(value, 1), np.roll(value, 3, axis=0)]
    found = [checksums([jnp.asarray(v)])["0"] for v in [value, *others]]
    assert len(set(found)) == 5


def test_signs_of_zero_and_kinds_of_nan_count():
    zeros = [checksums([jnp.float32(x)])["0"] for x in (0.0, -0.0, np.nan)]
    assert len(set(zeros)) == 3


def test_random_keys_and_names():
    key = jax.random.key(3)
    tree = {"a": {"b": jnp.ones(3)}, "rng": key}
    assert checksums(tree).keys() == {"a.b", "rng"}
    assert checksums(key) == checksums(jax.random.key_data(key))


def test_a_digest_is_of_the_values():
    assert digest({"a": 1, "b": [0.1]}) == digest({"b": [0.1], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
