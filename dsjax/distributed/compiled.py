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
    """Return the memory that the compiler planned.

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


def too_large(error: Exception) -> str:
    """Return the compiler's words where it refused a program for want of memory.

    Raises:
        Exception: the same one, which has another reason.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return re.sub(r"\s+", " ", str(error)).split(" Largest ")[0][:300]


class Collective(NamedTuple):
    """All runs of one kind of collective in a program.

    Attributes:
        kind: one of KINDS.
        count: how often it runs.
        bytes: what one device has of the larger side, before or after, summed over the runs and
            over the arrays that are moved together.
    """

    kind: str
    count: int
    bytes: int


class Collectives(NamedTuple):
    """What a program's devices send each other.

    Attributes:
        by_kind: all that it runs.
        unknown_loops: loops with collectives whose length the text does not tell; what is in them
            is counted as if they ran once.
    """

    by_kind: list[Collective]
    unknown_loops: int


def collectives_of(text: str) -> Collectives:
    """Count a program's collectives, those inside of loops as often as the loops run.

    Args:
        text: `compiled.as_text()`.
    """
    module = _parse(text)
    totals = {kind: [0, 0] for kind in KINDS}
    unknown: set[str] = set()
    for run in _walk(module, module.entry, 1, frozenset()):
        totals[run.kind][0] += run.times
        totals[run.kind][1] += run.times * run.size
        unknown |= run.unknown_loops
    by_kind = [Collective(kind, *total) for kind, total in totals.items() if total[0]]
    return Collectives(by_kind, len(unknown))


@dataclass(frozen=True)
class _Module:
    """A program's text.

    Attributes:
        entry: the computation that it starts with.
        lines: of each computation.
        sizes: bytes of each instruction's arrays.
    """

    entry: str
    lines: dict[str, list[str]]
    sizes: dict[str, int]


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
_COLLECTIVE = re.compile(rf" (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<operands>[^)]*)\)")
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
            sizes[found[1]] = _bytes(re.split(r" [\w\-]+\(", found[2], maxsplit=1)[0])
    return _Module(entry, lines, sizes)


def _bytes(types: str) -> int:
    """Bytes of all arrays of an instruction's type."""
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * _itemsize(name)
        for name, dims in _ARRAY.findall(types)
    )


def _itemsize(name: str) -> int:
    """Bytes of a number of XLA's; what is smaller than a byte counts as one."""
    if name == "pred":
        return 1
    bits = re.search(r"\d+", name)
    return max(int(bits[0]) // 8, 1) if bits else 0


class _Run(NamedTuple):
    """A collective instruction: bytes of its larger side, how often it runs, in which loops."""

    kind: str
    size: int
    times: int
    unknown_loops: frozenset[str]


def _walk(module: _Module, computation: str, times: int, unknown: frozenset[str]) -> Iterator[_Run]:
    """Every collective of a computation and of those it calls."""
    for line in module.lines.get(computation, ()):
        name = line.partition(" = ")[0].split("%")[-1]
        found = _COLLECTIVE.search(line)
        if found and _is_a_step(module, computation, line):
            continue
        if found:
            # XLA for TPU writes some as a fusion of the sum over all with the slice that is kept.
            scatters = computation.startswith("all-reduce-scatter")
            kind = "reduce-scatter" if scatters else found["kind"]
            yield _Run(kind, _larger_side(module, name, found), times, unknown)
            continue
        runs, inside = times, unknown
        if " while(" in line:
            trips = _trip_count(module, line)
            runs *= trips or 1
            inside |= {name} if trips is None else frozenset()
        for called in _CALLED.findall(line):
            for callee in called.replace("%", "").split(", "):
                yield from _walk(module, callee, runs, inside)


def _is_a_step(module: _Module, computation: str, line: str) -> bool:
    """Tell whether a collective is only begun or carried on here, and ends in another computation.

    XLA for TPU spreads one over several fusions, beside their own work; each of them names it.
    """
    ends = any("AsyncCollectiveDone" in other for other in module.lines[computation])
    return "chain_id=" in line and not ends


def _larger_side(module: _Module, name: str, found: re.Match[str]) -> int:
    """Bytes that a collective is given, or of `all-gather` that it gives."""
    operands = re.findall(r"%([\w.\-]+)", found["operands"])
    given = sum(module.sizes[operand] for operand in operands)
    if found["kind"] != "all-gather":
        return given
    # What only starts one has its operands in its own type.
    return module.sizes[name] - (given if found["start"] else 0)


def _trip_count(module: _Module, line: str) -> int | None:
    """How often a loop runs; jax's count from 0 up to a constant of their condition."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    lines = module.lines[condition[1]] if condition else []
    bounds = [int(n) for text in lines for n in re.findall(r" constant\((\d+)\)", text)]
    return bounds[0] if len(bounds) == 1 else None
