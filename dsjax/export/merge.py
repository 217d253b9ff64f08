# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint training changed, and each one's new values.

In: the trained arrays, of full training or of LoRA. Out: a `Change` by tensor name, computed in
float32 when its rows are fetched. Not done here: writing them (`weights.write`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.adapters import method_of
from dsjax.adapters.method import AdapterConfig
from dsjax.distributed.arrays import host_part
from dsjax.models import Model, entries_of
from dsjax.models.changes import Change
from dsjax.models.weight_rules import EMBEDDING, HEAD, Entry


def changed_tensors(
    model: Model, spec: AdapterConfig | None, trained: Mapping[str, Any], masks: Mapping[str, Any]
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
    merged = method_of(spec).merged
    assert merged is not None, f"{spec.peft_type} has no merged form"
    return merged(model, spec, trained)


def _trains(entry: Entry, masks: Mapping[str, Any]) -> bool:
    mask = masks.get(entry.path)
    return mask is None or bool(mask[entry.index])


def _trained_rows(array: Any, index: tuple[int, ...]) -> Change:
    def apply(source: np.ndarray, part: np.ndarray) -> np.ndarray:
        if np.array_equal(source.astype(part.dtype), part):
            return source  # what did not change keeps the precision of its file
        return part.astype(np.float32)

    return Change(lambda rows: host_part(array, (*index, *rows)), apply)
