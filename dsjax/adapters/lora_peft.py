# SPDX-License-Identifier: Apache-2.0
"""A LoRA in the form that PEFT really applies: the targets of its config, the tensors of its file.

In: a spec, a model, arrays. Out: PEFT's fields and tensors, and back. For DeepSeek-V2 and V3, PEFT
0.21 with transformers 5 takes gate_proj, up_proj and down_proj in `target_modules` for the routed
experts' (peft issue 3711), and drops what an adapter has for other modules of these names. Named as
weights, in `target_parameters`, they are adapted. Routed experts are two tensors of a layer there:
factors of gate and up become one pair of rank 2r. Not done here: the files themselves.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsjax.adapters import lora
from dsjax.adapters.expert_lora import (
    DOWN,
    GATE_UP,
    fuse,
    is_routed,
    parameter_of,
    split,
    split_gate_up,
    stack_gate_up,
)
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.targets import in_layers, linear_modules, module_at, short_names
from dsjax.distributed.sharding import Leaf
from dsjax.errors import raise_all
from dsjax.models import Model, entries_of
from dsjax.models.moe import ExpertLinear

BY_PARAMETER = ("deepseek_v2", "deepseek_v3", "deepseek_v32")
"""model_types whose feed-forwards PEFT adapts by the names of their weights only."""

_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

Whole = tuple[int, int | float]
"""Rank and alpha, as PEFT counts them for one of its targets."""

Place = tuple[str, int, int]
"""Where one kind of a layer's experts is: path of the adapter, layer of its stack, rank."""


def config_fields(model: Model, spec: LoraConfig) -> dict[str, Any]:
    """The fields of adapter_config.json that are LoRA's own, all written out.

    Raises:
        ConfigError: PEFT has no form for this adapter.
    """
    targets = peft_targets(model, spec)
    parameters = sorted(name for name in targets if _is_parameter(name, model))
    fields = {
        "r": spec.r,
        "lora_alpha": spec.lora_alpha,
        # PEFT has no dropout before a parameter; it means nothing once training is over.
        "lora_dropout": 0.0 if parameters else spec.lora_dropout,
        "target_modules": _listed(model, spec, [n for n in targets if n not in parameters]),
        "layers_to_transform": spec.layers_to_transform,
        "rank_pattern": _patterns(
            spec.rank_pattern, spec.r, {name: rank for name, (rank, _) in targets.items()}
        ),
        "alpha_pattern": _patterns(
            spec.alpha_pattern, spec.lora_alpha, {name: a for name, (_, a) in targets.items()}
        ),
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if parameters:
        fields["target_parameters"] = _ends(parameters, _weights(model))
    return fields


def peft_targets(model: Model, spec: LoraConfig) -> dict[str, Whole]:
    """What PEFT adapts: names of modules and of parameters -> rank and alpha.

    Raises:
        ConfigError: experts that are one tensor for PEFT differ.
    """
    found: dict[str, dict[str, Whole | None]] = {}
    for modules in lora.targets(model, spec).values():
        for name, hit in modules.items():
            key, share = _key(name, model)
            found.setdefault(key, {})[name] = _whole(spec, name, share) if hit else None
    _check_fused(model, found)
    first = {key: next(iter(values.values())) for key, values in found.items()}
    return {key: whole for key, whole in first.items() if whole is not None}


def _key(module: str, model: Model) -> tuple[str, int]:
    """PEFT's name of a target, and how many modules share its rank."""
    if model.config.model_type in BY_PARAMETER and module.rsplit(".", 1)[-1] in _FEED_FORWARD:
        return parameter_of(module)
    return module, 1


def _is_parameter(key: str, model: Model) -> bool:
    """Whether a target's name is a parameter's."""
    routed = key.endswith((f".experts.{GATE_UP}", f".experts.{DOWN}"))
    return key.endswith(".weight") or (routed and model.config.model_type in BY_PARAMETER)


def _whole(spec: LoraConfig, module: str, share: int) -> Whole:
    """Rank and alpha of a target that `share` modules have in common; the scaling stays."""
    rank, alpha, own = spec.peft_rank_alpha(module)
    if own == share:
        return rank, alpha
    return rank * share, alpha * (math.sqrt(share) if spec.use_rslora else share)


def _check_fused(model: Model, found: Mapping[str, Mapping[str, Whole | None]]) -> None:
    """Refuse adapters of a layer's experts that are not all alike: PEFT has one for all of them."""
    problems = []
    for key, values in found.items():
        kinds = set(values.values())
        missing = key.endswith(f".{GATE_UP}") and len({n.rsplit(".")[-1] for n in values}) < 2
        if kinds == {None} or not (len(kinds) > 1 or missing):
            continue
        why = (
            "gate_proj and up_proj are not both adapted"
            if missing
            else "its experts, or their gate_proj and up_proj, differ in rank or alpha"
        )
        problems.append(
            f"export.format: got peft, expected merged or null; PEFT has one adapter for {key}, "
            f"and here {why}"
        )
    raise_all(problems[:8])


def _listed(model: Model, spec: LoraConfig, found: list[str]) -> list[str]:
    """`target_modules` as a list: of short names if they say the same, else of the whole names.

    PEFT refuses an expression that also matches a module that is not linear, such as a whole MLP.
    """
    by_parameter = model.config.model_type in BY_PARAMETER
    if not isinstance(spec.target_modules, str) and not by_parameter and not spec.target_parameters:
        return spec.target_modules
    modules = linear_modules(model).values()
    short = short_names(found)
    said = {n for names in modules for n in names if n.rsplit(".", 1)[-1] in short}
    said = {name for name in said if in_layers(spec.pattern, name)}
    return short if said == set(found) else sorted(found)


def _patterns(
    given: Mapping[str, Any], default: Any, wanted: Mapping[str, Any]
) -> dict[str, int | float]:
    """rank_pattern or alpha_pattern: as given if PEFT understands it so, else by ends of names.

    Trap: PEFT takes the first pattern that fits, and adapter_config.json is sorted.
    """
    patterns = sorted(given.items())
    found = {
        name: next((value for end, value in patterns if lora.matches_suffix(end, name)), default)
        for name in wanted
    }
    if found == dict(wanted):
        return dict(given)
    return {
        re.escape(end): value
        for value in sorted(set(wanted.values()) - {default})
        for end in _ends([name for name, own in wanted.items() if own == value], wanted)
    }


def _ends(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """The names by their ends, of two parts or more, that nothing else `among` these ends in."""
    names = set(names)
    others = {end for other in among if other not in names for end in _ends_of(other)}
    return sorted({next(end for end in _ends_of(name) if end not in others) for name in names})


def _ends_of(name: str) -> list[str]:
    """Ends of a name from short to whole; none begins with a layer's number."""
    parts = name.split(".")
    starts = range(max(len(parts) - 2, 0), -1, -1)
    return [".".join(parts[start:]) for start in starts if not parts[start].isdigit()]


def _weights(model: Model) -> set[str]:
    """Names of all weights, on disk and in transformers 5."""
    names = {entry.hf for entry in entries_of(model)}
    modules = (module for names in linear_modules(model).values() for module in names)
    return names | {parameter_of(module)[0] for module in modules}


def _fused(model: Model, spec: LoraConfig) -> dict[str, dict[str, Place]]:
    """The modules `experts` that have an adapter: name -> gate_proj, up_proj, ... -> where."""
    found: dict[str, dict[str, Place]] = {}
    if model.config.model_type not in BY_PARAMETER:
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
    if model.config.model_type not in BY_PARAMETER:
        return pieces
    start = len("base_model.model.")
    return {k: v for k, v in pieces.items() if not is_routed(k[start:].rsplit(".", 2)[0])}


def shapes(
    model: Model, spec: LoraConfig, leaves: Mapping[str, Leaf]
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the adapter in PEFT's file, and its shape."""
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
    host = {path: np.asarray(array) for path, array in params.items()}
    tensors = {key: host[path][index] for key, (path, index) in _plain(model, spec).items()}
    for container, places in _fused(model, spec).items():
        for key, kinds in _fused_keys(container, places).items():
            pairs = [_pair(host, places[kind]) for kind in kinds]
            a, b = fuse(*(pairs[0] if len(pairs) == 1 else stack_gate_up(*pairs)))
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}


def _pair(host: Mapping[str, np.ndarray], place: Place) -> tuple[np.ndarray, np.ndarray]:
    """The factors of one kind of a layer's experts."""
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
