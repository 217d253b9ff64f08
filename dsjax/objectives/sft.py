# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: next-token cross-entropy, weighted per token.

In: a model and a batch whose targets are already shifted. Out: the weighted sum of the losses and
of the hits. The head runs over a few tokens of every row at a time and is computed again in the
backward pass, so that [B, T, V] logits never exist. Not done here: the mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.data import Batch
from dsjax.models import Model
from dsjax.models.attention import in_blocks

TOKENS_PER_CHUNK = 2048
"""Tokens per device whose logits exist at the same time."""


class Forward(NamedTuple):
    """How a forward pass runs.

    Attributes:
        remat: `training.gradient_checkpointing`.
        dropout_key: turns adapter dropout on.
        sharding: of activations that lead with the batch's rows.
        row_shards: number of parts that the rows are dealt into.
    """

    remat: str = "none"
    dropout_key: jax.Array | None = None
    sharding: jax.sharding.NamedSharding | None = None
    row_shards: int = 1


class Sums(NamedTuple):
    """Sums over a batch's tokens.

    Attributes:
        loss: weighted cross-entropy.
        weight: what a mean divides by.
        correct: weight of the tokens whose target was the likeliest.
        tokens: real tokens, trained or not.
        loads: tokens that each expert of each MoE layer took; None without experts.
        balance: balance losses, summed over rows and layers; None without experts.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    tokens: Int[Array, ""]
    loads: Int[Array, "L E"] | None = None
    balance: Float[Array, ""] | None = None


def sft(model: Model, batch: Batch, forward: Forward) -> Sums:
    """Sum the cross-entropy of every target times its weight, in float32."""
    hidden = model.hidden(
        jnp.asarray(batch.input_ids),
        jnp.asarray(batch.position_ids),
        jnp.asarray(batch.segment_ids),
        remat=forward.remat,
        dropout_key=forward.dropout_key,
        sharding=forward.sharding,
    )
    rows = max(1, batch.input_ids.shape[0] // forward.row_shards)
    length = max(1, min(batch.input_ids.shape[1], TOKENS_PER_CHUNK // rows))
    # Tokens that fill the last chunk up have weight 0.
    chunks = jax.tree.map(
        lambda x: in_blocks(x, length), (hidden.states, batch.targets, batch.loss_weights)
    )

    @jax.checkpoint
    def chunk_sums(number, chunk) -> tuple[jax.Array, jax.Array]:
        hidden_BtD, targets_Bt, weights_Bt = chunk
        key = forward.dropout_key
        if key is not None:  # else every chunk would lose the same inputs of an adapted head
            key = jax.random.fold_in(key, number)
        return _cross_entropy(model.head(hidden_BtD, key), targets_Bt, weights_Bt)

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, chunk_sums(*numbered)), None

    zero = jnp.zeros((), jnp.float32)
    numbers = jnp.arange(chunks[1].shape[0])
    (loss, correct), _ = jax.lax.scan(add, (zero, zero), (numbers, chunks))
    tokens = jnp.sum(batch.segment_ids > 0, dtype=jnp.int32)
    sums = Sums(loss, jnp.sum(batch.loss_weights), correct, tokens)
    if hidden.work is None:
        return sums
    return sums._replace(loads=hidden.work.loads, balance=jnp.sum(hidden.work.balance))


def _cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the losses and of the correct predictions."""
    picked_BT = jnp.take_along_axis(logits_BTV, targets[..., None], axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
    hits_BT = jnp.argmax(logits_BTV, axis=-1) == targets
    return jnp.sum(losses_BT * weights), jnp.sum(hits_BT * weights)
