# SPDX-License-Identifier: Apache-2.0
"""The safetensors format, one file at a time: read its header and rows of its tensors, write it.

In: a file; for writing, names, dtypes and shapes first and then the values in that order.
Out: `TensorInfo` records and fresh numpy arrays (ml_dtypes for bfloat16 and float8), or a file.
Not here: which files make up a checkpoint (`hf_directory`), what the tensors mean (`load`).

The safetensors library is not used, because its numpy reader refuses bfloat16 and float8, it maps
files into memory (mapped pages count as ours), and it writes a file from whole tensors only.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from dsjax.config.json_file import parse
from dsjax.errors import ConfigError, files_of
from dsjax.weights.storage import File, read_at, size_of

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F16": np.dtype(np.float16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "I8": np.dtype(np.int8),
        "I16": np.dtype(np.int16),
        "I32": np.dtype(np.int32),
        "I64": np.dtype(np.int64),
        "U8": np.dtype(np.uint8),
        "U16": np.dtype(np.uint16),
        "U32": np.dtype(np.uint32),
        "U64": np.dtype(np.uint64),
        "BOOL": np.dtype(np.bool_),
    }
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LFS_POINTER = b"version https://git-lfs"
_FETCH_AGAIN = "download the file again"
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MOST_AXES = 32
_FIRST_READ = 1 << 17  # holds most headers


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file name, dtype, shape and its byte range in the file.

    `start` and `end` count from the beginning of the file; both are -1 in a `.bin` file.
    """

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is what git leaves in place of a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def lfs_problem(path: File, field: str) -> str:
    """Write the message for a git-lfs pointer."""
    return (
        f"{field}: got a git-lfs pointer in {path}, expected the file itself; "
        "run `git lfs pull` in that directory, or download the file"
    )


def read_header(path: File, field: str = "model.path") -> tuple[bytes, list[TensorInfo]]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.
        field: config field that the message of an error begins with.

    Returns:
        The header's JSON text as it stands in the file, padding included, without the eight bytes
        of its length; and the tensors in the order of their bytes.

    Raises:
        ConfigError: a git-lfs pointer, a truncated file, or a header that does not describe it.
    """
    size = size_of(path)
    head = read_at(path, 0, min(size, _FIRST_READ)).tobytes()
    if head.startswith(_LFS_POINTER):
        raise ConfigError(lfs_problem(path, field))
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > _MOST_HEADER_BYTES or 8 + length > size:
        raise ConfigError(
            f"{field}: got {path} with {size} bytes, expected a safetensors file of at least "
            f"{8 + length} bytes (8 and its header); it is truncated or not safetensors, "
            f"{_FETCH_AGAIN}"
        )
    rest = max(0, 8 + length - len(head))
    raw = head[8 : 8 + length] + read_at(path, len(head), rest).tobytes()
    try:
        tensors = parse_header(raw, path.name)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{field}: got a corrupt header in {path} ({type(error).__name__}: {error}), "
            f"expected a safetensors header; {_FETCH_AGAIN}"
        ) from error
    expected = tensors[-1].end if tensors else 8 + length
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ConfigError(
            f"{field}: got {path} with {size} bytes, expected {expected} bytes as its header says; "
            f"it is {state}, {_FETCH_AGAIN}"
        )
    return raw, tensors


def parse_header(raw: bytes, file: str) -> list[TensorInfo]:
    """List the tensors of a header, whose text is `raw`, in the order of their bytes.

    Raises:
        ValueError, TypeError or KeyError: it is no safetensors header, or its tensors do not cover
            the bytes after it without gap or overlap.
    """
    entries = parse(raw)
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise ValueError("it is not an object of objects")
    infos = [
        _entry_info(name, file, entry, 8 + len(raw))
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
    infos.sort(key=lambda info: (info.start, info.end))
    position = 8 + len(raw)
    for info in infos:
        if info.start != position or info.end - info.start != info.nbytes:
            raise ValueError(
                f"{info.name} lies at bytes {info.start} to {info.end}, "
                f"its place is {position} to {position + info.nbytes}"
            )
        position = info.end
    return infos


def _entry_info(name: str, file: str, entry: dict[str, Any], base: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}, readable are {', '.join(DTYPES)}")
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (start, end, *shape)
    if len(shape) > _MOST_AXES or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{name} has shape {list(shape)[:8]} and offsets {[start, end]}"[:200])
    return TensorInfo(name, file, DTYPES[entry["dtype"]], shape, base + start, base + end)


def read_tensor(
    path: File, info: TensorInfo, index: tuple[slice, ...] | None = None
) -> Shaped[np.ndarray, "..."]:
    """Read a tensor, or the part that `index` selects, into a fresh array.

    Only the rows that the first slice needs are read; further slices are taken from those in
    memory. Nothing is mapped and no position is shared, so threads may read at the same time.

    Args:
        path: the safetensors file.
        info: its entry from `read_header`.
        index: slices of step 1 for the leading axes; None reads all.
    """
    slices = index or ()
    assert all(part.step in (None, 1) for part in slices)
    first, inner = slices[:1], slices[1:]
    start, stop, shape = 0, info.nbytes, info.shape
    if first:
        row_bytes = math.prod(shape[1:]) * info.dtype.itemsize
        low, high, _ = first[0].indices(shape[0])
        rows = max(0, high - low)
        shape = (rows, *shape[1:])
        start, stop = low * row_bytes, (low + rows) * row_bytes
    data = read_at(path, info.start + start, stop - start).view(info.dtype).reshape(shape)
    part = data[(slice(None), *inner)] if inner else data
    return part if part.shape == data.shape else part.copy()


def read_range(path: File, info: TensorInfo, offset: int, length: int) -> bytes:
    """Read `length` bytes of a tensor, `offset` bytes after its first."""
    assert 0 <= offset <= offset + length <= info.nbytes
    return read_at(path, info.start + offset, length).tobytes()


class SafetensorsWriter:
    """Write a safetensors file as its tensors come: header first, then values in declared order.

    Use as a context manager. Leaving it normally checks that every byte was written and syncs the
    file to the disk; leaving it by an exception closes the file as it is.

    Args:
        path: the file to write.
        entries: (name, dtype or its safetensors code, shape) in the order of the file.
        metadata: the header's `__metadata__`; transformers refuses files without `format: pt`.
        raw_header: header text from `read_header`, written verbatim in place of a new one. It must
            describe `entries`.

    Attributes:
        header: the header's text as it is written, padding included.

    Raises:
        ValueError: entries, header or values do not fit one another.
    """

    def __init__(
        self,
        path: Path | str,
        entries: Sequence[tuple[str, str | np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
        raw_header: bytes | None = None,
    ) -> None:
        typed = [(name, _as_dtype(dtype), tuple(shape)) for name, dtype, shape in entries]
        header = _make_header(typed, metadata) if raw_header is None else raw_header
        self._path = Path(path)
        self._infos = parse_header(header, self._path.name)
        if [(info.name, info.dtype, info.shape) for info in self._infos] != typed:
            raise ValueError(f"{path}: the header lists other tensors or another order than asked")
        self.header = header
        self._next = 0  # index of the tensor being written
        self._written = 0  # its bytes so far
        self._file: BinaryIO | None = None

    def __enter__(self) -> "SafetensorsWriter":
        with files_of(self._path):
            self._file = self._path.open("wb")
            self._file.write(len(self.header).to_bytes(8, "little") + self.header)
        return self

    def append(self, name: str, chunk: Shaped[np.ndarray, "..."] | bytes) -> None:
        """Write the next rows of tensor `name`, or its next bytes as they stand in another file."""
        assert self._file is not None, "SafetensorsWriter is used inside `with`"
        self._skip_finished(name)
        info = self._infos[self._next] if self._next < len(self._infos) else None
        if info is None or info.name != name:
            raise ValueError(
                f"{self._path}: got {name}, expected {info.name if info else 'nothing more'}"
            )
        data = chunk if isinstance(chunk, bytes) else _chunk_bytes(chunk, info)
        if self._written + len(data) > info.nbytes:
            raise ValueError(f"{self._path}: {name} got more than its {info.nbytes} bytes")
        with files_of(self._path):
            self._file.write(data)
        self._written += len(data)

    def _skip_finished(self, name: str) -> None:
        """Move on past complete tensors, up to `name`; one without elements needs no append."""
        while (
            self._next < len(self._infos)
            and self._infos[self._next].name != name
            and self._written == self._infos[self._next].nbytes
        ):
            self._next, self._written = self._next + 1, 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        with files_of(self._path), self._file:
            if kind is not None:
                return
            self._skip_finished("")
            if self._next < len(self._infos):
                info = self._infos[self._next]
                raise ValueError(
                    f"{self._path}: {info.name} got {self._written} of its {info.nbytes} bytes"
                )
            self._file.flush()
            os.fsync(self._file.fileno())


def _as_dtype(dtype: str | np.dtype) -> np.dtype:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    return np.dtype(dtype)


def _make_header(
    entries: Sequence[tuple[str, np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Write the header text that the safetensors library would write for tensors in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in entries:
        if dtype not in _CODES:
            raise ValueError(f"{name}: safetensors has no dtype {dtype}")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _chunk_bytes(chunk: np.ndarray, info: TensorInfo) -> memoryview:
    if chunk.dtype != info.dtype or chunk.shape[1:] != info.shape[1:]:
        raise ValueError(
            f"{info.name}: got rows of {chunk.dtype}{list(chunk.shape)}, "
            f"expected rows of {info.dtype}{list(info.shape)}"
        )
    return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
