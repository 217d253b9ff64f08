# SPDX-License-Identifier: Apache-2.0
"""States to save, and how one that was read is compared with it.

In: a step. Out: a train state that depends on it. Not here: the checkpointers (conftest.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.config import CheckpointSection
from dsjax.distributed.checksums import named_leaves

EVERY = CheckpointSection(save_steps=1, save_total_limit=None)


class State(NamedTuple):
    trainable: dict[str, jax.Array]
    opt_state: optax.OptState
    step: jax.Array
    rng: jax.Array


def make_state(step, width=6):
    params = {
        "model.norm.weight": jnp.full(width, float(step)),
        "model.layers.q_proj.weight": jnp.arange(8.0 * width).reshape(8, width).astype("bfloat16"),
    }
    optimizer = optax.adamw(1e-3, mask=dict.fromkeys(params, True))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return State(params, opt_state, jnp.int32(step), jax.random.key(step))


def matrix_shardings():
    """Ways to lay a matrix of 16 x 8 over eight devices, and on one."""
    auto = (AxisType.Auto, AxisType.Auto)
    return [
        NamedSharding(jax.make_mesh((4, 2), ("a", "b"), axis_types=auto), PartitionSpec("a", "b")),
        NamedSharding(jax.make_mesh((1, 8), ("a", "b"), axis_types=auto), PartitionSpec("b")),
        NamedSharding(jax.make_mesh((2, 4), ("a", "b"), axis_types=auto), PartitionSpec()),
        SingleDeviceSharding(jax.devices()[0]),
    ]


def abstract(tree, sharding=None):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(leaf, tree)


def bits(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name, leaf in named_leaves(expected).items():
        assert named_leaves(actual)[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(bits(named_leaves(actual)[name]), bits(leaf), name)


def saved(open_in, *steps):
    checkpointer = open_in()
    for step in steps:
        checkpointer.save(step, make_state(step), {"position": {"epoch": 0, "row": step}})
    checkpointer.wait()
    return checkpointer
