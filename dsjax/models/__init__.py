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
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dsjax.errors import ConfigError
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

STORAGE: dict[str, Storage] = {"dense": DENSE}
"""Kind of storage of frozen matrices -> how it works."""


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


def build(config: Mapping[str, Any], dtype: jnp.dtype | str, storage: str = "dense") -> Model:
    """Build the abstract model of a checkpoint, computing in `dtype`.

    Args:
        config: its config.json.
        dtype: of activations.
        storage: kind of storage, a key of `STORAGE`, of the linear maps in all stacks of blocks.
            Where it is not dense they are frozen.
    """
    family = family_of(config)
    model = family.model(family.parse_config(config), jnp.dtype(dtype))
    for linear in _stacked_linears(model) if storage != "dense" else ():
        store(linear, STORAGE[storage])
    return model


def _stacked_linears(model: Model) -> list[Linear | ExpertLinear]:
    """Return the linear maps of all stacks, but for those that no gradient goes through."""
    modules = [m for block in model.model.blocks() for _, m in nnx.iter_modules(block)]
    return [m for m in modules if isinstance(m, (Linear, ExpertLinear)) and m.trains]


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
