# SPDX-License-Identifier: Apache-2.0
"""Token ids in every form that callers have, and what is none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsjax.errors import ConfigError
from dsjax.models.token_ids import token_ids

IDS = [[3, 1, 4], [1, 5, 9]]


@pytest.mark.parametrize("form", [list, np.array, np.int64, np.uint8, jnp.array, torch.tensor])
def test_every_form_is_the_same_batch(form: Callable[[Any], Any]):
    given = np.array(IDS, form) if isinstance(form, type) and form is not list else form(IDS)
    ids_BT = token_ids(given, 10)
    assert isinstance(ids_BT, jax.Array) and ids_BT.dtype == jnp.int32
    np.testing.assert_array_equal(ids_BT, IDS)


def test_what_is_divided_over_devices_stays_so():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.NamedSharding(mesh, jax.P("data"))
    given = jax.device_put(jnp.array(IDS, jnp.int32), rows)
    assert token_ids(given, 10).sharding == rows


def test_what_is_traced_is_taken_as_it_is():
    assert jax.eval_shape(lambda ids: token_ids(ids, 10), jnp.zeros((2, 3), jnp.int32)).shape == (
        2,
        3,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2], [3]], "got rows of several lengths, expected one length; give model.generate"),
        ([1, 2, 3], r"got shape \[3\], expected \[rows, tokens\]"),
        ([[]], r"got shape \[1, 0\], expected"),
        ([[0.5, 1.0]], "got float64, expected integers"),
        ([[True]], "got bool, expected integers"),
        ([["a"]], "expected integers"),
        ([[3, 10]], "got token 10, expected ids from 0 to 9; the tokenizer belongs to another"),
        (np.array([[-1]]), "got token -1, expected ids from 0 to 9"),
        (jnp.array([[10]]), "got token 10, expected ids"),
    ],
)
def test_what_is_no_batch_is_refused(given: Any, message: str):
    with pytest.raises(ConfigError, match=f"^input_ids: .*{message}"):
        token_ids(given, 10)
