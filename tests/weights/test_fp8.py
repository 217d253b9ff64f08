# SPDX-License-Identifier: Apache-2.0
"""Block-wise FP8: bytes and scales to numbers, numbers to bytes and scales, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import quantised
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.errors import ConfigError
from dsjax.weights import fp8
from dsjax.weights.safetensors import TensorInfo

SECTION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
NAME = "model.layers.0.self_attn.o_proj.weight"


def _source(tensors: dict[str, np.ndarray], section: Any = SECTION) -> Any:
    """An opened checkpoint of these arrays."""
    infos = {
        name: TensorInfo(name, "model.safetensors", array.dtype, array.shape, 0, array.nbytes)
        for name, array in tensors.items()
    }
    return SimpleNamespace(
        directory=Path("nowhere"),
        config={"quantization_config": section} if section else {},
        tensors=infos,
        read=lambda name, index=None: tensors[name][index or ...],
        aux_files=list,
        file_headers=dict,
        index_text=lambda: None,
        reads_ahead=1,
    )


def _quantised(shape: tuple[int, int], power_of_two: bool = False) -> tuple[dict, np.ndarray]:
    """A checkpoint of one FP8 tensor, made without dsjax, and the numbers in it."""
    block = (16, 16)
    generator = torch.Generator().manual_seed(shape[0])
    weight, scales = quantised.quantise(
        torch.randn(shape, generator=generator), block, power_of_two
    )
    arrays = {
        NAME: weight.view(torch.uint8).numpy().view(fp8.FP8),
        NAME + fp8.SCALE: scales.numpy(),
    }
    return arrays, quantised.dequantise(weight, scales, block).numpy()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    cut=st.tuples(*[st.integers(0, 80)] * 4),
    power_of_two=st.booleans(),
)
def test_any_slice_is_the_same_part_of_the_whole(shape, cut, power_of_two):
    arrays, numbers = _quantised(shape, power_of_two)
    source = fp8.dequantised(_source(arrays))
    index = (slice(*sorted(cut[:2])), slice(*sorted(cut[2:])))
    np.testing.assert_array_equal(source.read(NAME), numbers)
    np.testing.assert_array_equal(source.read(NAME, index), numbers[index])
    np.testing.assert_array_equal(source.read(NAME, index[:1]), numbers[index[:1]])
    assert list(source.tensors) == [NAME]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_device_makes_the_same_bits(dtype: str) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (53, 41)).astype(np.uint8)
    codes.flat[:256] = np.arange(256)  # subnormals, both zeros and not-a-numbers among them
    scales = np.random.default_rng(1).uniform(-2, 2, (4, 3)).astype(np.float32)
    scales[1, 1], scales[2, 0] = 0, 2.0**-117
    source = fp8.dequantised(_source({NAME: codes.view(fp8.FP8), NAME + fp8.SCALE: scales}))
    assert isinstance(source, fp8.DequantisedSource)
    for index in ((slice(None),), (slice(20, 51), slice(3, 40)), (slice(7, 8), slice(16, 16))):
        part = source.read_quantised(NAME, index, np.dtype(dtype))
        assert part is not None
        found = np.asarray(jax.jit(fp8.dequantise, static_argnums=1)(part, np.dtype(dtype)))
        expected = source.read(NAME, index).astype(dtype)
        assert found.tobytes() == expected.tobytes() and found.shape == expected.shape


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (2.0**-118, "bfloat16"),  # subnormals in float32
        (200.0, "float16"),  # beyond 65504
        (1e37, "float32"),
        (np.nan, "bfloat16"),
    ],
)
def test_what_a_device_may_round_otherwise_stays_on_the_host(scale: float, dtype: str) -> None:
    arrays, _ = _quantised((20, 20))
    arrays[NAME + fp8.SCALE][1, 1] = scale
    arrays["norm"] = np.ones(3, np.float32)
    source = fp8.dequantised(_source(arrays))
    assert isinstance(source, fp8.DequantisedSource)
    assert source.read_quantised(NAME, (slice(None),), np.dtype(dtype)) is None
    assert source.read_quantised(NAME, (slice(16),), np.dtype(dtype)) is not None
    assert source.read_quantised("norm", (slice(None),), np.dtype(dtype)) is None


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (37, 5), (1, 50)])
def test_numbers_that_did_not_change_give_their_bytes_back(shape, power_of_two):
    form = fp8.Format(16, 16, power_of_two)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    first, scales = fp8.quantise(values, form)
    theirs, their_scales = quantised.quantise(torch.tensor(values), (16, 16), power_of_two)
    np.testing.assert_array_equal(scales, their_scales.numpy())
    np.testing.assert_array_equal(first.view(np.uint8), theirs.view(torch.uint8).numpy())
    if not power_of_two:  # a largest number that rounds down to a power of two takes a new scale
        source = fp8.dequantised(_source({NAME: first, NAME + fp8.SCALE: scales}))
        again, same = fp8.quantise(source.read(NAME), form)
        np.testing.assert_array_equal(again.view(np.uint8), first.view(np.uint8))
        np.testing.assert_allclose(same, scales, rtol=1e-6)


def test_a_block_of_zeros_stays_zero():
    weight, scales = fp8.quantise(np.zeros((20, 20), np.float32), fp8.Format(16, 16, True))
    assert not weight.view(np.uint8).any() and (scales == 1).all()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("fp8", "config.json quantization_config: got 'fp8', expected a mapping"),
        (SECTION | {"quant_method": "gptq"}, "quant_method: got 'gptq', expected 'fp8'"),
        (SECTION | {"fmt": "e5m2"}, "fmt: got 'e5m2', expected 'e4m3'"),
        (SECTION | {"activation_scheme": "static"}, "activation_scheme: got 'static'"),
        (SECTION | {"weight_block_size": None}, r"weight_block_size: got None, .* \[128, 128\]"),
        (SECTION | {"weight_block_size": [128]}, r"weight_block_size: got \[128\]"),
        (SECTION | {"weight_block_size": [0, 128]}, r"weight_block_size: got \[0, 128\]"),
        (SECTION | {"weight_block_size": [32, 32]}, r"_scale_inv: got shape \[3, 2\], .* \[2, 1\]"),
        (None, "o_proj.weight: got float8_e4m3fn, and config.json has no quantization_config"),
    ],
)
def test_a_section_that_does_not_fit(section: Any, said: str):
    arrays, _ = _quantised((40, 20))
    with pytest.raises(ConfigError, match=said):
        fp8.dequantised(_source(arrays, section))


def test_scales_that_are_missing_or_have_another_shape():
    arrays, _ = _quantised((40, 20))
    scales = arrays.pop(NAME + fp8.SCALE)
    with pytest.raises(ConfigError, match=r"o_proj.weight_scale_inv: got no such tensor"):
        fp8.dequantised(_source(arrays))
    with pytest.raises(ConfigError, match=r"_scale_inv: got shape \[2, 2\], expected \[3, 2\]"):
        fp8.dequantised(_source(arrays | {NAME + fp8.SCALE: scales[:2]}))


def test_a_section_without_fp8_is_refused():
    with pytest.raises(ConfigError, match="quantization_config: got it for files without a float8"):
        fp8.dequantised(_source({NAME: np.ones((2, 2), np.float32)}))


def test_a_checkpoint_without_fp8_is_left_alone():
    source = _source({NAME: np.ones((2, 2), np.float32)}, None)
    assert fp8.dequantised(source) is source
