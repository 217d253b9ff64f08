# SPDX-License-Identifier: Apache-2.0
"""A conversion under way: what another trainer's file says, and what of it stands here so far.

In: the keys of a file, and the trainer that it is of. Out: dotted keys of ours with their values,
lines for the file's head, and problems. Here the keys are taken that need no thought: those with
the same value, those without a counterpart, those that are refused. Not done here: keys whose value
changes (`trainer`, `llama_factory`, `trl`).
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsjax.config.other_trainers.key import Trainer
from dsjax.errors import nearest, printable

_NULL_MEANS_SOMETHING = ("max_length", "max_grad_norm")
"""Keys in which null is a wish; in all others it is their default."""


@dataclass
class Draft:
    """What is known of a conversion; the functions that take it add to it.

    Attributes:
        values: the file's keys over the trainer's defaults.
        given: the file's own keys.
        ours: dotted key -> value.
        source: dotted key -> the key of theirs that it comes from.
        differs: lines about what is not the same.
        nothing: lines about keys that set nothing.
        problems: why it cannot be converted.
        taken: keys of theirs that set one of ours, or of which a line tells.
    """

    trainer: Trainer
    given: dict[str, Any]
    values: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    nothing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def set(self, theirs: str, ours: str, value: Any) -> None:
        """Set a key of ours."""
        self.ours[ours] = value
        self.source[ours] = theirs
        self.taken.add(theirs)

    def on(self, key: str) -> bool:
        """Whether a switch of theirs is on; anything but true and false is a problem."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", "write it without quotes")
        return value is True

    def count(self, key: str) -> int | None:
        """Return a number of theirs that counts something; None, and a problem, for another."""
        value = self.values[key]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or value < 1:
            self.refuse(key, "an integer >= 1", "write the number")
            return None
        return value

    def refuse(self, key: str, expected: str, fix: str) -> None:
        """Note that a value cannot be converted."""
        got = shown(self.values[key]) if key in self.values else "nothing"
        self.problems.append(f"{key}: got {got}, expected {expected}; {fix}")

    def tell(self, key: str, note: str, same: bool = False) -> None:
        """Note what is not the same here, or is the same without a key."""
        value = shown(self.values[key]) if key in self.values else "not given"
        (self.nothing if same else self.differs).append(f"{key}: {value}: {note}")
        self.taken.add(key)

    def tell_the_rest(self) -> None:
        """Tell of keys that came to nothing, such as a switch that is off."""
        for key in [key for key in self.given if key not in self.taken]:
            self.tell(key, "not used with the other keys, or as here", same=True)


def begin(tree: Mapping[str, Any], trainer: Trainer) -> Draft:
    """Take the keys whose value stays, or that have no counterpart."""
    given = {
        key: value
        for key, value in tree.items()
        if value is not None or key in _NULL_MEANS_SOMETHING
    }
    draft = Draft(trainer, given, {**trainer.defaults, **given})
    for name in map(str, tree):
        if name not in trainer.keys:
            draft.problems.append(
                f"{printable(name)}: got an unknown key, expected one of {trainer.name}'s; "
                f"{nearest(name, trainer.keys)}"
            )
    for name, value in draft.values.items():
        key = trainer.keys.get(str(name))
        if key is None or key.fate == "read":
            continue
        if key.fate == "same":
            draft.set(name, key.ours, value)
        elif key.fate != "refused":
            draft.tell(name, key.note, same=key.fate == "nothing")
        elif value in key.off:
            draft.tell(name, "as here", same=True)
        else:
            draft.refuse(name, "a file without it", f"{key.note}; take it out to train without")
    return draft


def shown(value: Any) -> str:
    """Write a value in one line, as a file would."""
    return printable(textwrap.shorten(json.dumps(value, ensure_ascii=False, default=str), 80))
