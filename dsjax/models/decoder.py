# SPDX-License-Identifier: Apache-2.0
"""What every decoder here has in common: embedding, stacks of equal blocks, norm and head.

In: token ids with the position and segment of each. Out: hidden states or logits. A stack is one
module whose arrays hold all its layers as [L, ...]; `jax.lax.scan` runs it, so that compile time
does not grow with depth. Not done here: attention and feed-forward of the families, loss, sampling,
loading, sharding (the caller passes a mesh's layout, or none).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.distributed.sharding import Layout
from dsjax.models.cache import Cache, key_tokens
from dsjax.models.layers import MLP, Embedding, Linear, RMSNorm
from dsjax.models.loaded import Loaded
from dsjax.models.moe import ROUTING, MoE, RouterStats
from dsjax.models.ops.attention import KERNEL_NAME, PREFIX_SEGMENT, Tokens
from dsjax.models.rope import positions_like, rope_tables
from dsjax.models.slots import Dropout
from dsjax.models.token_ids import token_ids

LATENTS = "attention_latents"

SAVED_NAMES = (KERNEL_NAME, LATENTS, "attention_out", "mlp_out", ROUTING)
"""Activations that the remat policy `names` keeps."""

_ROUTING = jax.checkpoint_policies.save_only_these_names(ROUTING)

REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ROUTING
    ),
    "names": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "full": _ROUTING,
}
"""training.gradient_checkpointing -> what a block keeps for its backward pass. A token's experts
are always kept: a few numbers, whose routing is costly to recompute."""

POLICIES = ("none", *REMAT)
"""Remat policies, from what computes least again to what keeps least."""


class Hidden(NamedTuple):
    """What a forward pass gives.

    Attributes:
        states: after the last norm.
        cache: the grown cache, if one was given.
        work: how the experts of each MoE layer shared the work; None without experts.
    """

    states: Float[Array, "B T D"]
    cache: Cache | None
    work: RouterStats | None


class StackInputs(NamedTuple):
    """What every block needs besides its input: rope tables, token places, the cache's end."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array
    query: Tokens
    key: Tokens
    length: jax.Array | None
    layout: Layout | None
    dropout: Dropout | None = None


class LayerInputs(NamedTuple):
    """What differs from block to block, each with a leading layer axis, or None.

    Attributes:
        window: positions that a token looks back over.
        number: of the layer, for its dropout.
        cache: of its attention.
        dropout: the layer's own; `run_stack` makes it.
    """

    window: jax.Array | None
    number: jax.Array | None
    cache: tuple[jax.Array, ...] | None
    dropout: Dropout | None = None


class Block(nnx.Module):
    """One decoder layer; its arrays hold all layers of the stack."""

    def __init__(self, attention: Any, mlp: MLP | MoE, hidden_size: int, eps: float, layers: int):
        self.layers = layers
        self.input_layernorm = RMSNorm(hidden_size, eps, layers)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, eps, layers)
        self.mlp = mlp

    def __call__(self, x_BTD: jax.Array, shared: StackInputs, own: LayerInputs):
        """Run one layer; returns the activations, the layer's new cache and its experts' work."""
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), shared, own)
        x_BTD = x_BTD + checkpoint_name(attended_BTD, "attention_out")
        normed_BTD, work = self.post_attention_layernorm(x_BTD), None
        if isinstance(self.mlp, MoE):
            real_BT = shared.query.segment > 0
            mlp_BTD, work = self.mlp(normed_BTD, real_BT, shared.layout, own.dropout)
        else:
            mlp_BTD = self.mlp(normed_BTD, own.dropout)
        return x_BTD + checkpoint_name(mlp_BTD, "mlp_out"), cache, work


class Decoder(nnx.Module):
    """Embedding, the stacks of blocks, and the final norm (Hugging Face's `model.*`)."""

    def __init__(self, config: Any, stacks: Mapping[str, Block]):
        self.stacks = tuple(stacks)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        for name, block in stacks.items():
            setattr(self, name, block)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def blocks(self) -> list[Block]:
        """Return the stacks in their order."""
        return [getattr(self, name) for name in self.stacks]

    def attentions(self) -> dict[str, Any]:
        """Return every stack's attention, by its path in a `CausalLM`, in the stacks' order."""
        return {f"model.{name}.self_attn": getattr(self, name).self_attn for name in self.stacks}


class CausalLM(Loaded):
    """A decoder with its output head. `dtype` is what activations are computed in."""

    def __init__(self, config: Any, dtype: jnp.dtype, stacks: Mapping[str, Block]):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.model = Decoder(config, stacks)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else Linear(config.hidden_size, config.vocab_size, ("vocab", "embed"))
        )
        self.mtp: Any = nnx.data(None)  # the module that predicts ahead, where it is trained

    def __call__(
        self,
        input_ids: Any,
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the next token at every position of rows without a cache.

        Args:
            input_ids: integers [B, T]: nested lists, or an array of numpy, torch or jax.
            position_ids: position of each token in its segment; 0..T-1 if absent.
            segment_ids: segment of each token, 0 for padding; one segment if absent.

        Raises:
            ConfigError: no such integers, or an id that the model does not have.
        """
        ids_BT = token_ids(input_ids, self.config.vocab_size)
        return self.head(self.hidden(ids_BT, position_ids, segment_ids).states)

    def all_gather_embeddings(self, layout: Layout | None) -> None:
        """Bring embedding and head together once, before they are used piece by piece."""
        for end in (self.model.embed_tokens, self.lm_head):
            if end is not None and layout is not None:
                weight: Any = end.weight
                whole = layout.gather(weight[...], weight.get_metadata()["axes"], self.dtype)
                end.weight = weight.replace(whole)

    def head(
        self, hidden: Float[Array, "*B D"], dropout: Dropout | None = None
    ) -> Float[Array, "*B V"]:
        """Float32 logits from the final hidden states."""
        if self.lm_head is None:
            return self.model.embed_tokens.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden, dropout).astype(jnp.float32)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        remat: str = "none",
        dropout: Dropout | None = None,
        layout: Layout | None = None,
        cache: Cache | None = None,
    ) -> Hidden:
        """Run the decoder up to its last norm.

        Args:
            input_ids: tokens.
            position_ids: position of each token in its segment; 0..T-1 if absent.
            segment_ids: segment of each token, 0 for padding; one segment if absent.
            remat: `training.gradient_checkpointing`.
            dropout: of adapters; None where nothing is dropped.
            layout: of the mesh, None on one device.
            cache: of the tokens before; these tokens are appended to it.
        """
        position_ids = positions_like(input_ids) if position_ids is None else position_ids
        segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        tokens = Tokens(position_ids, segment_ids)
        shared, key = self.stack_inputs(tokens, dropout=dropout, layout=layout, cache=cache)
        x_BTD = self.model.embed_tokens(_constrain(input_ids, layout), self.dtype)
        x_BTD = _constrain(x_BTD, layout)
        x_BTD, caches, work = self._run_stacks(x_BTD, shared, remat, cache)
        if cache is not None:
            cache = Cache(caches, key, cache.length + input_ids.shape[1])
        return Hidden(self.model.norm(x_BTD), cache, work)

    def stack_inputs(
        self,
        tokens: Tokens,
        *,
        dropout: Dropout | None = None,
        layout: Layout | None = None,
        cache: Cache | None = None,
    ) -> tuple[StackInputs, Tokens]:
        """Make what every block needs besides its input.

        Returns:
            That, and where the keys' tokens stand, those in the cache included.
        """
        position, segment = (_constrain(x, layout) for x in (tokens.position, tokens.segment))
        query = Tokens(position + self._prefix_length(), segment)
        key = key_tokens(query, cache)
        length = None if cache is None else cache.length
        tables = rope_tables(self.config.rope, query.position)
        return StackInputs(*tables, query, self._with_prefix(key), length, layout, dropout), key

    def ahead(
        self,
        states: Float[Array, "B T D"],
        next_ids: Int[Array, "B T"],
        position_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        *,
        remat: str = "none",
        layout: Layout | None = None,
    ) -> Hidden:
        """Run the module for multi-token prediction; its states predict the token after the next.

        Args:
            states: `hidden`'s.
            next_ids: the token after each.
            position_ids: position of each token in its segment.
            segment_ids: segment of each token, 0 where the next one is not of the same.
            remat: `training.gradient_checkpointing`.
            layout: of the mesh, None on one device.
        """
        tokens = Tokens(position_ids, segment_ids)
        tables = rope_tables(self.config.rope, position_ids)
        shared = StackInputs(*tables, tokens, tokens, None, layout)
        next_BTD = _constrain(self.model.embed_tokens(next_ids, self.dtype), layout)
        states, work = self.mtp(next_BTD, states, shared, remat)
        return Hidden(states, None, work)

    def _run_stacks(
        self,
        x_BTD: jax.Array,
        shared: StackInputs,
        remat: str,
        cache: Cache | None,
    ) -> tuple[jax.Array, tuple[Any, ...], RouterStats | None]:
        """Run all stacks; returns the activations, the new caches and the experts' work."""
        blocks = self.model.blocks()
        total, first = sum(block.layers for block in blocks), 0
        windows = self.windows()
        numbers = None if shared.dropout is None else jnp.arange(total)
        caches, work = [], None
        for number, block in enumerate(blocks):
            here = slice(first, first + block.layers)
            own = LayerInputs(
                window=None if windows is None else windows[here],
                number=None if numbers is None else numbers[here],
                cache=None if cache is None else cache.stacks[number],
            )
            x_BTD, new, done = run_stack(block, x_BTD, shared, own, remat)
            caches.append(new)
            work = work if done is None else done  # one stack at most has experts
            first += block.layers
        return x_BTD, tuple(caches), work

    def windows(self) -> jax.Array | None:
        """Window per layer, or None when no layer slides."""
        windows = self.config.windows
        if all(window is None for window in windows):
            return None
        unlimited = np.iinfo(np.int32).max
        return jnp.asarray([unlimited if w is None else w for w in windows], jnp.int32)

    def _prefix_length(self) -> int:
        """Tokens of the prefix in the attentions' slots; positions are the same in every stack."""
        prefixes = [attention.prefix for attention in self.model.attentions().values()]
        (length,) = {0 if prefix is None else prefix.length for prefix in prefixes}
        return length

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
        """Make an empty cache for `batch` rows of at most `length` tokens."""
        stacks = tuple(
            tuple(
                jnp.zeros((block.layers, batch, length, *shape), self.dtype)
                for shape in block.self_attn.cache_shapes()
            )
            for block in self.model.blocks()
        )
        nowhere = jnp.full((batch, length), -2, jnp.int32)
        tokens = Tokens(jnp.zeros((batch, length), jnp.int32), nowhere)
        return Cache(stacks, tokens, jnp.int32(0))


def run_stack(
    block: Block, x_BTD: jax.Array, shared: StackInputs, own: LayerInputs, remat: str
) -> tuple[jax.Array, Any, Any]:
    """Scan one stack; returns the activations, the stacked new caches and experts' work."""
    graphdef, stacked = nnx.split(block)

    def body(x_BTD, xs):
        state, own = xs
        state = _gathered(state, x_BTD.dtype, shared.layout)
        if shared.dropout is not None and own.number is not None:
            own = own._replace(dropout=shared.dropout.fold_in(own.number))
        x_BTD, cache, work = nnx.merge(graphdef, state)(x_BTD, shared, own)
        return _constrain(x_BTD, shared.layout), (cache, work)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    x_BTD, (caches, work) = jax.lax.scan(body, x_BTD, (stacked, own))
    return x_BTD, caches, work


def _gathered(state: Any, dtype: jnp.dtype, layout: Layout | None) -> Any:
    """Gather a layer's matrices for its products: rounded to `dtype`, where they are needed.

    Said here, XLA gathers each once, cast first; left to itself it would weave the gathering into
    every product, which takes many times as long to compile.
    """

    def whole(variable: nnx.Variable) -> nnx.Variable:
        metadata, value = variable.get_metadata(), variable[...]
        axes = metadata["axes"][1:]
        if len(axes) < 2 or layout is None:
            return variable
        narrow = isinstance(variable, nnx.Param) and not metadata.get("exact", False)
        return variable.replace(layout.gather(value, axes, dtype if narrow else value.dtype))

    return jax.tree.map(whole, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _constrain(x: jax.Array, layout: Layout | None) -> jax.Array:
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.rows)
