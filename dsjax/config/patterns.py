# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that users write, matched within a time limit.

In: expressions of Python's `re`, and names. Out: which names each expression covers whole, or why
it cannot be told. Not done here: what the names are, and the message.

`(a+)+$` takes `re` longer than the age of the universe, and nothing in the process can interrupt
it: so an expression that repeats or chooses is matched in a process of its own, once.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

LIMIT_S = 5
"""Seconds for all expressions; a usual one takes 0.1 s for the 44,000 modules of R1."""

_LINEAR = re.compile(r"(?:[\w.^$-]|\\\.)*")
"""Expressions without a repetition, a choice or a group: `re` is done with one in a moment."""

_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        match = re.compile(pattern).fullmatch
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        found = str(error)
    else:
        found = [at for at, name in enumerate(names) if match(name)]
    print(json.dumps(found), flush=True)
"""


class Matches(NamedTuple):
    """What expressions cover.

    Attributes:
        covered: expression -> the names that it covers.
        problems: expression -> why it covers nothing: no expression, or too slow; expressions
            after one that is too slow are in neither.
    """

    covered: dict[str, frozenset[str]]
    problems: dict[str, str]


def is_linear(pattern: str) -> bool:
    """Whether an expression is one that `re` is done with in a moment, whatever the name."""
    return _LINEAR.fullmatch(pattern) is not None


def fullmatch(patterns: Sequence[str], names: Sequence[str]) -> Matches:
    """Match each expression against each name as `re.fullmatch` does; answers are kept."""
    return _fullmatch(tuple(patterns), tuple(names))


@functools.lru_cache(maxsize=64)
def _fullmatch(patterns: tuple[str, ...], names: tuple[str, ...]) -> Matches:
    found = {p: _in_process(p, names) for p in patterns if is_linear(p)}
    slow = [p for p in patterns if p not in found]
    found |= _in_child(slow, names) if slow else {}
    covered = {p: value for p, value in found.items() if isinstance(value, frozenset)}
    return Matches(covered, {p: value for p, value in found.items() if isinstance(value, str)})


def _in_process(pattern: str, names: tuple[str, ...]) -> frozenset[str]:
    match = re.compile(pattern).fullmatch
    return frozenset(name for name in names if match(name))


def _in_child(patterns: list[str], names: tuple[str, ...]) -> dict[str, frozenset[str] | str]:
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    asked = json.dumps([patterns, names]).encode()
    try:
        out = subprocess.run(command, input=asked, stdout=subprocess.PIPE, timeout=LIMIT_S).stdout
    except subprocess.TimeoutExpired as stopped:
        out = stopped.stdout or b""
    answers = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    found: dict[str, frozenset[str] | str] = {
        pattern: answer if isinstance(answer, str) else frozenset(names[at] for at in answer)
        for pattern, answer in zip(patterns, answers, strict=False)
    }
    for pattern in patterns[len(answers) :][:1]:  # those after it have not been tried
        found[pattern] = f"it takes longer than {LIMIT_S} s; repeat nothing that repeats itself"
    return found
