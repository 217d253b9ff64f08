# SPDX-License-Identifier: Apache-2.0
"""Where LoRA's factors begin (`init_lora_weights`), and what of them counts.

In: a LoRA in its slot, and the weight it is beside. Out: first values. `true` and `gaussian` draw
A, and B is zero. PiSSA (arXiv 2404.02948) begins with the weight's largest singular values, OLoRA
(arXiv 2406.01775) with the first columns and rows of its QR decomposition; both then take their
product out of the base. Here the base stays as it is: the first values A0 and B0 are kept, and what
counts is scaling * (B A - B0 A0), a LoRA of twice the rank. Not done here: the update
(`linear_lora`, `expert_lora`), files (`lora_plain`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dsjax.distributed.sharding import Leaf
from dsjax.models.parameters import AdapterParam

INITIAL_A, INITIAL_B = "initial_lora_A", "initial_lora_B"
"""Names of the kept first values."""


def is_of_weight(start: bool | str) -> bool:
    """Whether the factors begin as a part of the weight."""
    return isinstance(start, str) and start != "gaussian"


def problems(start: bool | str, path: str, linear: Any, rank: int) -> list[str]:
    """Refuse more rank than a weight has."""
    most = min(linear.in_features, linear.out_features)
    if not is_of_weight(start) or rank <= most:
        return []
    return [
        f"adapter.r: got {rank} with adapter.init_lora_weights={start}, expected at most {most}, "
        f"the rank of {path.rpartition('.')[2]}; lower it, or give that module less in rank_pattern"
    ]


def declared(lora: Any) -> tuple[AdapterParam | None, AdapterParam | None]:
    """Declare the kept first values of a LoRA's factors; None where nothing is kept."""
    if not is_of_weight(lora.start):
        return None, None
    factors = lora.lora_A, lora.lora_B
    low, high = (
        AdapterParam(factor.get_value(), **_declaration(factor), trains=False) for factor in factors
    )
    return low, high


def _declaration(factor: AdapterParam) -> dict[str, Any]:
    metadata = factor.get_metadata()
    return {"axes": metadata["axes"], "count": metadata["count"]}


def since_start(lora: Any) -> tuple[Float[Array, "*E r I"], Float[Array, "*E O r"]]:
    """Return what counts of A and B; of twice the rank, where first values are kept."""
    a, b = lora.lora_A[...], lora.lora_B[...]
    if lora.initial_lora_A is None:
        return a, b
    a0, b0 = lora.initial_lora_A[...], lora.initial_lora_B[...]
    return change_of_a(a, a0), change_of_b(b, b0)


def change_of_a(a: Float[Array, "*L r I"], a0: Float[Array, "*L r I"]) -> Float[Array, "*L R I"]:
    """Return the first factor of B A - B0 A0 = (B - B0) A + B0 (A - A0): nothing cancels there."""
    return jnp.concatenate([a, a - a0], axis=-2)


def change_of_b(b: Float[Array, "*L O r"], b0: Float[Array, "*L O r"]) -> Float[Array, "*L O R"]:
    """Return the second factor; see `change_of_a`."""
    return jnp.concatenate([b - b0, b0], axis=-1)


def drawn(lora: Any, leaf: Leaf, key: jax.Array) -> jax.Array:
    """Draw A as PEFT does: uniform in +-1/sqrt(in) (kaiming, a = sqrt 5), or normal of 1/r.

    Rows beyond a layer's own rank are zero.
    """
    ranks = np.asarray(lora.ranks)[:, None]
    rows = np.arange(leaf.shape[-2]) < ranks
    if lora.start == "gaussian":
        values = jax.random.normal(key, leaf.shape, leaf.dtype)
        rows = rows / np.maximum(ranks, 1)
    else:
        bound = 1 / math.sqrt(leaf.shape[-1])
        values = jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
    return values * jnp.asarray(rows.reshape(*leaf.shape[:-1], 1), leaf.dtype)


def of_weight(
    lora: Any, weight: Float[Array, "*L O I"], key: jax.Array
) -> dict[str, Float[Array, "..."]]:
    """Compute both factors of all layers, one after the other, and what is kept of them.

    Args:
        lora: the LoRA in its slot.
        weight: of all layers (and experts).
        key: of what is random.
    """
    lead, matrix = weight.shape[:-2], weight.shape[-2:]
    rank = max(lora.ranks)
    scalings = jnp.float32(dict(lora.scaling.get_metadata())["values"])
    keys = jax.random.split(key, scalings.size)

    def one(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        weight_OI, own, scaling, key = layer
        wide = weight_OI.astype(jnp.float32)

        def parts() -> tuple[jax.Array, jax.Array]:
            b_Or, a_rI = _parts(lora.start, wide, rank, scaling, key)
            mine = jnp.arange(rank) < own
            return jnp.where(mine[:, None], a_rI, 0), jnp.where(mine, b_Or, 0)

        none = jnp.zeros((rank, wide.shape[1])), jnp.zeros((wide.shape[0], rank))
        return lax.cond(own > 0, parts, lambda: none)

    ranks = jnp.int32(lora.ranks)
    a, b = lax.map(one, (weight.reshape(-1, *matrix), ranks, scalings, keys))
    a, b = a.reshape(*lead, *a.shape[1:]), b.reshape(*lead, *b.shape[1:])
    return {"lora_A": a, "lora_B": b, INITIAL_A: a, INITIAL_B: b}


def _parts(
    start: str, weight_OI: jax.Array, rank: int, scaling: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the first B [O, r] and A [r, I] of one weight, as PEFT makes them."""
    if start == "olora":
        q_OK, r_KI = jnp.linalg.qr(weight_OI)
        return q_OK[:, :rank], r_KI[:rank]
    if start == "pissa":
        u_OK, s_K, v_KI = jnp.linalg.svd(weight_OI, full_matrices=False)
    else:
        u_OK, s_K, v_KI = _low_rank_svd(weight_OI, rank, int(start.rpartition("_")[2]), key)
    root_r = jnp.sqrt(s_K[:rank] / scaling)
    return u_OK[:, :rank] * root_r, root_r[:, None] * v_KI[:rank]


def _low_rank_svd(
    weight_OI: jax.Array, rank: int, niter: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximate the largest singular values (arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    drawn_Ir = jax.random.normal(key, (weight_OI.shape[1], rank), jnp.float32)
    q_Or, _ = jnp.linalg.qr(_exact(weight_OI, drawn_Ir))
    for _ in range(niter):
        q_Ir, _ = jnp.linalg.qr(_exact(weight_OI.T, q_Or))
        q_Or, _ = jnp.linalg.qr(_exact(weight_OI, q_Ir))
    u_rr, s_r, v_rI = jnp.linalg.svd(_exact(q_Or.T, weight_OI), full_matrices=False)
    return _exact(q_Or, u_rr), s_r, v_rI


def _exact(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")
