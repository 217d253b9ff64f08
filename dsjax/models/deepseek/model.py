# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2, V3 and V3.2: latent attention, and layers with experts after a few dense ones.

In: a `DeepseekConfig`. Out: an abstract `CausalLM` of up to two stacks. MoE-16B has Llama's
attention. Sources: arXiv 2405.04434 (V2), 2412.19437 (V3), DeepSeek-V3.2-Exp's report. Not done
here: what all decoders share (`decoder`), experts (`moe`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsjax.distributed.sequence import copy_rows
from dsjax.models.cache import append_to_cache
from dsjax.models.decoder import LATENTS, Block, CausalLM, LayerInputs, StackInputs
from dsjax.models.deepseek.config import LATENT_EPS, DeepseekConfig
from dsjax.models.deepseek.mtp import MTP
from dsjax.models.layers import MLP, LayerNorm, Linear, RMSNorm, spread
from dsjax.models.llama.model import Attention
from dsjax.models.moe import MoE
from dsjax.models.ops.attention import SparseMask, dot_product_attention
from dsjax.models.ops.blocks import precision
from dsjax.models.rope import rotate, split_pairs
from dsjax.models.slots import Dropout


class LatentAttention(nnx.Module):
    """Multi-head latent attention: keys and values of all heads come from one small latent.

    Without a cache the latent is expanded to heads. With one only the latent and the rotated key
    that all heads share are kept, and the expansion moves to the queries and the output: products
    of a query with W c are products of W^T q with c.
    """

    def __init__(self, config: DeepseekConfig, layers: int):
        c, m = config, config.mla
        assert m is not None
        self.mla, self.heads = m, c.num_attention_heads
        query_size = self.heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
        bias = c.attention_bias
        if m.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, query_size, ("heads", "embed"), layers=layers)
        else:
            rank = m.q_lora_rank
            self.q_a_proj = Linear(c.hidden_size, rank, (None, "embed"), bias=bias, layers=layers)
            self.q_a_layernorm = RMSNorm(rank, LATENT_EPS, layers)
            self.q_b_proj = Linear(rank, query_size, ("heads", "latent"), layers=layers)
        self.kv_a_proj_with_mqa = Linear(
            c.hidden_size,
            m.kv_lora_rank + m.qk_rope_head_dim,
            (None, "embed"),
            bias=bias,
            layers=layers,
        )
        self.kv_a_layernorm = RMSNorm(m.kv_lora_rank, LATENT_EPS, layers)
        self.kv_b_proj = Linear(
            m.kv_lora_rank,
            self.heads * (m.qk_nope_head_dim + m.v_head_dim),
            ("heads", "latent"),
            layers=layers,
        )
        self.o_proj = Linear(
            self.heads * m.v_head_dim, c.hidden_size, ("embed", "heads"), bias=bias, layers=layers
        )
        self.indexer = Indexer(c, layers) if c.indexer else None
        self.prefix = None  # no slot: a prefix of plain keys and values has no place in a latent

    def __call__(
        self, x_BTD: jax.Array, shared: StackInputs, own: LayerInputs
    ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
        """Attend; returns the output and, with a cache, what is kept of all tokens so far."""
        m, dropout = self.mla, own.dropout
        q_BTNH, q_latent_BTQ = self._queries(x_BTD, dropout)
        q_nope_BTNP, q_rope_BTNR = jnp.split(q_BTNH, [m.qk_nope_head_dim], axis=-1)
        both_BTX = checkpoint_name(self.kv_a_proj_with_mqa(x_BTD, dropout), LATENTS)
        latent_BTC, k_rope_BTR = jnp.split(both_BTX, [m.kv_lora_rank], axis=-1)
        new = (
            self.kv_a_layernorm(latent_BTC),
            self._rotate(k_rope_BTR[:, :, None], shared)[:, :, 0],
        )
        if self.indexer is not None:
            new = (*new, self.indexer.keys(x_BTD, shared))
        seen = copy_rows(append_to_cache(own.cache, new, shared.length), shared.layout)
        selection = None
        if self.indexer is not None and q_latent_BTQ is not None:
            selection = self.indexer.select(x_BTD, q_latent_BTQ, seen[2], shared)
        q_rope_BTNR = self._rotate(q_rope_BTNR, shared)
        if own.cache is None:
            kept = _of_copies(dropout, shared)
            qkv = self._expanded(q_nope_BTNP, q_rope_BTNR, seen[0], seen[1], kept)
        else:
            qkv = self._as_latents(q_nope_BTNP, q_rope_BTNR, seen[0], seen[1])
        out_BTNV = dot_product_attention(
            *qkv,
            shared.query,
            shared.key,
            None,
            m.softmax_scale,
            selection,
            shared.layout,
            own_rows=own.cache is None,
        )
        if own.cache is not None:
            out_BTNV = self._from_latents(out_BTNV)
        out_BTD = self.o_proj(out_BTNV.reshape(*x_BTD.shape[:2], -1), dropout)
        return out_BTD, None if own.cache is None else seen

    def _queries(
        self, x_BTD: jax.Array, dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Compute queries by head, and the latent that they come from, where there is one."""
        if self.mla.q_lora_rank is None:
            q_BTX, latent_BTQ = self.q_proj(x_BTD, dropout), None
        else:
            narrow_BTQ = checkpoint_name(self.q_a_proj(x_BTD, dropout), LATENTS)
            latent_BTQ = self.q_a_layernorm(narrow_BTQ)
            q_BTX = self.q_b_proj(latent_BTQ, dropout)
        return q_BTX.reshape(*x_BTD.shape[:2], self.heads, -1), latent_BTQ

    def _rotate(self, x_BTNR: jax.Array, shared: StackInputs) -> jax.Array:
        if self.mla.rope_interleave:
            x_BTNR = split_pairs(x_BTNR)
        wide = x_BTNR.astype(jnp.float32) if self.mla.rope_in_float32 else x_BTNR
        return rotate(wide, shared.cos_BTH, shared.sin_BTH).astype(x_BTNR.dtype)

    def _expanded(
        self,
        q_nope_BTNP: jax.Array,
        q_rope_BTNR: jax.Array,
        latent_BSC: jax.Array,
        k_rope_BSR: jax.Array,
        dropout: Dropout | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute queries, keys and values by head."""
        m = self.mla
        both_BSX = self.kv_b_proj(latent_BSC, dropout)
        both_BSNX = both_BSX.reshape(*latent_BSC.shape[:2], self.heads, -1)
        k_nope_BSNP, v_BSNV = jnp.split(both_BSNX, [m.qk_nope_head_dim], axis=-1)
        by_head = (*k_nope_BSNP.shape[:3], m.qk_rope_head_dim)
        k_rope_BSNR = spread(k_rope_BSR[:, :, None], by_head, k_rope_BSR.dtype)
        q_BTNH = jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1)
        return q_BTNH, jnp.concatenate([k_nope_BSNP, k_rope_BSNR], axis=-1), v_BSNV

    def _as_latents(
        self,
        q_nope_BTNP: jax.Array,
        q_rope_BTNR: jax.Array,
        latent_BSC: jax.Array,
        k_rope_BSR: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute queries in the latent's space; the latent is one key and value for all heads."""
        key_NPC, _ = self._by_head(latent_BSC.dtype)
        exact = precision(latent_BSC.dtype)
        q_BTNC = jnp.einsum("btnp,npc->btnc", q_nope_BTNP, key_NPC, precision=exact)
        k_BS1H = jnp.concatenate([latent_BSC, k_rope_BSR], axis=-1)[:, :, None]
        return jnp.concatenate([q_BTNC, q_rope_BTNR], axis=-1), k_BS1H, latent_BSC[:, :, None]

    def _from_latents(self, out_BTNC: Float[Array, "B T N C"]) -> Float[Array, "B T N V"]:
        """Bring what was attended to from the latent's space to values by head."""
        _, value_NVC = self._by_head(out_BTNC.dtype)
        exact = precision(out_BTNC.dtype)
        return jnp.einsum("btnc,nvc->btnv", out_BTNC, value_NVC, precision=exact)

    def _by_head(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return the parts of kv_b_proj that make keys and values: [N, P, C] and [N, V, C]."""
        weight_XC = self.kv_b_proj.merged_weight(dtype)
        weight_NXC = weight_XC.reshape(self.heads, -1, self.mla.kv_lora_rank)
        key_NPC, value_NVC = jnp.split(weight_NXC, [self.mla.qk_nope_head_dim], axis=1)
        return key_NPC, value_NVC

    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that are kept of one token: latent, rotated key, the indexer's key."""
        shapes = ((self.mla.kv_lora_rank,), (self.mla.qk_rope_head_dim,))
        return shapes if self.indexer is None else (*shapes, (self.indexer.sizes.index_head_dim,))


def _of_copies(dropout: Dropout | None, shared: StackInputs) -> Dropout | None:
    """Return what is dropped of the copies of rows that their parts have: the rows' own."""
    if dropout is None:
        return None
    return dropout._replace(token=copy_rows(dropout.token, shared.layout))


class Indexer(nnx.Module):
    """V3.2's choice of the keys that a query attends to; no gradient reaches it."""

    def __init__(self, config: DeepseekConfig, layers: int):
        assert config.indexer is not None and config.mla is not None
        assert config.mla.q_lora_rank is not None
        self.sizes, self.rotated = config.indexer, config.mla.qk_rope_head_dim
        heads, size = self.sizes.index_n_heads, self.sizes.index_head_dim
        self.wq_b = Linear(
            config.mla.q_lora_rank, heads * size, (None, "latent"), layers=layers, trains=False
        )
        self.wk = Linear(config.hidden_size, size, (None, "embed"), layers=layers, trains=False)
        self.k_norm = LayerNorm(size, 1e-6, layers, trains=False)
        self.weights_proj = Linear(
            config.hidden_size, heads, (None, "embed"), layers=layers, trains=False
        )

    def keys(self, x_BTD: jax.Array, shared: StackInputs) -> Float[Array, "B T H"]:
        """One key for each token, rotated in half-split order."""
        key_BTH = self.k_norm(self.wk(jax.lax.stop_gradient(x_BTD)))
        return self._rotate(key_BTH[:, :, None], shared)[:, :, 0]

    def select(
        self, x_BTD: jax.Array, q_latent_BTQ: jax.Array, key_BSH: jax.Array, shared: StackInputs
    ) -> SparseMask | None:
        """Choose `index_topk` keys for each query; None where there are no more than that."""
        most, size = self.sizes.index_topk, self.sizes.index_head_dim
        if key_BSH.shape[1] <= most:
            return None
        x_BTD, q_latent_BTQ = jax.lax.stop_gradient((x_BTD, q_latent_BTQ))
        q_BTNH = self.wq_b(q_latent_BTQ).reshape(*x_BTD.shape[:2], -1, size)
        q_BTNH = self._rotate(q_BTNH, shared)
        weights_BTN = self.weights_proj(x_BTD).astype(jnp.float32) * self.sizes.index_n_heads**-0.5

        def select(query_inputs, mask_BTS):
            q_BTNH, weights_BTN = query_inputs
            wide = jnp.float32
            scores_BTNS = jnp.einsum(
                "btnh,bsh->btns",
                q_BTNH.astype(wide),
                key_BSH.astype(wide),
                precision=precision(jnp.dtype(wide)),
            )
            scores_BTNS = jax.nn.relu(scores_BTNS * size**-0.5)
            score_BTS = jnp.einsum("btn,btns->bts", weights_BTN, scores_BTNS)
            _, best_BTK = jax.lax.top_k(jnp.where(mask_BTS, score_BTS, -jnp.inf), most)
            rows, columns = jnp.ogrid[: mask_BTS.shape[0], : mask_BTS.shape[1]]
            chosen_BTS = jnp.zeros_like(mask_BTS).at[rows[..., None], columns[..., None], best_BTK]
            return mask_BTS & chosen_BTS.set(True)

        return SparseMask(select, (q_BTNH, weights_BTN))

    def _rotate(self, x_BTNH: jax.Array, shared: StackInputs) -> jax.Array:
        """Rotate the first dimensions of each head; unlike those of the attention, half-split."""
        first, rest = jnp.split(x_BTNH, [self.rotated], axis=-1)
        return jnp.concatenate([rotate(first, shared.cos_BTH, shared.sin_BTH), rest], axis=-1)


def causal_lm(config: DeepseekConfig, dtype: jnp.dtype) -> CausalLM:
    """Build the abstract model: dense layers first, then layers with experts."""
    dense = config.dense_layers
    sizes = {"dense_layers": dense, "layers": config.num_hidden_layers - dense}
    stacks = {
        name: _block(config, layers, name == "dense_layers")
        for name, layers in sizes.items()
        if layers
    }
    return CausalLM(config, dtype, stacks)


def prediction_module(config: DeepseekConfig) -> MTP:
    """Build the abstract module for multi-token prediction: a layer of the kind that comes next."""
    return MTP(config, _block(config, 1, config.num_hidden_layers < config.first_k_dense_replace))


def _block(config: DeepseekConfig, layers: int, dense: bool) -> Block:
    mlp = _dense(config, layers) if dense else _experts(config, layers)
    attention = _attention(config, layers)
    return Block(attention, mlp, config.hidden_size, config.rms_norm_eps, layers)


def _attention(config: DeepseekConfig, layers: int) -> Attention | LatentAttention:
    return Attention(config, layers) if config.mla is None else LatentAttention(config, layers)


def _dense(config: DeepseekConfig, layers: int) -> MLP:
    c = config
    return MLP(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, layers=layers)


def _experts(config: DeepseekConfig, layers: int) -> MoE:
    c, wide, shared = config, config.moe_intermediate_size, None
    if c.n_shared_experts:
        width = c.n_shared_experts * wide
        shared = MLP(c.hidden_size, width, bias=c.mlp_bias, layers=layers)
    return MoE(c.router, c.hidden_size, wide, shared, layers)
