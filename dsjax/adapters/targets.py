# SPDX-License-Identifier: Apache-2.0
"""Which linear maps an adapter is for: PEFT's rules for `target_modules` and its companions.

In: a `TargetPattern` and a model. Out: the modules that it matches, by their names on disk, and
what is wrong with it in words. Not done here: what is put there.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from flax import nnx

from dsjax.adapters.expert_lora import is_routed, parameter_of
from dsjax.config.patterns import fullmatch
from dsjax.errors import nearest
from dsjax.models import Model, entries_of
from dsjax.models.layers import Linear
from dsjax.models.moe import ExpertLinear, Router


@dataclass(frozen=True)
class TargetPattern:
    """What names an adapter's modules, as PEFT's configs do.

    `target_parameters` are names of weights; no `layers_to_transform` applies to them, and no
    `exclude_modules`.
    """

    target_modules: str | list[str]
    layers_to_transform: list[int] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None

    def parameter_target(self, module: str) -> tuple[str, int] | None:
        """Name the parameter by which a module is targeted, and how many share its rank."""
        if not self.target_parameters:
            return None
        key, share = parameter_of(module)
        return (key, share) if _is_named(key, tuple(self.target_parameters)) else None


@functools.lru_cache(maxsize=4096)  # hundreds of experts are one parameter
def _is_named(key: str, wanted: tuple[str, ...]) -> bool:
    return any(f".{key}".endswith(f".{name}") for name in wanted)


def linear_modules(model: Model) -> dict[str, list[str]]:
    """Path of every linear map that trains -> its modules' names on disk, as `targets` has them."""
    linears: dict[str, list[str]] = {}
    for entry in entries_of(model):
        path = entry.path.removesuffix(".weight")
        if path != entry.path and _is_linear(module_at(model, path)):
            linears.setdefault(path, []).append(entry.hf.removesuffix(".weight"))
    return linears


def _is_linear(module: Any) -> bool:
    """Whether an adapter can learn there: no gradient reaches the indexer of V3.2."""
    return isinstance(module, (Linear, ExpertLinear)) and module.trains


def module_at(model: nnx.Module, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def chosen(pattern: TargetPattern, names: Sequence[str]) -> set[str]:
    """PEFT's rule: all linear maps but the head, one regular expression, or a list of name ends.

    Routed experts are no linear maps in transformers 5.
    """
    by_weight = {name for name in names if pattern.parameter_target(name)}
    excluded = _named(pattern.exclude_modules, names)
    return by_weight | {name for name in _wanted(pattern, names) if name not in excluded}


def _wanted(pattern: TargetPattern, names: Sequence[str]) -> set[str]:
    wanted = pattern.target_modules
    if is_regex(wanted):
        return _named(wanted, names)
    if isinstance(wanted, str):
        return {
            name
            for name in names
            if name != "lm_head" and not is_routed(name) and in_layers(pattern, name)
        }
    whole = set(wanted).intersection(names)  # named whole: PEFT adapts it in any layer
    return whole | {name for name in _named(wanted, names) if in_layers(pattern, name)}


def _named(wanted: str | list[str] | None, names: Sequence[str]) -> set[str]:
    """Return what one regular expression matches whole, or a list of names' ends."""
    if isinstance(wanted, str):
        return set(fullmatch([wanted], names).covered[wanted])
    ends = set(wanted or ())
    return {name for name in names if not ends.isdisjoint(ends_of(name))}


def ends_of(name: str) -> list[str]:
    """Return a module's name and its ends after each dot, from the longest."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def in_layers(pattern: TargetPattern, module: str) -> bool:
    """Whether `layers_to_transform` leaves a module in."""
    if not pattern.layers_to_transform:
        return True
    layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return layer is not None and int(layer[1]) in pattern.layers_to_transform


def is_regex(wanted: str | list[str]) -> TypeGuard[str]:
    return isinstance(wanted, str) and wanted.lower() != "all-linear"


def target_problems(pattern: TargetPattern, names: list[str], model: Model) -> list[str]:
    """Say what of a pattern no module of the model answers to.

    Args:
        pattern: which modules are wanted.
        names: all that an adapter may be on, by their names on disk.
        model: the abstract model.
    """
    problems = [
        f"adapter.target_parameters: got {wanted!r}, which matches no weight of a linear map or of "
        "routed experts"
        for wanted in pattern.target_parameters or []
        if not any(f".{parameter_of(name)[0]}".endswith(f".{wanted}") for name in names)
    ]
    problems += _layer_problems(pattern, model) + _exclusion_problems(pattern, names)
    wanted = pattern.target_modules
    if is_regex(wanted):
        matches = fullmatch([wanted], names)
        if wanted in matches.problems:
            problems.append(
                f"adapter.target_modules: got {wanted!r}, expected a regular expression, a list of "
                f"module names, or all-linear ({matches.problems[wanted]})"
            )
        elif not matches.covered[wanted]:
            problems.append(
                f"adapter.target_modules: got {wanted!r}, which matches no linear module; write a "
                f"list to name modules by their ends; {nearest(wanted, names)}"
            )
        return problems
    known = {end for name in names for end in ends_of(name)}
    problems += [
        f"adapter.target_modules: got {name!r}, which matches no linear module; "
        + _hint(name, names, model)
        for name in ([] if isinstance(wanted, str) else wanted)
        if name not in known
    ]
    return problems


def _layer_problems(pattern: TargetPattern, model: Model) -> list[str]:
    problems = []
    layers = model.config.num_hidden_layers
    wrong = [layer for layer in pattern.layers_to_transform or [] if not 0 <= layer < layers]
    if wrong:
        problems.append(
            f"adapter.layers_to_transform: got {wrong}, expected indices from 0 to {layers - 1}"
        )
    if pattern.layers_to_transform and is_regex(pattern.target_modules):
        problems.append(
            "adapter.layers_to_transform: got it beside a regular expression in "
            "adapter.target_modules, expected one of the two; name the layers in the expression"
        )
    return problems


def _exclusion_problems(pattern: TargetPattern, names: list[str]) -> list[str]:
    excluded, known = pattern.exclude_modules, {end for name in names for end in ends_of(name)}
    if not isinstance(excluded, str):
        return [
            f"adapter.exclude_modules: got {name!r}, which matches no linear module; "
            f"{nearest(name, short_names(names))}"
            for name in excluded or []
            if name not in known
        ]
    matches = fullmatch([excluded], names)
    if excluded in matches.problems:
        problem = matches.problems[excluded]
        return [
            f"adapter.exclude_modules: got {excluded!r}, expected a regular expression or a "
            f"list of module names ({problem})"
        ]
    if not matches.covered[excluded]:
        return [
            f"adapter.exclude_modules: got {excluded!r}, which matches no linear module; write "
            f"a list to name modules by their ends; {nearest(excluded, names)}"
        ]
    return []


def _hint(wanted: str, names: list[str], model: Model) -> str:
    """Why there is nothing of this name to adapt, or what has a name like it."""
    if wanted == "lm_head":
        return "the head is the embedding (tie_word_embeddings), without a weight of its own"
    paths = {e.path for e in entries_of(model) if f".{e.hf}".endswith(f".{wanted}.weight")}
    found = [module_at(model, path.removesuffix(".weight")) for path in paths]
    if any(isinstance(module, Router) for module in found):
        return "it is the experts' router, which has no adapter"
    if any(isinstance(module, Linear) for module in found):
        return "no gradient reaches the indexer"
    return nearest(wanted, short_names(names))


def short_names(names: list[str]) -> list[str]:
    """Return the last parts of names."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})
