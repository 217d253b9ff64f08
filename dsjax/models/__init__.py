# SPDX-License-Identifier: Apache-2.0
"""The models: from a checkpoint's config.json to an abstract NNX module and its weight rules.

In: a parsed config.json. Out: a module whose leaves are shapes (nothing is allocated), and the
table that names each leaf's tensor on disk. Not done here: loading, sharding, adapters, training.

Dimension key, used as suffixes of array names throughout:
    B batch    T query position    S key position    L layers    D hidden    V vocabulary
    M = n B, parts of rows that a mesh divides into n (`mesh.sequence`); else rows
    N query heads    K key/value heads    G = N / K    H head size    R rotated pairs
    F feed-forward    P prefix length    r adapter rank
    E experts    A experts of a token    Z rows sorted by expert
    latent attention: C and Q latents of keys/values and queries    P plain, V value head size
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from dsjax.errors import ConfigError, nearest, raise_all
from dsjax.models.config_checks import shown
from dsjax.models.decoder import CausalLM
from dsjax.models.deepseek import weights as deepseek_weights
from dsjax.models.deepseek.config import parse_config as parse_deepseek
from dsjax.models.deepseek.model import causal_lm as deepseek
from dsjax.models.deepseek.model import prediction_module
from dsjax.models.layers import Linear
from dsjax.models.llama import weights as llama_weights
from dsjax.models.llama.config import parse_config as parse_llama
from dsjax.models.llama.model import causal_lm as llama
from dsjax.models.llama.model import prefix_shape
from dsjax.models.moe import ExpertLinear
from dsjax.models.quantization import fp8
from dsjax.models.quantization.int8 import INT8
from dsjax.models.quantization.nf4 import NF4
from dsjax.models.quantization.nf4_double import NF4_DOUBLE
from dsjax.models.slots import PrefixShape
from dsjax.models.storage import DENSE, Storage, base_shape, store
from dsjax.models.weight_rules import Entry, Rule, expand

Model = CausalLM
"""The type of every model here."""


@dataclass(frozen=True)
class Family:
    """How one model_type is read, built and named on disk.

    Attributes:
        parse_config: config.json -> the family's config.
        model: (config, compute dtype) -> the abstract model.
        rules: (config, whether it predicts ahead) -> its weight rules.
        carried: the same -> patterns of tensors that are kept without being computed with.
        ahead: config -> the abstract module for multi-token prediction; None without.
        prefix: config -> what PEFT's prefix holds of a token in each layer; None where PEFT has no
            working prefix.
        target_parameters: whether PEFT adapts its feed-forwards by the names of their weights only.
        remote_code: whether transformers has no class for it, so that the code of its repository
            goes along with an export.
    """

    parse_config: Callable[[Mapping[str, Any]], Any]
    model: Callable[[Any, jnp.dtype], Model]
    rules: Callable[[Any, bool], Sequence[Rule]]
    carried: Callable[[Any, bool], Sequence[str]]
    ahead: Callable[[Any], nnx.Module] | None = None
    prefix: Callable[[Any], PrefixShape] | None = None
    target_parameters: bool = False
    remote_code: bool = False


_LLAMA = Family(parse_llama, llama, llama_weights.rules, llama_weights.carried, prefix=prefix_shape)
_DEEPSEEK = Family(parse_deepseek, deepseek, deepseek_weights.rules, deepseek_weights.carried)
_DEEPSEEK_V2 = replace(_DEEPSEEK, target_parameters=True)
_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, ahead=prediction_module)

MODELS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3"), _LLAMA),
    "deepseek": replace(_DEEPSEEK, remote_code=True),
    "deepseek_v2": _DEEPSEEK_V2,
    **dict.fromkeys(("deepseek_v3", "deepseek_v32"), _DEEPSEEK_V3),
}
"""config.json's model_type -> family."""

STORAGE: dict[str, Callable[[Mapping[str, Any]], Storage | None]] = {
    "dense": lambda config: DENSE,
    "nf4": lambda config: NF4,
    "nf4_double": lambda config: NF4_DOUBLE,
    "int8": lambda config: INT8,
    "fp8": fp8.storage_of,
}
"""Kind of storage of frozen matrices -> config.json -> how it works; None where it has no place."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a checkpoint.

    Raises:
        ConfigError: its model_type is not one that we compute.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise ConfigError(
            f"config.json model_type: got {shown(kind)}, expected one of {', '.join(MODELS)}"
        )
    return MODELS[kind]


class Quantization(NamedTuple):
    """Which frozen matrices are held in fewer bits, and how.

    Attributes:
        kind: `model.quantization`.
        double: whether the scales are quantized, too.
        experts: whether the routed experts' are.
        skip_modules: names of modules whose matrices stay as they are; a name is one or more whole
            components of a module's path (`down_proj`, `self_attn.o_proj`, `shared_experts`).
    """

    kind: str
    double: bool = False
    experts: bool = True
    skip_modules: Sequence[str] = ()

    def storage(self, config: Mapping[str, Any]) -> Storage:
        """Return how the matrices of a checkpoint are held.

        Raises:
            ConfigError: it has none that could be held so.
        """
        found = STORAGE[f"{self.kind}_double" if self.double else self.kind](config)
        if found is None:
            raise ConfigError(
                f"model.quantization: got {self.kind} for a checkpoint that is not in FP8, "
                "expected int8, nf4 or null"
            )
        return found


def build(
    config: Mapping[str, Any],
    dtype: jnp.dtype | str,
    quantization: Quantization | None = None,
) -> Model:
    """Build the abstract model of a checkpoint, computing in `dtype`.

    Args:
        config: its config.json.
        dtype: of activations.
        quantization: of the linear maps in all stacks of blocks, which then are frozen.

    Raises:
        ConfigError: of the config.json; or a matrix cannot be held so.
    """
    family = family_of(config)
    model = family.model(family.parse_config(config), jnp.dtype(dtype))
    if quantization is not None:
        _quantize(model, quantization, quantization.storage(config))
    return model


def _quantize(model: Model, quantization: Quantization, storage: Storage) -> None:
    """Declare other storage for the matrices of a model, or refuse those that do not fit into it.

    Raises:
        ConfigError: a matrix cannot be held so; a name that no module has.
    """
    names = {entry.path: entry.hf for entry in reversed(entries_of(model))}
    linears, problems, skipped = _stacked_linears(model), [], set()
    for path, linear in linears.items():
        own = {name for name in quantization.skip_modules if f".{name}." in f".{path}."}
        skipped |= own
        if own or (isinstance(linear, ExpertLinear) and not quantization.experts):
            continue
        shape = (linear.weight.shape[-2], linear.weight.shape[-1])
        expected = storage.problem(shape)
        if expected:
            name = path.rpartition(".")[2]
            problems.append(
                f"model.quantization: got {quantization.kind} for {names[f'{path}.weight']} of "
                f"shape {list(shape)}, expected {expected}; keep it as it is, with "
                f"model.quantization_skip_modules=[{name}], or take int8"
            )
        else:
            store(linear, storage)
    modules = {name for path in linears for name in path.split(".")}
    problems += [
        f"model.quantization_skip_modules: got {name!r}, which is in no linear map's path; "
        f"{nearest(name, sorted(modules))}"
        for name in quantization.skip_modules
        if name not in skipped
    ]
    raise_all(problems)


def _stacked_linears(model: Model) -> dict[str, Linear | ExpertLinear]:
    """Return the linear maps of all stacks by path, but for those that no gradient goes through."""
    return {
        f"model.{stack}." + ".".join(map(str, path)): module
        for stack in model.model.stacks
        for path, module in nnx.iter_modules(getattr(model.model, stack))
        if isinstance(module, (Linear, ExpertLinear)) and module.trains
    }


def stored_linears(model: Model) -> dict[str, Linear | ExpertLinear]:
    """Path of every weight that is stored -> the linear map that it is of."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, (Linear, ExpertLinear)) and module.storage is not DENSE:
            found[".".join(map(str, (*path, "weight")))] = module
    return found


def model_family(model: Model) -> Family:
    """Return the family that a model is of."""
    return MODELS[model.config.model_type]


def predict_ahead(model: Model) -> None:
    """Put the module for multi-token prediction into its slot in the model."""
    ahead = model_family(model).ahead
    assert ahead is not None
    model.mtp = ahead(model.config)


def base_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shape of every base parameter by path; adapters are not among them."""
    state = nnx.to_flat_state(nnx.state(model))
    shapes = {".".join(map(str, path)): base_shape(leaf) for path, leaf in state}
    return {path: shape for path, shape in shapes.items() if shape is not None}


def entries_of(model: Model) -> list[Entry]:
    """Every tensor that the model's base parameters are on disk, in disk order by layer."""
    rules = model_family(model).rules(model.config, model.mtp is not None)
    return expand(rules, base_shapes(model))


def carried_of(model: Model) -> Sequence[str]:
    """Patterns of tensors that are kept without being computed with."""
    return model_family(model).carried(model.config, model.mtp is not None)
