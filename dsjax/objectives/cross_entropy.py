# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy of a model's head, without ever holding the logits of a row.

In: final states, targets and weights of tokens. Out: the weighted sums of losses and of hits. The
head runs over a few tokens of every row at a time and is computed again in the backward pass, so
that [B, T, V] logits never exist. Not done here: the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsjax.distributed.sequence import split_rows
from dsjax.models import Model
from dsjax.models.ops.blocks import in_blocks
from dsjax.objectives.objective import Forward

TOKENS_PER_CHUNK = 2048
"""Tokens per device whose logits exist at the same time."""


def head_sums(
    model: Model,
    states_BTD: Float[Array, "B T D"],
    targets: Shaped[Array, "B T"] | np.ndarray,
    weights: Shaped[Array, "B T"] | np.ndarray,
    forward: Forward,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the losses and of the hits of the head on final states."""
    dropout = forward.dropout
    tokens = None if dropout is None else dropout.token
    # By device: the parts of rows that it has, a few tokens of each at a time.
    parts = split_rows((states_BTD, targets, weights, tokens), forward.layout)
    rows = max(1, states_BTD.shape[0] // forward.row_shards)
    length = max(1, min(parts[0].shape[1], TOKENS_PER_CHUNK // rows))
    # Tokens that fill the last chunk up have weight 0.
    chunks = jax.tree.map(lambda x: in_blocks(x, length), parts)

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
    # Not taken by index: the gradient would be scattered, through float32 arrays of all logits.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets[..., None]
    picked_BT = jnp.sum(logits_BTV, axis=-1, where=is_target_BTV)
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
    hits_BT = jnp.argmax(logits_BTV, axis=-1) == targets
    return jnp.sum(losses_BT * weights), jnp.sum(hits_BT * weights)
