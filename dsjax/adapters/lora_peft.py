# SPDX-License-Identifier: Apache-2.0
"""A LoRA in the form that PEFT really applies: the fields of its adapter_config.json, both ways.

In: a config and a model, or PEFT's fields. Out: the other. For DeepSeek-V2 and V3, PEFT
0.21 with transformers 5 takes gate_proj, up_proj and down_proj in `target_modules` for the routed
experts' (peft issue 3711), and drops what an adapter has for other modules of these names. Named as
weights, in `target_parameters`, they are adapted. Not done here: tensors (`lora_tensors`), files.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsjax.adapters import lora
from dsjax.adapters.expert_lora import (
    DOWN,
    GATE_UP,
    parameter_of,
)
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.lora_plain import plain_config
from dsjax.adapters.peft_fields import value_problems
from dsjax.adapters.targets import in_layers, linear_modules, short_names
from dsjax.config import AdapterSection
from dsjax.errors import ConfigError, raise_all
from dsjax.models import Model, entries_of, model_family
from dsjax.models.config_checks import names_problems, shown

_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")

_INITIALISED_AS_LORA = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""init_lora_weights whose saved tensors are a plain LoRA; the others change the base too."""

Whole = tuple[int, int | float]
"""Rank and alpha, as PEFT counts them for one of its targets."""


def problems(config: Mapping[str, Any], field: str) -> list[str]:
    """Say what is wrong with the fields of an adapter_config.json, for a LoRA.

    Args:
        config: the fields.
        field: what messages begin with.
    """
    found = []
    if config.get("bias") not in (None, "none"):
        found.append(f"{field} bias: got {shown(config['bias'])}, expected none")
    start = config.get("init_lora_weights")
    if isinstance(start, str):  # PEFT takes some of them in any case
        start = start.lower()
    if start not in _INITIALISED_AS_LORA:
        found.append(
            f"{field} init_lora_weights: got {shown(start)}, expected true; such an adapter goes "
            "with a changed base model, save it as a plain LoRA with PEFT's path_initial_model_for_"
            "weight_conversion"
        )
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        found.append(
            f"{field} layers_pattern: got {shown(config['layers_pattern'])}, expected layers"
        )
    if not config.get("target_modules") and not config.get("target_parameters"):
        found.append(f"{field} target_modules: got nothing, expected a list or an expression")
    misnamed = names_problems(config, "target_parameters", field)
    if misnamed:
        return found + misnamed
    found += [
        f"{field} target_parameters: got {name!r}, expected names that end in .weight, or in "
        f"experts.{GATE_UP} and experts.{DOWN}; other parameters have no adapter here"
        for name in config.get("target_parameters") or []
        if not name.endswith(".weight") and name.rsplit(".", 1)[-1] not in (GATE_UP, DOWN)
    ]
    return found + value_problems(field, config, "r")


def from_fields(config: Mapping[str, Any], section: AdapterSection) -> LoraConfig:
    """Read the LoRA that an adapter_config.json describes; `problems` found none."""
    layers, parameters = config.get("layers_to_transform"), config.get("target_parameters")
    wanted = config.get("target_modules") or []
    # PEFT has no dropout before a parameter, so its file cannot say one.
    dropout = section.lora_dropout if parameters else config.get("lora_dropout")
    return LoraConfig(
        r=config["r"],
        lora_alpha=config.get("lora_alpha") or 8,
        lora_dropout=float(dropout or 0),
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        layers_to_transform=[layers] if isinstance(layers, int) else layers or None,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        exclude_modules=config.get("exclude_modules") or None,
        loraplus_lr_ratio=section.loraplus_lr_ratio,
        target_parameters=parameters or None,
    )


def config_fields(model: Model, spec: LoraConfig) -> dict[str, Any]:
    """Return the fields of adapter_config.json that are LoRA's own, all written out.

    Raises:
        ConfigError: PEFT has no form for this adapter.
    """
    spec = plain_config(spec)
    targets = peft_targets(model, spec)
    parameters = sorted(name for name in targets if _is_parameter(name, model))
    if spec.use_dora and parameters:
        raise ConfigError(
            f"export.format: got peft with adapter.use_dora on {parameters[0]}, expected merged or "
            "null; PEFT has no DoRA for what it adapts by its weight. Leave the feed-forwards out "
            "of adapter.target_modules, or set export.format=merged"
        )
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
        "use_dora": spec.use_dora,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if parameters:
        fields["target_parameters"] = _ends(parameters, _weights(model))
    return fields


def readers(model: Model, spec: LoraConfig) -> str:
    """Say who reads a LoRA's files; of vLLM what its code and its issue 48974 say."""
    if config_fields(model, spec).get("target_parameters"):
        return (
            "This adapter names weights in `target_parameters`. It is for peft 0.21 and "
            "transformers 5 or later; earlier ones may leave a part of it out without a warning. "
            "For vLLM export merged weights."
        )
    known = "PEFT reads this adapter, and so does transformers with `load_adapter`."
    if spec.use_dora:
        return f"{known} vLLM's `--enable-lora` refuses DoRA: export merged weights for it."
    found = (names for path, names in lora.targets(model, spec).items() if "kv_b_proj" in path)
    if any(hit for names in found for hit in names.values()):
        return (
            f"{known} vLLM's `--enable-lora` loads what is on `kv_b_proj` and does not apply it "
            "(its issue 48974): export merged weights for it."
        )
    return (
        f"{known} vLLM's `--enable-lora` is for adapters of this kind, with `--max-lora-rank` of "
        f"at least {_most_rank(spec)}; that was not tried."
    )


def _most_rank(spec: LoraConfig) -> int:
    plain = plain_config(spec)
    return max(plain.r, *plain.rank_pattern.values()) if plain.rank_pattern else plain.r


def peft_targets(model: Model, spec: LoraConfig) -> dict[str, Whole]:
    """Return what PEFT adapts: names of modules and of parameters -> rank and alpha.

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
    if model_family(model).target_parameters and module.rsplit(".", 1)[-1] in _FEED_FORWARD:
        return parameter_of(module)
    return module, 1


def _is_parameter(key: str, model: Model) -> bool:
    """Whether a target's name is a parameter's."""
    routed = key.endswith((f".experts.{GATE_UP}", f".experts.{DOWN}"))
    return key.endswith(".weight") or (routed and model_family(model).target_parameters)


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
    by_parameter = model_family(model).target_parameters
    wanted, as_named = spec.target_modules, not (spec.target_parameters or spec.exclude_modules)
    if not isinstance(wanted, str) and as_named and not by_parameter:
        return wanted
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
    """Shorten names to ends of two parts or more that nothing else `among` these ends in."""
    names = set(names)
    others = {end for other in among if other not in names for end in _ends_of(other)}
    return sorted({next(end for end in _ends_of(name) if end not in others) for name in names})


def _ends_of(name: str) -> list[str]:
    """Return ends of a name from short to whole; none begins with a layer's number."""
    parts = name.split(".")
    starts = range(max(len(parts) - 2, 0), -1, -1)
    return [".".join(parts[start:]) for start in starts if not parts[start].isdigit()]


def _weights(model: Model) -> set[str]:
    """Names of all weights, on disk and in transformers 5."""
    names = {entry.hf for entry in entries_of(model)}
    modules = (module for names in linear_modules(model).values() for module in names)
    return names | {parameter_of(module)[0] for module in modules}
