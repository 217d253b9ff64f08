# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: next-token cross-entropy, weighted per token.

In: a model and a batch whose targets are already shifted. Out: the weighted sum of the losses and
of the hits; where it is asked for, also those of the module that predicts the token after the next.
The head runs over a few tokens of every row at a time and is computed again in the backward pass,
so that [B, T, V] logits never exist. Not done here: the mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsjax.data import Batch
from dsjax.distributed.sharding import Layout
from dsjax.models import Model
from dsjax.models.ops.blocks import in_blocks
from dsjax.models.slots import Dropout

TOKENS_PER_CHUNK = 2048
"""Tokens per device whose logits exist at the same time."""


class Forward(NamedTuple):
    """How a forward pass runs.

    Attributes:
        remat: `training.gradient_checkpointing`.
        dropout: of adapters; None where nothing is dropped.
        layout: of the mesh, None on one device.
        row_shards: number of parts that the rows are dealt into.
        ahead: whether the token after the next is predicted too.
    """

    remat: str = "none"
    dropout: Dropout | None = None
    layout: Layout | None = None
    row_shards: int = 1
    ahead: bool = False


class AheadSums(NamedTuple):
    """Sums over a batch's predictions of the token after the next.

    Attributes:
        loss: weighted cross-entropy.
        weight: what a mean divides by.
        tokens_per_expert: as in `Sums`, of the module's layer; tokens whose next is another
            segment's are not among them.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    tokens_per_expert: Int[Array, "1 E"] | None = None


class Sums(NamedTuple):
    """Sums over a batch's tokens.

    Attributes:
        loss: weighted cross-entropy.
        weight: what a mean divides by.
        correct: weight of the tokens whose target was the likeliest.
        tokens: real tokens, trained or not.
        tokens_per_expert: tokens that each expert of each MoE layer took; None without experts.
        balance: balance losses, summed over rows and layers; None without experts.
        ahead: of the token after the next; None where it is not predicted.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]
    tokens: Int[Array, ""]
    tokens_per_expert: Int[Array, "L E"] | None = None
    balance: Float[Array, ""] | None = None
    ahead: AheadSums | None = None


def sft(model: Model, batch: Batch, forward: Forward) -> Sums:
    """Sum the cross-entropy of every target times its weight, in float32."""
    model.all_gather_embeddings(forward.layout)
    hidden = model.hidden(
        jnp.asarray(batch.input_ids),
        jnp.asarray(batch.position_ids),
        jnp.asarray(batch.segment_ids),
        remat=forward.remat,
        dropout=forward.dropout,
        layout=forward.layout,
    )
    loss, correct = _head_sums(model, hidden.states, batch.targets, batch.loss_weights, forward)
    tokens = jnp.sum(batch.segment_ids > 0, dtype=jnp.int32)
    sums = Sums(loss, jnp.sum(batch.loss_weights), correct, tokens)
    if hidden.work is not None:
        sums = sums._replace(
            tokens_per_expert=hidden.work.tokens_per_expert, balance=jnp.sum(hidden.work.balance)
        )
    return _with_ahead(model, batch, hidden.states, sums, forward) if forward.ahead else sums


def shifted(batch: Batch) -> Batch:
    """The same rows one token on: at each place what stands at the next of its segment.

    Ids and targets are the next place's, so that the target is the token after the next. Where the
    next place is of another segment, segment and weight are 0. Positions stay.
    """
    segments = jnp.asarray(batch.segment_ids)
    inside = (segments > 0) & (_next(segments) == segments)
    return batch._replace(
        input_ids=_next(batch.input_ids),
        targets=_next(batch.targets),
        loss_weights=_next(batch.loss_weights) * inside,
        segment_ids=segments * inside,
    )


def _next(x: Shaped[Array, "B T"] | np.ndarray) -> Shaped[Array, "B T"]:
    return jnp.pad(jnp.asarray(x)[:, 1:], [(0, 0), (0, 1)])


def _with_ahead(
    model: Model, batch: Batch, states_BTD: jax.Array, sums: Sums, forward: Forward
) -> Sums:
    """Add what the module for multi-token prediction gives: its sums and its balance losses."""
    after = shifted(batch)
    hidden = model.ahead(
        states_BTD,
        jnp.asarray(after.input_ids),
        jnp.asarray(after.position_ids),
        jnp.asarray(after.segment_ids),
        remat=forward.remat,
        layout=forward.layout,
    )
    loss, _ = _head_sums(model, hidden.states, after.targets, after.loss_weights, forward)
    ahead = AheadSums(loss, jnp.sum(after.loss_weights))
    if hidden.work is None:
        return sums._replace(ahead=ahead)
    balance = jnp.sum(hidden.work.balance)
    return sums._replace(
        ahead=ahead._replace(tokens_per_expert=hidden.work.tokens_per_expert),
        balance=balance if sums.balance is None else sums.balance + balance,
    )


def _head_sums(
    model: Model,
    states_BTD: Float[Array, "B T D"],
    targets: Shaped[Array, "B T"] | np.ndarray,
    weights: Shaped[Array, "B T"] | np.ndarray,
    forward: Forward,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the losses and of the hits of the head on final states."""
    rows = max(1, states_BTD.shape[0] // forward.row_shards)
    length = max(1, min(states_BTD.shape[1], TOKENS_PER_CHUNK // rows))
    dropout = forward.dropout
    tokens = None if dropout is None else dropout.token
    # Tokens that fill the last chunk up have weight 0.
    chunks = jax.tree.map(lambda x: in_blocks(x, length), (states_BTD, targets, weights, tokens))

    @jax.checkpoint
    def chunk_sums(chunk) -> tuple[jax.Array, jax.Array]:
        hidden_BtD, targets_Bt, weights_Bt, token_Bt = chunk
        own = None if dropout is None else dropout._replace(token=token_Bt)
        return _cross_entropy(model.head(hidden_BtD, own), targets_Bt, weights_Bt)

    def add(total, chunk):
        return jax.tree.map(jnp.add, total, chunk_sums(chunk)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(add, (zero, zero), chunks)
    return sums


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
