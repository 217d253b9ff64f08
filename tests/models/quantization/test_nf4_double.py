# SPDX-License-Identifier: Apache-2.0
"""NF4 with double quantization: bitsandbytes' numbers, bit for bit, however a matrix is cut."""

from types import SimpleNamespace

import bitsandbytes.functional as bitsandbytes
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsjax.models.quantization import nf4_double
from dsjax.models.quantization.nf4 import ABSMAX
from dsjax.models.quantization.nf4_double import OFFSET, SCALE, Encoder

SHAPES = [(2, 64), (10, 192), (96, 256), (70, 1408), (512, 512)]


@pytest.fixture(autouse=True)
def one_thread():
    """Torch sums in another order with more of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrix(seed: int, shape: tuple[int, int]) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32) * 0.02
    values[0, :64] = 0
    return values


def reader(values: np.ndarray) -> SimpleNamespace:
    tensors = {"w": SimpleNamespace(shape=values.shape)}
    return SimpleNamespace(tensors=tensors, read=lambda name, index: values[index])


def encoded(values: np.ndarray) -> dict[str, np.ndarray]:
    encoder = Encoder(reader(values))
    declared = nf4_double.arrays(values.shape, (None, None))
    return {
        array: encoder("w", array, tuple(slice(0, size) for size in one.shape))
        for array, one in declared.items()
    }


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_numbers_are_those_of_bitsandbytes(seed: int, shape: tuple[int, int]) -> None:
    values = matrix(seed, shape)
    packed, state = bitsandbytes.quantize_4bit(
        torch.tensor(values), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    stored = encoded(values)
    np.testing.assert_array_equal(stored[OFFSET][0], state.offset.numpy())
    np.testing.assert_array_equal(stored[ABSMAX].reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(stored[SCALE], state.state2.absmax.numpy())
    np.testing.assert_array_equal(nf4_double.code(), state.state2.code.numpy())
    expected = bitsandbytes.dequantize_4bit(packed, state).numpy()
    arrays = {name: jnp.asarray(array) for name, array in stored.items()}
    found = nf4_double.decode(arrays, jnp.dtype("float32"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_part_is_cut_from_whole_groups(shape: tuple[int, int]) -> None:
    values = matrix(0, shape)
    whole, rng = encoded(values), np.random.default_rng(1)
    encoder = Encoder(reader(values))
    for array, expected in whole.items():
        for _ in range(5):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in expected.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(encoder("w", array, index), expected[index])


def test_stacks_are_decoded_as_their_layers_are() -> None:
    layers = [encoded(matrix(seed, (10, 192))) for seed in range(3)]
    stacked = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    found = nf4_double.decode(stacked, jnp.dtype("float32"))
    for number, layer in enumerate(layers):
        own = {name: jnp.asarray(array) for name, array in layer.items()}
        np.testing.assert_array_equal(found[number], nf4_double.decode(own, jnp.dtype("float32")))
    assert found.shape == (3, 10, 192)
