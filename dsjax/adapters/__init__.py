# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is attached to a model, from the YAML or from a PEFT adapter on disk.

In: the `adapter` section and an abstract model. Out: the model with its slots filled, the first
values of the new arrays, and the same arrays as PEFT's tensors. Not done here: deciding what trains
(`partition`), writing an export.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsjax.adapters import idle, lora, peft_files, peft_lora, prefix
from dsjax.adapters.lora import LoraSpec
from dsjax.adapters.prefix import PrefixSpec
from dsjax.config import AdapterSection
from dsjax.errors import raise_all
from dsjax.models import Model
from dsjax.partition import Leaf

Spec = LoraSpec | PrefixSpec

ADAPTERS = {"LORA": lora, "PREFIX_TUNING": prefix}
"""adapter.peft_type -> the module that implements it."""

FIELDS = {"LORA": peft_lora.config_fields, "PREFIX_TUNING": prefix.config_fields}
"""adapter.peft_type -> what writes the fields of adapter_config.json that are its own."""

KEYS = {
    "LORA": tuple(key for key in LoraSpec.__dataclass_fields__ if key != "target_parameters"),
    "PREFIX_TUNING": tuple(PrefixSpec.__dataclass_fields__),
}
"""adapter.peft_type -> the keys of the section that it uses."""


def resolve(section: AdapterSection) -> Spec | None:
    """What to attach: the adapter at `adapter.path`, or what the YAML says, or nothing.

    Raises:
        ConfigError: a key of the YAML disagrees with the adapter on disk, or that adapter needs
            what we do not have.
    """
    if section.path is not None:
        spec = peft_files.read_spec(section.path)
        if isinstance(spec, LoraSpec) and spec.target_parameters:
            # PEFT has no dropout there, so its file cannot say one.
            spec = replace(spec, lora_dropout=section.lora_dropout)
        _check_agreement(section, spec)
        return spec
    if section.peft_type == "LORA":
        return LoraSpec(**{key: getattr(section, key) for key in KEYS["LORA"]})
    if section.peft_type == "PREFIX_TUNING":
        return PrefixSpec(section.num_virtual_tokens)
    return None


def fitted(section: AdapterSection, spec: Spec | None, model: Model) -> tuple[Spec | None, str]:
    """An adapter from disk without what is not in this model, as PEFT loads it.

    Returns:
        The adapter, and what to tell the user; empty if there is nothing to tell.
    """
    if section.path is None or spec is None:
        return spec, ""
    told = []
    if isinstance(spec, LoraSpec):
        spec, left_out = idle.without_idle(model, spec)
        told += [f"not in this model: {_some(left_out)}"] if left_out else []
    unknown = peft_files.unknown_fields(section.path)
    told += [f"no fields of PEFT, and not used: {_some(unknown)}"] if unknown else []
    return spec, f"adapter.path {section.path}: {'; '.join(told)}" if told else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def unused_keys(section: AdapterSection, spec: Spec | None) -> list[str]:
    """Keys that the user gave and that this kind of adapter does not have."""
    used = KEYS[spec.peft_type] if spec else ()
    off = {"peft_type", "path", "use_dora", *used}
    return [f"adapter.{key}" for key in sorted(section.model_fields_set - off)]


def _check_agreement(section: AdapterSection, spec: Spec) -> None:
    problems = []
    given = section.model_fields_set - {"path"}
    if "peft_type" in given and section.peft_type != spec.peft_type:
        problems.append(
            f"adapter.peft_type: got {section.peft_type!r}, expected {spec.peft_type!r} as in "
            f"{section.path}/adapter_config.json; remove the key"
        )
    by_model = _compared_with_model(spec)
    for key in sorted(given & set(KEYS[spec.peft_type]) - by_model):
        mine, theirs = getattr(section, key), getattr(spec, key)
        if _comparable(mine) != _comparable(theirs):
            problems.append(
                f"adapter.{key}: got {mine!r}, expected {theirs!r} as in "
                f"{section.path}/adapter_config.json; remove the key, the adapter decides"
            )
    raise_all(problems)


def _compared_with_model(spec: Spec) -> set[str]:
    """Keys of which two values can say the same; patterns in PEFT's file may be for parameters."""
    by_parameter = isinstance(spec, LoraSpec) and spec.target_parameters
    return {"target_modules"} | ({"rank_pattern", "alpha_pattern"} if by_parameter else set())


def check_targets(section: AdapterSection, spec: Spec, model: Model) -> None:
    """Refuse targets and patterns of the YAML that mean another adapter than the one on disk."""
    if section.path is None or not isinstance(spec, LoraSpec):
        return
    given = section.model_fields_set & _compared_with_model(spec)
    raise_all(
        f"adapter.{key}: got {getattr(section, key)!r}, expected {getattr(spec, key)!r} as in "
        f"{section.path}/adapter_config.json; remove the key, the adapter decides"
        for key in sorted(given)
        if not _says_the_same(key, section, spec, model)
    )


def _says_the_same(key: str, section: AdapterSection, spec: LoraSpec, model: Model) -> bool:
    """Whether the YAML's value of a key gives every module what the adapter on disk has."""
    plain = replace(spec, target_parameters=None, rank_pattern={}, alpha_pattern={})
    wished = replace(plain, **{key: getattr(section, key)})
    adapted = lora.targets(model, spec)
    if key == "target_modules":
        return lora.targets(model, wished) == adapted
    names = [name for modules in adapted.values() for name, hit in modules.items() if hit]
    raise_all(lora.pattern_problems(wished, names))
    if key == "rank_pattern":
        return all(wished.rank_of(name) == spec.rank_of(name) for name in names)
    return all(math.isclose(wished.alpha_of(name), spec.alpha_of(name)) for name in names)


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return frozenset(value) if value else None
    return dict(value) if isinstance(value, Mapping) else value


def attach(model: Model, spec: Spec | None) -> None:
    """Put the adapter into the model's slots (abstract)."""
    if spec is not None:
        ADAPTERS[spec.peft_type].attach(model, spec)


def initial_params(
    model: Model,
    spec: Spec | None,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
    seed: int,
) -> dict[str, jax.Array]:
    """First values of every adapter leaf, made on their devices; the mesh does not change them."""
    own = {path: leaf for path, leaf in leaves.items() if leaf.kind != "base"}
    if spec is None or not own:
        return {}
    initial = ADAPTERS[spec.peft_type].initial

    def make() -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        return {
            path: initial(path, leaf, model, jax.random.fold_in(key, zlib.crc32(path.encode())))
            for path, leaf in own.items()
        }

    return jax.jit(make, out_shardings={path: shardings[path] for path in own})()


def check_params(
    path: str,
    model: Model,
    spec: Spec,
    leaves: Mapping[str, Leaf],
    read_base: Callable[[str], np.ndarray],
) -> None:
    """Hold a PEFT adapter's tensors against the model.

    Args:
        path: the adapter's folder.
        model: the abstract model, adapter attached.
        spec: the adapter.
        leaves: the model's leaves by path.
        read_base: gives a tensor of the model's checkpoint by name.

    Raises:
        ConfigError: tensors are missing, left over, or of another shape than the model's.
    """
    peft_files.check_tensors(path, model, spec, leaves, read_base)


def load_params(
    path: str,
    model: Model,
    spec: Spec,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """Every trained adapter leaf from a PEFT adapter on disk; `check_params` has passed."""
    params = {}
    for name, values in peft_files.read_params(path, model, spec, leaves).items():
        params[name] = jax.make_array_from_callback(
            values.shape, shardings[name], lambda index, values=values: values[index]
        )
    return params


def peft_tensors(model: Model, spec: Spec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The adapter's arrays as the tensors of PEFT's file, by its names."""
    return peft_files.to_tensors(model, spec, params)


def check_peft_form(model: Model, spec: Spec) -> None:
    """Refuse an adapter that PEFT has no form for, before a run and not after it.

    Raises:
        ConfigError: routed experts whose adapters differ within a layer.
    """
    peft_config(model, spec, base="")


def targets_parameters(model: Model, spec: Spec | None) -> bool:
    """Whether PEFT's file of this adapter names weights, which older readers do not know."""
    return spec is not None and bool(peft_config(model, spec, "").get("target_parameters"))


def peft_config(model: Model, spec: Spec, base: str) -> dict[str, Any]:
    """The adapter_config.json for these arrays, every field written out."""
    return {
        "peft_type": spec.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **FIELDS[spec.peft_type](model, spec),
    }
