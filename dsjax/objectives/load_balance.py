# SPDX-License-Identifier: Apache-2.0
"""How evenly experts work: the balance loss, routers' biases that move, and what is logged of it.

In: what the routers of a forward pass tell. Out: sums, the balance loss's term, biases after a
step, gauges, and what the options need of the model, the adapter and the checkpoint. Not done here:
routing, and the balance loss of a layer (`models.moe`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ObjectiveSection
from dsjax.data import Batch
from dsjax.distributed.sharding import Leaf, has_experts
from dsjax.models import Model, base_shapes, entries_of
from dsjax.models.moe import RouterStats
from dsjax.objectives.objective import TOKENS, Gauge, Sums, Term
from dsjax.weights.safetensors import TensorInfo

KEYS = ("aux_loss_alpha", "bias_update_speed")
BIAS = "e_score_correction_bias"
_LOADS = "tokens_per_expert"


def sums(work: RouterStats | None, options: ObjectiveSection, prefix: str = "") -> Sums:
    """Return what the routers tell; nothing without experts.

    Args:
        work: how the experts of each MoE layer shared the work.
        options: the objective's.
        prefix: of the name of the loads, which are one model's; the balance loss is all routers'.

    Returns:
        `tokens_per_expert` [L, E]; where it is a term also `balance`, the balance losses summed
        over rows and layers.
    """
    if work is None:
        return {}
    balance = {"balance": jnp.sum(work.balance)} if options.aux_loss_alpha else {}
    return {f"{prefix}{_LOADS}": work.tokens_per_expert} | balance


def terms(options: ObjectiveSection) -> dict[str, Term]:
    """Return the balance loss, a mean over rows, where the option switches it on."""
    alpha = options.aux_loss_alpha
    return {"balance": Term(_filled_rows, alpha)} if alpha else {}


def _filled_rows(batch: Batch) -> jax.Array:
    return jnp.sum(jnp.any(batch.segment_ids > 0, axis=1))


def moves_biases(options: ObjectiveSection) -> bool:
    """Whether routers' biases move."""
    return options.bias_update_speed > 0


def moved(options: ObjectiveSection, path: str, bias_LE: jax.Array, sums: Sums) -> jax.Array:
    """Routers' biases after a step: DeepSeek-V3's balancing without a loss.

    An expert that took more of the batch's real tokens than the mean of its layer loses
    `bias_update_speed`, one that took fewer gains it (arXiv 2412.19437, 2.1.2).
    """
    loads_LE = sums[f"mtp_{_LOADS}" if path.startswith("mtp.") else _LOADS]
    assert bias_LE.shape == loads_LE.shape, path
    mean_L1 = jnp.sum(loads_LE, axis=-1, keepdims=True) / loads_LE.shape[-1]
    return bias_LE + options.bias_update_speed * jnp.sign(mean_L1 - loads_LE)


def expert_imbalance(sums: Mapping[str, Any], model: Model) -> float:
    """Return the busiest expert's load over the mean load, averaged over the layers: 1 is even.

    The module for multi-token prediction is not among them.
    """
    loads_LE = np.asarray(sums[_LOADS])
    means_L = loads_LE.mean(axis=1)
    return float(np.mean(loads_LE.max(axis=1) / np.maximum(means_L, 1e-30)))


def dropped_tokens(sums: Mapping[str, Any], model: Model) -> int:
    """Choices that no expert computed, of all layers."""
    loads_LE = np.asarray(sums[_LOADS])
    chosen = model.config.router.num_experts_per_tok
    return int(int(sums[TOKENS]) * chosen * len(loads_LE) - loads_LE.sum())


GAUGES = {
    "expert_imbalance": Gauge(_LOADS, expert_imbalance, "imbalance {:.2f}"),
    "dropped_tokens": Gauge(_LOADS, dropped_tokens),
}


def unused_keys(options: ObjectiveSection, leaves: Mapping[str, Leaf]) -> list[str]:
    """Name the balance loss's weight in a model without experts."""
    unused = options.aux_loss_alpha and not has_experts(leaves)
    return ["objective.aux_loss_alpha"] if unused else []


def problems(options: ObjectiveSection, model: Model, peft_type: str | None) -> list[str]:
    """Why this model or this kind of training has no biases to move."""
    got = f"objective.bias_update_speed: got {options.bias_update_speed}"
    if not options.bias_update_speed:
        return []
    if peft_type is not None:
        return [
            f"{got} with {peft_type}, expected 0; the file of an adapter has no place for the "
            "routers' biases, full training has (adapter.peft_type=null)"
        ]
    if not any(path.endswith(f".{BIAS}") for path in base_shapes(model)):
        return [
            f"{got} for a model of model_type {model.config.model_type} without {BIAS}, expected "
            "0; only routers of topk_method noaux_tc have it (deepseek_v3, deepseek_v32)"
        ]
    return []


def tensor_problems(
    options: ObjectiveSection, model: Model, found: Mapping[str, TensorInfo]
) -> list[str]:
    """Biases that the export could not hold: steps of 0.001 vanish in 16 bits."""
    if not options.bias_update_speed:
        return []
    names = [entry.hf for entry in entries_of(model) if entry.path.endswith(f".{BIAS}")]
    coarse = [name for name in names if name in found and found[name].dtype.itemsize < 4]
    if not coarse:
        return []
    return [
        f"{coarse[0]}: got {found[coarse[0]].dtype.name} with objective.bias_update_speed="
        f"{options.bias_update_speed}, expected float32 (so in {len(coarse)} tensors): an "
        "export keeps the file's dtype, which is too coarse for such steps; set it to 0, "
        "or take the published checkpoint"
    ]
