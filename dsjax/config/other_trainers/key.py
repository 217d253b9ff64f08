# SPDX-License-Identifier: Apache-2.0
"""What one key of another trainer is here.

In: nothing. Out: `Key`, and short ways to write one in a table. Not done here: the tables
(`trainer_keys`, `llama_factory_keys`, `trl_keys`).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Key(NamedTuple):
    """What a key of theirs is here.

    Attributes:
        fate: same: `ours` takes the value; read: it takes another, by `note`; nothing: there is
            nothing to set, by `note`; differs: nothing is set and the run is not the same;
            refused: it asks for what dsjax does not do.
        ours: dotted key, or several; empty: none.
        note: one line for users.
        off: values with which a refused key asks for nothing.
    """

    fate: Literal["same", "read", "nothing", "differs", "refused"]
    ours: str = ""
    note: str = ""
    off: tuple[Any, ...] = ()


def each(names: str, key: Key) -> dict[str, Key]:
    """Give several keys, with spaces between them, the same meaning."""
    return dict.fromkeys(names.split(), key)


def same(ours: str) -> Key:
    """Make a key whose value ours takes as it is."""
    return Key("same", ours)


def read(ours: str, note: str) -> Key:
    """Make a key whose value becomes another of ours."""
    return Key("read", ours, note)


def nothing(note: str) -> Key:
    """Make a key for which there is nothing to set."""
    return Key("nothing", note=note)


def differs(note: str) -> Key:
    """Make a key for which nothing is set although the run is not the same."""
    return Key("differs", note=note)


def refused(note: str, *off: Any) -> Key:
    """Make a key that is refused, unless its value is one of `off`."""
    return Key("refused", note=note, off=off or (False, 0, "", "none", "no"))


class Trainer(NamedTuple):
    """A trainer whose files are read; its defaults that have to be written down."""

    name: str
    keys: Mapping[str, Key]
    defaults: Mapping[str, Any]
