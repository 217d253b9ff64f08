# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint training changed, and each one's new values.

In: the trained arrays, of full training or of LoRA. Out: a `Change` by tensor name, computed in
float32 when its rows are fetched. Not done here: writing them (`weights.write`).
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from dsjax.adapters import Spec, lora
from dsjax.distributed.arrays import host_part, is_here
from dsjax.models import Model, entries_of
from dsjax.models.weight_rules import EMBEDDING, HEAD, Entry
from dsjax.weights.write import Change, Rows


def changed_tensors(
    model: Model, spec: Spec | None, trained: Mapping[str, Any], masks: Mapping[str, Any]
) -> dict[str, Change]:
    """Which of the checkpoint's tensors training changed, and how to compute each.

    Args:
        model: the abstract model, adapter attached.
        spec: its adapter; None in full training.
        trained: the trained arrays by path. Nothing of them but their paths is looked at before a
            change is fetched, so that shapes serve as well to count what would be written.
        masks: `Partition.layer_masks`.
    """
    if spec is None:
        changes = {
            entry.hf: _trained_rows(trained[entry.path], entry.index)
            for entry in entries_of(model)
            if entry.path in trained and _trains(entry, masks)
        }
        if model.lm_head is None and EMBEDDING in changes:
            changes[HEAD] = changes[EMBEDDING]  # the copy that some tied checkpoints carry
        return changes
    assert isinstance(spec, lora.LoraConfig), "a prefix has no merged form"
    pieces = lora.tensors(model, spec)

    @cache
    def array_of(path: str) -> Any:
        array = trained[path]
        return np.asarray(array, np.float32) if is_here(array) else array

    changes = {}
    for key in (key for key in pieces if key.endswith(".lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        (path_a, at_a), (path_b, at_b) = pieces[key], pieces[key.replace("lora_A", "lora_B")]
        low, high = (partial(array_of, path_a), at_a), (partial(array_of, path_b), at_b)
        changes[f"{name}.weight"] = _with_update(low, high, spec.scaling_of(name))
    return changes


def _trains(entry: Entry, masks: Mapping[str, Any]) -> bool:
    mask = masks.get(entry.path)
    return mask is None or bool(mask[entry.index])


def _trained_rows(array: Any, index: tuple[int, ...]) -> Change:
    def apply(source: np.ndarray, part: np.ndarray) -> np.ndarray:
        if np.array_equal(source.astype(part.dtype), part):
            return source  # what did not change keeps the precision of its file
        return part.astype(np.float32)

    return Change(lambda rows: host_part(array, (*index, *rows)), apply)


def compose(first: Change, second: Change) -> Change:
    """Two changes of one tensor, one after the other."""
    return Change(
        lambda rows: (first.fetch(rows), second.fetch(rows)),
        lambda source, parts: second.apply(first.apply(source, parts[0]), parts[1]),
    )


Factor = tuple[Callable[[], Any], tuple[Any, ...]]
"""What gives an array, and the index of a module's factor in it."""


def _with_update(low: Factor, high: Factor, scaling: float) -> Change:
    """The source plus scaling * high @ low."""

    def fetch(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        (low_array, at), (high_array, (*lead, _, rank)) = low, high
        return host_part(low_array(), at), host_part(high_array(), (*lead, *rows, rank))

    def apply(source: np.ndarray, factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        low_rI, high_Or = factors
        return source.astype(np.float32) + (high_Or * np.float32(scaling)) @ low_rI

    return Change(fetch, apply)
