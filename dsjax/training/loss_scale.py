# SPDX-License-Identifier: Apache-2.0
"""float16's dynamic scale of the loss, by the rule of torch's GradScaler.

In: whether a step's gradients are finite. Out: the scale of the next step. Not done here: scaling,
and leaving out a step that overflowed (`step`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FIRST_LOSS_SCALE = 2.0**15
GROW_AFTER = 2000
"""Steps without overflow after which the loss scale doubles."""


class LossScale(NamedTuple):
    """Dynamic scale of the loss under float16; 1 and never changed under other dtypes."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skipped: Int[Array, ""]


def first_loss_scale(float16: bool) -> LossScale:
    """Start."""
    zero = jnp.int32(0)
    return LossScale(jnp.float32(FIRST_LOSS_SCALE if float16 else 1.0), zero, zero)


def next_loss_scale(before: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """Halve the scale after an overflow, double it after many steps without one."""
    scale, good, skipped = before
    good = jnp.where(finite, good + 1, 0)
    grown = jnp.where(good >= GROW_AFTER, scale * 2, scale)
    return LossScale(
        jnp.where(finite, grown, jnp.maximum(scale / 2, 1.0)),
        jnp.where(good >= GROW_AFTER, 0, good),
        skipped + jnp.where(finite, 0, 1),
    )
