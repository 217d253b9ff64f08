# SPDX-License-Identifier: Apache-2.0
"""What a compiler's text says that a program holds.

In: a program compiled for GPUs or TPUs. Out: its kernels, buffers and collectives. Not here: what
they should be, and compiling.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

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
        # Of its kernels, XLA for TPU names the instructions; for CUDA it keeps where they are from.
        tpu = re.compile(r'%(\w+?)(?:\.\d+)* = .*custom_call_target="tpu_custom_call"')
        cuda = re.compile(r'op_name="[^"]*?(\w+)\)*/pallas_call"')
        found = (tpu.search(line) or cuda.search(line) for line in calls)
        return Counter(match[1] for match in found if match)

    def shapes(self) -> set[Shape]:
        """Of all arrays of floats."""
        return _shapes(self.text)

    def gathered(self) -> set[Shape]:
        """Of all arrays of floats that devices put together from their parts."""
        return self._results("all-gather(?:-start)?")

    def summed(self) -> set[Shape]:
        """Of all arrays of floats that devices sum, and of which each then holds everything.

        XLA for TPU writes a sum of which each device keeps its part as a fusion of its own, in
        which the sum is followed by a slice.
        """
        scatters = r"^%all-reduce-scatter[\w.\-]* \(.*\{$(?:\n .*)*"
        program = Program(re.sub(scatters, "", self.text, flags=re.MULTILINE), self.temporaries)
        return program._results("all-reduce(?:-start)?")

    def rearranged(self, dtype: str) -> set[Shape]:
        """Of all arrays that are another in another layout or place.

        But for what XLA for TPU brings into the chip's own memory, S(1), ahead of its use.
        """
        ahead = re.compile(r".*S\(1\).* copy-start\(.*")
        program = Program(ahead.sub("", self.text), self.temporaries)
        return program._results("(?:transpose|copy|copy-start)", dtype)

    def _results(self, operation: str, dtype: str = _FLOATS) -> set[Shape]:
        ends = re.compile(rf" = (.*) {operation}\(")
        results = (ends.search(line) for line in self.text.splitlines())
        return set().union(*(_shapes(match[1], dtype) for match in results if match))


def _shapes(text: str, dtype: str = _FLOATS) -> set[Shape]:
    found = re.findall(rf"\b(?:{dtype})\[([\d,]+)\]", text)
    return {tuple(map(int, shape.split(","))) for shape in found}


def program_of(compiled: Any) -> Program:
    """What a program holds that XLA has compiled."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return Program(compiled.as_text() or "", memory.temp_size_in_bytes)


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
