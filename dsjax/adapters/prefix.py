# SPDX-License-Identifier: Apache-2.0
"""Prefix-tuning (arXiv 2101.00190) with PEFT's semantics: trained keys and values before the row.

In: a `PrefixConfig` and a model with plain key/value heads. Out: a prefix in the attention's slot,
and the same numbers as PEFT's one tensor. The keys are stored after rope; real tokens start at
position P and every segment of a packed row sees the prefix. Not done here: a merged form, which
does not exist.
"""

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
from dsjax.models import Model
from dsjax.models.parameters import AdapterParam, abstract, stacked_axes

PREFIX_MODELS = ("llama", "qwen2", "qwen3")
"""model_types whose attention keeps plain keys and values, which is what PEFT's prefix holds."""

TENSOR = "prompt_embeddings"
"""The one tensor of PEFT's file: [P, layers * 2 * kv heads * head size]."""


@dataclass(frozen=True)
class PrefixConfig:
    """PEFT's PrefixTuningConfig, the fields that we honour, under its names."""

    num_virtual_tokens: int

    peft_type = "PREFIX_TUNING"


class Prefix(nnx.Module):
    """Keys and values of P virtual tokens for every layer of a stack."""

    def __init__(self, length: int, layers: int, kv_heads: int, head_dim: int):
        self.length = length
        shape, axes = (length, kv_heads, head_dim), (None, None, None)
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
    """Put a prefix into the attention's slot.

    Raises:
        ConfigError: PEFT has no working prefix for this kind of model.
    """
    c = model.config
    if c.model_type not in PREFIX_MODELS:
        raise ConfigError(
            f"adapter.peft_type: got PREFIX_TUNING for model_type {c.model_type}, expected LORA or "
            f"null; PEFT's prefix works with {', '.join(PREFIX_MODELS)} only"
        )
    model.model.blocks()[0].self_attn.prefix = Prefix(
        spec.num_virtual_tokens, c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    )


def initial(path: str, leaf: Leaf, model: Model, key: jax.Array) -> jax.Array:
    """PEFT's start: a standard normal, that of its embedding."""
    del path, model
    return jax.random.normal(key, leaf.shape, leaf.dtype)


def from_file(
    values: Float[np.ndarray, "P W"], model: Model
) -> tuple[Float[np.ndarray, "L P K H"], Float[np.ndarray, "L P K H"]]:
    """PEFT's tensor as keys and values; its width runs over layer, key/value, head, size."""
    c = model.config
    shape = (values.shape[0], c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
    key_LPKH, value_LPKH = values.reshape(shape).transpose(2, 1, 0, 3, 4)
    return key_LPKH, value_LPKH


def to_file(
    key_LPKH: Float[np.ndarray, "L P K H"], value_LPKH: Float[np.ndarray, "L P K H"]
) -> Float[np.ndarray, "P W"]:
    """Keys and values as PEFT's tensor."""
    both = np.stack([key_LPKH, value_LPKH], axis=1)
    return np.ascontiguousarray(both.transpose(2, 0, 1, 3, 4).reshape(key_LPKH.shape[1], -1))


def config_fields(model: Model, spec: PrefixConfig) -> dict[str, Any]:
    """The fields of adapter_config.json that are prefix-tuning's own, all written out."""
    c = model.config
    return {
        "num_virtual_tokens": spec.num_virtual_tokens,
        "num_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_key_value_heads,
        "token_dim": c.num_key_value_heads * c.head_dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": c.num_key_value_heads * c.head_dim,
        "prefix_projection": False,
        "modules_to_save": None,
    }


def shapes(
    model: Model, config: PrefixConfig, leaves: Mapping[str, Leaf]
) -> dict[str, tuple[int, ...]]:
    """The one tensor of PEFT's file, and its shape."""
    layers, length, heads, size = leaves[_paths(leaves)[0]].shape
    return {TENSOR: (length, layers * 2 * heads * size)}


def to_tensors(
    model: Model, config: PrefixConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The prefix as PEFT's tensor."""
    key, value = (np.asarray(params[path]) for path in sorted(params))
    return {TENSOR: to_file(key, value)}


def from_tensors(
    model: Model,
    config: PrefixConfig,
    leaves: Mapping[str, Leaf],
    found: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """PEFT's tensor as the prefix."""
    return dict(zip(_paths(leaves), from_file(found[TENSOR], model), strict=True))


def _paths(leaves: Mapping[str, Leaf]) -> list[str]:
    """Paths of the prefix's keys and values, in this order."""
    return sorted(path for path, leaf in leaves.items() if leaf.kind == "adapter")


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
