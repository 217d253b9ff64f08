# SPDX-License-Identifier: Apache-2.0
"""JSON files as damage leaves them: one value replaced or gone, bytes cut out or in, no end to it.

In: a value that JSON can hold. Out: a hypothesis strategy of the bytes of files that were such a
value once. Not here: what reads them, and what it has to say.
"""

import copy
import json
from typing import Any

from hypothesis import strategies as st

GONE = object()

VALUES = st.sampled_from([None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, -2.5, 1e300]) | (
    st.sampled_from([float("nan"), float("inf"), "", "x", "../x", "q_proj", ".*", "(", "\u00e9"])
    | st.sampled_from([[], {}, [None], [1], ["x"], [[]], [{}], {"x": None}, {"x": 1}, {"": []}])
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)

PIECES = st.binary(max_size=3) | st.sampled_from(
    [b"[" * 3_000, b'{"a":' * 3_000, b"9" * 4_400, b"NaN", b"\\ud800", b'"', b"null", b",", b"0"]
)


@st.composite
def spoilt(draw: st.DrawFn, tree: Any) -> bytes:
    """Bytes of a file that held `tree` before it was damaged, or filled in wrongly."""
    if draw(st.booleans()):
        changed = replaced(tree, draw(st.integers(0, 10_000)), draw(VALUES | st.just(GONE)))
        return json.dumps(changed).encode()
    content = json.dumps(tree).encode()
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(PIECES) + content[at + draw(st.integers(0, 200)) :]


def replaced(tree: Any, number: int, value: Any) -> Any:
    """The tree with another value at one of its places, or without that place; 0 is all of it."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    number %= len(places) + 1
    if number == 0:
        return {} if value is GONE else value
    holder, key = places[number - 1]
    if value is GONE:
        del holder[key]
    else:
        holder[key] = value
    return tree


def _places(tree: Any) -> Any:
    """Every object or list in a tree with each of its keys or indices."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])
