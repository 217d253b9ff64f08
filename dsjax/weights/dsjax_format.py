# SPDX-License-Identifier: Apache-2.0
"""A dsjax checkpoint on disk: a model's weights as Orbax arrays, and what its source was.

    config.json, tokenizer, templates, licences   the source's files, as they were
    arrays/                    Orbax: one array per parameter; stacks are [L, ...] or [L, E, ...]
    unmodelled.safetensors     tensors that the model does not compute with
    dsjax_checkpoint.json      the source's file headers and index

In: an opened Hugging Face source and its parameters in the dtypes of the files. Out: such a
directory, and a `FlaxSource` that reads it tensor by tensor under the source's names. Not done
here: loading parameters (`load`), writing Hugging Face files (`export`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsjax.config.json_file import parse_object, read_object
from dsjax.config.paths import FLAX_MANIFEST
from dsjax.errors import ConfigError, system_fault
from dsjax.models.config_checks import shown
from dsjax.models.weight_rules import Entry
from dsjax.weights.fp8 import FP8
from dsjax.weights.hf_directory import HFSource, index_json, is_weight_file, open_source
from dsjax.weights.safetensors import (
    SafetensorsWriter,
    TensorInfo,
    parse_header,
    read_header,
    read_tensor,
)
from dsjax.weights.source import copy_aux_files

MANIFEST, ARRAYS, UNMODELLED = FLAX_MANIFEST, "arrays", "unmodelled.safetensors"
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
    """Return the name of the safetensors file that takes a `.bin` file's place."""
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _index_of(source: HFSource) -> str | None:
    """Write the index of `.bin` files with their safetensors successors; None for one file."""
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
        store = self._stores[path]
        with _array_of(self.directory, path):
            stored = store[(*lead, *(index or ()), ...)].read().result()
        return np.ascontiguousarray(stored.astype(self.tensors[name].dtype, copy=False))

    @cached_property
    def _stores(self) -> dict[str, Any]:
        """An open array store per parameter, as large and as exact as its tensors ask."""
        held: dict[str, list[str]] = {}
        for name, (path, *_) in self.manifest["arrays"].items():
            held.setdefault(path, []).append(name)
        stores = {}
        for path, names in sorted(held.items()):
            with _array_of(self.directory, path):
                stores[path] = _open_array(self.directory / ARRAYS / path)
                self._check_array(stores[path], names)
        return stores

    def _check_array(self, store: Any, names: Sequence[str]) -> None:
        infos = [self.tensors[name] for name in names]
        if store.dtype.numpy_dtype != exact_dtype([info.dtype for info in infos]):
            raise ValueError(f"it holds {store.dtype.name}, {names[0]} is {infos[0].dtype}")
        for info in infos:
            _, *lead = self.manifest["arrays"][info.name]
            inside = all(at < size for at, size in zip(lead, store.shape, strict=False))
            if not inside or store.shape[len(lead) :] != info.shape:
                size, place = list(store.shape), f"{info.name} {list(info.shape)} at {lead}"
                raise ValueError(f"it has shape {size}, which does not hold {place}")

    @cached_property
    def _unmodelled(self) -> dict[str, TensorInfo]:
        file = self.directory / UNMODELLED
        infos = {info.name: info for info in read_header(file)[1]} if file.is_file() else {}
        for name in self.tensors.keys() - self.manifest["arrays"].keys():
            found, wanted = infos.get(name), self.tensors[name]
            if found is None or (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
                raise _damaged(file, f"it does not hold {name} {wanted.dtype}{list(wanted.shape)}")
        return infos

    def raw_header(self, file: str) -> bytes:
        """Return the header of one of the source's weight files."""
        return self.manifest["files"][file].encode()

    def file_headers(self) -> dict[str, bytes]:
        """`raw_header` of every weight file."""
        return {file: self.raw_header(file) for file in self.files}

    def index_text(self) -> str | None:
        """Return the source's index file, None if it had one weight file."""
        return self.manifest["index"]

    def aux_files(self) -> list[Path]:
        """List the files kept beside the weights."""
        return _plain(self.directory).aux_files()


def _plain(directory: Path) -> HFSource:
    return open_source(directory, weights=False)


def open_flax(path: str | Path) -> FlaxSource:
    """Open a directory that `to-flax` wrote.

    Raises:
        ConfigError: its manifest or its arrays are damaged.
    """
    directory = Path(path).expanduser()
    manifest = _read_manifest(directory / MANIFEST)
    tensors = {info.name: info for infos in _headers(manifest).values() for info in infos}
    config = _plain(directory).config
    return FlaxSource(directory, config, tensors, list(manifest["files"]), manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself, so checked that it can be used as it is."""
    manifest = read_object(file, "model.path")
    version = manifest.get("format")
    if type(version) is not int:
        raise _damaged(file, "it has no format")
    if version != FORMAT:
        raise ConfigError(
            f"model.path: got {file} of format {shown(version)}, expected {FORMAT}; "
            "convert the source again with this version"
        )
    problem = _form_problem(manifest)
    if problem:
        raise _damaged(file, problem)
    try:
        headers = _headers(manifest)
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(file, f"a header of its files: {type(error).__name__}: {error}") from error
    files = {info.name: file for file, infos in headers.items() for info in infos}
    if len(files) < sum(map(len, headers.values())):
        raise _damaged(file, "a tensor is in two of its files")
    unknown = next((name for name in manifest["arrays"] if name not in files), None)
    if unknown is not None:
        raise _damaged(file, f"{unknown} is in none of its files")
    index = manifest["index"]
    if (
        index is not None
        and parse_object(index.encode(), file, "model.path").get("weight_map") != files
    ):
        raise _damaged(file, "its index is of other files")
    return manifest


def _form_problem(manifest: Mapping[str, Any]) -> str:
    """Say what in a manifest `save_flax` does not write so; empty if all is as it should be."""
    arrays, files = manifest.get("arrays"), manifest.get("files")
    if not isinstance(files, dict) or not files:
        return f"files: {shown(files)}"
    if wrong := [n for n, text in files.items() if not (is_weight_file(n) and type(text) is str)]:
        return f"files: {shown(wrong[0])}"
    if not isinstance(arrays, dict):
        return f"arrays: {shown(arrays)}"
    if wrong := [place for place in arrays.values() if not _is_place(place)]:
        return f"arrays: {shown(wrong[0])}"
    if len({tuple(place) for place in arrays.values()}) < len(arrays):
        return "arrays: two tensors at one place"
    if not isinstance(manifest.get("index", 0), str | None):
        return f"index: {shown(manifest.get('index'))}"
    return ""


def _is_place(place: Any) -> bool:
    """Whether this is a parameter's path with indices into its stack."""
    if not isinstance(place, list) or not place:
        return False
    path, *lead = place
    is_name = isinstance(path, str) and 0 < len(path) < 256 and path != ".."
    is_name = is_name and Path(path).name == path
    return is_name and all(type(at) is int and 0 <= at < 2**31 for at in lead)


def _headers(manifest: Mapping[str, Any]) -> dict[str, list[TensorInfo]]:
    return {file: parse_header(text.encode(), file) for file, text in manifest["files"].items()}


def _damaged(file: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"model.path: got a damaged {file} ({reason[:300]}), expected what to-flax wrote; convert "
        "the source again"
    )


def _open_array(path: Path) -> Any:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path.absolute())},
        # Trap: a piece that is not there would be read as zeros; Orbax writes those of zeros too.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec).result()


@contextmanager
def _array_of(directory: Path, path: str) -> Iterator[None]:
    """Tell of what TensorStore meets in an array's folder by its name."""
    place = directory / ARRAYS / path
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        fault = system_fault(error, place)
        if fault is not None:
            raise fault from error
        said = str(error).split("\n")[0].partition(" [tensorstore_spec=")[0]  # all of its settings
        raise _damaged(place, f"{type(error).__name__}: {said}") from error


def exact_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Return the narrowest dtype that holds the values of all these exactly."""
    kinds = set(dtypes)
    if len(kinds) > 1:  # bfloat16 and float16 hold every float8_e4m3fn
        kinds.discard(FP8)
    return np.dtype(jax.numpy.result_type(*kinds)) if len(kinds) > 1 else kinds.pop()
