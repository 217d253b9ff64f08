# SPDX-License-Identifier: Apache-2.0
"""NF4: codes and values are bitsandbytes', bit for bit, however a matrix is read and cut."""

from types import SimpleNamespace

import bitsandbytes.functional as bitsandbytes
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.distributed import arrays
from dsjax.models.quantization import nf4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def matrix(seed: int, shape: tuple[int, int], tails: float) -> torch.Tensor:
    """Numbers of a t-distribution, with a row and a block of zeros."""
    values = np.random.default_rng(seed).standard_t(tails, shape).astype(np.float32)
    values[shape[0] // 2] = 0
    values[0, :64] = 0
    return torch.tensor(values) * 0.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tails", [2.0, 100.0])
def test_codes_and_values_are_those_of_bitsandbytes(seed: int, dtype: str, tails: float) -> None:
    given = matrix(seed, (96, 256), tails).to(DTYPES[dtype])
    packed, state = bitsandbytes.quantize_4bit(
        given, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    theirs = packed.numpy().reshape(96, 128)
    codes, absmax = nf4.quantise(given.float().numpy())

    np.testing.assert_array_equal(codes[:, 0::2] << 4 | codes[:, 1::2], theirs)
    np.testing.assert_array_equal(absmax.reshape(-1), state.absmax.numpy())
    expected = bitsandbytes.dequantize_4bit(packed, state).float().numpy()
    stored = {"": jnp.asarray(nf4.pack(codes)), nf4.ABSMAX: jnp.asarray(absmax)}
    values = nf4.decode(stored, jnp.dtype(dtype)).astype(jnp.float32)
    np.testing.assert_array_equal(values, expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9).map(lambda n: 2 * n),
    blocks=st.integers(1, 5),
    piece=st.integers(1, 4000),
    data=st.data(),
)
def test_a_part_is_cut_from_whole_blocks_however_it_is_read(
    rows: int, blocks: int, piece: int, data: st.DataObject
) -> None:
    values = matrix(rows, (rows, 64 * blocks), 3.0).numpy()
    source = SimpleNamespace(tensors={}, read=lambda name, index: values[index])
    codes, absmax = nf4.quantise(values)
    for array, whole in {"": nf4.pack(codes), nf4.ABSMAX: absmax}.items():
        index = tuple(
            slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2).filter(_differ))))
            for n in whole.shape
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(arrays, "PIECE_BYTES", piece)
            part = nf4.encode(source, "", array, index)
        np.testing.assert_array_equal(part, whole[index])


def _differ(ends: tuple[int, int]) -> bool:
    return ends[0] != ends[1]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 96), "an input size that 64 divides"), ((3, 64), "an even output size"), ((2, 64), "")],
)
def test_what_cannot_be_held_is_named(shape: tuple[int, int], expected: str) -> None:
    assert nf4.problem(shape) == expected
