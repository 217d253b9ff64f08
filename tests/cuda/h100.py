# SPDX-License-Identifier: Apache-2.0
"""Compile-only GPUs, and what a program that was compiled for them holds.

In: the name of a target description, a lowered program. Out: its kernels, buffers and collectives,
read from the compiled text. Not here: what they should be.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

TARGETS = Path(__file__).resolve().parents[2] / "dsjax" / "gpu_targets"

UNTIMED = {"xla_gpu_autotune_level": 0}
"""Without a device there is nothing to choose kernels by."""

_FLOATS = "bf16|f16|f32"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """What a compiled program holds.

    Attributes:
        text: the compiler's, after all its passes.
        temporaries: bytes per device beyond arguments and results.
    """

    text: str
    temporaries: int

    def kernels(self) -> Counter[str]:
        """How many calls of each Pallas kernel there are, by its name."""
        calls = [line for line in self.text.splitlines() if " custom-call(" in line]
        named = re.compile(r'op_name="[^"]*?(\w+)\)*/pallas_call"')
        return Counter(match[1] for line in calls if (match := named.search(line)))

    def shapes(self) -> set[Shape]:
        """Of all arrays of floats."""
        return _shapes(self.text)

    def gathered(self) -> set[Shape]:
        """Of all arrays of floats that devices put together from their parts."""
        return self._results("all-gather(?:-start)?")

    def rearranged(self, dtype: str) -> set[Shape]:
        """Of all arrays that are another in another layout or place."""
        return self._results("(?:transpose|copy|copy-start)", dtype)

    def _results(self, operation: str, dtype: str = _FLOATS) -> set[Shape]:
        ends = re.compile(rf" = (.*) {operation}\(")
        results = (ends.search(line) for line in self.text.splitlines())
        return set().union(*(_shapes(match[1], dtype) for match in results if match))


def _shapes(text: str, dtype: str = _FLOATS) -> set[Shape]:
    found = re.findall(rf"\b(?:{dtype})\[([\d,]+)\]", text)
    return {tuple(map(int, shape.split(","))) for shape in found}


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
    program = lowered.compile(UNTIMED)
    memory = program.memory_analysis()
    assert memory is not None
    return Program(program.as_text() or "", memory.temp_size_in_bytes)


def squares(shapes: set[Shape], length: int) -> list[Shape]:
    """Those that grow with the square of the tokens of a row."""
    return [
        shape
        for shape in shapes
        if sum(size % length == 0 for size in shape) > 1
        or any(size % length**2 == 0 for size in shape)
    ]


def by_tokens(shapes: set[Shape], length: int, elements: int) -> list[Shape]:
    """Those that grow with the tokens of a row, and hold so many numbers or more."""
    return [
        shape
        for shape in shapes
        if math.prod(shape) >= elements and any(size % length == 0 for size in shape)
    ]
