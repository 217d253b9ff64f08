# SPDX-License-Identifier: Apache-2.0
"""The loss of the token after the next, which a module for multi-token prediction predicts.

In: the main model's final states and the batch. Out: the module's sums, its term, its metric, and
what the option needs of the model, the adapter and the checkpoint. Source: arXiv 2412.19437, 2.2.
Not done here: the module (`models.deepseek.mtp`).
"""

from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.models import MODELS, Model, entries_of, predict_ahead
from dsjax.objectives import load_balance
from dsjax.objectives.cross_entropy import head_sums
from dsjax.objectives.objective import Forward, Metric, Sums, Term

KEYS = ("mtp_loss_weight",)
METRICS = {"mtp_loss": Metric("mtp_loss", "mtp_weight", "mtp loss {:.4f}", optional=True)}


def shifted(batch: Batch) -> Batch:
    """Shift rows one token on: at each place what stands at the next of its segment.

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


def sums(
    model: Model,
    batch: Batch,
    states_BTD: jax.Array,
    main: Sums,
    forward: Forward,
    options: ObjectiveSection,
) -> Sums:
    """Sum over the predictions of the token after the next.

    Args:
        model: with the module.
        batch: the rows.
        states_BTD: the main model's, after its last norm.
        main: the main model's sums.
        forward: how the pass runs; the module has no adapter, so nothing is dropped in it.
        options: the objective's.

    Returns:
        `mtp_loss`, `mtp_weight`; with experts in the module also `mtp_tokens_per_expert` [1, E],
        which leaves out tokens whose next is another segment's, and `balance`, now of both.
    """
    after = shifted(batch)
    hidden = model.ahead(
        states_BTD,
        jnp.asarray(after.input_ids),
        jnp.asarray(after.position_ids),
        jnp.asarray(after.segment_ids),
        remat=forward.remat,
        layout=forward.layout,
    )
    loss, _ = head_sums(model, hidden.states, after.targets, after.loss_weights, forward)
    own = {"mtp_loss": loss, "mtp_weight": jnp.sum(after.loss_weights)}
    work = load_balance.sums(hidden.work, options, "mtp_")
    if "balance" in main and "balance" in work:
        work["balance"] = main["balance"] + work["balance"]
    return own | work


def terms(options: ObjectiveSection) -> dict[str, Term]:
    """Return the term, where the option switches it on."""
    weight = options.mtp_loss_weight
    return {"mtp_loss": Term(_shifted_weight, weight)} if weight else {}


def _shifted_weight(batch: Batch) -> jax.Array:
    return jnp.sum(shifted(batch).loss_weights)


def prepare(options: ObjectiveSection, model: Model) -> None:
    """Put the module into its slot in the model, where the option trains it."""
    if options.mtp_loss_weight:
        predict_ahead(model)


def problems(options: ObjectiveSection, model: Model, peft_type: str | None) -> list[str]:
    """Why this model or this kind of training cannot train the module."""
    got = f"objective.mtp_loss_weight: got {options.mtp_loss_weight}"
    if not options.mtp_loss_weight:
        return []
    if peft_type is not None:
        return [
            f"{got} with {peft_type}, expected 0; the module for multi-token prediction is trained "
            "in full training only (adapter.peft_type=null)"
        ]
    kind = model.config.model_type
    if MODELS[kind].ahead is None:
        able = ", ".join(name for name, family in MODELS.items() if family.ahead)
        return [
            f"{got} for model_type {kind}, expected 0; these have a module for multi-token "
            f"prediction: {able}"
        ]
    count = model.config.num_nextn_predict_layers
    if count != 1:
        return [
            f"{got} for config.json num_nextn_predict_layers {count}, expected 0; one module for "
            "multi-token prediction is trained, neither none nor a chain of several"
        ]
    return []


def tensor_problems(options: ObjectiveSection, model: Model, found: Container[str]) -> list[str]:
    """Which of the module's tensors the checkpoint lacks, where the option trains it."""
    names = [entry.hf for entry in entries_of(model) if entry.path.startswith("mtp.")]
    missing = [name for name in names if name not in found]
    if not options.mtp_loss_weight or not missing:
        return []
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return [
        f"objective.mtp_loss_weight: got {options.mtp_loss_weight}, and the checkpoint lacks "
        f"{len(missing)} of the {len(names)} tensors of its module for multi-token prediction: "
        f"{shown}, expected 0; or fetch the files that hold them"
    ]
