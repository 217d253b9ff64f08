# SPDX-License-Identifier: Apache-2.0
"""The one table between a checkpoint's tensors and the model's parameters, read in both directions.

In: a family's rules and the parameters that its model declares. Out: an `Entry` for each tensor of
the checkpoint, and the proof that tensors and parameters cover each other. Not done here: reading
or writing tensors.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsjax.models.tensor_names import mismatches

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Attributes:
        hf: the tensor's name in the checkpoint, with `{layer}` where it is one of a stack, and
            `{expert}` where it is one of a layer's experts.
        path: the parameter's path; a stack's parameter holds all layers as [L, ...], and a stack of
            experts as [L, E, ...].
        first: the number, in the checkpoint, of the stack's first layer.
        copy: the checkpoint may hold this parameter a second time under this name: nothing is
            loaded from there, and an export writes both alike.
    """

    hf: str
    path: str
    first: int = 0
    copy: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint.

    Attributes:
        hf: its name.
        path: the parameter it is (part of).
        index: where in that parameter: (), (layer of the stack,) or (layer of the stack, expert).
        layer: the number of its layer in the checkpoint; None outside the layers.
        copy: see `Rule`.
    """

    hf: str
    path: str
    index: tuple[int, ...]
    layer: int | None
    copy: bool = False


def expand(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """All tensors that a model with these parameters has on disk, in the rules' order by layer.

    Args:
        rules: the family's table.
        shapes: shape of every base parameter, by path.
    """
    entries = []
    for rule in rules:
        if rule.path not in shapes:
            continue  # this model has no such parameter: a bias, a norm, an untied head
        stacked = [name for name in ("{layer}", "{expert}") if name in rule.hf]
        for index in np.ndindex(*shapes[rule.path][: len(stacked)]):
            layer = rule.first + index[0] if stacked else None
            expert = index[1] if len(stacked) > 1 else None
            name = rule.hf.format(layer=layer, expert=expert)
            entries.append(Entry(name, rule.path, index, layer, rule.copy))
    unnamed = sorted(set(shapes) - {entry.path for entry in entries})
    assert not unnamed, f"parameters without a weight rule: {unnamed}"
    return sorted(entries, key=lambda entry: -1 if entry.layer is None else entry.layer)


def entry_shape(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the tensor on disk."""
    return shapes[entry.path][len(entry.index) :]


def coverage_problems(
    entries: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    carried: Iterable[str],
) -> tuple[list[str], list[str]]:
    """Hold the checkpoint's tensors against the model's parameters.

    Args:
        entries: what the model has on disk.
        shapes: shape of every base parameter, by path.
        found: shape of every tensor in the checkpoint, by name.
        carried: patterns of tensors that are kept without being modelled.

    Returns:
        Every mismatch as a line of an error, and the names of the tensors carried along. A name
        that neither a rule nor a pattern knows may be a part of the network that we do not
        compute, and is a mismatch.
    """
    known = [re.compile(pattern) for pattern in carried]
    wanted = {entry.hf: entry_shape(entry, shapes) for entry in entries}
    copies = {entry.hf for entry in entries if entry.copy}
    others = [name for name in found if name not in wanted]
    kept = [name for name in others if any(pattern.fullmatch(name) for pattern in known)]
    problems = mismatches(
        wanted,
        found,
        copies,
        kept,
        rule="from config.json",
        config="config.json",
        place="model.path",
    )
    return problems, kept
