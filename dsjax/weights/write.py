# SPDX-License-Identifier: Apache-2.0
"""A checkpoint like its source, with what training changed.

In: the opened source, the trained arrays. Out: a Hugging Face folder. The source's files are
streamed: what training did not touch is copied byte for byte, the rest is computed in float32 a few
rows at a time and written in the source's dtype; FP8 tensors that changed become bfloat16, or new
FP8. What was written is read again and compared. Not done here: adapters' files, comparing logits.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.buckets import new_digest
from dsjax.config.json_file import read_object
from dsjax.distributed.arrays import row_pieces
from dsjax.models.changes import Change, Rows
from dsjax.weights import fp8
from dsjax.weights.dsjax_format import safetensors_name
from dsjax.weights.folders import check_room
from dsjax.weights.hf_directory import (
    SAFETENSORS_INDEX,
    SafetensorsWriter,
    index_json,
    open_source,
)
from dsjax.weights.model_files import CONFIG, DECIDING, needs_code
from dsjax.weights.source import Source, copy_aux_files
from dsjax.weights.storage import file_digest, in_order, open_folder

PIECES = 2
"""Pieces that are read ahead of the one that is computed, and that wait behind it to be written."""


@dataclass(frozen=True)
class Output:
    """One tensor to write: what it is, and its rows a bounded number of bytes at a time.

    Attributes:
        name: of the tensor.
        dtype: that it is written in.
        shape: that it is written in.
        rows: the parts of the source's tensor that it is made of, in order.
        read: reads such a part; any thread may.
        make: (rows, what was read) -> what is written; all processes fetch for it alike.
        change: what training changed of it.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[Rows]]
    read: Callable[[Rows], np.ndarray]
    make: Callable[[Rows, np.ndarray], np.ndarray] = lambda rows, values: values
    change: Change | None = None

    def follow(self) -> None:
        """Do what `make` needs of a process that does not write."""
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
) -> dict[str, str]:
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

    Returns:
        The digest of each file of weights (`storage.file_digest`).

    Raises:
        ConfigError: the disk has no room for it.
        RuntimeError: reading it again gave other bytes than were written.
    """
    files = _outputs(source, changes, quantised)
    if not primary:
        for out in (out for outs in files.values() for out in outs):
            out.follow()
        return {}
    sizes, done = file_bytes(source, changes, quantised).values(), 0
    total, needed = sum(sizes), sum(sizes) if send is None else max(sizes, default=0)
    check_room(directory, {"the checkpoint": needed}, "output directory")
    copy_aux_files(source, directory)
    _write_config(source, directory, files)
    digests = {}
    for file, outs in files.items():
        entries = [(out.name, out.dtype, out.shape) for out in outs]
        header = _header(source, file, entries)
        with SafetensorsWriter(directory / file, entries, raw_header=header) as writer:
            whole = new_digest(len(writer.header).to_bytes(8, "little") + writer.header)
            for piece in _appended(writer, outs, min(PIECES, source.reads_ahead)):
                whole.update(_bytes_of(piece))
                done += piece.nbytes
                progress(done, total)
        digests[file] = whole.hexdigest()
        if send is not None:
            send(file)
    index = _index_text(source, files)
    if index is not None:
        (directory / SAFETENSORS_INDEX).write_text(index, "utf-8")
    _prove_written(str(directory) if share is None else share(), digests)
    return digests


def _appended(
    writer: SafetensorsWriter, outputs: Sequence[Output], ahead: int
) -> Iterator[np.ndarray]:
    """Make the pieces of a file's tensors and write them, and yield each one that is written.

    While one is computed here, the next ones are read and the last ones written in threads.
    """
    reads = (partial(_read, out, rows) for out in outputs for rows in out.rows())
    made = ((out, out.make(rows, values)) for out, rows, values in in_order(reads, ahead))
    writes = (partial(_append, writer, out, piece) for out, piece in made)
    return in_order(writes, PIECES, threads=1)


def _read(out: Output, rows: Rows) -> tuple[Output, Rows, np.ndarray]:
    return out, rows, out.read(rows)


def _append(writer: SafetensorsWriter, out: Output, piece: np.ndarray) -> np.ndarray:
    writer.append(out.name, piece)
    return piece


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
    output = Output(name, dtype, info.shape, rows, partial(source.read, name))
    if change is None:
        return output
    return replace(output, make=partial(_changed, change, info.dtype), change=change)


def _changed(change: Change, dtype: np.dtype, rows: Rows, values: np.ndarray) -> np.ndarray:
    """Return the new values of some rows."""
    return change(rows, values).astype(dtype)


def _changed_fp8(source: Source, name: str, change: Change, quantised: bool) -> list[Output]:
    """Return what takes the place of a changed FP8 weight, or of its scales."""
    assert isinstance(source, fp8.DequantisedSource)
    weight, info = name.removesuffix(fp8.SCALE), source.raw.tensors[name]
    is_scale = name != weight
    if quantised:
        whole = source.tensors[weight].shape
        rows = partial(row_pieces, whole, 4, source.format.rows)
        read = partial(source.read, weight)
        make = partial(_requantised, source.format, change, info.dtype if is_scale else None)
        return [Output(name, info.dtype, info.shape, rows, read, make, change)]
    if is_scale:
        return []
    return [_output(source, name, np.dtype(ml_dtypes.bfloat16), change)]


def _requantised(
    form: fp8.Format, change: Change, scales: np.dtype | None, rows: Rows, values: np.ndarray
) -> np.ndarray:
    """Return the new bytes, or new scales of a dtype, of whole rows of blocks of an FP8 weight."""
    pair = fp8.quantise(change(rows, values), form)
    return pair[0] if scales is None else pair[1].astype(scales)


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


def _prove_written(directory: str, digests: Mapping[str, str]) -> None:
    """Read everything again, as anybody would, and compare it with what was meant."""
    open_source(directory)  # index and headers fit one another
    folder = open_folder(directory, "output directory")
    reads = [partial(file_digest, folder.files[file]) for file in digests]
    found = in_order(reads, folder.reads_ahead)
    wrong = [file for file, digest in zip(digests, found, strict=True) if digest != digests[file]]
    if wrong:
        raise RuntimeError(
            f"{directory}: what was read back differs from what was written: {wrong}"
        )
