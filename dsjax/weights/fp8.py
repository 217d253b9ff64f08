# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in block-wise FP8, as DeepSeek ships V3 and its successors.

In: an opened checkpoint whose tensors `X.weight` are float8_e4m3fn beside `X.weight_scale_inv`, one
scale for each block. Out: the same checkpoint under the same names with the numbers that the bytes
stand for, made here or on a device; and new bytes for new numbers. Despite its name the scale is
the multiplier: W[i, j] = bytes[i, j] * scale[i // 128, j // 128]. Not done here: reading files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from dsjax.errors import ConfigError, raise_all
from dsjax.models.config_checks import shown
from dsjax.models.quantization.fp8 import FP8, LARGEST, LEAST_SCALE, SCALE, numbers
from dsjax.models.tensor_names import examples
from dsjax.weights.safetensors import TensorInfo
from dsjax.weights.source import Source

_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
"""Number of every byte: five times as fast as a cast."""

_LARGEST_BLOCK = 2**20

_OTHER_KEYS = {"quantization": "MLX", "compression_config": "compressed-tensors"}
"""Keys of config.json in which other tools say the same."""

_ONLY = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantised: the sizes of a block, and the kind of scales."""

    rows: int
    columns: int
    power_of_two: bool

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a matrix; blocks at its edges may be cut."""
        return math.ceil(shape[0] / self.rows), math.ceil(shape[1] / self.columns)


def read_format(config: Mapping[str, Any]) -> Format | None:
    """Read `quantization_config`; None if there is none.

    What is refused here is refused by plans, by downloads before their first shard, by training.

    Raises:
        ConfigError: it, or another tool's key, names another method or other sizes than we read.
    """
    raise_all(
        f"config.json {name}: got {shown(config[name])}, expected null; {tool}'s quantised "
        "checkpoints are not read: use the checkpoint before it was quantised"
        for name, tool in _OTHER_KEYS.items()
        if config.get(name) is not None
    )
    section = config.get("quantization_config")
    if section is None:
        return None
    field = "config.json quantization_config"
    if not isinstance(section, Mapping):
        raise ConfigError(f"{field}: got {shown(section)}, expected a mapping or null")
    problems = [
        f"{field}.{name}: got {shown(section.get(name))}, expected {value!r}; other kinds of "
        "quantised checkpoints are not read"
        for name, value in _ONLY.items()
        if section.get(name) != value and (section.get(name) is not None or name == "quant_method")
    ]
    block: Any = section.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(_is_size(size) for size in block)):
        problems.append(f"{field}.weight_block_size: got {shown(block)}, expected [128, 128]")
    scales, plain = section.get("scale_fmt"), section.get("modules_to_not_convert")
    if scales not in (None, "ue8m0"):
        problems.append(f"{field}.scale_fmt: got {shown(scales)}, expected 'ue8m0' or null")
    if not (plain is None or (isinstance(plain, list) and all(type(n) is str for n in plain))):
        problems.append(
            f"{field}.modules_to_not_convert: got {shown(plain)}, expected a list of names or null"
        )
    raise_all(problems)
    return Format(block[0], block[1], scales == "ue8m0")


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_BLOCK


class Quantised(NamedTuple):
    """Rows of a matrix as bytes, with all that their numbers are made of; a device takes it whole.

    Attributes:
        codes: the bytes.
        scales: of every column, for each row of blocks.
        block_rows: which row of blocks each row is in, counted from that of the first row.
    """

    codes: UInt8[np.ndarray | Array, "... O I"]
    scales: Float[np.ndarray | Array, "o I"]
    block_rows: Int[np.ndarray | Array, " O"]


def dequantise(part: Quantised, dtype: np.dtype) -> Float[Array, "... O I"]:
    """Return the numbers of bytes and scales, to be traced: bit by bit those that `read` gives."""
    scales = jnp.asarray(part.scales).at[part.block_rows].get(mode="promise_in_bounds")
    return (numbers(jnp.asarray(part.codes)) * scales).astype(dtype)


@dataclass(frozen=True)
class DequantisedSource:
    """A checkpoint's numbers: scales are applied, and are no tensors of their own."""

    raw: Source
    format: Format

    @property
    def directory(self) -> Path:
        """Where its small files lie."""
        return self.raw.directory

    @property
    def reads_ahead(self) -> int:
        """How many reads are worth having under way at a time."""
        return self.raw.reads_ahead

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return self.raw.config

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor but the scales; a quantised one has bfloat16's name for its dtype."""
        return self._tensors

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        bfloat16 = np.dtype(ml_dtypes.bfloat16)
        return {
            name: replace(info, dtype=bfloat16) if info.dtype == FP8 else info
            for name, info in self.raw.tensors.items()
            if not is_scale(name, self.raw)
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor, or the part that slices of step 1 select; float32 if it is quantised."""
        if self.raw.tensors[name].dtype != FP8:
            return self.raw.read(name, index)
        codes, scales, block_rows = self._quantised(name, index)
        values = np.empty(codes.shape, np.float32)
        for i, scale in enumerate(scales):  # not all at once: numpy's indices are 8 bytes each
            first, last = np.searchsorted(block_rows, (i, i + 1))
            np.multiply(_VALUES[codes[first:last]], scale, out=values[first:last])
        return values

    def read_quantised(
        self, name: str, index: tuple[slice, ...], dtype: np.dtype
    ) -> "Quantised | None":
        """Read a part of a tensor for a device to compute; None of what only the host can.

        That is what is not in FP8, and numbers that a device may round otherwise or that `dtype`
        cannot hold.

        Args:
            name: of the tensor.
            index: slices of step 1.
            dtype: what `dequantise` will be asked for.
        """
        if self.raw.tensors[name].dtype != FP8:
            return None
        part = self._quantised(name, index)
        sizes = np.abs(part.scales[part.scales != 0])
        fits = np.all(sizes <= float(jnp.finfo(dtype).max) / LARGEST)
        return part if fits and np.all(sizes >= LEAST_SCALE) else None

    def _quantised(self, name: str, index: tuple[slice, ...] | None) -> "Quantised":
        """Read bytes and scales of a part of a quantised tensor."""
        rows, columns = (
            part.indices(size)[:2]
            for part, size in zip(
                (*(index or ()), slice(None), slice(None)),
                self.raw.tensors[name].shape,
                strict=False,
            )
        )
        blocks = (
            slice(rows[0] // self.format.rows, -(-rows[1] // self.format.rows)),
            slice(columns[0] // self.format.columns, -(-columns[1] // self.format.columns)),
        )
        scales = self.raw.read(name + SCALE, blocks).astype(np.float32)
        per_row = np.arange(*rows, dtype=np.int32) // self.format.rows - blocks[0].start
        per_column = np.arange(*columns) // self.format.columns - blocks[1].start
        codes = self.raw.read(name, index).view(np.uint8)
        return Quantised(codes, scales[:, per_column], per_row)

    def aux_files(self) -> list[Path]:
        """List the files to keep beside the weights."""
        return self.raw.aux_files()

    def file_headers(self) -> dict[str, bytes]:
        """Return the safetensors headers."""
        return self.raw.file_headers()

    def index_text(self) -> str | None:
        """Return the index file."""
        return self.raw.index_text()


def dequantised(source: Source) -> Source:
    """Return a checkpoint's numbers, whatever they are stored as.

    Raises:
        ConfigError: config.json and tensors disagree on what is quantised, a scale is missing or of
            another shape.
    """
    quantised = {name for name, info in source.tensors.items() if info.dtype == FP8}
    form = read_format(source.config)
    if form is None:
        raise_all(
            f"{name}: got float8_e4m3fn, and config.json has no quantization_config, expected it "
            "with weight_block_size; take config.json from where the weights are from"
            for name in sorted(quantised)[:8]
        )
        return source
    if not quantised:
        raise ConfigError(
            "config.json quantization_config: got it for files without a float8_e4m3fn tensor, "
            "expected null; remove it if the weights are converted, else fetch the files again"
        )
    problems = {name: _scale_problem(name, source, form) for name in sorted(quantised)}
    wrong = [name for name, problem in problems.items() if problem]
    raise_all(examples(wrong, problems.__getitem__, "tensors whose scales are missing or wrong"))
    return DequantisedSource(source, form)


def _scale_problem(name: str, source: Source, form: Format) -> str:
    """Say what is wrong with a quantised tensor or its scales; empty if nothing is."""
    shape = source.tensors[name].shape
    scale = source.tensors.get(name + SCALE)
    if len(shape) != 2:
        return f"{name}: got float8_e4m3fn of shape {list(shape)}, expected a matrix"
    expected = form.scale_shape(shape)
    if scale is None:
        return f"{name}{SCALE}: got no such tensor, expected shape {list(expected)}"
    if scale.shape != expected:
        return (
            f"{name}{SCALE}: got shape {list(scale.shape)}, expected {list(expected)} for "
            f"{list(shape)} in blocks of {form.rows} x {form.columns} (config.json "
            "quantization_config.weight_block_size)"
        )
    return ""


def raw_of(source: Source) -> Source:
    """Return a checkpoint as its files are: bytes and scales where it is quantised."""
    return source.raw if isinstance(source, DequantisedSource) else source


def is_scale(name: str, source: Source) -> bool:
    """Whether a tensor holds the scales of another."""
    weight = source.tensors.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
    return weight is not None and weight.dtype == FP8


def quantise(
    values: Float[np.ndarray, "O I"], form: Format
) -> tuple[Shaped[np.ndarray, "O I"], Float[np.ndarray, "o i"]]:
    """Return the bytes and scales of a matrix, or of whole rows of blocks of it.

    A scale is the largest magnitude of its block / 448; with power-of-two scales, the next power of
    two from there.
    """
    rows, columns = values.shape
    padded = np.zeros(
        [
            n * size
            for n, size in zip(
                form.scale_shape(values.shape), (form.rows, form.columns), strict=True
            )
        ],
        np.float32,
    )
    padded[:rows, :columns] = values
    blocks = padded.reshape(-1, form.rows, padded.shape[1] // form.columns, form.columns)
    largest = np.abs(blocks).max(axis=(1, 3))
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    if form.power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales))).astype(np.float32)
    scaled = np.clip(blocks / scales[:, None, :, None], -LARGEST, LARGEST)
    return scaled.reshape(padded.shape)[:rows, :columns].astype(FP8), scales
