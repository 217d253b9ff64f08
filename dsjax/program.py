# SPDX-License-Identifier: Apache-2.0
"""What a compiled program says of itself: the memory it needs, the collectives it runs.

In: a compiled `jax.stages` program. Out: bytes per device, and how often which collective moves how
much. Not done here: compiling, times.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Memory(NamedTuple):
    """Bytes that a program needs on one device.

    Attributes:
        arguments: what it is given.
        outputs: what it gives.
        aliased: of the outputs, what takes the place of donated arguments.
        temporaries: what it needs in between.
        code: its instructions.
        peak: the most that is needed at a time.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


def memory_of(compiled: Any, platform: str) -> Memory:
    """What the compiler planned.

    The peak is the sum on CPU and CUDA, whose own figure leaves temporaries out. For TPU it is the
    compiler's, which is what it refuses programs by: it takes some whose sum is above the memory.

    Args:
        compiled: the program.
        platform: of the devices that it was compiled for.
    """
    stats = compiled.memory_analysis()
    parts = (
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    arguments, outputs, aliased, temporaries, code = parts
    total = arguments + outputs - aliased + temporaries
    peak = stats.peak_memory_in_bytes if platform == "tpu" else total
    return Memory(*parts, peak=peak + code)


class Collective(NamedTuple):
    """All runs of one kind of collective in a program.

    Attributes:
        kind: one of KINDS.
        count: how often it runs.
        bytes: what one device has of the larger side, before or after, summed over the runs.
    """

    kind: str
    count: int
    bytes: int


def collectives_of(text: str) -> list[Collective]:
    """Count a program's collectives, those inside of loops as often as the loops run.

    Args:
        text: `compiled.as_text()`.
    """
    module = _parse(text)
    totals = {kind: [0, 0] for kind in KINDS}
    for kind, size, times in _walk(module, module.entry, 1):
        totals[kind][0] += times
        totals[kind][1] += times * size
    return [Collective(kind, *total) for kind, total in totals.items() if total[0]]


@dataclass(frozen=True)
class _Module:
    """A program's text.

    Attributes:
        entry: the computation that it starts with.
        lines: of each computation.
        sizes: bytes of each instruction's largest array.
    """

    entry: str
    lines: dict[str, list[str]]
    sizes: dict[str, int]


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(([^)]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def _parse(text: str) -> _Module:
    entry, current = "", ""
    lines: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins and not line.startswith(" "):
            current = begins[2]
            lines[current] = []
            entry = current if begins[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current:
            lines[current].append(line)
            sizes[found[1]] = _largest(re.split(r" [\w\-]+\(", found[2], maxsplit=1)[0])
    return _Module(entry, lines, sizes)


def _largest(types: str) -> int:
    """Bytes of the largest array of an instruction's type."""
    arrays = [
        math.prod(map(int, filter(None, dims.split(",")))) * _itemsize(name)
        for name, dims in _ARRAY.findall(types)
    ]
    return max(arrays, default=0)


def _itemsize(name: str) -> int:
    """Bytes of a number of XLA's; what is smaller than a byte counts as one."""
    if name == "pred":
        return 1
    bits = re.search(r"\d+", name)
    return max(int(bits[0]) // 8, 1) if bits else 0


def _walk(module: _Module, computation: str, times: int) -> Iterator[tuple[str, int, int]]:
    """Every collective of a computation and of those it calls: kind, bytes, runs."""
    for line in module.lines.get(computation, ()):
        found = _COLLECTIVE.search(line)
        if found:
            name = line.partition(" = ")[0].split("%")[-1]
            operands = [module.sizes.get(o, 0) for o in re.findall(r"%([\w.\-]+)", found[2])]
            yield found[1], max([module.sizes[name], *operands]), times
            continue
        runs = times * (_trip_count(module, line) if " while(" in line else 1)
        for called in _CALLED.findall(line):
            for name in called.replace("%", "").split(", "):
                yield from _walk(module, name, runs)


def _trip_count(module: _Module, line: str) -> int:
    """How often a loop runs; jax's count from 0 up to a constant of their condition."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    lines = module.lines[condition[1]] if condition else []
    bounds = [int(n) for text in lines for n in re.findall(r" constant\((\d+)\)", text)]
    return bounds[0] if len(bounds) == 1 else 1
