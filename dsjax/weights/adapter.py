# SPDX-License-Identifier: Apache-2.0
"""What to attach to a model: the adapter of the YAML, or one on disk as PEFT saves it.

In: the `adapter` section, and the abstract model. Out: the adapter's description, which may not
contradict the YAML, and its arrays from disk. Not done here: reading PEFT's files (`peft`),
attaching (`adapters`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsjax.adapters import ADAPTERS, method_of
from dsjax.adapters.method import AdapterConfig
from dsjax.config import AdapterSection
from dsjax.distributed.sharding import Leaf
from dsjax.errors import raise_all
from dsjax.models import Model
from dsjax.weights import peft


def resolve(section: AdapterSection) -> AdapterConfig | None:
    """Return what to attach: the adapter at `adapter.path`, or what the YAML says, or nothing.

    Raises:
        ConfigError: a key of the YAML disagrees with the adapter on disk, or that adapter needs
            what we do not have.
    """
    if section.path is not None:
        spec = peft.read_spec(section.path, section)
        _check_agreement(section, spec)
        return spec
    return None if section.peft_type is None else ADAPTERS[section.peft_type].from_section(section)


def fitted(
    section: AdapterSection, spec: AdapterConfig | None, model: Model
) -> tuple[AdapterConfig | None, str]:
    """Leave out of an adapter from disk what is not in this model, as PEFT does.

    Returns:
        The adapter, and what to tell the user; empty if there is nothing to tell.
    """
    if section.path is None or spec is None:
        return spec, ""
    told = []
    spec, left_out = method_of(spec).without_idle(model, spec)
    told += [f"not in this model: {_some(left_out)}"] if left_out else []
    unknown = peft.unknown_fields(section.path)
    told += [f"no fields of PEFT, and not used: {_some(unknown)}"] if unknown else []
    return spec, f"adapter.path {section.path}: {'; '.join(told)}" if told else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def _check_agreement(section: AdapterSection, spec: AdapterConfig) -> None:
    problems = []
    given = section.model_fields_set - {"path"}
    if "peft_type" in given and section.peft_type != spec.peft_type:
        problems.append(
            f"adapter.peft_type: got {section.peft_type!r}, expected {spec.peft_type!r} as in "
            f"{section.path}/adapter_config.json; remove the key"
        )
    method = method_of(spec)
    for key in sorted(given & set(method.keys) - set(method.compared_with_model(spec))):
        mine, theirs = getattr(section, key), getattr(spec, key)
        if _comparable(mine) != _comparable(theirs):
            problems.append(
                f"adapter.{key}: got {mine!r}, expected {theirs!r} as in "
                f"{section.path}/adapter_config.json; remove the key, the adapter decides"
            )
    raise_all(problems)


def check_targets(section: AdapterSection, spec: AdapterConfig, model: Model) -> None:
    """Refuse targets and patterns of the YAML that mean another adapter than the one on disk."""
    if section.path is None:
        return
    method = method_of(spec)
    given = section.model_fields_set & set(method.compared_with_model(spec))
    raise_all(
        f"adapter.{key}: got {getattr(section, key)!r}, expected {getattr(spec, key)!r} as in "
        f"{section.path}/adapter_config.json; remove the key, the adapter decides"
        for key in sorted(given)
        if not method.says_the_same(key, section, spec, model)
    )


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return frozenset(value) if value else None
    return dict(value) if isinstance(value, Mapping) else value


def check_params(
    path: str,
    model: Model,
    spec: AdapterConfig,
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
    peft.check_tensors(path, model, spec, leaves, read_base)


def load_params(
    path: str,
    model: Model,
    spec: AdapterConfig,
    leaves: Mapping[str, Leaf],
    shardings: Mapping[str, NamedSharding],
) -> dict[str, jax.Array]:
    """Every trained adapter leaf from a PEFT adapter on disk; `check_params` has passed."""
    params = {}
    for name, values in peft.read_params(path, model, spec, leaves).items():
        params[name] = jax.make_array_from_callback(
            values.shape, shardings[name], lambda index, values=values: values[index]
        )
    return params


def peft_tensors(
    model: Model, spec: AdapterConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the adapter's arrays as the tensors of PEFT's file, by its names."""
    return method_of(spec).to_file(model, spec, params)
