# SPDX-License-Identifier: Apache-2.0
"""The attention kernel for TPU computes what the plain path does; its program is interpreted.

That the TPU compiler takes it is tests/test_tpu_compile.py's.
"""

import itertools
from typing import Any

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_steps
from attention_cases import Shape, arrays_of, check, with_gradients
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import CausalMask
from jax.interpreters import partial_eval

from dsjax.models.ops import attention_tpu
from dsjax.models.ops.attention_tpu import attend_part_tpu, attend_tpu

SHAPES = {
    "latent": Shape(1, 40, 2, 2, 192, 128),
    "grouped": Shape(2, 150, 4, 2, 16, 16),
    "one kv head": Shape(1, 9, 3, 1, 8, 12),
    "whole blocks": Shape(1, 128, 2, 1, 16, 8),
}


def _packed(shape: Shape) -> jax.Array:
    """Three segments, then two tokens of padding; in a second row one segment alone."""
    segment = np.arange(shape.tokens) * 3 // (shape.tokens - 2) + 1
    rows = np.stack([np.where(segment > 3, 0, segment)] * shape.rows)
    rows[1:] = 1
    return jnp.asarray(rows, jnp.int32)


def _ours(arrays: tuple[jax.Array, ...], segment_BT: jax.Array) -> tuple[jax.Array, ...]:
    scale = arrays[0].shape[-1] ** -0.5

    def run(q: Any, k: Any, v: Any, dout: Any) -> tuple[jax.Array, ...]:
        return with_gradients(
            lambda q, k, v: attend_tpu(q, k, v, segment_BT, scale, interpret=True), q, k, v, dout
        )

    return jax.jit(run)(*arrays)


@pytest.mark.parametrize("name", SHAPES)
def test_packed_rows_are_attended_to_as_by_attend(name: str) -> None:
    check(_ours, arrays_of(SHAPES[name]), _packed(SHAPES[name]))


def test_rows_longer_than_a_block_are_filled_up_to_whole_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_tpu, "BLOCK", 128)
    shape = Shape(1, 290, 2, 1, 8, 8)  # three blocks, the last of which has 34 tokens
    check(_ours, arrays_of(shape), _packed(shape))


@pytest.mark.parametrize(
    ("parts", "block"), [(2, 512), pytest.param(4, 128, marks=pytest.mark.slow), (2, 128)]
)
def test_parts_of_the_queries_are_attended_to_as_whole_rows(
    parts: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_tpu, "BLOCK", block)
    shape = Shape(2, 512, 2, 1, 8, 8)
    ours = attention_cases.by_part(attend_part_tpu, parts, shape.size**-0.5)
    check(ours, arrays_of(shape), _packed(shape))


def test_the_mask_of_a_long_row_is_that_of_jax_in_every_block() -> None:
    ours, theirs = (kind((64, 64)) for kind in (attention_tpu._CausalMask, CausalMask))
    for rows, columns in itertools.product(range(0, 64, 16), range(0, 64, 8)):
        block = slice(rows, rows + 16), slice(columns, columns + 8)
        np.testing.assert_array_equal(ours[block], theirs[block])


def test_narrow_numbers_cost_no_more_than_their_rounding() -> None:
    shape = SHAPES["grouped"]
    arrays, segment_BT = arrays_of(shape, jnp.bfloat16), _packed(shape)
    ours = _ours(arrays, segment_BT)
    expected = attention_cases.expected(tuple(x.astype(jnp.float32) for x in arrays), segment_BT)
    # Scaled queries, weights, scores' gradients and the result are rounded, each by half a unit of
    # the last place (eps / 2) or less. The errors are independent: their norm stays below eps.
    bound = float(jnp.finfo(jnp.bfloat16).eps)
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        assert tiny_steps.distance(np.asarray(got, np.float32), np.asarray(want)) < bound


def test_a_remat_policy_that_keeps_the_name_runs_the_kernel_once() -> None:
    shape = SHAPES["one kv head"]
    qkv, segment_BT = arrays_of(shape)[:3], _packed(shape)

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
