# SPDX-License-Identifier: Apache-2.0
"""Continue rows of tokens, with a cache of keys and values.

In: a model with its arrays, prompts as token ids. Out: the tokens that follow each. Prompts are
padded on the right to a common length, a power of two, so that few lengths are ever compiled; what
is padding is known by segment, so a row's tokens do not depend on the rows beside it. Not done
here: text (`detokenizer`), the choice of a token (`sampling`).
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsjax.decoding.sampling import Sampling, row_keys, sample, sampling_problems
from dsjax.errors import raise_all
from dsjax.models import Model
from dsjax.models.rope import positions_like

SHORTEST_PROMPT = 16
"""Prompts are padded to at least this, and else to a power of two."""

CACHE_STEP = 128
"""Room for new tokens is a multiple of this."""

OnToken = Callable[[int, int], bool | None]
"""Told (row, token) for every new token, in order; True ends that row."""


class DecodeState(NamedTuple):
    """What a decode step goes on from: each row's newest token, its position, its key."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    key: jax.Array


def generate(
    model: Model,
    input_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue every prompt until a stop token or the limit.

    Args:
        model: from `load_pretrained`.
        input_ids: prompts; each at least one token.
        max_new_tokens: limit for each row.
        stop_ids: tokens that end a row.
        temperature: 0 takes the likeliest token each time.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        seed: of the draws; row i draws the same tokens whatever the other rows are.
        on_token: told every new token as it comes.

    Returns:
        The new tokens of each row; a stop token that came is the last of them.

    Raises:
        ConfigError: a prompt or a number is wrong.
    """
    sampling = Sampling(temperature, top_k, top_p)
    raise_all(request_problems(max_new_tokens, sampling, seed))
    raise_all(prompt_problems(input_ids, model.config.vocab_size))
    rows: list[list[int]] = [[] for _ in input_ids]
    if not rows:
        return rows
    graphdef, state = nnx.split(model)
    room = -(-max_new_tokens // CACHE_STEP) * CACHE_STEP
    ahead, cache = _prefill(
        graphdef, state, *padded(input_ids), row_keys(seed, len(rows)), sampling=sampling, room=room
    )
    live = set(range(len(rows)))
    for done in range(1, max_new_tokens + 1):
        current = ahead
        if done < max_new_tokens:  # before its tokens are looked at: the device need not wait
            ahead, cache = _decode(graphdef, state, cache, current, sampling=sampling)
        tokens = np.asarray(current.token).tolist()
        for row in sorted(live):
            rows[row].append(tokens[row])
            ends = on_token(row, tokens[row]) if on_token else False
            if ends or tokens[row] in stop_ids:
                live.remove(row)
        if not live:
            break
    return rows


def request_problems(max_new_tokens: int, sampling: Sampling, seed: int) -> list[str]:
    """Return a line for every number of a request that is wrong."""
    problems = sampling_problems(sampling, seed)
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: got {max_new_tokens}, expected an integer >= 1")
    return problems


def prompt_problems(input_ids: Sequence[Sequence[int]], vocab_size: int) -> list[str]:
    """Return a line for every prompt that the model cannot read."""
    problems = []
    for index, ids in enumerate(input_ids):
        # An id beyond the embedding would not fail on the device: JAX clamps it to the last row.
        wrong = [token for token in ids if not 0 <= token < vocab_size]
        if not ids:
            problems.append(f"prompt {index + 1}: got no token, expected at least one")
        if wrong:
            problems.append(
                f"prompt {index + 1}: got token {wrong[0]}, expected ids from 0 to "
                f"{vocab_size - 1}; the tokenizer belongs to another model"
            )
    return problems


def length_warnings(
    input_ids: Sequence[Sequence[int]], max_new_tokens: int, limit: int
) -> list[str]:
    """Return a line for every prompt whose answer may pass the model's longest position."""
    return [
        f"prompt {index}: {len(ids)} tokens and up to {max_new_tokens} new ones pass the model's "
        f"max_position_embeddings ({limit}); what comes after that may be poor"
        for index, ids in enumerate(input_ids, 1)
        if len(ids) + max_new_tokens > limit
    ]


def padded(
    input_ids: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts padded on the right to one length, and the length of each."""
    lengths_B = np.array([len(ids) for ids in input_ids], np.int32)
    longest = max(SHORTEST_PROMPT, int(lengths_B.max()))
    ids_BT = np.zeros((len(lengths_B), 1 << (longest - 1).bit_length()), np.int32)
    for row, ids in zip(ids_BT, input_ids, strict=True):
        row[: len(ids)] = ids
    return ids_BT, lengths_B


@partial(jax.jit, static_argnames=("graphdef", "sampling", "room"))
def _prefill(graphdef, state, ids_BT, lengths_B, keys_B, *, sampling, room):
    """Read the prompts into a cache with room for more; choose the first token of every row."""
    model = nnx.merge(graphdef, state)
    batch, length = ids_BT.shape
    positions_BT = positions_like(ids_BT)
    segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    cache = model.init_cache(batch, length + room)
    hidden = model.hidden(ids_BT, positions_BT, segments_BT, cache=cache)
    last_BD = hidden.states[jnp.arange(batch), lengths_B - 1]
    return _choose(model, last_BD, lengths_B, keys_B, sampling), hidden.cache


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames=("cache",))
def _decode(graphdef, state, cache, newest, *, sampling):
    """Read the newest token of every row; choose the one after it."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden(newest.token[:, None], newest.position[:, None], cache=cache)
    chosen = _choose(model, hidden.states[:, 0], newest.position + 1, newest.key, sampling)
    return chosen, hidden.cache


def _choose(model, hidden_BD, position_B, keys_B, sampling) -> DecodeState:
    """Return the token that stands at `position_B`, given the hidden state before it."""
    draws_B = jax.vmap(jax.random.fold_in)(keys_B, position_B)
    return DecodeState(sample(model.head(hidden_BD), draws_B, sampling), position_B, keys_B)
