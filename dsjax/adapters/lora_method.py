# SPDX-License-Identifier: Apache-2.0
"""LoRA as an adapter method: its record, and what of that has no other place.

In: the `adapter` section, or adapter_config.json. Out: a `LoraConfig`; how it changes a checkpoint.
Not done here: the update itself (`lora`, `expert_lora`), PEFT's fields and tensors (`lora_peft`,
`lora_tensors`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from dsjax.adapters import idle, lora, lora_peft, lora_tensors
from dsjax.adapters.dora import MAGNITUDE
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.lora_plain import plain_array, plain_config
from dsjax.adapters.method import AdapterMethod, Tensors
from dsjax.config import AdapterSection
from dsjax.distributed.arrays import host_part, is_here
from dsjax.errors import raise_all
from dsjax.models import Model
from dsjax.models.changes import Change, Rows, compose

KEYS = tuple(key for key in LoraConfig.__dataclass_fields__ if key != "target_parameters")

Factor = tuple[Callable[[], Any], tuple[Any, ...]]
"""What gives an array, and the index of a module's factor in it."""


_CHOICE = ("target_modules", "exclude_modules")


def from_section(section: AdapterSection) -> LoraConfig:
    """Read the LoRA that the YAML describes."""
    return LoraConfig(**{key: getattr(section, key) for key in KEYS})


def compared_with_model(config: LoraConfig) -> set[str]:
    """Keys of which two values can say the same; patterns in PEFT's file may be for parameters."""
    patterns = {"rank_pattern", "alpha_pattern"} if config.target_parameters else set()
    return {*_CHOICE} | patterns


def says_the_same(key: str, section: AdapterSection, config: LoraConfig, model: Model) -> bool:
    """Whether the YAML's value of a key gives every module what the adapter on disk has."""
    plain = replace(config, target_parameters=None, rank_pattern={}, alpha_pattern={})
    adapted = lora.targets(model, config)
    if key in _CHOICE:  # both together say which modules
        given = section.model_fields_set & set(_CHOICE)
        wished = replace(plain, **{name: getattr(section, name) for name in given})
        return lora.targets(model, wished) == adapted
    wished = replace(plain, **{key: getattr(section, key)})
    names = [name for modules in adapted.values() for name, hit in modules.items() if hit]
    raise_all(lora.pattern_problems(wished, names))
    if key == "rank_pattern":
        return all(wished.rank_of(name) == config.rank_of(name) for name in names)
    return all(math.isclose(wished.alpha_of(name), config.alpha_of(name)) for name in names)


def file_problems(model: Model, config: LoraConfig, read: Callable[[], Tensors]) -> list[str]:
    """Tensors of PEFT's file whose numbers we have no place for."""
    if not config.target_parameters:
        return []
    return [
        f"{key}: got a part of the rank that gate_proj and up_proj share, expected half of it for "
        "each; merge the adapter into the model with PEFT"
        for key in lora_tensors.shared_rank_tensors(model, config, read())
    ]


def merged(model: Model, config: LoraConfig, trained: Mapping[str, Any]) -> dict[str, Change]:
    """Every adapted weight plus scaling * B A; under DoRA its rows at their trained lengths."""
    config = plain_config(config)
    pieces = lora.tensors(model, config)

    @cache
    def array_of(path: str) -> Any:
        array = plain_array(model, path, trained)
        return np.asarray(array, np.float32) if is_here(array) else array

    changes = {}
    for key in (key for key in pieces if key.endswith(".lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        (path_a, at_a), (path_b, at_b) = pieces[key], pieces[key.replace("lora_A", "lora_B")]
        low, high = (partial(array_of, path_a), at_a), (partial(array_of, path_b), at_b)
        change = _with_update(low, high, config.scaling_of(name))
        if config.use_dora:
            path, at = pieces[key.replace("lora_A.weight", MAGNITUDE)]
            change = compose(change, _at_length(partial(array_of, path), at))
        changes[f"{name}.weight"] = change
    return changes


def _with_update(low: Factor, high: Factor, scaling: float) -> Change:
    """Return the change to the source plus scaling * high @ low."""

    def fetch(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        (low_array, at), (high_array, (*lead, _, rank)) = low, high
        return host_part(low_array(), at), host_part(high_array(), (*lead, *rows, rank))

    def apply(source: np.ndarray, factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        low_rI, high_Or = factors
        values = (high_Or * np.float32(scaling)) @ low_rI
        # In place, since pieces are large.
        return np.add(values, source, out=values, dtype=np.float32, casting="same_kind")

    return Change(fetch, apply)


def _at_length(magnitude: Callable[[], Any], at: tuple[Any, ...]) -> Change:
    """Return the change of the rows of a weight to trained lengths."""

    def apply(source: np.ndarray, magnitude_O: np.ndarray) -> np.ndarray:
        lengths_O = np.linalg.norm(source, axis=-1)
        some = lengths_O > 0
        ratio_O = np.where(some, magnitude_O / np.where(some, lengths_O, 1), 1)
        return source * ratio_O.astype(np.float32)[:, None]

    return Change(lambda rows: host_part(magnitude(), (*at, *rows[:1])), apply)


LORA = AdapterMethod(
    keys=KEYS,
    from_section=from_section,
    peft_problems=lora_peft.problems,
    from_peft=lora_peft.from_fields,
    attach=lora.attach,
    initial=lora.initial,
    config_fields=lora_peft.config_fields,
    shapes=lora_tensors.shapes,
    to_file=lora_tensors.to_file,
    from_file=lora_tensors.from_file,
    merged=merged,
    initial_reads=lora.initial_reads,
    initial_at_once=lora.initial_at_once,
    lr_factor=lora.lr_factor,
    without_idle=idle.without_idle,
    file_problems=file_problems,
    without_effect=(
        *("bias", "init_lora_weights", "target_parameters", "layers_pattern"),
        *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    ),
    readers=lora_peft.readers,
    compared_with_model=compared_with_model,
    says_the_same=says_the_same,
)
