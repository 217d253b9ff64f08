# SPDX-License-Identifier: Apache-2.0
"""Rounding at random loses nothing on average, and is the same wherever an array lies."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import MeshSection
from dsjax.distributed.mesh import make_mesh
from dsjax.training.rounding import round_to, share_lost

DRAWS = 4096
BFLOAT16 = jnp.dtype("bfloat16")


@jax.jit
def _many(x: jax.Array, key: jax.Array) -> jax.Array:
    return round_to(jnp.broadcast_to(x, (DRAWS, *x.shape)), BFLOAT16, key)


def _assert_rounding_is_fair(values: list[float], seed: int) -> None:
    """Each draw is one of the two neighbours, and the mean is the value."""
    x = np.float32(values)
    drawn = np.asarray(_many(jnp.asarray(x), jax.random.key(seed)).astype(jnp.float32), np.float64)
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    low = bits.view(np.float32).astype(np.float64)
    high = (
        np.where(bits == x.view(np.uint32), bits, bits + np.uint32(0x10000))
        .astype(np.uint32)
        .view(np.float32)
        .astype(np.float64)
    )
    assert ((drawn == low) | (drawn == high)).all()
    share = np.where(high == low, 0, (x - low) / np.where(high == low, 1, high - low))
    spread = 6 * np.sqrt(share * (1 - share) / DRAWS) + 1 / 2**16
    ups = np.where(high == low, 0, (drawn == high).mean(0))
    assert (np.abs(ups - share) <= spread).all(), (x, ups, share)


_VALUES = given(
    values=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=8, max_size=8
    ),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=10)
@_VALUES
def test_rounding_is_fair(values: list[float], seed: int) -> None:
    _assert_rounding_is_fair(values, seed)


@pytest.mark.slow
@settings(max_examples=400)
@_VALUES
def test_rounding_is_fair_often(values: list[float], seed: int) -> None:
    _assert_rounding_is_fair(values, seed)


def test_what_bfloat16_has_stays_and_so_does_what_is_no_number() -> None:
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, 3.3895314e38], jnp.float32)
    for seed in range(20):
        found = round_to(x, BFLOAT16, jax.random.key(seed))
        assert np.asarray(found).tobytes() == np.asarray(x.astype(BFLOAT16)).tobytes()
        # Its last bits are set: added to, they would carry into the sign.
        nan = jnp.asarray(np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000]).view(np.float32))
        assert jnp.isnan(round_to(nan, BFLOAT16, jax.random.key(seed))).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_are_cast(dtype: str) -> None:
    x = jnp.linspace(-3, 3, 100)
    found = round_to(x, jnp.dtype(dtype), jax.random.key(0))
    np.testing.assert_array_equal(found, x.astype(dtype))


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
def test_every_mesh_rounds_alike_and_sends_nothing(mesh: dict[str, int]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 32)), jnp.float32)
    key = jax.random.key(5)
    expected = round_to(x, BFLOAT16, key)
    divided = NamedSharding(
        make_mesh(MeshSection(**({"fsdp": 1} | mesh))), PartitionSpec(None, "fsdp", "tensor")
    )
    rounded = (
        jax.jit(lambda x: round_to(x, BFLOAT16, key), in_shardings=divided, out_shardings=divided)
        .lower(x)
        .compile()
    )
    assert np.asarray(rounded(jax.device_put(x, divided))).tobytes() == (
        np.asarray(expected).tobytes()
    )
    assert "all-gather" not in (rounded.as_text() or "")


@pytest.mark.slow
def test_a_step_on_another_mesh_stores_the_same_but_for_neighbours() -> None:
    """The gradients' last bits differ with the order of sums; few values are that near to a bit."""
    stored = []
    for mesh in (None, {"fsdp": 2, "tensor": 2}):
        run = tiny_steps.start(
            mesh=mesh, model={"param_dtype": "bfloat16"}, optimizer={"learning_rate": 1e-4}
        )
        run.step(tiny_steps.batch())
        stored.append(run.trainable())
    same = [(stored[0][path] == stored[1][path]).mean() for path in stored[0]]
    assert min(same) > 0.99


def test_the_share_of_lost_updates() -> None:
    old = {"a": jnp.ones(4, BFLOAT16), "b": jnp.ones(4)}
    new = {"a": jnp.asarray([1, 1, 2, 1], BFLOAT16), "b": jnp.ones(4)}
    updates = {"a": jnp.asarray([1e-4, 1e-4, 1e-2, 0.0]), "b": jnp.ones(4)}
    share = share_lost(old, new, updates)
    assert share is not None and float(share) == pytest.approx(2 / 3)
    assert share_lost({"b": old["b"]}, {"b": new["b"]}, {"b": updates["b"]}) is None
