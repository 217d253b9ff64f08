# SPDX-License-Identifier: Apache-2.0
"""Prefix-tuning (arXiv 2101.00190) with PEFT's semantics: trained keys and values before the row.

In: a `PrefixConfig` and a model of a family with a prefix. Out: a prefix in the slot of every
stack's attention, and the same numbers as PEFT's one tensor. The keys are stored after rope; real
tokens start at position P and every segment of a packed row sees the prefix. Not done here: a
merged form, which does not exist.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsjax.adapters.method import AdapterMethod
from dsjax.adapters.peft_fields import value_problems
from dsjax.distributed.sharding import Leaf
from dsjax.errors import ConfigError
from dsjax.models import MODELS, Model, model_family
from dsjax.models.parameters import AdapterParam, abstract, stacked_axes
from dsjax.models.slots import PrefixShape

TENSOR = "prompt_embeddings"
"""The one tensor of PEFT's file: [P, layers * 2 * kv heads * head size]."""


@dataclass(frozen=True)
class PrefixConfig:
    """PEFT's PrefixTuningConfig, the fields that we honour, under its names."""

    num_virtual_tokens: int

    peft_type = "PREFIX_TUNING"


class Prefix(nnx.Module):
    """Keys and values of P virtual tokens for every layer of a stack."""

    def __init__(self, length: int, layers: int, of_token: PrefixShape):
        self.length = length
        shape, axes = (length, *of_token), (None, None, None)
        self.key = AdapterParam(abstract(shape, layers), axes=stacked_axes(axes, layers))
        self.value = AdapterParam(abstract(shape, layers), axes=stacked_axes(axes, layers))

    def __call__(
        self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"]
    ) -> tuple[Float[Array, "B Z K H"], Float[Array, "B Z K H"]]:
        """Put the prefix before every row's keys and values, in their dtype."""
        return _before(self.key[...], k_BSKH), _before(self.value[...], v_BSKH)


def _before(prefix_PKH: jax.Array, x_BSKH: jax.Array) -> jax.Array:
    rows = (x_BSKH.shape[0], *prefix_PKH.shape)
    return jnp.concatenate([jnp.broadcast_to(prefix_PKH, rows).astype(x_BSKH.dtype), x_BSKH], 1)


def attach(model: Model, spec: PrefixConfig) -> None:
    """Put a prefix into the slot of every stack's attention.

    Raises:
        ConfigError: PEFT has no working prefix for this kind of model.
    """
    if model_family(model).prefix is None:
        able = ", ".join(name for name, family in MODELS.items() if family.prefix)
        raise ConfigError(
            f"adapter.peft_type: got PREFIX_TUNING for model_type {model.config.model_type}, "
            f"expected LORA, IA3 or null; PEFT's prefix works with {able} only"
        )
    for block in model.model.blocks():
        block.self_attn.prefix = Prefix(spec.num_virtual_tokens, block.layers, _shape(model))


def _shape(model: Model) -> PrefixShape:
    """Return what the model's family holds of one token."""
    prefix = model_family(model).prefix
    assert prefix is not None
    return prefix(model.config)


def initial(
    path: str, leaf: Leaf, model: Model, key: jax.Array, base: Mapping[str, jax.Array]
) -> jax.Array:
    """PEFT's start: a standard normal, that of its embedding."""
    del path, model, base
    return jax.random.normal(key, leaf.shape, leaf.dtype)


def from_file(
    values: Float[np.ndarray, "P W"], model: Model
) -> tuple[Float[np.ndarray, "L P K H"], Float[np.ndarray, "L P K H"]]:
    """PEFT's tensor as keys and values; its width runs over layer, key/value, head, size."""
    shape = (values.shape[0], model.config.num_hidden_layers, 2, *_shape(model))
    key_LPKH, value_LPKH = values.reshape(shape).transpose(2, 1, 0, 3, 4)
    return key_LPKH, value_LPKH


def to_file(
    key_LPKH: Float[np.ndarray, "L P K H"], value_LPKH: Float[np.ndarray, "L P K H"]
) -> Float[np.ndarray, "P W"]:
    """Keys and values as PEFT's tensor."""
    both = np.stack([key_LPKH, value_LPKH], axis=1)
    return np.ascontiguousarray(both.transpose(2, 0, 1, 3, 4).reshape(key_LPKH.shape[1], -1))


def config_fields(model: Model, spec: PrefixConfig) -> dict[str, Any]:
    """Return the fields of adapter_config.json that are prefix-tuning's own, all written out."""
    kv_heads, head_dim = _shape(model)
    return {
        "num_virtual_tokens": spec.num_virtual_tokens,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": kv_heads,
        "token_dim": kv_heads * head_dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": kv_heads * head_dim,
        "prefix_projection": False,
        "modules_to_save": None,
    }


def shapes(
    model: Model, config: PrefixConfig, leaves: Mapping[str, Leaf]
) -> dict[str, tuple[int, ...]]:
    """Name the one tensor of PEFT's file, with its shape."""
    width = model.config.num_hidden_layers * 2 * math.prod(_shape(model))
    return {TENSOR: (config.num_virtual_tokens, width)}


def to_tensors(
    model: Model, config: PrefixConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the prefix as PEFT's tensor."""
    stacks = [[np.asarray(params[path]) for path in paths] for paths in _paths(model)]
    return {TENSOR: to_file(*map(np.concatenate, zip(*stacks, strict=True)))}


def from_tensors(
    model: Model,
    config: PrefixConfig,
    leaves: Mapping[str, Leaf],
    found: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """PEFT's tensor as the prefix."""
    whole, params, first = from_file(found[TENSOR], model), {}, 0
    for paths, block in zip(_paths(model), model.model.blocks(), strict=True):
        layers = slice(first, first + block.layers)
        params |= {path: array[layers] for path, array in zip(paths, whole, strict=True)}
        first += block.layers
    return params


def _paths(model: Model) -> list[tuple[str, str]]:
    """Paths of each stack's keys and values, in the stacks' order."""
    return [(f"{path}.prefix.key", f"{path}.prefix.value") for path in model.model.attentions()]


PREFIX_TUNING = AdapterMethod(
    keys=tuple(PrefixConfig.__dataclass_fields__),
    from_section=lambda section: PrefixConfig(section.num_virtual_tokens),
    peft_problems=lambda fields, field: value_problems(field, fields, "num_virtual_tokens"),
    from_peft=lambda fields, section: PrefixConfig(fields["num_virtual_tokens"]),
    attach=attach,
    initial=initial,
    config_fields=config_fields,
    shapes=shapes,
    to_file=to_tensors,
    from_file=from_tensors,
    merged=None,
    without_effect=(
        *("num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules"),
        *("encoder_hidden_size", "prefix_projection", "init_weights"),
    ),
)
