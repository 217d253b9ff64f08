# SPDX-License-Identifier: Apache-2.0
"""What to say of many tensors whose names are wrong, in a few lines and in seconds.

In: names that should be in a file and are not, names that are there and should not be. Out: lines
of an error: what they have in common, else the first of each kind and how many more there are. A
checkpoint may have 90,000 names: none is compared with all others. Not done here: what is expected
(`weight_rules`, `weights.peft`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from dsjax.errors import nearest

MOST_EXAMPLES = 8
"""Tensors that a message names."""

Shapes = Mapping[str, Sequence[int]]
"""Tensor name -> shape."""

_MOSTLY = 0.9
"""Share of the missing tensors that a prefix has to explain."""

_MOST_COMPARED = 200
"""Kinds of names that one is compared with."""

_MOST_PARTS = 3
"""Parts of a name that a prefix may stand in place of."""


def mismatches(
    wanted: Shapes,
    found: Shapes,
    optional: Collection[str] = (),
    carried: Collection[str] = (),
    *,
    rule: str,
    config: str,
    place: str,
    prefix: str = "",
) -> list[str]:
    """Hold the tensors of a file against those that there should be; returns lines of an error.

    Args:
        wanted: shape by name, as the config declares it.
        found: the same of the file.
        optional: names of wanted tensors that may be absent.
        carried: names of found tensors that are not wanted, and welcome.
        rule: says of a shape where it is from.
        config: the file that declares the tensors.
        place: what a line of no single tensor begins with.
        prefix: what stands before a tensor's name.
    """
    other = [n for n, shape in wanted.items() if n in found and tuple(found[n]) != tuple(shape)]
    missing = [n for n in wanted if n not in found and n not in optional]
    extra = [n for n in found if n not in wanted]
    renamed = find_renamed(missing, extra)
    problems = []
    if renamed is not None:
        problems.append(renamed.line(place))
        there = set(renamed.pairs.values())
        missing = [name for name in missing if name not in renamed.pairs]
        extra = [name for name in extra if name not in there]
    likely, declared = Candidates(extra), Candidates(missing or wanted)

    def reshaped(name: str) -> str:
        shape = list(wanted[name])
        return f"{prefix}{name}: got shape {list(found[name])}, expected {shape} {rule}"

    def absent(name: str) -> str:
        hint = f"; {likely.nearest(name)}" if extra else ""
        shape = list(wanted[name])
        return f"{prefix}{name}: got no such tensor, expected shape {shape} {rule}{hint}"

    def undeclared(name: str) -> str:
        hint = declared.nearest(name)
        return f"{prefix}{name}: got a tensor that {config} does not declare, expected none; {hint}"

    known = set(carried)
    problems += examples(other, reshaped, "tensors of other shapes")
    problems += examples(missing, absent, "missing tensors")
    left = [name for name in extra if name not in known]
    return problems + examples(left, undeclared, f"tensors that {config} does not declare")


def examples(names: Sequence[str], line: Callable[[str], str], what: str) -> list[str]:
    """Make a line for each name; of many, for the first of each kind, and one that counts the rest.

    Args:
        names: of tensors.
        line: says what is wrong with one.
        what: names all of them in the last line, such as "missing tensors".
    """
    shown = names
    if len(names) > MOST_EXAMPLES:
        kinds: dict[str, str] = {}
        for name in names:
            kinds.setdefault(_kind(name), name)
        others = (name for name in names if name != kinds[_kind(name)])
        shown = [*kinds.values(), *islice(others, MOST_EXAMPLES)][:MOST_EXAMPLES]
    more = len(names) - len(shown)
    return [*map(line, shown), *([f"and {more:,} more {what}"] if more else [])]


class Candidates:
    """Names that could have been meant, by kind: those that differ by numbers only are one."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names)
        kinds: dict[str, str] = {}
        for name in names:
            kinds.setdefault(_kind(name), name)
        self._kinds = dict(islice(kinds.items(), _MOST_COMPARED))

    def nearest(self, name: str) -> str:
        """Say which of them could have been meant, of each kind the one with the same numbers."""
        numbers = re.findall(r"\d+", name)
        likely = []
        for kind, first in self._kinds.items():
            parts = kind.split("#")
            same = "".join(a + b for a, b in zip(parts, [*numbers, ""], strict=False))
            likely.append(same if same in self.names else first)
        return nearest(name, likely)


@dataclass(frozen=True)
class Renamed:
    """Tensors that are there under another prefix.

    Attributes:
        found: the prefix that they have, may be empty.
        expected: the prefix that they should have in its place, may be empty.
        pairs: expected name -> name in the file.
    """

    found: str
    expected: str
    pairs: Mapping[str, str]

    def line(self, place: str) -> str:
        """Write an error's line, which begins with the file or field that the names are from."""
        name, other = next(iter(self.pairs.items()))
        begin = f"begin with {self.found!r}" if self.found else f"lack {self.expected!r}"
        right = f"{self.expected!r} in its place" if self.expected else "names without it"
        return (
            f"{place}: got {len(self.pairs):,} tensors whose names {begin} ({other}), expected "
            f"{right if self.found else 'it'} ({name}); save the model itself and not what wraps "
            "it, or rename the tensors"
        )


def find_renamed(missing: Sequence[str], extra: Collection[str]) -> Renamed | None:
    """Find a prefix that (nearly) all that is missing has in the file; None if there is none."""
    there = set(extra)
    if len(missing) < 2 or not there:
        return None
    for probe in dict.fromkeys((missing[0], missing[len(missing) // 2], missing[-1])):
        for expected in _prefixes(probe):
            for found in _prefixes_of(probe.removeprefix(expected), there):
                pairs = {
                    name: found + name.removeprefix(expected)
                    for name in missing
                    if name.startswith(expected) and found + name.removeprefix(expected) in there
                }
                if len(pairs) >= _MOSTLY * len(missing):
                    return Renamed(found, expected, pairs)
    return None


def _prefixes(name: str) -> list[str]:
    """Return what a name begins with, the empty prefix first; a layer's number is in none."""
    parts = name.split(".")[:-1]
    named = list(takewhile(lambda part: not part.isdigit(), parts))[:_MOST_PARTS]
    return ["".join(f"{part}." for part in named[:count]) for count in range(len(named) + 1)]


def _prefixes_of(name: str, names: Iterable[str]) -> list[str]:
    """Return what stands before `name` in names that end in it: a few, the shortest first."""
    ends = {other.removesuffix(name) for other in names if other.endswith(name)}
    whole = [end for end in ends if not end or re.fullmatch(r"([^.]*[^.\d][^.]*\.)+", end)]
    return sorted(whole, key=lambda prefix: (len(prefix), prefix))[:MOST_EXAMPLES]


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)
