# SPDX-License-Identifier: Apache-2.0
"""Which token comes next: greedy, or drawn after temperature, top-k and top-p.

In: float32 logits of every row, a key per row. Out: a token per row. The order and the definitions
are those of transformers' logits processors: temperature, then top-k, then top-p over what is left.
Not done here: the model, the loop over tokens.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sampling(NamedTuple):
    """How a token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens, and those that tie with the last of them.
        top_p: keep the fewest likeliest tokens whose probabilities add up to at least this.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def sampling_problems(sampling: Sampling, seed: int) -> list[str]:
    """Return a line for everything that is wrong with a request."""
    temperature, top_k, top_p = sampling
    problems = []
    if not (temperature >= 0 and math.isfinite(temperature)):
        problems.append(f"temperature: got {temperature}, expected a number >= 0; 0 is greedy")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k: got {top_k}, expected an integer >= 1")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p: got {top_p}, expected a number above 0 and at most 1")
    given = [name for name in ("top_k", "top_p") if getattr(sampling, name) is not None]
    if temperature == 0 and given:
        problems.append(
            f"temperature: got 0 (greedy) with {' and '.join(given)}, expected a number > 0; "
            "1 samples from the model's own distribution"
        )
    if not 0 <= seed < 2**32:
        problems.append(f"seed: got {seed}, expected an integer from 0 to {2**32 - 1}")
    return problems


def row_keys(seed: int, rows: int) -> jax.Array:
    """Make a random key for each row, which does not depend on how many others there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits to draw from, for a temperature above 0; what may not be drawn is -inf."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None:
        k = min(sampling.top_k, logits_BV.shape[-1])
        last_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < last_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = jnp.where(_in_nucleus(logits_BV, sampling.top_p), logits_BV, -jnp.inf)
    return logits_BV


def _in_nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Which tokens are needed for a mass of top_p: those with less than that before them."""
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
    sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    # The likeliest is always kept: nothing comes before it, whatever the rounding.
    kept_BV = (before_BV < top_p).at[:, 0].set(True)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros_like(kept_BV).at[rows_B1, order_BV].set(kept_BV)


def sample(
    logits_BV: Float[Array, "B V"], keys_B: jax.Array, sampling: Sampling
) -> Int[Array, " B"]:
    """Choose the next token of every row, each with a key of its own."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, sampling))
    return drawn_B.astype(jnp.int32)
