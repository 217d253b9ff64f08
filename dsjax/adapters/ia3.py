# SPDX-License-Identifier: Apache-2.0
"""IA3 (arXiv 2205.05638) with PEFT's semantics: a trained vector scales what a linear map reads or
gives.

In: an `IA3Config` and a model. Out: a vector in the slot of every targeted linear map: of its input
for `feedforward_modules`, else of its output, the bias included. All begin as ones. A stack holds
the vectors of all its layers; those of layers without one are not used. Not done here: routed
experts, which transformers 5 holds as parameters and PEFT's IA3 does not reach.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsjax.adapters.expert_lora import is_routed
from dsjax.adapters.method import AdapterMethod
from dsjax.adapters.peft_fields import value_problems
from dsjax.adapters.targets import (
    TargetPattern,
    chosen,
    linear_modules,
    module_at,
    short_names,
    target_problems,
)
from dsjax.config import AdapterSection
from dsjax.distributed.arrays import host_part
from dsjax.distributed.sharding import Leaf
from dsjax.errors import raise_all
from dsjax.models import Model, entries_of
from dsjax.models.changes import Change, Rows
from dsjax.models.layers import Linear
from dsjax.models.parameters import AdapterBuffer, AdapterParam, abstract, stacked_axes
from dsjax.models.slots import Dropout

KEYS = ("target_modules", "feedforward_modules")


@dataclass(frozen=True)
class IA3Config:
    """PEFT's IA3Config, the fields that we honour, under its names."""

    target_modules: str | list[str]
    feedforward_modules: str | list[str]

    peft_type = "IA3"

    def __post_init__(self):
        """Keep each list, which names a set, in one order: equal adapters have equal configs."""
        for name in KEYS:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, sorted(set(value)))

    @property
    def pattern(self) -> TargetPattern:
        """Which modules it is for."""
        return TargetPattern(self.target_modules)

    def scales_input(self, module: str) -> bool:
        """Whether a module's vector is for what it reads, by PEFT's rule: any end of its name."""
        wanted = self.feedforward_modules
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return module.endswith(tuple(wanted))


def from_section(section: AdapterSection) -> IA3Config:
    """Read the IA3 that the YAML describes; without feedforward_modules PEFT's own choice."""
    targeted, reads = section.target_modules, section.feedforward_modules
    if reads is None:
        ends = ["down_proj"] if isinstance(targeted, str) else targeted
        reads = [name for name in ends if name.endswith("down_proj")]
    return IA3Config(targeted, reads)


class Vector(nnx.Module):
    """A vector for each layer of a stack; layers that have none are scaled by one."""

    def __init__(self, layers: int | None, size: int, axis: str | None, on: list[bool]):
        axes, values = stacked_axes((axis,), layers), tuple(map(float, on))
        self.vector = AdapterParam(abstract((size,), layers), axes=axes, count=sum(on) * size)
        self.on = AdapterBuffer(abstract((), layers), axes=stacked_axes((), layers), values=values)

    def __call__(self) -> Float[Array, " size"]:
        """Return what a layer's input or output is multiplied by."""
        return jnp.where(self.on[...] > 0, self.vector[...], 1.0)


class IA3(nnx.Module):
    """The vectors of one linear map, for all layers of a stack (one outside a stack)."""

    def __init__(self, linear: Linear, read: list[bool], given: list[bool]):
        """Declare the vectors.

        Args:
            linear: the map whose slot this goes into.
            read: for each layer, whether its input is scaled.
            given: for each layer, whether its output is.
        """
        out_axis, in_axis = linear.axes
        self.read = self.given = nnx.data(None)
        if any(read):
            self.read = Vector(linear.layers, linear.in_features, in_axis, read)
        if any(given):
            self.given = Vector(linear.layers, linear.out_features, out_axis, given)

    def __call__(
        self,
        x: Float[Array, "*B I"],
        linear: Callable[[jax.Array], jax.Array],
        dropout: Dropout | None,
    ) -> Float[Array, "*B O"]:
        """Scale in float32, as PEFT does, and cast back."""
        return _scaled(linear(_scaled(x, self.read)), self.given)

    def merged_weight(self, weight: Float[Array, "O I"]) -> Float[Array, "O I"]:
        """Return the weight with its columns and rows scaled."""
        if self.read is not None:
            weight = weight * self.read()[None, :]
        return weight if self.given is None else weight * self.given()[:, None]


def _scaled(x: jax.Array, vector: Vector | None) -> jax.Array:
    return x if vector is None else (x.astype(jnp.float32) * vector()).astype(x.dtype)


def targets(model: Model, config: IA3Config) -> dict[str, dict[str, bool]]:
    """Find the targeted linear maps: path -> for each layer's module, whether it is adapted.

    Raises:
        ConfigError: a target matches nothing, or routed experts alone.
    """
    linears = linear_modules(model)
    dense = {path: names for path, names in linears.items() if not is_routed(names[0])}
    names = [name for modules in dense.values() for name in modules]
    routed = [name for modules in linears.values() for name in modules if is_routed(name)]
    problems = _routed_problems(config, names, routed)
    raise_all(problems or target_problems(config.pattern, names, model))
    adapted = chosen(config.pattern, names)
    raise_all(_feedforward_problems(config, adapted))
    hits = {path: {name: name in adapted for name in modules} for path, modules in dense.items()}
    return {path: modules for path, modules in hits.items() if any(modules.values())}


def _routed_problems(config: IA3Config, names: Sequence[str], routed: Sequence[str]) -> list[str]:
    """Targets that name routed experts and nothing besides."""
    wanted, problems = config.target_modules, []
    for one in [wanted] if isinstance(wanted, str) else [[name] for name in wanted]:
        pattern = TargetPattern(one)
        experts = chosen(pattern, routed)
        if experts and not chosen(pattern, names):
            got = one if isinstance(one, str) else one[0]
            problems.append(
                f"adapter.target_modules: got {got!r}, which names routed experts "
                f"({min(experts)}), expected other linear maps; IA3 has no vectors for routed "
                "experts"
            )
    return problems


def _feedforward_problems(config: IA3Config, adapted: set[str]) -> list[str]:
    wanted, targeted = config.feedforward_modules, config.target_modules
    if isinstance(wanted, str):
        if any(config.scales_input(name) for name in adapted):
            return []
        return [f"adapter.feedforward_modules: got {wanted!r}, which matches no target"]
    strange = [name for name in wanted if isinstance(targeted, list) and name not in targeted]
    return [
        f"adapter.feedforward_modules: got {name!r}, expected one of adapter.target_modules "
        f"({', '.join(targeted)})"
        for name in strange
    ]


def attach(model: Model, config: IA3Config) -> None:
    """Put vectors into the slot of every targeted linear map.

    Raises:
        ConfigError: a target matches nothing, or routed experts alone.
    """
    for path, modules in targets(model, config).items():
        reads = [hit and config.scales_input(name) for name, hit in modules.items()]
        gives = [hit and not config.scales_input(name) for name, hit in modules.items()]
        linear = module_at(model, path)
        linear.adapter = IA3(linear, reads, gives)


def initial(
    path: str, leaf: Leaf, model: Model, key: jax.Array, base: Mapping[str, jax.Array]
) -> jax.Array:
    """PEFT's start: ones, with which the model is as it was."""
    owner, name = path.rsplit(".", 1)
    if name == "vector":
        return jnp.ones(leaf.shape, leaf.dtype)
    values = dict(module_at(model, owner).on.get_metadata())["values"]
    return jnp.asarray(values, jnp.float32).reshape(leaf.shape)


def notes(model: Model, config: IA3Config) -> list[str]:
    """Say that routed experts of a targeted name are left as they are."""
    routed = [n for names in linear_modules(model).values() for n in names if is_routed(n)]
    left = short_names(list(chosen(config.pattern, routed)))
    if not left:
        return []
    return [f"IA3 leaves the routed experts' {', '.join(left)} as they are, as PEFT does"]


Place = tuple[str, tuple[int, ...], bool]
"""Where a module's vector is: path of the array, index into it, whether it is for the input."""


def vectors(model: Model, config: IA3Config) -> dict[str, Place]:
    """Every adapted module's vector, by the module's name on disk."""
    found = {}
    for path, modules in targets(model, config).items():
        lead = () if module_at(model, path).layers is None else (len(modules),)
        for index, (name, hit) in zip(np.ndindex(*lead), modules.items(), strict=True):
            if hit:
                side = "read" if config.scales_input(name) else "given"
                found[name] = (f"{path}.adapter.{side}.vector", index, side == "read")
    return found


def shapes(
    model: Model, config: IA3Config, leaves: Mapping[str, Leaf]
) -> dict[str, tuple[int, ...]]:
    """Every tensor of PEFT's file: [1, I] for an input, [O, 1] for an output."""
    found = {}
    for name, (path, _, of_input) in vectors(model, config).items():
        size = leaves[path].shape[-1]
        found[_key(name)] = (1, size) if of_input else (size, 1)
    return found


def to_file(model: Model, config: IA3Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the vectors as the tensors of PEFT's file, float32."""
    host = {path: np.asarray(array) for path, array in params.items()}
    return {
        _key(name): host[path][index].reshape((1, -1) if of_input else (-1, 1))
        for name, (path, index, of_input) in vectors(model, config).items()
    }


def from_file(
    model: Model, config: IA3Config, leaves: Mapping[str, Leaf], found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Undo `to_file`; layers without a vector get ones."""
    adapter = {path: leaf for path, leaf in leaves.items() if leaf.kind == "adapter"}
    params = {path: np.ones(leaf.shape, np.float32) for path, leaf in adapter.items()}
    for name, (path, index, _) in vectors(model, config).items():
        params[path][index] = found[_key(name)].reshape(-1)
    return params


def _key(module: str) -> str:
    return f"base_model.model.{module}.ia3_l"


def config_fields(model: Model, config: IA3Config) -> dict[str, Any]:
    """Return the fields of adapter_config.json that are IA3's own, all written out."""
    found = vectors(model, config)
    reads = [name for name, (_, _, of_input) in found.items() if of_input]
    dense = [n for names in linear_modules(model).values() for n in names if not is_routed(n)]
    short, short_reads = short_names(list(found)), short_names(reads)
    alike = {n for n in dense if n.rsplit(".", 1)[-1] in short} == set(found)
    alike = alike and {n for n in found if n.endswith(tuple(short_reads))} == set(reads)
    return {
        "target_modules": short if alike else sorted(found),
        "feedforward_modules": short_reads if alike else sorted(reads),
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }


def problems(config: Mapping[str, Any], field: str) -> list[str]:
    """Say what is wrong with the fields of an adapter_config.json, for IA3."""
    missing = [
        f"{field} {key}: got nothing, expected a list or an expression"
        for key in KEYS
        if not config.get(key) and (key == "target_modules" or config.get(key) is None)
    ]
    return missing + value_problems(field, config, "target_modules")


def from_fields(config: Mapping[str, Any], section: AdapterSection) -> IA3Config:
    """Read the IA3 that an adapter_config.json describes; `problems` found none."""
    return IA3Config(**{key: config[key] for key in KEYS})


def merged(model: Model, config: IA3Config, trained: Mapping[str, Any]) -> dict[str, Change]:
    """Every adapted weight with its columns or rows scaled, and the bias with the rows'."""
    biases = {entry.hf for entry in entries_of(model) if entry.hf.endswith(".bias")}
    changes = {}
    for name, (path, index, of_input) in vectors(model, config).items():
        fetch = partial(_rows_of, trained, path, index, of_input)
        changes[f"{name}.weight"] = Change(fetch, _times_columns if of_input else _times_rows)
        if not of_input and f"{name}.bias" in biases:
            changes[f"{name}.bias"] = Change(fetch, _times_rows)
    return changes


def _rows_of(
    trained: Mapping[str, Any], path: str, index: tuple[int, ...], of_input: bool, rows: Rows
) -> np.ndarray:
    """Return what of a vector some rows of a tensor are scaled by."""
    return host_part(trained[path], index if of_input else (*index, *rows[:1]))


def _times_columns(source: np.ndarray, vector_I: np.ndarray) -> np.ndarray:
    return source.astype(np.float32) * vector_I


def _times_rows(source: np.ndarray, vector_O: np.ndarray) -> np.ndarray:
    return source.astype(np.float32) * vector_O.reshape(-1, *[1] * (source.ndim - 1))


IA3_METHOD = AdapterMethod(
    keys=KEYS,
    from_section=from_section,
    peft_problems=problems,
    from_peft=from_fields,
    attach=attach,
    initial=initial,
    config_fields=config_fields,
    shapes=shapes,
    to_file=to_file,
    from_file=from_file,
    merged=merged,
    without_effect=("init_ia3_weights",),
    notes=notes,
)
