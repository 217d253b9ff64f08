# SPDX-License-Identifier: Apache-2.0
"""How gradients become parameter updates: schedule, AdamW or Lion, weight-decay mask, clipping.

In: the `optimizer` section, the number of steps, the paths of the trainable leaves.
Out: a schedule (step -> learning rate), an `optax.GradientTransformation`, and clipping as a
function of its own, because the step also reports the norm before clipping.
Not done here: choosing what trains (`partition`), casting, loss scaling and applying (`step`).

Dtypes: call `init` with a float32 view of the trainable leaves and `update` with float32 gradients
and that view; then moments and updates are float32, whatever the parameters are stored in. The
learning rate is no part of the state, only optax's counters are: 0 at the first update, and
unchanged by an update that the step throws away.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from dsjax.config import OptimizerSection
from dsjax.errors import ConfigError

FEW_STEPS = 10
MORE_STEPS = "raise training.num_train_epochs or training.max_steps, or lower training.batch_size"

Schedule = Callable[[ArrayLike], Float[Array, ""]]

# transformers.Trainer.get_decay_parameter_names: searched anywhere in the lower-cased name. So
# norms and biases do not decay; embeddings, LoRA factors and prefixes do, as under PEFT. The two
# norms of a module for multi-token prediction, which transformers does not have, are ours.
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)[eh]?norm(?:$|\.)|_norm(?:$|\.)")


def make_schedule(section: OptimizerSection, total_steps: int) -> Schedule:
    """Build the learning rate of each step: Hugging Face's `get_scheduler`, jittable, in float32.

    Step s, counted from 0, gets `learning_rate * f(s)`; the warm-up is `s / warmup`, so its first
    step has learning rate 0. `warmup_steps`, when given, wins over `ceil(warmup_ratio * total)`.
    `min_lr_ratio` m lifts the decay f to `m + (1 - m) f` after the warm-up. That is Hugging Face's
    `cosine_with_min_lr`; we do the same for `cosine`, `linear` and `cosine_with_restarts`, where
    Hugging Face has no minimum, and it leaves the constant ones at 1.

    Returns:
        A function of the 0-based step that gives the learning rate as a float32 scalar.
    """
    decay = DECAYS[section.lr_scheduler_type]
    warmup = warmup_length(section, total_steps)
    floor = section.min_lr_ratio

    def schedule(step: ArrayLike) -> Float[Array, ""]:
        now = jnp.asarray(step, jnp.int32)
        decayed = floor + (1.0 - floor) * decay(now, warmup, total_steps, section.num_cycles)
        rising = now.astype(jnp.float32) / max(1, warmup)
        return jnp.float32(section.learning_rate) * jnp.where(now < warmup, rising, decayed)

    return schedule


def unused_keys(section: OptimizerSection) -> list[str]:
    """Keys that the user gave and that this schedule or update rule does not have."""
    kind = section.lr_scheduler_type
    unused = {
        "num_cycles": kind != "cosine_with_restarts",
        "min_lr_ratio": kind.startswith("constant"),
        "warmup_ratio": section.warmup_steps is not None and kind != "constant",
        "adam_epsilon": section.optim == "lion",
    }
    given = section.model_fields_set
    return [f"optimizer.{key}" for key, idle in unused.items() if idle and key in given]


def warmup_length(section: OptimizerSection, total_steps: int) -> int:
    """Give the number of warm-up steps; a ratio leaves at least the last step to the peak."""
    if section.lr_scheduler_type == "constant":
        return 0
    if section.warmup_steps is not None:
        return section.warmup_steps
    return min(math.ceil(section.warmup_ratio * total_steps), total_steps - 1)


def check_rates(section: OptimizerSection, total_steps: int, moves_biases: bool = False) -> None:
    """Refuse a run that cannot change a weight, or never gets beyond its warm-up.

    Args:
        section: the run's.
        total_steps: the run's.
        moves_biases: whether routers' biases move, which needs no learning rate.

    Raises:
        ConfigError: names the key.
    """
    if not np.float32(section.learning_rate) and not moves_biases:
        raise ConfigError(
            f"optimizer.learning_rate: got {section.learning_rate}, expected more than 0; no step "
            "would change a weight"
        )
    if warmup_length(section, total_steps) >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps: got {section.warmup_steps} in a run of {total_steps} steps, "
            "expected fewer than the steps: the learning rate, 0 in the first, would never reach "
            f"its peak; lower it, or take more steps ({MORE_STEPS})"
        )


def few_steps(total_steps: int, rows: int, batch_size: int, sequences: int) -> list[str]:
    """Say of a short run that it is one, and what makes it longer.

    Args:
        total_steps: what the data came to.
        rows: of an epoch, packed.
        batch_size: rows of a step.
        sequences: that the rows hold.
    """
    if total_steps >= FEW_STEPS:
        return []
    apart = f", or data.packing=false ({sequences:,} rows)" if sequences > rows else ""
    return [
        f"only {total_steps} step{'s' * (total_steps > 1)}: {rows:,} rows, {batch_size} in each "
        f"step; for more, {MORE_STEPS}{apart}"
    ]


def _constant(step: Array, warmup: int, total: int, cycles: int) -> Array:
    return jnp.ones((), jnp.float32)


def _linear(step: Array, warmup: int, total: int, cycles: int) -> Array:
    return jnp.maximum(0, total - step).astype(jnp.float32) / max(1, total - warmup)


def _cosine(step: Array, warmup: int, total: int, cycles: int) -> Array:
    span = max(1, total - warmup)
    return _half_cosine(span - (step - warmup), span)


def _cosine_with_restarts(step: Array, warmup: int, total: int, cycles: int) -> Array:
    # Whole numbers keep the restarts exact. Hugging Face's doubles can land a hair below a restart
    # and give it learning rate 0 instead of the full one; that needs 22 cycles or more.
    span = max(1, total - warmup)
    into_cycle = (step - warmup) * cycles % span
    return jnp.where(step - warmup >= span, 0.0, _half_cosine(span - into_cycle, span))


def _half_cosine(remaining: Array, span: int) -> Array:
    # sin^2(pi/2 * r) is 0.5 * (1 + cos(pi * (1 - r))) without its cancellation near the end, where
    # float32 would keep no digit at all.
    return jnp.sin(0.5 * math.pi * (remaining.astype(jnp.float32) / span)) ** 2


DECAYS = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
}


def decay_mask(paths: Mapping[str, Any]) -> dict[str, bool]:
    """Say for each parameter path whether weight decay applies: not to norms and biases."""
    return {path: NO_DECAY.search(path.lower()) is None for path in paths}


def make_optimizer(
    section: OptimizerSection,
    schedule: Schedule,
    decay_mask: Mapping[str, bool],
    lr_factors: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """Build the optimizer over a flat dict of parameters. It does not clip.

    `adamw` is torch.optim.AdamW; `lion` is Lion (https://arxiv.org/abs/2302.06675), which takes
    its betas from `adam_beta1` and `adam_beta2` as Hugging Face does (the paper uses 0.9 and 0.99).
    Both decay the parameter directly, by learning rate times `weight_decay`, where `decay_mask` is
    True. Every moment is a dict with the keys and shapes of the parameters: shard it like them.
    What has a factor in `lr_factors` learns, and decays, at so many times the schedule's rate.
    """

    def scaled(updates: Any, params: Any) -> Any:
        return {path: update * lr_factors.get(path, 1.0) for path, update in updates.items()}

    return optax.chain(
        DIRECTIONS[section.optim](section),
        optax.add_decayed_weights(section.weight_decay, mask=dict(decay_mask)),
        optax.scale_by_learning_rate(schedule),
        *([optax.stateless(scaled)] if lr_factors else []),
    )


def _adamw(section: OptimizerSection) -> optax.GradientTransformation:
    return optax.scale_by_adam(section.adam_beta1, section.adam_beta2, section.adam_epsilon)


def _lion(section: OptimizerSection) -> optax.GradientTransformation:
    return optax.scale_by_lion(section.adam_beta1, section.adam_beta2)


DIRECTIONS = {"adamw": _adamw, "lion": _lion}


def clip_by_global_norm(
    grads: PyTree[Float[Array, "..."]], norm: Float[Array, ""], max_norm: float | None
) -> PyTree[Float[Array, "..."]]:
    """Scale the gradients, whose global norm is `norm`, as torch.nn.utils.clip_grad_norm_ does.

    The factor is `min(1, max_norm / (norm + 1e-6))`. `max_norm` None or 0 means no clipping.
    """
    if not max_norm:
        return grads
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)
