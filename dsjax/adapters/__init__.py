# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is attached to a model, from the YAML or from a PEFT adapter on disk.

In: the `adapter` section and an abstract model. Out: the model with its slots filled, the first
values of the new arrays, and the same arrays as PEFT's tensors. Not done here: deciding what trains
(`training.partition`), writing an export.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from dsjax.adapters import lora, lora_peft, prefix
from dsjax.adapters.lora import LoraConfig
from dsjax.adapters.prefix import PrefixConfig
from dsjax.config import AdapterSection
from dsjax.distributed.sharding import Leaf
from dsjax.models import Model

Spec = LoraConfig | PrefixConfig

ADAPTERS = {"LORA": lora, "PREFIX_TUNING": prefix}
"""adapter.peft_type -> the module that implements it."""

FIELDS = {"LORA": lora_peft.config_fields, "PREFIX_TUNING": prefix.config_fields}
"""adapter.peft_type -> what writes the fields of adapter_config.json that are its own."""

KEYS = {
    "LORA": tuple(key for key in LoraConfig.__dataclass_fields__ if key != "target_parameters"),
    "PREFIX_TUNING": tuple(PrefixConfig.__dataclass_fields__),
}
"""adapter.peft_type -> the keys of the section that it uses."""


def unused_keys(section: AdapterSection, spec: Spec | None) -> list[str]:
    """Keys that the user gave and that this kind of adapter does not have."""
    used = KEYS[spec.peft_type] if spec else ()
    off = {"peft_type", "path", "use_dora", *used}
    return [f"adapter.{key}" for key in sorted(section.model_fields_set - off)]


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


def check_peft_form(model: Model, spec: Spec) -> None:
    """Refuse an adapter that PEFT has no form for, before a run and not after it.

    Raises:
        ConfigError: routed experts whose adapters differ within a layer.
    """
    peft_config(model, spec, base="")


def uses_target_parameters(model: Model, spec: Spec | None) -> bool:
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
