# SPDX-License-Identifier: Apache-2.0
"""Token ids as callers have them: lists, numpy's or torch's arrays, or jax's.

In: any of them. Out: int32 [B, T], each id one of the model's. Not done here: text (`data`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from dsjax.errors import ConfigError


def token_ids(input_ids: Any, vocab_size: int) -> Int[Array, "B T"]:
    """Check a batch of token ids, and bring it to the device.

    Args:
        input_ids: [B, T], integers: nested lists, or an array of numpy, torch or jax. What is
            traced, or lies on other hosts too, is taken as it is: its numbers cannot be read here.
        vocab_size: how many tokens the model has.

    Raises:
        ConfigError: rows of several lengths, another number of axes, no integers, or an id that
            the model does not have, for which JAX would take the last one's embedding.
    """
    if isinstance(input_ids, Tracer):
        return input_ids
    if isinstance(input_ids, jax.Array) and not input_ids.is_fully_addressable:
        return input_ids
    try:
        ids_BT = np.asarray(input_ids)
    except ValueError as error:  # numpy makes no array of rows of several lengths
        raise ConfigError(
            "input_ids: got rows of several lengths, expected one length; give model.generate "
            "such rows, or pad them and say where by segment_ids"
        ) from error
    if ids_BT.ndim != 2 or 0 in ids_BT.shape:
        raise ConfigError(
            f"input_ids: got shape {list(ids_BT.shape)}, expected [rows, tokens], both above 0"
        )
    if not np.issubdtype(ids_BT.dtype, np.integer):
        raise ConfigError(f"input_ids: got {ids_BT.dtype}, expected integers")
    wrong = ids_BT[(ids_BT < 0) | (ids_BT >= vocab_size)]
    if wrong.size:
        raise ConfigError(
            f"input_ids: got token {wrong[0]}, expected ids from 0 to {vocab_size - 1}; the "
            "tokenizer belongs to another model"
        )
    # What lies on devices already stays there, however it is divided.
    return jnp.asarray(input_ids if isinstance(input_ids, jax.Array) else ids_BT, jnp.int32)
