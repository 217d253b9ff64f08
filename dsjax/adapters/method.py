# SPDX-License-Identifier: Apache-2.0
"""A kind of adapter, as one record: all that the rest of the package knows of it.

In: nothing. Out: `AdapterMethod`, which a method's file fills in, and which `ADAPTERS` registers.
What a record does not hold cannot be asked: nothing outside compares a kind's name. Not done here:
any method.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from dsjax.config import AdapterSection
from dsjax.distributed.sharding import Leaf
from dsjax.models import Model
from dsjax.models.changes import Change


@runtime_checkable
class AdapterConfig(Protocol):
    """An adapter's description: a frozen dataclass, its fields named as PEFT names them."""

    @property
    def peft_type(self) -> str:
        """Key of its method in `ADAPTERS`."""
        ...


Leaves = Mapping[str, Leaf]
Arrays = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]


def _nothing_idle(model: Model, config: Any) -> tuple[Any, list[str]]:
    return config, []


def _no_problems(model: Model, config: Any, read: Callable[[], Tensors]) -> list[str]:
    return []


def _nothing_to_note(model: Model, config: Any) -> list[str]:
    return []


def _one_by_one(
    slot: str, leaves: Collection[str], model: Model, key: jax.Array, base: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    return {}


def _by_peft(model: Model, config: Any) -> str:
    return ""


def _reads_nothing(path: str) -> Collection[str]:
    return ()


def _by_value(config: Any) -> Collection[str]:
    return ()


def _as_it_is(path: str, config: Any) -> float:
    return 1.0


def _never(key: str, section: AdapterSection, config: Any, model: Model) -> bool:
    raise AssertionError(f"{key} is compared by its value")


@dataclass(frozen=True)
class AdapterMethod:
    """What a kind of adapter is, on the model, in the YAML and in PEFT's files.

    Attributes:
        keys: the keys of the `adapter` section that it uses.
        from_section: its description by the YAML.
        peft_problems: what is wrong with the fields of an adapter_config.json, in words that begin
            with the second argument.
        from_peft: its description by fields with which nothing is wrong; the YAML's section says
            what PEFT's file cannot.
        attach: puts it into the slots of an abstract model. Raises ConfigError where it has no
            place there.
        initial: (path of one of its leaves, the leaf, the abstract model, its random key, base
            parameters by path) -> its first value; traced. The base parameters are those that
            `initial_reads` names, with the checkpoint's values: beside an adapter none of them
            trains. They are sharded as they lie on the devices and hold all layers of a stack,
            [L, ...]. A matrix in another storage than `dense` is decoded as a layer decodes it,
            but the stack at once.
        config_fields: its own fields of adapter_config.json, all written out. Raises ConfigError
            where PEFT has no form for this adapter.
        shapes: the tensors of PEFT's file.
        to_file: the arrays as those tensors, float32.
        from_file: those tensors as arrays by path.
        merged: how it changes the checkpoint's tensors, by name; None where it has no merged form
            (`config.sections.UNMERGED` says why).
        initial_reads: path of one of its leaves -> paths of the base parameters that its first
            value is computed from (`models.base_shapes` lists them all).
        initial_at_once: (path of a slot, names of its leaves, the abstract model, the slot's random
            key, base parameters by path) -> first values by name, of those leaves whose values are
            computed together; `initial` is not asked for them.
        lr_factor: (path of one of its leaves, config) -> what the learning rate of this leaf is
            multiplied by.
        without_idle: the description without what is not in a model, and the names left out.
        file_problems: why tensors of the right shapes cannot be read, by names of tensors; they
            are read only if they are asked for.
        without_effect: fields of its adapter_config.json that change nothing of a saved adapter.
        readers: what of its PEFT files other programs read, for the model card; empty: nothing that
            PEFT's own card does not say.
        notes: what a user should know of it before it trains.
        compared_with_model: keys of which two values can say the same of a model.
        says_the_same: whether the YAML's value of such a key means the adapter on disk.
    """

    keys: tuple[str, ...]
    from_section: Callable[[AdapterSection], AdapterConfig]
    peft_problems: Callable[[Mapping[str, Any], str], list[str]]
    from_peft: Callable[[Mapping[str, Any], AdapterSection], AdapterConfig]
    attach: Callable[[Model, Any], None]
    initial: Callable[[str, Leaf, Model, jax.Array, Mapping[str, jax.Array]], jax.Array]
    config_fields: Callable[[Model, Any], dict[str, Any]]
    shapes: Callable[[Model, Any, Leaves], dict[str, tuple[int, ...]]]
    to_file: Callable[[Model, Any, Arrays], dict[str, np.ndarray]]
    from_file: Callable[[Model, Any, Leaves, Tensors], dict[str, np.ndarray]]
    merged: Callable[[Model, Any, Arrays], dict[str, Change]] | None
    initial_reads: Callable[[str], Collection[str]] = _reads_nothing
    initial_at_once: Callable[
        [str, Collection[str], Model, jax.Array, Mapping[str, jax.Array]], Mapping[str, jax.Array]
    ] = _one_by_one
    lr_factor: Callable[[str, Any], float] = _as_it_is
    without_idle: Callable[[Model, Any], tuple[Any, list[str]]] = _nothing_idle
    file_problems: Callable[[Model, Any, Callable[[], Tensors]], list[str]] = _no_problems
    without_effect: tuple[str, ...] = ()
    readers: Callable[[Model, Any], str] = _by_peft
    notes: Callable[[Model, Any], list[str]] = _nothing_to_note
    compared_with_model: Callable[[Any], Collection[str]] = _by_value
    says_the_same: Callable[[str, AdapterSection, Any, Model], bool] = _never
