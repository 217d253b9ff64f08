# SPDX-License-Identifier: Apache-2.0
"""A LoRA's arrays as the tensors of PEFT's file, and back.

In: a config, a model, arrays. Out: factors by PEFT's names. Routed experts are two tensors of a
layer there: factors of gate and up become one pair of rank 2r. Not done here: the fields of
adapter_config.json (`lora_peft`), the file itself.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsjax.adapters import lora
from dsjax.adapters.expert_lora import (
    DOWN,
    fuse,
    is_routed,
    split,
    split_gate_up,
    stack_gate_up,
)
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.lora_plain import plain_arrays, plain_config, plain_leaves
from dsjax.adapters.targets import module_at
from dsjax.distributed.sharding import Leaf
from dsjax.models import Model, model_family
from dsjax.models.moe import ExpertLinear

Place = tuple[str, int, int]
"""Where one kind of a layer's experts is: path of the adapter, layer of its stack, rank."""


def _fused(model: Model, spec: LoraConfig) -> dict[str, dict[str, Place]]:
    """Find modules `experts` that have an adapter: name -> gate_proj, up_proj, ... -> where."""
    found: dict[str, dict[str, Place]] = {}
    if not model_family(model).target_parameters:
        return found
    for path, modules in lora.targets(model, spec).items():
        linear = module_at(model, path)
        if not isinstance(linear, ExpertLinear):
            continue
        names = list(modules)[:: linear.experts]
        for layer, name in enumerate(names):
            container, _, kind = name.rsplit(".", 2)
            if modules[name]:
                rank = spec.rank_of(name)
                found.setdefault(container, {})[kind] = (f"{path}.adapter", layer, rank)
    return found


def _fused_keys(container: str, kinds: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """PEFT's names of a layer's factors -> what each is for; the first wraps the second."""
    inner = tuple(kind for kind in ("gate_proj", "up_proj") if kind in kinds)
    outer = (DOWN,) if DOWN in kinds else ()
    both = [kinds for kinds in (outer, inner) if kinds]
    return {
        f"base_model.model.{container}{'.base_layer' * depth}": kinds
        for depth, kinds in enumerate(both)
    }


def _plain(model: Model, spec: LoraConfig) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """`lora.tensors` without those that are fused."""
    pieces = lora.tensors(model, spec)
    if not model_family(model).target_parameters:
        return pieces
    start = len("base_model.model.")
    return {k: v for k, v in pieces.items() if not is_routed(k[start:].rsplit(".", 2)[0])}


def shapes(
    model: Model, spec: LoraConfig, leaves: Mapping[str, Leaf]
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the adapter in PEFT's file, and its shape."""
    spec, leaves = plain_config(spec), plain_leaves(leaves)
    # Arrays of no memory: every element is the same one.
    empty = {
        path: np.broadcast_to(np.float32(0), leaf.shape)
        for path, leaf in leaves.items()
        if leaf.kind == "adapter"
    }
    found = {key: empty[path][index].shape for key, (path, index) in _plain(model, spec).items()}
    for container, places in _fused(model, spec).items():
        for key, kinds in _fused_keys(container, places).items():
            path, _, rank = places[kinds[0]]
            _, experts, _, wide = empty[f"{path}.lora_A"].shape
            out, rank = empty[f"{path}.lora_B"].shape[2] * len(kinds), rank * len(kinds)
            found[f"{key}.lora_A.weight"] = (experts * rank, wide)
            found[f"{key}.lora_B.weight"] = (out, rank * experts)
    return found


def to_file(model: Model, spec: LoraConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our arrays as the tensors of PEFT's file, float32."""
    spec, params = plain_config(spec), plain_arrays(model, params)
    host = {path: np.asarray(array) for path, array in params.items()}
    tensors = {key: host[path][index] for key, (path, index) in _plain(model, spec).items()}
    for container, places in _fused(model, spec).items():
        for key, kinds in _fused_keys(container, places).items():
            pairs = [_pair(host, places[kind]) for kind in kinds]
            a, b = fuse(*(pairs[0] if len(pairs) == 1 else stack_gate_up(*pairs)))
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}


def _pair(host: Mapping[str, np.ndarray], place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of one kind of a layer's experts."""
    path, layer, rank = place
    return host[f"{path}.lora_A"][layer, :, :rank], host[f"{path}.lora_B"][layer, :, :, :rank]


def from_file(
    model: Model, spec: LoraConfig, leaves: Mapping[str, Leaf], found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Undo `to_file`; `shared_rank_tensors` has named nothing."""
    params = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in leaves.items()
        if leaf.kind == "adapter"
    }
    for key, (path, index) in _plain(model, spec).items():
        params[path][index] = found[key]
    for container, places in _fused(model, spec).items():
        for key, kinds in _fused_keys(container, places).items():
            experts = params[f"{places[kinds[0]][0]}.lora_A"].shape[1]
            pair = split(found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"], experts)
            pairs = (pair,) if len(kinds) == 1 else split_gate_up(*pair)
            assert pairs is not None, key
            for kind, values in zip(kinds, pairs, strict=True):
                for into, value in zip(_pair(params, places[kind]), values, strict=True):
                    into[...] = value
    return params


def shared_rank_tensors(
    model: Model, spec: LoraConfig, found: Mapping[str, np.ndarray]
) -> list[str]:
    """Names of tensors in which gate and up share a part of their ranks: no pair for each.

    Args:
        model: the abstract model.
        spec: the adapter.
        found: the file's tensors, in shapes that have been checked.
    """
    names = []
    for container, places in _fused(model, spec).items():
        for key, kinds in _fused_keys(container, places).items():
            a, b = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
            path, _, _ = places[kinds[0]]
            experts = module_at(model, path.removesuffix(".adapter")).experts
            if len(kinds) == 2 and split_gate_up(*split(found[a], found[b], experts)) is None:
                names.append(b)
    return names
