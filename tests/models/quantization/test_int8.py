# SPDX-License-Identifier: Apache-2.0
"""INT8: scale and codes are those of the formula in its docstring, however a matrix is cut."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.distributed import arrays
from dsjax.models.quantization import int8

VALUES = np.random.default_rng(0).standard_t(3, (12, 40)).astype(np.float32)
VALUES[5] = 0


def test_it_is_the_formula() -> None:
    codes, scales = int8.quantise(VALUES)
    largest = np.abs(VALUES).max(axis=1)
    rows = np.flatnonzero(largest)
    np.testing.assert_array_equal(scales[rows, 0], largest[rows] / np.float32(127.5))
    expected = np.clip(np.round(VALUES[rows] / scales[rows]), -128, 127)
    np.testing.assert_array_equal(codes[rows], expected)
    assert codes.dtype == np.int8 and not codes[5].any() and codes.max() == 127
    values = int8.decode(
        {"": jnp.asarray(codes), int8.SCALE: jnp.asarray(scales)}, jnp.dtype("float32")
    )
    np.testing.assert_array_equal(values, codes.astype(np.float32) * scales)


@pytest.mark.parametrize("piece", [1, 500, 10**6])
def test_a_part_has_the_scales_of_whole_rows(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece)
    tensors = {"w": SimpleNamespace(shape=VALUES.shape)}
    source = SimpleNamespace(tensors=tensors, read=lambda name, index: VALUES[index])
    codes, scales = int8.quantise(VALUES)
    part = int8.encode(source, "w", "", (slice(2, 9), slice(7, 30)))
    np.testing.assert_array_equal(part, codes[2:9, 7:30])
    part = int8.encode(source, "w", int8.SCALE, (slice(2, 9), slice(0, 1)))
    np.testing.assert_array_equal(part, scales[2:9])
