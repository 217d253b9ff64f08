# SPDX-License-Identifier: Apache-2.0
"""A LoRA as others read it: one that counts from its start becomes a plain one of twice the rank.

In: a config, a model, arrays. Out: the same, so that scaling * B A is all that the adapter adds. A
plain LoRA stays as it is. Not done here: what the first values are (`lora_start`), PEFT's names
(`lora_tensors`).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.lora_start import (
    INITIAL_A,
    INITIAL_B,
    change_of_a,
    change_of_b,
    is_of_weight,
)
from dsjax.adapters.targets import module_at
from dsjax.distributed.sharding import Leaf
from dsjax.models import Model

_KEPT = {"lora_A": (INITIAL_A, -2, change_of_a), "lora_B": (INITIAL_B, -1, change_of_b)}
"""Factor -> what is kept of it, the axis of its rank, and what counts of both."""


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the config of the plain LoRA: twice each rank at the same scaling."""
    if not is_of_weight(config.init_lora_weights):
        return config
    by = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=by * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: by * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def plain_leaves(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return the leaves of the plain LoRA."""
    found = {}
    for path, leaf in leaves.items():
        kept = _kept_path(path, leaves)
        if kept is not None:
            shape = list(leaf.shape)
            shape[_KEPT[path.rpartition(".")[2]][1]] *= 2
            leaf = replace(leaf, shape=tuple(shape))
        found[path] = leaf
    return {path: leaf for path, leaf in found.items() if not _is_kept(path)}


def plain_array(model: Model, path: str, arrays: Mapping[str, Any]) -> Any:
    """Return an array of the plain LoRA; in layers of a lower rank all zeros come last."""
    kept = _kept_path(path, arrays)
    if kept is None:
        return arrays[path]
    _, axis, change = _KEPT[path.rpartition(".")[2]]
    both = change(arrays[path], arrays[kept])
    ranks = module_at(model, path.rpartition(".")[0]).ranks
    return both if min(ranks) == max(ranks) else _packed(both, ranks, axis)


def plain_arrays(model: Model, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arrays of the plain LoRA."""
    return {path: plain_array(model, path, arrays) for path in arrays if not _is_kept(path)}


def _is_kept(path: str) -> bool:
    return path.endswith((f".{INITIAL_A}", f".{INITIAL_B}"))


def _kept_path(path: str, among: Mapping[str, Any]) -> str | None:
    slot, _, name = path.rpartition(".")
    kept = f"{slot}.{_KEPT[name][0]}" if name in _KEPT else None
    return kept if kept in among else None


def _packed(both: jax.Array, ranks: tuple[int, ...], axis: int) -> jax.Array:
    """Bring what belongs to a layer of a lower rank together."""
    rank = max(ranks)
    rows = [(*range(own), *range(rank, rank + own)) for own in ranks]
    order = np.array([(*mine, *sorted(set(range(2 * rank)) - set(mine))) for mine in rows])
    order = order.reshape(*both.shape[:-2], 2 * rank)
    order = order[..., None] if axis == -2 else order[..., None, :]
    return jnp.take_along_axis(both, jnp.asarray(order), axis=axis)
