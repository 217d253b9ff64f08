# SPDX-License-Identifier: Apache-2.0
"""A dsjax checkpoint on disk: a model's weights as Orbax arrays, and what its source was.

    config.json, tokenizer, templates, licences   the source's files, as they were
    arrays/                    Orbax: one array per parameter; stacks are [L, ...] or [L, E, ...]
    unmodelled.safetensors     tensors that the model does not compute with
    dsjax_checkpoint.json      the source's file headers and index

In: an opened Hugging Face source and its parameters in the dtypes of the files. Out: such a
directory, and a `FlaxSource` that reads it tensor by tensor under the source's names. Not done
here: loading parameters (`convert`), writing Hugging Face files (`export`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsjax.errors import ConfigError
from dsjax.fp8 import FP8
from dsjax.hf_files import HFSource, index_json, open_source
from dsjax.models.weight_rules import Entry
from dsjax.safetensors_file import (
    SafetensorsWriter,
    TensorInfo,
    parse_header,
    read_header,
    read_tensor,
)
from dsjax.source import copy_aux_files

MANIFEST, ARRAYS, UNMODELLED = "dsjax_checkpoint.json", "arrays", "unmodelled.safetensors"
FORMAT = 2
CHUNK_BYTES = 32 * 2**20
"""Bytes of an unstacked array that are stored, and read, together; of a stack it is one tensor."""


def is_flax_checkpoint(path: str | Path) -> bool:
    """Whether `to-flax` wrote this directory."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def save_flax(
    source: HFSource,
    directory: Path,
    entries: Sequence[Entry],
    params: Mapping[str, jax.Array],
    carried: Sequence[str],
) -> None:
    """Write a dsjax checkpoint into an empty directory; the manifest comes last.

    Args:
        source: the checkpoint that the parameters are from.
        directory: where to write.
        entries: the tensor of the source that each (layer of a) parameter is.
        params: every base parameter, in a dtype that holds its tensors exactly.
        carried: names of the source's other tensors.
    """
    copy_aux_files(source, directory)
    lead = {entry.path: len(entry.index) for entry in entries}
    save_args = {
        path: ocp.SaveArgs(shard_axes=tuple(range(lead[path]))) if lead[path] else _chunked()
        for path in params
    }
    # OCDBT would put all arrays into shared files; plain zarr leaves one folder per array.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(
            (directory / ARRAYS).absolute(),
            args=ocp.args.PyTreeSave(dict(params), save_args=save_args),
        )
    if carried:
        infos = [(name, source.tensors[name].dtype, source.tensors[name].shape) for name in carried]
        with SafetensorsWriter(directory / UNMODELLED, infos) as writer:
            for name in carried:
                writer.append(name, source.read(name))
    manifest = {
        "format": FORMAT,
        "arrays": {e.hf: [e.path, *e.index] for e in entries},
        "files": _layout(source),
        "index": source.index_text() if source.file_headers() else _index_of(source),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False), "utf-8")


def _chunked() -> ocp.SaveArgs:
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


def _layout(source: HFSource) -> dict[str, str]:
    """Every weight file with the header that `to-hf` writes; `.bin` files become safetensors."""
    headers = source.file_headers()
    if headers:
        return {file: headers[file].decode() for file in source.files}
    layout = {}
    for file in source.files:
        infos = [info for info in source.tensors.values() if info.file == file]
        entries = [(info.name, info.dtype, info.shape) for info in infos]
        layout[safetensors_name(file)] = SafetensorsWriter(file, entries).header.decode()
    return layout


def safetensors_name(file: str) -> str:
    """The name of the safetensors file that takes a `.bin` file's place."""
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _index_of(source: HFSource) -> str | None:
    """The index of `.bin` files, naming their safetensors successors; None for a single file."""
    if len(source.files) == 1:
        return None
    files: dict[str, list[tuple[str, int]]] = {}
    for info in source.tensors.values():
        files.setdefault(safetensors_name(info.file), []).append((info.name, info.nbytes))
    return index_json(files)


@dataclass(frozen=True)
class FlaxSource:
    """An opened dsjax checkpoint, under the names and in the dtypes of the files it came from.

    Attributes:
        directory: where it lies.
        config: the source's parsed config.json.
        tensors: every tensor of the source, in its files' order.
        files: names of the source's weight files.
        manifest: what `dsjax_checkpoint.json` says.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[str]
    manifest: dict[str, Any]

    @property
    def reads_ahead(self) -> int:
        """How many reads are worth having under way at a time."""
        return 1

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor, or the part that slices select, in the source's dtype."""
        place = self.manifest["arrays"].get(name)
        if place is None:
            return read_tensor(self.directory / UNMODELLED, self._unmodelled[name], index)
        path, *lead = place
        stored = self._stores[path][(*lead, *(index or ()), ...)].read().result()
        return np.ascontiguousarray(stored.astype(self.tensors[name].dtype, copy=False))

    @cached_property
    def _stores(self) -> dict[str, Any]:
        """An open array store per parameter."""
        paths = sorted({place[0] for place in self.manifest["arrays"].values()})
        root = self.directory / ARRAYS
        stores = {}
        for path in paths:
            kvstore = {"driver": "file", "path": str((root / path).absolute())}
            try:
                stores[path] = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
            except (ValueError, OSError) as error:
                raise ConfigError(
                    f"model.path: got {root} without a readable array {path} ({error}), expected "
                    "what to-flax wrote; convert the source again"
                ) from error
        return stores

    @cached_property
    def _unmodelled(self) -> dict[str, TensorInfo]:
        _, infos = read_header(self.directory / UNMODELLED)
        return {info.name: info for info in infos}

    def raw_header(self, file: str) -> bytes:
        """The header of one of the source's weight files."""
        return self.manifest["files"][file].encode()

    def file_headers(self) -> dict[str, bytes]:
        """`raw_header` of every weight file."""
        return {file: self.raw_header(file) for file in self.files}

    def index_text(self) -> str | None:
        """The source's index file, None if it had one weight file."""
        return self.manifest["index"]

    def aux_files(self) -> list[Path]:
        """The files kept beside the weights."""
        return _plain(self.directory).aux_files()


def _plain(directory: Path) -> HFSource:
    return open_source(directory, weights=False)


def open_flax(path: str | Path) -> FlaxSource:
    """Open a directory that `to-flax` wrote.

    Raises:
        ConfigError: its manifest or its arrays are damaged.
    """
    directory = Path(path).expanduser()
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.path: got a damaged {directory / MANIFEST} ({error}), expected what to-flax "
            "wrote; convert the source again"
        ) from error
    if version != FORMAT:
        raise ConfigError(
            f"model.path: got {directory / MANIFEST} of format {version!r}, expected {FORMAT}; "
            "convert the source again with this version"
        )
    tensors = {}
    for file, header in manifest["files"].items():
        for info in parse_header(header.encode(), file):
            tensors[info.name] = info
    config = _plain(directory).config
    return FlaxSource(directory, config, tensors, list(manifest["files"]), manifest)


def exact_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the values of all these exactly."""
    kinds = set(dtypes)
    if len(kinds) > 1:  # bfloat16 and float16 hold every float8_e4m3fn
        kinds.discard(FP8)
    return np.dtype(jax.numpy.result_type(*kinds)) if len(kinds) > 1 else kinds.pop()
