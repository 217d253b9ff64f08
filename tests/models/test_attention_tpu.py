# SPDX-License-Identifier: Apache-2.0
"""The attention kernel for TPU computes what `attend` computes; its program is interpreted.

That the TPU compiler takes it is tests/test_tpu_compile.py's.
"""

from typing import Any, NamedTuple

import in_memory
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from dsjax.models import attention_tpu
from dsjax.models.attention import Tokens, attend
from dsjax.models.attention_tpu import attend_tpu


class Shape(NamedTuple):
    """Rows, tokens, heads, kv heads, head size, value head size."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    value_size: int


SHAPES = {
    "latent": Shape(1, 40, 2, 2, 192, 128),
    "grouped": Shape(2, 150, 4, 2, 16, 16),
    "one kv head": Shape(1, 9, 3, 1, 8, 12),
    "whole blocks": Shape(1, 128, 2, 1, 16, 8),
}


def _arrays(shape: Shape, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Queries, keys, values and gradients of the result."""
    rng = np.random.default_rng(0)
    rows, tokens, heads, kv_heads, size, value_size = shape
    kinds = (heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size)
    return tuple(jnp.asarray(rng.normal(size=(rows, tokens, *k)), dtype) for k in kinds)


def _packed(shape: Shape) -> jax.Array:
    """Three segments, then two tokens of padding; in a second row one segment alone."""
    segment = np.arange(shape.tokens) * 3 // (shape.tokens - 2) + 1
    rows = np.stack([np.where(segment > 3, 0, segment)] * shape.rows)
    rows[1:] = 1
    return jnp.asarray(rows, jnp.int32)


def _both(function: Any, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The result and the gradients of queries, keys and values."""

    def run(q: Any, k: Any, v: Any, dout: Any) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout.astype(out.dtype))

    return jax.jit(run, compiler_options=in_memory.QUICK_COMPILE)(*arrays)


def _ours(arrays: tuple[jax.Array, ...], segment_BT: jax.Array) -> tuple[jax.Array, ...]:
    scale = arrays[0].shape[-1] ** -0.5
    return _both(lambda q, k, v: attend_tpu(q, k, v, segment_BT, scale, interpret=True), arrays)


def _expected(arrays: tuple[jax.Array, ...], segment_BT: jax.Array) -> tuple[jax.Array, ...]:
    scale = arrays[0].shape[-1] ** -0.5
    place_BT = jnp.broadcast_to(jnp.arange(segment_BT.shape[1]), segment_BT.shape)
    tokens = Tokens(place_BT, segment_BT)
    return _both(lambda q, k, v: attend(q, k, v, tokens, tokens, None, scale), arrays)


def _check(arrays: tuple[jax.Array, ...], segment_BT: jax.Array) -> None:
    ours, expected = _ours(arrays, segment_BT), _expected(arrays, segment_BT)
    for got, want, bound in zip(ours, expected, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", SHAPES)
def test_packed_rows_are_attended_to_as_by_attend(name: str) -> None:
    _check(_arrays(SHAPES[name]), _packed(SHAPES[name]))


def test_rows_longer_than_a_block_are_filled_up_to_whole_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    shape = Shape(1, 290, 2, 1, 8, 8)  # three blocks, the last of which has 34 tokens
    _check(_arrays(shape), _packed(shape))


def test_narrow_numbers_cost_no_more_than_their_rounding() -> None:
    shape = SHAPES["grouped"]
    arrays, segment_BT = _arrays(shape, jnp.bfloat16), _packed(shape)
    ours = _ours(arrays, segment_BT)
    expected = _expected(tuple(x.astype(jnp.float32) for x in arrays), segment_BT)
    # Scaled queries, weights, scores' gradients and the result are rounded, each by half a unit of
    # the last place (eps / 2) or less. The errors are independent: their norm stays below eps.
    bound = float(jnp.finfo(jnp.bfloat16).eps)
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        assert in_memory.distance(np.asarray(got, np.float32), np.asarray(want)) < bound


def test_a_remat_policy_that_keeps_the_name_runs_the_kernel_once() -> None:
    shape = SHAPES["one kv head"]
    qkv, segment_BT = _arrays(shape)[:3], _packed(shape)

    def loss(*qkv: jax.Array) -> jax.Array:
        return attend_tpu(*qkv, segment_BT, 0.3, "kept", interpret=True).sum()

    def kernels(policy: Any) -> int:
        gradients = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        whole = jax.make_jaxpr(gradients)(*qkv).jaxpr
        live, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
        return str(live).count("pallas_call[")

    # Once forward and twice backward.
    assert kernels(jax.checkpoint_policies.save_only_these_names("kept")) == 3
    assert kernels(jax.checkpoint_policies.nothing_saveable) == 4
