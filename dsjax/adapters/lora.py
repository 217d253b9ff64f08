# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685) with PEFT's initialisation, scaling, dropout and target matching.

In: a `LoraConfig` and a model. Out: A and B in the slot of every targeted linear map, and where in
them each module's factors lie. `LoraConfig.scaling_of` computes the scaling of every form: linear
maps, routed experts, merged weights. Not done here: the update (`linear_lora`, `expert_lora`,
`dora`), PEFT's files (`lora_peft`, `weights.peft`), merged weights (`lora_method`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.adapters import lora_start
from dsjax.adapters.dora import MAGNITUDE, Dora, ExpertDora, lengths
from dsjax.adapters.expert_lora import ExpertLora, is_routed, parameter_of
from dsjax.adapters.linear_lora import Lora
from dsjax.adapters.targets import (
    TargetPattern,
    chosen,
    linear_modules,
    module_at,
    short_names,
    target_problems,
)
from dsjax.config.patterns import fullmatch, is_linear
from dsjax.distributed.sharding import Leaf
from dsjax.errors import nearest, raise_all
from dsjax.models import Model
from dsjax.models.layers import Linear
from dsjax.models.moe import ExpertLinear


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig, the fields that we honour, under its names.

    `target_parameters` comes from PEFT's files only: names of weights, among them those that hold
    all experts of a layer in transformers 5. No `layers_to_transform` applies to them.
    """

    r: int
    lora_alpha: int | float
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    layers_to_transform: list[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict)
    use_rslora: bool = False
    target_parameters: list[str] | None = None
    # Not in `repr`, by which checkpoints know an adapter on disk: its tensors say it too.
    use_dora: bool = field(default=False, repr=False)
    # Of training alone, as the next: an adapter on disk has none.
    loraplus_lr_ratio: float | None = field(default=None, repr=False)
    init_lora_weights: bool | str = field(default=True, repr=False)
    exclude_modules: str | list[str] | None = field(default=None, repr=False)

    peft_type = "LORA"

    def __post_init__(self):
        """Keep each list, which names a set, in one order: equal adapters have equal specs."""
        sets = ("target_modules", "layers_to_transform", "target_parameters", "exclude_modules")
        for name in sets:
            value = getattr(self, name)
            if isinstance(value, list):
                empty = [] if name == "target_modules" else None
                object.__setattr__(self, name, sorted(set(value)) or empty)

    @property
    def pattern(self) -> TargetPattern:
        """Which modules it is for."""
        return TargetPattern(
            self.target_modules,
            self.layers_to_transform,
            self.target_parameters,
            self.exclude_modules,
        )

    def parameter_target(self, module: str) -> tuple[str, int] | None:
        """Name the parameter by which a module is targeted, and how many share its rank."""
        return self.pattern.parameter_target(module)

    def peft_rank_alpha(self, module: str) -> tuple[int, int | float, int]:
        """Rank and alpha as PEFT counts them, and how many modules share them, by full name."""
        key, share = self.parameter_target(module) or (module, 1)
        rank = _pattern_value(self.rank_pattern, key, self.r)
        return rank, _pattern_value(self.alpha_pattern, key, self.lora_alpha), share

    def rank_of(self, module: str) -> int:
        """Rank of the adapter of one module, by its full name."""
        rank, _, share = self.peft_rank_alpha(module)
        return rank // share

    def alpha_of(self, module: str) -> float:
        """Alpha of the adapter of one module: with its own rank it gives the same scaling."""
        _, alpha, share = self.peft_rank_alpha(module)
        return alpha / (math.sqrt(share) if self.use_rslora else share)

    def scaling_of(self, module: str) -> float:
        """Factor of one module's update: alpha / r, or alpha / sqrt(r) with `use_rslora`.

        Both as PEFT counts them: routed experts' gate_proj and up_proj under `target_parameters`
        share one r, twice `rank_of`.
        """
        rank, alpha, _ = self.peft_rank_alpha(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if matches_suffix(pattern, module):
            return value
    return default


def matches_suffix(pattern: str, module: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: a regular expression for the name's end.

    Trap: it may take `re` forever; `pattern_problems` has to have passed.
    """
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def pattern_problems(spec: LoraConfig, names: Iterable[str]) -> list[str]:
    """Keys of rank_pattern and alpha_pattern that cannot be matched against modules.

    Args:
        spec: the adapter.
        names: modules; the parameters that they may be called by are looked at too.
    """
    keys = {key for name in names for key in (name, parameter_of(name)[0])}
    wanted = {f"(.*\\.)?({key})": key for key in (*spec.rank_pattern, *spec.alpha_pattern)}
    others = [whole for whole, key in wanted.items() if not is_linear(key)]
    problems = fullmatch(others, sorted(keys)).problems
    return [
        f"adapter.{field}: got {wanted[whole]!r}, expected a regular expression ({problem})"
        for whole, problem in problems.items()
        for field in ("rank_pattern", "alpha_pattern")
        if wanted[whole] in getattr(spec, field)
    ]


def attach(model: Model, spec: LoraConfig) -> None:
    """Put an adapter into the slot of every targeted linear map.

    Raises:
        ConfigError: a target, pattern or layer matches nothing.
    """
    start, problems = spec.init_lora_weights, []
    for path, modules in targets(model, spec).items():
        linear = module_at(model, path)
        ranks = [spec.rank_of(name) if hit else 0 for name, hit in modules.items()]
        scalings = [spec.scaling_of(name) if hit else 0.0 for name, hit in modules.items()]
        problems += lora_start.problems(start, path, linear, max(ranks))
        if isinstance(linear, ExpertLinear):
            experts = ExpertDora if spec.use_dora else ExpertLora
            linear.adapter = experts(linear, ranks, scalings, start)
        else:
            kind = Dora if spec.use_dora else Lora
            linear.adapter = kind(linear, path, ranks, scalings, spec.lora_dropout, start)
    raise_all(problems)


def targets(model: Model, spec: LoraConfig) -> dict[str, dict[str, bool]]:
    """Find the targeted linear maps: path -> for each module's name, whether it is adapted.

    The modules of a path are its layers, and in each layer its experts, in the order of its arrays.
    """
    linears = linear_modules(model)
    names = [name for modules in linears.values() for name in modules]
    _check(spec, names, model)
    adapted = chosen(spec.pattern, names)
    hits = {path: {name: name in adapted for name in modules} for path, modules in linears.items()}
    return {path: modules for path, modules in hits.items() if any(modules.values())}


def _check(spec: LoraConfig, names: list[str], model: Model) -> None:
    problems = target_problems(spec.pattern, names, model) + pattern_problems(spec, names)
    raise_all(problems)
    hits = chosen(spec.pattern, names)
    adapted = [name for name in names if name in hits]
    if not adapted:
        problems.append(
            f"adapter.target_modules: got {spec.target_modules!r}, which matches nothing"
        )
    problems += _expert_problems(spec, adapted)
    keys = sorted({(spec.parameter_target(name) or (name,))[0] for name in adapted})
    for key, patterns in (
        ("rank_pattern", spec.rank_pattern),
        ("alpha_pattern", spec.alpha_pattern),
    ):
        problems += [
            f"adapter.{key}: got {pattern!r}, which matches no adapted module; "
            f"{nearest(pattern, short_names(keys) + keys)}"
            for pattern in patterns
            if not any(matches_suffix(pattern, name) for name in keys)
        ]
    raise_all(problems)


def _expert_problems(spec: LoraConfig, adapted: list[str]) -> list[str]:
    """Say what routed experts cannot have: dropout (nor has PEFT), half of an odd rank."""
    routed = [name for name in adapted if is_routed(name)]
    problems = []
    if routed and spec.lora_dropout:
        problems.append(
            f"adapter.lora_dropout: got {spec.lora_dropout}, expected 0 with routed experts in "
            f"adapter.target_modules ({routed[0]})"
        )
    odd = {
        parameter_of(name)[0]: spec.peft_rank_alpha(name)[0]
        for name in routed
        if spec.peft_rank_alpha(name)[0] % spec.peft_rank_alpha(name)[2]
    }
    problems += [
        f"adapter.rank_pattern: got rank {rank} for {key}, expected an even one: half of it for "
        "gate_proj, half for up_proj"
        for key, rank in odd.items()
    ]
    return problems


def initial(
    path: str, leaf: Leaf, model: Model, key: jax.Array, base: Mapping[str, jax.Array]
) -> jax.Array:
    """First value of one leaf: A at random, B zero, DoRA's magnitudes the lengths of W's rows."""
    if path.endswith(f".{MAGNITUDE}"):
        (weight,) = base.values()
        return lengths(weight)
    module = module_at(model, path.rsplit(".", 1)[0])
    if path.endswith(".scaling"):
        values = dict(module.scaling.get_metadata())["values"]
        return jnp.asarray(values, jnp.float32).reshape(leaf.shape)
    if path.endswith(".lora_B"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return lora_start.drawn(module, leaf, key)


def initial_at_once(
    slot: str, leaves: Iterable[str], model: Model, key: jax.Array, base: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """First values of both factors, where they are computed from the weight they are beside."""
    if lora_start.INITIAL_A not in leaves:
        return {}
    owner = slot.removesuffix(".adapter")
    return lora_start.of_weight(module_at(model, slot), base[f"{owner}.weight"], key)


def lr_factor(path: str, spec: LoraConfig) -> float:
    """LoRA+ (arXiv 2402.12354) in PEFT's groups: the ratio for B and vectors, 1 for A."""
    ratio = spec.loraplus_lr_ratio
    return 1.0 if ratio is None or path.endswith(".lora_A") else float(ratio)


def initial_reads(path: str) -> list[str]:
    """Name the base parameter that the first value of a leaf is computed from, if one is."""
    owner, _, name = path.rpartition(".adapter.")
    return [f"{owner}.weight"] if name in (MAGNITUDE, lora_start.INITIAL_A) else []


def tensors(model: Model, spec: LoraConfig) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """All arrays of every adapted module under PEFT's names: (path, index into that array)."""
    found = {}
    for path, modules in targets(model, spec).items():
        lead = stack_shape(module_at(model, path))
        for index, (name, hit) in zip(np.ndindex(*lead), modules.items(), strict=True):
            if not hit:
                continue
            rank = slice(spec.rank_of(name))
            key = f"base_model.model.{name}"
            found[f"{key}.lora_A.weight"] = (f"{path}.adapter.lora_A", (*index, rank, slice(None)))
            found[f"{key}.lora_B.weight"] = (f"{path}.adapter.lora_B", (*index, slice(None), rank))
            if spec.use_dora:
                found[f"{key}.{MAGNITUDE}"] = (f"{path}.adapter.{MAGNITUDE}", index)
    return found


def stack_shape(linear: Linear | ExpertLinear) -> tuple[int, ...]:
    """By what a map's modules are stacked: (), (layers,) or (layers, experts)."""
    if isinstance(linear, ExpertLinear):
        return linear.layers, linear.experts
    return () if linear.layers is None else (linear.layers,)
