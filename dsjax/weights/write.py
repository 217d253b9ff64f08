# SPDX-License-Identifier: Apache-2.0
"""A checkpoint like its source, with what training changed.

In: the opened source, the trained arrays. Out: a Hugging Face folder. The source's files are
streamed: what training did not touch is copied byte for byte, the rest is computed in float32 a few
rows at a time and written in the source's dtype; FP8 tensors that changed become bfloat16, or new
FP8. What was written is read again and compared. Not done here: adapters' files, comparing logits.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.config.json_file import read_object
from dsjax.distributed.arrays import row_pieces
from dsjax.models.changes import Change, Rows
from dsjax.weights import fp8
from dsjax.weights.dsjax_format import safetensors_name
from dsjax.weights.folders import check_room
from dsjax.weights.hf_directory import SAFETENSORS_INDEX, SafetensorsWriter, index_json, open_source
from dsjax.weights.model_files import CONFIG, DECIDING, needs_code
from dsjax.weights.source import Source, copy_aux_files


@dataclass(frozen=True)
class Output:
    """One tensor to write: what it is, and its rows a bounded number of bytes at a time."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]
    change: Change | None = None
    rows: Callable[[], Iterator[Rows]] = lambda: iter(())

    def follow(self) -> None:
        """Do what `pieces` needs of a process that does not write."""
        if self.change is not None:
            for rows in self.rows():
                self.change.fetch(rows)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_bytes(
    source: Source, changes: Mapping[str, Change], quantised: bool = False
) -> dict[str, int]:
    """Bytes of the tensors in each file that `write_checkpoint` writes for the same arguments."""
    files = _outputs(source, changes, quantised)
    return {file: sum(out.nbytes for out in outs) for file, outs in files.items()}


def write_checkpoint(
    source: Source,
    directory: Path,
    changes: Mapping[str, Change],
    progress: Callable[[int, int], None] = lambda done, total: None,
    quantised: bool = False,
    primary: bool = True,
    send: Callable[[str], None] | None = None,
    share: Callable[[], str] | None = None,
) -> None:
    """Write a Hugging Face checkpoint like the source, some tensors changed, and prove it.

    Args:
        source: what to copy; a `.bin` file becomes a safetensors file.
        directory: an empty folder.
        changes: how each changed tensor is computed.
        progress: told the bytes written so far and in all.
        quantised: whether FP8 tensors that changed become FP8 again, and not bfloat16.
        primary: whether this is the process that writes; the others help it to the arrays.
        send: takes away each file of weights once it is written, so that one at a time needs room.
        share: called when all is written, gives the place where it is proven; else the folder is.

    Raises:
        ConfigError: the disk has no room for it.
        RuntimeError: reading it again gave other bytes than were written.
    """
    files = _outputs(source, changes, quantised)
    if not primary:
        for out in (out for outs in files.values() for out in outs):
            out.follow()
        return
    sizes, done = file_bytes(source, changes, quantised).values(), 0
    total, needed = sum(sizes), sum(sizes) if send is None else max(sizes, default=0)
    check_room(directory, {"the checkpoint": needed}, "output directory")
    copy_aux_files(source, directory)
    _write_config(source, directory, files)
    checksums = {}
    for file, outs in files.items():
        entries = [(out.name, out.dtype, out.shape) for out in outs]
        header = _header(source, file, entries)
        with SafetensorsWriter(directory / file, entries, raw_header=header) as writer:
            for out in outs:
                checksum = 0
                for piece in out.pieces():
                    writer.append(out.name, piece)
                    checksum = zlib.crc32(_bytes_of(piece), checksum)
                checksums[out.name] = checksum
                done += out.nbytes
                progress(done, total)
        if send is not None:
            send(file)
    index = _index_text(source, files)
    if index is not None:
        (directory / SAFETENSORS_INDEX).write_text(index, "utf-8")
    _prove_written(str(directory) if share is None else share(), checksums)


def _outputs(
    source: Source, changes: Mapping[str, Change], quantised: bool
) -> dict[str, list[Output]]:
    """Return what each file will hold, in the order of the source."""
    raw = fp8.raw_of(source)
    files: dict[str, list[Output]] = {}
    for name, info in raw.tensors.items():
        file = info.file if info.file.endswith(".safetensors") else safetensors_name(info.file)
        outputs = files.setdefault(file, [])
        weight = name.removesuffix(fp8.SCALE)
        if weight in changes and raw.tensors[weight].dtype == fp8.FP8:
            outputs += _changed_fp8(source, name, changes[weight], quantised)
        else:
            outputs.append(_output(raw, name, info.dtype, changes.get(name)))
    return files


def _output(source: Source, name: str, dtype: np.dtype, change: Change | None) -> Output:
    """Return a tensor as the source has it, or changed."""
    info = source.tensors[name]
    rows = partial(row_pieces, info.shape, info.dtype.itemsize)
    pieces = partial(_pieces, source, name, change, rows)
    return Output(name, dtype, info.shape, pieces, change, rows)


def _pieces(
    source: Source, name: str, change: Change | None, all_rows: Callable[[], Iterator[Rows]]
) -> Iterator[np.ndarray]:
    info = source.tensors[name]
    for rows in all_rows():
        piece = source.read(name, rows)
        yield piece if change is None else change(rows, piece).astype(info.dtype)


def _changed_fp8(source: Source, name: str, change: Change, quantised: bool) -> list[Output]:
    """Return what takes the place of a changed FP8 weight, or of its scales."""
    assert isinstance(source, fp8.DequantisedSource)
    weight, info = name.removesuffix(fp8.SCALE), source.raw.tensors[name]
    is_scale = name != weight
    if quantised:
        whole = source.tensors[weight].shape
        rows = partial(row_pieces, whole, 4, source.format.rows)
        pieces = partial(_requantised, source, weight, change, is_scale, rows)
        return [Output(name, info.dtype, info.shape, pieces, change, rows)]
    if is_scale:
        return []
    return [_output(source, name, np.dtype(ml_dtypes.bfloat16), change)]


def _requantised(
    source: fp8.DequantisedSource,
    name: str,
    change: Change,
    scales: bool,
    all_rows: Callable[[], Iterator[Rows]],
) -> Iterator[np.ndarray]:
    """Return the new bytes, or the new scales, of a changed FP8 weight, whole blocks at a time."""
    form, info = source.format, source.raw.tensors[name + fp8.SCALE]
    for rows in all_rows():
        pair = fp8.quantise(change(rows, source.read(name, rows)), form)
        yield pair[1].astype(info.dtype) if scales else pair[0]


def _header(source: Source, file: str, entries: Sequence[tuple]) -> bytes | None:
    """Return the source's header where it still says what the file holds, else None."""
    kept = [
        (info.name, info.dtype, info.shape)
        for info in fp8.raw_of(source).tensors.values()
        if info.file == file
    ]
    return source.file_headers().get(file) if kept == list(entries) else None


def _write_config(source: Source, directory: Path, files: Mapping[str, Sequence[Output]]) -> None:
    """Correct what the copied files say and is no longer so; each stays as it is if nothing is."""
    if not needs_code(source.config):
        for name in DECIDING:
            _change(directory / name, _without_code)
    if isinstance(source, fp8.DequantisedSource):
        kinds = {out.name: out.dtype for outs in files.values() for out in outs}
        was = [name for name, info in source.raw.tensors.items() if info.dtype == fp8.FP8]
        plain = [name.removesuffix(".weight") for name in was if kinds[name] != fp8.FP8]
        if plain:
            _change(directory / CONFIG, partial(_not_quantised, plain, len(plain) == len(was)))


def _change(file: Path, change: Callable[[dict[str, Any]], bool]) -> None:
    """Write a JSON object again if `change` says that it changed it."""
    content = read_object(file, "model.path") if file.is_file() else {}
    if change(content):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", "utf-8")


def _without_code(config: dict[str, Any]) -> bool:
    """Drop the mention of Python files that do not travel: transformers has these classes."""
    return config.pop("auto_map", None) is not None


def _not_quantised(modules: Sequence[str], all_of_them: bool, config: dict[str, Any]) -> bool:
    """Say in config.json which modules are no longer quantised."""
    if all_of_them:
        del config["quantization_config"]
    else:
        section = config["quantization_config"]
        before = section.get("modules_to_not_convert") or []
        section["modules_to_not_convert"] = [*before, *modules]
    return True


def _index_text(source: Source, files: Mapping[str, Sequence[Output]]) -> str | None:
    """Return the source's index where it still holds, else a new one; None for a single file."""
    kept = {name: info.dtype for name, info in fp8.raw_of(source).tensors.items()}
    now = {out.name: out.dtype for outs in files.values() for out in outs}
    if kept == now and (source.file_headers() or len(files) == 1):
        return source.index_text()
    if len(files) == 1 and source.index_text() is None:
        return None
    return index_json({f: [(out.name, out.nbytes) for out in outs] for f, outs in files.items()})


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _prove_written(directory: str, checksums: Mapping[str, int]) -> None:
    """Read everything again, as anybody would, and compare it with what was meant."""
    written = open_source(directory)
    wrong = sorted(set(written.tensors) ^ set(checksums))
    for name in set(written.tensors) & set(checksums):
        info, checksum = written.tensors[name], 0
        for rows in row_pieces(info.shape, info.dtype.itemsize):
            checksum = zlib.crc32(_bytes_of(written.read(name, rows)), checksum)
        if checksum != checksums[name]:
            wrong.append(name)
    if wrong:
        raise RuntimeError(
            f"{directory}: what was read back differs from what was written: {wrong}"
        )
