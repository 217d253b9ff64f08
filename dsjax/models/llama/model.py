# SPDX-License-Identifier: Apache-2.0
"""Llama, Qwen2 and Qwen3: their attention, and one stack of blocks.

In: a `LlamaConfig`. Out: an abstract `CausalLM`. Not done here: what decoders share (`decoder`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.distributed.sequence import copy_rows
from dsjax.models.cache import append_to_cache
from dsjax.models.decoder import Block, CausalLM, LayerInputs, StackInputs
from dsjax.models.layers import MLP, Linear, RMSNorm
from dsjax.models.llama.config import LlamaConfig
from dsjax.models.ops.attention import dot_product_attention
from dsjax.models.rope import rotate
from dsjax.models.slots import PrefixShape, PrefixSlot


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention, with a slot for a trained prefix."""

    def __init__(self, config: Any, layers: int):
        """Declare the weights of a stack of layers, from any config with Llama's fields."""
        c = config
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim, self.kv_heads = c.head_dim, c.num_key_value_heads
        self.q_proj = Linear(
            c.hidden_size, q_size, ("heads", "embed"), bias=c.qkv_bias, layers=layers
        )
        self.k_proj = Linear(
            c.hidden_size, kv_size, ("kv_heads", "embed"), bias=c.qkv_bias, layers=layers
        )
        self.v_proj = Linear(
            c.hidden_size, kv_size, ("kv_heads", "embed"), bias=c.qkv_bias, layers=layers
        )
        self.o_proj = Linear(
            q_size, c.hidden_size, ("embed", "heads"), bias=c.o_bias, layers=layers
        )
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, layers) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, layers) if c.qk_norm else None
        self.prefix: PrefixSlot | None = nnx.data(None)

    def __call__(
        self, x_BTD: jax.Array, shared: StackInputs, own: LayerInputs
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        """Attend; returns the output and, with a cache, the layer's keys and values so far."""
        q_BTNH = self._heads(self.q_proj(x_BTD, own.dropout), self.q_norm)
        k_BSKH = self._heads(self.k_proj(x_BTD, own.dropout), self.k_norm)
        v_BSKH = self._heads(self.v_proj(x_BTD, own.dropout), None)
        q_BTNH = rotate(q_BTNH, shared.cos_BTH, shared.sin_BTH)
        k_BSKH = rotate(k_BSKH, shared.cos_BTH, shared.sin_BTH)
        seen = append_to_cache(own.cache, (k_BSKH, v_BSKH), shared.length)
        k_MSKH, v_MSKH = copy_rows(seen, shared.layout)
        if self.prefix is not None:
            k_MSKH, v_MSKH = self.prefix(k_MSKH, v_MSKH)
        out_BTNH = dot_product_attention(
            q_BTNH,
            k_MSKH,
            v_MSKH,
            shared.query,
            shared.key,
            own.window,
            self.head_dim**-0.5,
            layout=shared.layout,
            own_rows=own.cache is None and self.prefix is None,
        )
        out_BTD = self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1), own.dropout)
        return out_BTD, None if own.cache is None else seen

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        x_BTNH = x.reshape(*x.shape[:2], -1, self.head_dim)
        return x_BTNH if norm is None else norm(x_BTNH)

    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that are kept of one token: its key and its value."""
        return ((self.kv_heads, self.head_dim),) * 2


def prefix_shape(config: Any) -> PrefixShape:
    """Return what `Attention` takes of a prefix, from any config with Llama's fields."""
    return PrefixShape(config.num_key_value_heads, config.head_dim)


def causal_lm(config: LlamaConfig, dtype: jnp.dtype) -> CausalLM:
    """Build the abstract model."""
    c, layers = config, config.num_hidden_layers
    mlp = MLP(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, layers=layers)
    block = Block(Attention(c, layers), mlp, c.hidden_size, c.rms_norm_eps, layers)
    return CausalLM(c, dtype, {"layers": block})
