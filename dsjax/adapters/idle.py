# SPDX-License-Identifier: Apache-2.0
"""What an adapter on disk names and this model does not have.

In: the spec of a PEFT adapter, and the model. Out: the spec without it, and words on what was left
out. PEFT asks only that one target matches: adapters made for several models name `k_proj` for one
that has none. What the model has and no adapter can be on stays, and is refused by `lora`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsjax.adapters import lora
from dsjax.adapters.expert_lora import is_routed, parameter_of
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.targets import ends_of, linear_modules
from dsjax.config.patterns import fullmatch
from dsjax.errors import raise_all
from dsjax.models import Model, entries_of


def without_idle(model: Model, spec: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """Leave out targets, patterns and layers that are not in the model, unless nothing stays.

    Returns:
        The spec, and the names that were left out.

    Raises:
        ConfigError: a pattern that cannot be matched.
    """
    modules = _modules(model)
    raise_all(lora.pattern_problems(spec, modules))
    ends = {end for module in modules for end in ends_of(module)}
    idle: list[str] = []
    changes: dict[str, Any] = {}
    wanted = spec.target_modules
    if isinstance(wanted, list):
        changes["target_modules"] = _kept(wanted, [name for name in wanted if name in ends], idle)
    changes["exclude_modules"] = _excluding(model, spec, idle)
    layers = spec.layers_to_transform
    if layers:
        inside = [layer for layer in layers if 0 <= layer < model.config.num_hidden_layers]
        changes["layers_to_transform"] = _kept(layers, inside, idle)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(spec, key)
        # A name that is there needs no matching; EVA writes one for every module.
        there = [one for one in patterns if one in ends or _is_there(one, modules)]
        idle += [pattern for pattern in patterns if pattern not in there and pattern not in idle]
        changes[key] = {pattern: patterns[pattern] for pattern in there}
    return replace(spec, **changes), idle


def _excluding(model: Model, spec: LoraConfig, idle: list[str]) -> str | list[str] | None:
    """Keep what of `exclude_modules` leaves anything out; the rest is noted as idle."""
    wanted = spec.exclude_modules
    names = [name for names in linear_modules(model).values() for name in names]
    if isinstance(wanted, str):
        matches = fullmatch([wanted], names)
        if wanted in matches.problems or matches.covered[wanted]:
            return wanted
        idle.append(wanted)
        return None
    linear = {end for name in names for end in ends_of(name)}
    idle += [name for name in wanted or [] if name not in linear]
    return [name for name in wanted or [] if name in linear] or None


def _kept(wanted: list[Any], there: list[Any], idle: list[str]) -> list[Any]:
    """Those of a list that are there, the others noted as idle; all, if none is there."""
    if not there:
        return wanted
    absent = [item for item in wanted if item not in there]
    idle += [item if isinstance(item, str) else f"layer {item}" for item in absent]
    return there


def _is_there(pattern: str, modules: list[str]) -> bool:
    return any(lora.matches_suffix(pattern, module) for module in modules)


def _modules(model: Model) -> list[str]:
    """Every weight, every module around it, and what PEFT calls the routed experts' weights."""
    found = {"lm_head"}  # a tied one has no weight of its own
    for entry in entries_of(model):
        parts = entry.hf.split(".")
        found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return sorted(found | {parameter_of(module)[0] for module in found if is_routed(module)})
