# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is attached to a model, from the YAML or from a PEFT adapter on disk.

In: the `adapter` section and an abstract model. Out: the model with its slots filled, the first
values of the new arrays, and the same arrays as PEFT's tensors. The parts: `method` (the record of
a kind of adapter), `targets` (which modules); LoRA is `lora` (which maps), `lora_start` (first
values), `linear_lora`, `expert_lora` and `dora` (the update), `lora_method` (its record),
`lora_plain` (as others read it), `lora_peft` (PEFT's config) and `lora_tensors` (PEFT's tensors);
`ia3`; `prefix`; `idle` (what of an adapter has no effect). Not done here: deciding what trains
(`training.partition`), writing an export.
"""

import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import NamedSharding

from dsjax.adapters.ia3 import IA3_METHOD
from dsjax.adapters.lora_method import LORA
from dsjax.adapters.method import AdapterConfig, AdapterMethod
from dsjax.adapters.prefix import PREFIX_TUNING
from dsjax.config import AdapterSection
from dsjax.config.sections import UNMERGED
from dsjax.distributed.sharding import Leaf
from dsjax.errors import ConfigError
from dsjax.models import Model, stored_linears
from dsjax.models.storage import storage_of

ADAPTERS: Mapping[str, AdapterMethod] = MappingProxyType(
    {"LORA": LORA, "IA3": IA3_METHOD, "PREFIX_TUNING": PREFIX_TUNING}
)
"""adapter.peft_type -> all that is known of this kind of adapter."""


def method_of(spec: AdapterConfig) -> AdapterMethod:
    """Return the method of an adapter."""
    return ADAPTERS[spec.peft_type]


def notes(model: Model, spec: AdapterConfig | None) -> list[str]:
    """Return what a user should know of an adapter before it trains."""
    return method_of(spec).notes(model, spec) if spec else []


def unused_keys(section: AdapterSection, spec: AdapterConfig | None) -> list[str]:
    """Keys that the user gave and that this kind of adapter does not have."""
    used = method_of(spec).keys if spec else ()
    off = {"peft_type", "path", *used}
    return [f"adapter.{key}" for key in sorted(section.model_fields_set - off)]


def attach(model: Model, spec: AdapterConfig | None) -> None:
    """Put the adapter into the model's slots (abstract)."""
    if spec is not None:
        method_of(spec).attach(model, spec)


def initial_params(
    model: Model,
    spec: AdapterConfig | None,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
    seed: int,
    loaded: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """First values of every adapter leaf, made on their devices; the mesh does not change them.

    Args:
        model: the abstract model, adapter attached.
        spec: the adapter; None in full training.
        leaves: of the model; those of the adapter are made.
        shardings: by path.
        seed: of what is random.
        loaded: the base's arrays by path; of them those are used that the method's
            `initial_reads` names.
    """
    own = {path: leaf for path, leaf in leaves.items() if leaf.kind != "base"}
    if spec is None or not own:
        return {}
    method, stored = method_of(spec), stored_linears(model)
    reads = {path: sorted(method.initial_reads(path)) for path in own}
    kinds = {name: storage_of(stored.get(name)) for names in reads.values() for name in names}
    slots: dict[str, list[str]] = {}
    for path in own:
        slots.setdefault(path.rpartition(".")[0], []).append(path)
    held = {
        name: {array: loaded[name + array] for array in arrays}
        for name, (_, arrays) in kinds.items()
    }

    def make(held: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        base = {name: kind.decode(held[name], model.dtype) for name, (kind, _) in kinds.items()}

        def of(paths: Iterable[str]) -> dict[str, jax.Array]:
            return {name: base[name] for path in paths for name in reads[path]}

        def key_of(path: str) -> jax.Array:
            return jax.random.fold_in(key, zlib.crc32(path.encode()))

        found: dict[str, jax.Array] = {}
        for slot, paths in slots.items():
            names = [path.rpartition(".")[2] for path in paths]
            values = method.initial_at_once(slot, names, model, key_of(slot), of(paths))
            found |= {f"{slot}.{name}": value for name, value in values.items()}
        return {
            path: found[path]
            if path in found
            else method.initial(path, leaf, model, key_of(path), of([path]))
            for path, leaf in own.items()
        }

    # Where nothing is read, the compiled function has no input.
    return jax.jit(make, out_shardings={path: shardings[path] for path in own})(held)


def lr_factors(spec: AdapterConfig | None, paths: Iterable[str]) -> dict[str, float]:
    """Return what the learning rates of an adapter's leaves are multiplied by, where not by 1."""
    if spec is None:
        return {}
    factors = {path: method_of(spec).lr_factor(path, spec) for path in paths}
    return {path: factor for path, factor in factors.items() if factor != 1}


def check_form(model: Model, spec: AdapterConfig | None, form: str, field: str) -> None:
    """Refuse a form that this training has not, before a run and not after it.

    Args:
        model: the abstract model, adapter attached.
        spec: the adapter; None in full training.
        form: merged or peft.
        field: the key or option that asks for it.

    Raises:
        ConfigError: PEFT's form of full training, or of an adapter that PEFT has none for, such as
            routed experts whose adapters differ within a layer; merged weights of an adapter that
            is no change of weights.
    """
    if spec is None:
        if form == "peft":
            raise ConfigError(f"{field}: got peft without an adapter, expected merged")
    elif form == "peft":
        peft_config(model, spec, base="")
    elif method_of(spec).merged is None:
        reason = UNMERGED[spec.peft_type]
        raise ConfigError(f"{field}: got merged with {spec.peft_type}, expected peft; {reason}")


def readers(model: Model, spec: AdapterConfig | None) -> str:
    """Return which programs read PEFT's files of an adapter, and which do not."""
    return method_of(spec).readers(model, spec) if spec else ""


def peft_config(model: Model, spec: AdapterConfig, base: str) -> dict[str, Any]:
    """Return the adapter_config.json for these arrays, every field written out."""
    return {
        "peft_type": spec.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **method_of(spec).config_fields(model, spec),
    }
