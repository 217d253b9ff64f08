# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: next-token cross-entropy, weighted per token.

In: a model and a batch whose targets are already shifted. Out: the weighted sum of the losses and
of the hits; and what the options add: the balance loss of models with experts (`load_balance`), the
loss of the token after the next (`multi_token`). Not done here: the head (`cross_entropy`), means.
"""

import math

import jax
import jax.numpy as jnp

from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.models import Model
from dsjax.objectives import load_balance, multi_token
from dsjax.objectives.cross_entropy import head_sums
from dsjax.objectives.objective import Forward, Metric, Objective, Sums, Term


def sft_sums(model: Model, batch: Batch, forward: Forward, options: ObjectiveSection) -> Sums:
    """Sum the cross-entropy of every target times its weight, in float32.

    Returns:
        `loss`, `weight` (what a mean divides by), `correct` (weight of the tokens whose target was
        the likeliest), `tokens` (real ones, trained or not), and the sums of the added terms.
    """
    model.all_gather_embeddings(forward.layout)
    hidden = model.hidden(
        jnp.asarray(batch.input_ids),
        jnp.asarray(batch.position_ids),
        jnp.asarray(batch.segment_ids),
        remat=forward.remat,
        dropout=forward.dropout,
        layout=forward.layout,
    )
    loss, correct = head_sums(model, hidden.states, batch.targets, batch.loss_weights, forward)
    sums = {
        "loss": loss,
        "weight": _trained_weight(batch),
        "correct": correct,
        "tokens": jnp.sum(batch.segment_ids > 0, dtype=jnp.int32),
        **load_balance.sums(hidden.work, options),
    }
    if not options.mtp_loss_weight:
        return sums
    return sums | multi_token.sums(model, batch, hidden.states, sums, forward, options)


def _trained_weight(batch: Batch) -> jax.Array:
    return jnp.sum(batch.loss_weights)


def _terms(options: ObjectiveSection) -> dict[str, Term]:
    added = load_balance.terms(options) | multi_token.terms(options)
    return {"loss": Term(_trained_weight)} | added


def _perplexity(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def _for_evaluation(options: ObjectiveSection) -> ObjectiveSection:
    return options.model_copy(update={"mtp_loss_weight": 0.0, "aux_loss_alpha": 0.0})


SFT = Objective(
    keys=(*load_balance.KEYS, *multi_token.KEYS),
    batch_fields=Batch._fields,
    sums=sft_sums,
    terms=_terms,
    metrics={
        "loss": Metric("loss", "weight", "loss {:.4f}"),
        **multi_token.METRICS,
        "accuracy": Metric("correct", "weight", "accuracy {:.3f}"),
    },
    eval_metrics={
        "loss": Metric("loss", "weight", "eval loss {:.4f}"),
        "perplexity": Metric("loss", "weight", "perplexity {:.4g}", value=_perplexity),
        "tokens": Metric("tokens", None),
        "accuracy": Metric("correct", "weight"),
    },
    gauges=load_balance.GAUGES,
    for_evaluation=_for_evaluation,
    prepare=multi_token.prepare,
    problems=lambda *given: [*load_balance.problems(*given), *multi_token.problems(*given)],
    tensor_problems=lambda *given: [
        *multi_token.tensor_problems(*given),
        *load_balance.tensor_problems(*given),
    ],
    unused_keys=load_balance.unused_keys,
    moves_biases=load_balance.moves_biases,
    moved=load_balance.moved,
)
