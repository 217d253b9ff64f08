# SPDX-License-Identifier: Apache-2.0
"""FP8: the bytes and the scales of a checkpoint that is in FP8, held as they come.

One scale for each block of the file's size (config.json's `weight_block_size`); blocks at a
matrix's edges may be cut. Nothing is rounded again. Not done here: reading files (`weights.fp8`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from dsjax.distributed.sharding import WHOLE
from dsjax.errors import ConfigError
from dsjax.models.storage import Encode, Index, Storage, StoredArray, TensorReader

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
"""The largest number of float8_e4m3fn."""

SCALE = "_scale_inv"
"""What a weight's scale is called after it."""

LEAST_SCALE = 2.0**-117
"""With smaller scales some numbers are subnormal in float32; most devices make them 0."""


@runtime_checkable
class BlockReader(Protocol):
    """An opened checkpoint whose bytes can be had as they are (`weights.fp8.DequantisedSource`)."""

    @property
    def raw(self) -> TensorReader:
        """The checkpoint as its files are."""
        ...


@dataclass(frozen=True)
class Blocks:
    """How matrices are held in blocks of rows x columns."""

    rows: int
    columns: int

    def arrays(
        self, shape: tuple[int, int], axes: tuple[str | None, ...]
    ) -> Mapping[str, StoredArray]:
        """Declare the bytes in the matrix's shape, and the blocks' scales.

        An axis that blocks do not divide is `WHOLE` in the scales: no device decodes a part of it
        by a part of them.
        """
        sizes = (self.rows, self.columns)
        scales = tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True))
        cut = tuple(
            axis if axis is None or n % size == 0 else WHOLE
            for axis, n, size in zip(axes, shape, sizes, strict=True)
        )
        return {
            "": StoredArray(shape, "uint8", axes),
            SCALE: StoredArray(scales, "float32", cut),
        }

    def decode(self, stored: Mapping[str, Array], dtype: jnp.dtype) -> Float[Array, "*E O I"]:
        """Return the numbers, byte times scale in float32, rounded to `dtype` once."""
        codes = stored[""]
        scales = jnp.repeat(stored[SCALE], self.rows, axis=-2)[..., : codes.shape[-2], :]
        scales = jnp.repeat(scales, self.columns, axis=-1)[..., : codes.shape[-1]]
        return (numbers(codes) * scales).astype(dtype)


def storage_of(config: Mapping[str, Any]) -> Storage | None:
    """How matrices of a checkpoint with this config.json are held; None if it is not in FP8."""
    section = config.get("quantization_config")
    if section is None:
        return None
    blocks = Blocks(*section["weight_block_size"])
    return Storage(blocks.arrays, _encoder, blocks.decode)


def _encoder(source: TensorReader) -> Encode:
    assert isinstance(source, BlockReader)
    return partial(_read, source.raw)


def _read(raw: TensorReader, name: str, array: str, index: Index) -> np.ndarray:
    if raw.tensors[name].dtype != FP8:
        module = name.removesuffix(".weight").rpartition(".")[2]
        raise ConfigError(
            f"{name}: got {raw.tensors[name].dtype}, expected float8_e4m3fn with "
            "model.quantization fp8; keep it as it is, with "
            f"model.quantization_skip_modules=[{module}]"
        )
    if array == "":
        return raw.read(name, index).view(np.uint8)
    scales = raw.read(name + SCALE, index).astype(np.float32)
    sizes = np.abs(scales[scales != 0])
    if not np.all((sizes >= LEAST_SCALE) & (sizes <= np.finfo(np.float32).max / LARGEST)):
        raise ConfigError(
            f"{name}{SCALE}: got a scale with which float32 cannot hold all numbers of its block, "
            "expected model.quantization null for this checkpoint"
        )
    return scales


def numbers(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Convert float8_e4m3fn to float32: XLA for CPU takes twice as long for its own conversion.

    Of a byte, 1 bit is the sign, 4 the exponent, 3 the fraction; exponents count from -7, those of
    float32 from -127. The smallest exponent means subnormals: no subnormal of float32 is among the
    steps, since devices may make it 0.
    """
    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    bits = codes.astype(jnp.uint32)
    rest = bits & 0x7F
    normal, one_higher = as_float((rest << 20) + (120 << 23)), as_float((rest << 20) + (121 << 23))
    values = jnp.where(rest < 8, one_higher - jnp.float32(2**-6), normal)
    values = jnp.where(rest == 0x7F, jnp.float32(jnp.nan), values)
    return as_float(jax.lax.bitcast_convert_type(values, jnp.uint32) | ((bits & 0x80) << 24))
