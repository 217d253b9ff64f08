# SPDX-License-Identifier: Apache-2.0
"""The decoder of Llama, Qwen2 and Qwen3: equal blocks, stacked and scanned.

In: token ids with the position and segment of each. Out: hidden states or logits. Blocks are one
module whose arrays hold all layers as [L, ...]; `jax.lax.scan` runs them, so that compile time does
not grow with depth. Not done here: loss, sampling, loading, sharding (the caller passes a sharding
for activations, or none).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.models.attention import PREFIX_SEGMENT, Tokens, attend
from dsjax.models.layers import Embedding, Linear, RMSNorm
from dsjax.models.llama.config import LlamaConfig
from dsjax.models.rope import positions_like, rope_tables, rotate

SAVED_NAMES = ("attention_out", "mlp_out")
"""Activations that the remat policy `names` keeps."""

REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""training.gradient_checkpointing -> what a block keeps for its backward pass."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for every layer, and where those tokens stand."""

    key: Float[Array, "L B S K H"]
    value: Float[Array, "L B S K H"]
    tokens: Tokens
    length: Int[Array, ""]


class Shared(NamedTuple):
    """What every block needs besides its input: rope tables, token places, the cache's end."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array
    query: Tokens
    key: Tokens
    length: jax.Array | None


class PerLayer(NamedTuple):
    """What differs from block to block, each with a leading layer axis, or None."""

    window: jax.Array | None
    dropout_key: jax.Array | None
    cache: tuple[jax.Array, jax.Array] | None


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention, with a slot for a trained prefix."""

    def __init__(self, config: LlamaConfig):
        c, layers = config, config.num_hidden_layers
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
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
        self.prefix: Any = nnx.data(None)

    def __call__(
        self, x_BTD: jax.Array, shared: Shared, own: PerLayer
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attend; returns the output and, with a cache, the layer's keys and values so far."""
        q_BTNH = self._heads(self.q_proj(x_BTD, own.dropout_key), self.q_norm)
        k_BSKH = self._heads(self.k_proj(x_BTD, own.dropout_key), self.k_norm)
        v_BSKH = self._heads(self.v_proj(x_BTD, own.dropout_key), None)
        q_BTNH = rotate(q_BTNH, shared.cos_BTH, shared.sin_BTH)
        k_BSKH = rotate(k_BSKH, shared.cos_BTH, shared.sin_BTH)
        cache = None
        if own.cache is not None and shared.length is not None:
            start = (0, shared.length, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(own.cache[0], k_BSKH, start)
            v_BSKH = jax.lax.dynamic_update_slice(own.cache[1], v_BSKH, start)
            cache = (k_BSKH, v_BSKH)
        if self.prefix is not None:
            k_BSKH, v_BSKH = self.prefix(k_BSKH, v_BSKH)
        out_BTNH = attend(
            q_BTNH, k_BSKH, v_BSKH, shared.query, shared.key, own.window, self.head_dim**-0.5
        )
        out_BTD = self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1), own.dropout_key)
        return out_BTD, cache

    def _heads(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        x_BTNH = x.reshape(*x.shape[:2], -1, self.head_dim)
        return x_BTNH if norm is None else norm(x_BTNH)


class MLP(nnx.Module):
    """SiLU-gated feed-forward."""

    def __init__(self, config: LlamaConfig):
        c, layers = config, config.num_hidden_layers
        wide, narrow, bias = c.intermediate_size, c.hidden_size, c.mlp_bias
        self.gate_proj = Linear(narrow, wide, ("mlp", "embed"), bias=bias, layers=layers)
        self.up_proj = Linear(narrow, wide, ("mlp", "embed"), bias=bias, layers=layers)
        self.down_proj = Linear(wide, narrow, ("embed", "mlp"), bias=bias, layers=layers)

    def __call__(self, x_BTD: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        gate_BTF = jax.nn.silu(self.gate_proj(x_BTD, dropout_key))
        return self.down_proj(gate_BTF * self.up_proj(x_BTD, dropout_key), dropout_key)


class Block(nnx.Module):
    """One decoder layer; its arrays hold all layers of the stack."""

    def __init__(self, config: LlamaConfig):
        c, layers = config, config.num_hidden_layers
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, layers)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, layers)
        self.mlp = MLP(c)

    def __call__(self, x_BTD: jax.Array, shared: Shared, own: PerLayer):
        """Run one layer; returns the activations and the layer's new cache, if any."""
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), shared, own)
        x_BTD = x_BTD + checkpoint_name(attended_BTD, "attention_out")
        mlp_BTD = self.mlp(self.post_attention_layernorm(x_BTD), own.dropout_key)
        return x_BTD + checkpoint_name(mlp_BTD, "mlp_out"), cache


class Decoder(nnx.Module):
    """Embedding, the stack of blocks, and the final norm (Hugging Face's `model.*`)."""

    def __init__(self, config: LlamaConfig):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = Block(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nnx.Module):
    """A decoder with its output head. `dtype` is what activations are computed in."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.origin: Any = None  # what it was loaded from, for whoever loads it
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else Linear(config.hidden_size, config.vocab_size, ("vocab", "embed"))
        )

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the next token at every position of rows without a cache."""
        hidden_BTD, _ = self.hidden(input_ids, position_ids, segment_ids)
        return self.head(hidden_BTD)

    def head(
        self, hidden: Float[Array, "*B D"], dropout_key: jax.Array | None = None
    ) -> Float[Array, "*B V"]:
        """Float32 logits from the final hidden states."""
        if self.lm_head is None:
            return self.model.embed_tokens.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden, dropout_key).astype(jnp.float32)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        remat: str = "none",
        dropout_key: jax.Array | None = None,
        sharding: jax.sharding.Sharding | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states (after the last norm), and the grown cache if one was given.

        Args:
            input_ids: tokens.
            position_ids: position of each token in its segment; 0..T-1 if absent.
            segment_ids: segment of each token, 0 for padding; one segment if absent.
            remat: `training.gradient_checkpointing`.
            dropout_key: turns adapter dropout on.
            sharding: of [B, T, D] activations.
            cache: keys and values so far; the tokens are appended to it.
        """
        position_ids = positions_like(input_ids) if position_ids is None else position_ids
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        query = Tokens(position_ids + self._prefix_length(), segment_ids)
        key = _key_tokens(query, cache)
        cos_BTH, sin_BTH = rope_tables(self.config.rope, query.position, self.dtype)
        shared = Shared(
            cos_BTH, sin_BTH, query, self._with_prefix(key), None if cache is None else cache.length
        )
        x_BTD = self.model.embed_tokens(input_ids, self.dtype)
        x_BTD, caches = self._run_layers(
            _constrain(x_BTD, sharding), shared, remat, dropout_key, sharding, cache
        )
        if cache is not None:
            keys, values = caches
            cache = Cache(keys, values, key, cache.length + input_ids.shape[1])
        return self.model.norm(x_BTD), cache

    def _run_layers(
        self,
        x_BTD: jax.Array,
        shared: Shared,
        remat: str,
        dropout_key: jax.Array | None,
        sharding: Any,
        cache: Cache | None,
    ) -> tuple[jax.Array, Any]:
        """Scan the blocks; returns the activations and the stacked new caches, if any."""
        graphdef, stacked = nnx.split(self.model.layers)
        layers = self.config.num_hidden_layers

        def body(x_BTD, xs):
            state, own = xs
            x_BTD, new_cache = nnx.merge(graphdef, state)(x_BTD, shared, own)
            return _constrain(x_BTD, sharding), new_cache

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        own = PerLayer(
            window=self._windows(),
            dropout_key=None if dropout_key is None else jax.random.split(dropout_key, layers),
            cache=None if cache is None else (cache.key, cache.value),
        )
        return jax.lax.scan(body, x_BTD, (stacked, own))

    def _windows(self) -> jax.Array | None:
        """Window per layer, or None when no layer slides."""
        windows = self.config.windows
        if all(window is None for window in windows):
            return None
        unlimited = np.iinfo(np.int32).max
        return jnp.asarray([unlimited if w is None else w for w in windows], jnp.int32)

    def _prefix_length(self) -> int:
        prefix = self.model.layers.self_attn.prefix
        return 0 if prefix is None else prefix.length

    def _with_prefix(self, key: Tokens) -> Tokens:
        """Put the prefix's places before the keys': positions 0.., seen by every segment."""
        length = self._prefix_length()
        if not length:
            return key
        shape = (key.position.shape[0], length)
        position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
        segment = jnp.full(shape, PREFIX_SEGMENT, jnp.int32)
        return Tokens(
            jnp.concatenate([position, key.position], axis=1),
            jnp.concatenate([segment, key.segment], axis=1),
        )

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        c = self.config
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        nowhere = jnp.full((batch, length), -2, jnp.int32)
        tokens = Tokens(jnp.zeros((batch, length), jnp.int32), nowhere)
        return Cache(
            jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype), tokens, jnp.int32(0)
        )


def _key_tokens(query: Tokens, cache: Cache | None) -> Tokens:
    """Places of the keys: the queries' own, or the cache's with the queries' written in."""
    if cache is None:
        return query
    start = (0, cache.length)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, start), cache.tokens, query
    )


def _constrain(x: jax.Array, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
