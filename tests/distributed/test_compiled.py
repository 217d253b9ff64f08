# SPDX-License-Identifier: Apache-2.0
"""What a compiled program tells of its memory and its collectives."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.distributed.compiled import Collective, Collectives, collectives_of, memory_of


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
    by_kind = [
        Collective("all-gather", 15, 15 * 32 * 4),
        Collective("all-reduce", 3, 3 * 8 * 4),
    ]
    assert collectives_of(compiled.as_text()) == Collectives(by_kind, unknown_loops=0)


def test_a_loop_whose_length_is_not_told_is_counted_once_and_named() -> None:
    def until_it_is_small(x: jax.Array) -> jax.Array:
        x = jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: jax.lax.psum(x, "x") / 9, x)
        return jax.lax.while_loop(lambda x: jnp.max(x) > 0.1, lambda x: x / 2, x)

    run = jax.shard_map(
        until_it_is_small, mesh=_mesh(), in_specs=P("x"), out_specs=P("x"), check_vma=False
    )
    found = collectives_of(jax.jit(run).lower(jnp.zeros(64)).compile().as_text())
    # The other loop sends nothing.
    assert found == Collectives([Collective("all-reduce", 1, 8 * 4)], unknown_loops=1)


TPU_TEXT = """HloModule step

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %input = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.9, %a, %b)
}

ENTRY %main (x: bf16[64,8], y: f32[32]) -> bf16[16,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = f32[32]{0:T(128)} parameter(1)
  %all-reduce.3 = (bf16[64,8]{1,0}, f32[32]{0}) all-reduce(%x, /*index=1*/%y), to_apply=%add
  %all-gather-start = (f32[32]{0}, f32[128]{0}) all-gather-start(%y), dimensions={0}
  %collective-permute-start = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%y)
  ROOT %fusion = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_what_is_moved_together_counts_and_a_sum_that_is_sliced_is_a_scatter() -> None:
    assert collectives_of(TPU_TEXT).by_kind == [
        Collective("all-gather", 1, 128 * 4),
        Collective("all-reduce", 1, 64 * 8 * 2 + 32 * 4),
        Collective("reduce-scatter", 1, 64 * 8 * 2),
        Collective("collective-permute", 1, 32 * 4),
    ]


STEPS_TEXT = """HloModule step

%begin (p.0: bf16[8,4]) -> (bf16[8,4], bf16[64,4]) {
  %p.0 = bf16[8,4]{1,0} parameter(0)
  %all-gather.1 = bf16[64,4]{1,0} all-gather(%p.0), frontend_attributes={chain_id="7"}
  ROOT %c.1 = (bf16[8,4], bf16[64,4]) custom-call(%p.0), custom_call_target="AsyncCollectiveStart"
}

%carry_on (p.1: bf16[8,4]) -> (bf16[8,4], bf16[64,4]) {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %all-gather.2 = bf16[64,4]{1,0} all-gather(%p.1), frontend_attributes={chain_id="7"}
  ROOT %t.1 = (bf16[8,4], bf16[64,4]) tuple(%p.1, %all-gather.2)
}

%end (p.2: bf16[8,4]) -> bf16[64,4] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  %all-gather.3 = bf16[64,4]{1,0} all-gather(%p.2), frontend_attributes={chain_id="7"}
  ROOT %c.2 = bf16[64,4]{1,0} custom-call(%p.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[8,4]) -> bf16[64,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %f.0 = (bf16[8,4], bf16[64,4]) fusion(%x), kind=kCustom, calls=%begin
  %f.1 = (bf16[8,4], bf16[64,4]) fusion(%x), kind=kOutput, calls=%carry_on
  %f.2 = (bf16[8,4], bf16[64,4]) fusion(%x), kind=kOutput, calls=%carry_on
  ROOT %f.3 = bf16[64,4]{1,0} fusion(%x), kind=kCustom, calls=%end
}
"""


def test_what_several_fusions_carry_on_counts_once() -> None:
    once = Collective("all-gather", 1, 64 * 4 * 2)
    assert collectives_of(STEPS_TEXT) == Collectives([once], unknown_loops=0)


def test_the_larger_side_of_a_scatter_counts() -> None:
    run = jax.shard_map(
        lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
        mesh=_mesh(),
        in_specs=P(),
        out_specs=P("x"),
        check_vma=False,
    )
    found = collectives_of(jax.jit(run).lower(jnp.zeros((16, 4))).compile().as_text()).by_kind
    assert [(c.count, c.bytes) for c in found] == [(1, 16 * 4 * 4)]


def test_a_program_without_collectives_has_none() -> None:
    text = jax.jit(jnp.sin).lower(jnp.zeros(8)).compile().as_text()
    assert collectives_of(text) == Collectives([], 0)


def test_memory_is_what_arrays_take_on_a_device() -> None:
    sharding = NamedSharding(_mesh(), P("x"))
    x = jax.ShapeDtypeStruct((1024, 4), jnp.float32, sharding=sharding)
    step = jax.jit(lambda x: x * 2, donate_argnums=0, in_shardings=sharding, out_shardings=sharding)

    memory = memory_of(step.lower(x).compile(), "cpu")

    part = 1024 * 4 * 4 // 8
    assert (memory.arguments, memory.outputs, memory.aliased) == (part, part, part)
    assert memory.peak == part + memory.temporaries + memory.code
