# SPDX-License-Identifier: Apache-2.0
"""The grouped matrix product equals a product for each group, on every platform's path."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsjax.models.ops import grouped_matmul as grouped
from dsjax.models.ops import grouped_matmul_cuda
from dsjax.models.ops.grouped_matmul import LOOP_ROWS, _ragged, grouped_matmul, tiles_of

ROWS, GROUPS = 96, 4
ENDS = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted)
"""Where each group ends; rows after the last belong to none."""


def _arrays(ends: list[int], inputs: int, outputs: int) -> tuple:
    """Rows, matrices, sizes and gradients of the products."""
    rng = np.random.default_rng(0)
    shapes = (ROWS, inputs), (GROUPS, outputs, inputs), (ROWS, outputs)
    x_ZI, weight_EOI, y_ZO = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return x_ZI, weight_EOI, jnp.asarray(np.diff(ends, prepend=0), jnp.int32), y_ZO


def _narrow(arrays: tuple, rows: str) -> tuple:
    """Rows and gradients in a dtype; matrices of float32 whose values that dtype holds too."""
    x_ZI, weight_EOI, sizes_E, y_ZO = arrays
    weight_EOI = weight_EOI.astype(rows).astype(jnp.float32)
    return x_ZI.astype(rows), weight_EOI, sizes_E, y_ZO.astype(rows)


def _group_by_group(
    x_ZI: np.ndarray, weight_EOI: np.ndarray, sizes_E: np.ndarray, y_ZO: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product, and the gradients of rows and matrices, in float64."""
    x_ZI, weight_EOI, y_ZO = (a.astype(np.float64) for a in (x_ZI, weight_EOI, y_ZO))
    out, dx, dw = np.zeros(y_ZO.shape), np.zeros(x_ZI.shape), np.zeros(weight_EOI.shape)
    for group, end in enumerate(np.cumsum(sizes_E)):
        rows = slice(end - sizes_E[group], end)
        out[rows] = x_ZI[rows] @ weight_EOI[group].T
        dx[rows] = y_ZO[rows] @ weight_EOI[group]
        dw[group] = y_ZO[rows].T @ x_ZI[rows]
    return out, dx, dw


@jax.jit
def _product_and_gradients(x_ZI: Any, weight_EOI: Any, sizes_E: Any, y_ZO: Any) -> tuple:
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x_ZI, weight_EOI)
    return out, *pull(y_ZO)


@settings(max_examples=50)
@given(ENDS)
def test_it_is_a_product_for_each_group_and_zero_beyond(ends: list[int]) -> None:
    arrays = _arrays(ends, 12, 7)
    expected = _group_by_group(*(np.asarray(a) for a in arrays))
    for got, want in zip(_product_and_gradients(*arrays), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@settings(max_examples=50)
@given(ENDS, st.sampled_from([1, 7, LOOP_ROWS]))
def test_tiles_cover_every_row_of_a_group_once(ends: list[int], most: int) -> None:
    sizes = np.diff(ends, prepend=0)
    tiles = tiles_of(jnp.asarray(sizes, jnp.int32), ROWS, most)
    groups = np.repeat(np.arange(GROUPS), sizes)
    covered = []
    columns = (np.asarray(column) for column in tiles[:3])
    for group, begin, end in zip(*columns, strict=True):
        assert 0 <= end - begin <= most
        assert (groups[begin:end] == group).all()
        covered += range(begin, end)
    assert covered == list(range(ends[-1]))
    assert tiles.count == (-(-sizes // most)).sum()


@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs, outputs", [(40, 24), (130, 8), (8, 200)])
def test_the_kernels_for_cuda_compute_the_same(inputs: int, outputs: int, rows: str) -> None:
    """Without a GPU: their programs are interpreted. Sizes are none of the blocks' multiples."""
    arrays = _narrow(_arrays([3, 3, 80, 81], inputs, outputs), rows)
    x_ZI, weight_EOI, sizes_E, y_ZO = arrays
    tiles = tiles_of(sizes_E, x_ZI.shape[0], grouped_matmul_cuda.TILE_ROWS)[:3]
    multiply = partial(grouped_matmul_cuda.multiply, dtype=jnp.float32, interpret=True)
    out = multiply(x_ZI, weight_EOI, *tiles, transposed=True)
    dx = multiply(y_ZO, weight_EOI, *tiles, transposed=False)
    dw = grouped_matmul_cuda.weight_gradient(x_ZI, y_ZO, sizes_E, dtype=jnp.float32, interpret=True)

    expected = _group_by_group(*(np.asarray(a) for a in arrays))
    used = int(sizes_E.sum())
    np.testing.assert_allclose(out[:used], expected[0][:used], atol=1e-4)
    np.testing.assert_allclose(dx[:used], expected[1][:used], atol=1e-4)
    np.testing.assert_allclose(dw, expected[2], atol=1e-4)


@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
def test_xlas_grouped_product_for_tpus_computes_the_same(rows: str) -> None:
    """On a CPU, where XLA knows it too."""
    arrays = _narrow(_arrays([3, 3, 80, 96], 40, 24), rows)
    x_ZI, weight_EOI, sizes_E, y_ZO = arrays
    weight = weight_EOI.astype(x_ZI.dtype)
    found = (
        _ragged(x_ZI, weight, sizes_E, ((1,), (2,)), [0], jnp.float32),
        _ragged(y_ZO, weight, sizes_E, ((1,), (1,)), [0], jnp.float32),
        _ragged(y_ZO, x_ZI, sizes_E, ((0,), (0,)), [], jnp.float32),
    )
    expected = _group_by_group(*(np.asarray(a) for a in arrays))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_gradients_of_float32_matrices_under_bfloat16_rows_are_float32() -> None:
    arrays = _narrow(_arrays([3, 3, 80, 96], 40, 24), "bfloat16")
    out, dx_ZI, dw_EOI = _product_and_gradients(*arrays)
    assert [a.dtype.name for a in (out, dx_ZI, dw_EOI)] == ["bfloat16", "bfloat16", "float32"]
    expected = _group_by_group(*(np.asarray(a) for a in arrays))
    np.testing.assert_allclose(dw_EOI, expected[2], atol=1e-4)
    for got, want in zip((out, dx_ZI), expected[:2], strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7, atol=1e-4)


def test_the_kernels_for_tpu_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a TPU: jax's megablox is interpreted. No size is a multiple of its tiles."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *x, tpu, **others: tpu(*x))
    monkeypatch.setattr(grouped, "gmm", partial(gmm, interpret=True))
    monkeypatch.setattr(grouped, "tgmm", partial(tgmm, interpret=True))
    monkeypatch.setattr(grouped, "MEGABLOX_TILE", (32, 128, 128))
    arrays = _narrow(_arrays([3, 3, 80, 81], 140, 24), "bfloat16")
    expected = _group_by_group(*(np.asarray(a) for a in arrays))
    x_ZI, weight_EOI, sizes_E, y_ZO = arrays

    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x_ZI, weight_EOI)
    dx_ZI, dw_EOI = pull(y_ZO)

    assert [a.dtype.name for a in (out, dx_ZI, dw_EOI)] == ["bfloat16", "bfloat16", "float32"]
    np.testing.assert_allclose(dw_EOI, expected[2], atol=1e-4)
    for got, want in zip((out, dx_ZI), expected[:2], strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-7, atol=1e-4)


def test_bfloat16_is_summed_in_float32_on_the_way() -> None:
    x_ZI, weight_EOI, sizes_E, _ = _arrays([30, 64, 64, 96], 256, 5)
    x_ZI, weight_EOI = x_ZI.astype(jnp.bfloat16), weight_EOI.astype(jnp.bfloat16)
    wide = [np.asarray(a, np.float64) for a in (x_ZI, weight_EOI)]
    expected, _, _ = _group_by_group(*wide, np.asarray(sizes_E), np.zeros((ROWS, 5)))
    out = grouped_matmul(x_ZI, weight_EOI, sizes_E)
    assert out.dtype == jnp.bfloat16
    # Half a unit of bfloat16: rounded once, at the end.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)


KINDS = {"cuda": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5p"}


@pytest.mark.parametrize(
    "platform, rows, called",
    [
        ("cuda", "float32", "triton"),
        ("tpu", "float32", "ragged_dot"),
        ("tpu", "bfloat16", "tpu_custom_call"),
    ],
)
def test_every_platform_gets_its_own_grouped_product(platform: str, rows: str, called: str) -> None:
    """Forward and both gradients are the platform's, and not the loop over tiles."""
    x_ZI, weight_EOI, sizes_E, _ = _narrow(_arrays([50, 71, 71, 96], 24, 20), rows)

    def loss(x_ZI: jax.Array, weight_EOI: jax.Array) -> jax.Array:
        return jnp.sum(grouped_matmul(x_ZI, weight_EOI, sizes_E) ** 2)

    device = AbstractDevice(KINDS[platform], None, platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x_ZI, weight_EOI)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(called) >= 3
    assert "stablehlo.dot_general" not in text  # the loop's; megablox has a loop to find its tiles
