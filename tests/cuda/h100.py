# SPDX-License-Identifier: Apache-2.0
"""Compile-only GPUs.

In: the name of a target description, a lowered program. Out: what the CUDA compiler makes of it.
Not here: reading its text (`compiled_text`).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from compiled_text import Program, program_of
from jax.experimental import topologies
from jax.sharding import NamedSharding

TARGETS = Path(__file__).resolve().parents[2] / "dsjax" / "plan" / "gpu_targets"

UNTIMED = {"xla_gpu_autotune_level": 0}
"""Without a device there is nothing to choose kernels by."""


@functools.cache
def devices(count: int, target: str = "h100_sxm") -> tuple[Any, ...]:
    """GPUs that one can compile for, and nothing else; those of two calls do not mix."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=(TARGETS / f"{target}.txtpb").read_text(),
        topology=f"1x1x{count}",
    )
    return tuple(topology.devices)


def lowered(function: Callable[..., Any], *arrays: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The function on abstract arrays that lie on such GPUs."""
    sharding = arrays[0].sharding
    assert isinstance(sharding, NamedSharding)
    # From 0.12 on jax asks the mesh in use, not the arrays, which GPU a kernel is for.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.jit(function).lower(*arrays)


def compiled(lowered: jax.stages.Lowered) -> Program:
    """What the CUDA compiler makes of it."""
    return program_of(lowered.compile(UNTIMED))
