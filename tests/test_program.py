# SPDX-License-Identifier: Apache-2.0
"""What a compiled program tells of its memory and its collectives."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.program import Collective, collectives_of, memory_of


def _mesh() -> Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def test_collectives_in_nested_loops_count_as_often_as_they_run() -> None:
    mesh = _mesh()

    def body(x: jax.Array) -> jax.Array:
        def inner(total, _):
            return total + jax.lax.all_gather(total[:4], "x", tiled=True).sum(), None

        def outer(total, _):
            total, _ = jax.lax.scan(inner, total, None, length=5)
            return jax.lax.psum(total, "x") * 0.1, None

        return jax.lax.scan(outer, x, None, length=3)[0]

    run = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    compiled = jax.jit(run).lower(jnp.zeros(64)).compile()

    # Gathered: 8 x 4 floats, 15 times; summed: 8 floats on a device, 3 times.
    assert collectives_of(compiled.as_text()) == [
        Collective("all-gather", 15, 15 * 32 * 4),
        Collective("all-reduce", 3, 3 * 8 * 4),
    ]


def test_the_larger_side_of_a_scatter_counts() -> None:
    run = jax.shard_map(
        lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
        mesh=_mesh(),
        in_specs=P(),
        out_specs=P("x"),
        check_vma=False,
    )
    found = collectives_of(jax.jit(run).lower(jnp.zeros((16, 4))).compile().as_text())
    assert [(c.count, c.bytes) for c in found] == [(1, 16 * 4 * 4)]


def test_a_program_without_collectives_has_none() -> None:
    assert collectives_of(jax.jit(jnp.sin).lower(jnp.zeros(8)).compile().as_text()) == []


def test_memory_is_what_arrays_take_on_a_device() -> None:
    sharding = NamedSharding(_mesh(), P("x"))
    x = jax.ShapeDtypeStruct((1024, 4), jnp.float32, sharding=sharding)
    step = jax.jit(lambda x: x * 2, donate_argnums=0, in_shardings=sharding, out_shardings=sharding)

    memory = memory_of(step.lower(x).compile(), "cpu")

    part = 1024 * 4 * 4 // 8
    assert (memory.arguments, memory.outputs, memory.aliased) == (part, part, part)
    assert memory.peak == part + memory.temporaries + memory.code
