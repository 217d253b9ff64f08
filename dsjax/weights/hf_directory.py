# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face model directory lies on disk; the only place that knows.

In: a directory, a URL of one, or a hub id. Out: an `HFSource`: its config, the tensors of its
weight files, each readable by rows, and the files that belong beside the weights. Faults of the
files are found on opening and reported together. For export: the names and the index of the files
to write. Not here: what a tensor means and where it goes (`load`), one weight file by itself
(`safetensors`, `torch_bin`), the files besides weights (`model_folder`, `model_files`).
Nothing of a checkpoint is executed.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dsjax.config.json_file import read_object
from dsjax.config.paths import is_url
from dsjax.errors import ConfigError, raise_all
from dsjax.weights import storage, torch_bin
from dsjax.weights.model_files import ADAPTER_CONFIG
from dsjax.weights.model_folder import ModelFolder, open_model_folder, some
from dsjax.weights.safetensors import (
    SafetensorsWriter,
    TensorInfo,
    read_header,
    read_range,
    read_tensor,
)
from dsjax.weights.storage import File, Folder, RemoteFile, in_order

__all__ = [
    "HFSource",
    "SafetensorsWriter",
    "TensorInfo",
    "index_json",
    "is_weight_file",
    "open_source",
    "shard_names",
]

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_SAFETENSORS_FILES = (SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors")
_TORCH_FILES = (_TORCH, _TORCH_INDEX, "pytorch_model-*.bin")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class HFSource:
    """An opened Hugging Face directory.

    Attributes:
        directory: where its small files lie on this machine: all of it for a directory, the hub's
            cache for a hub id, a copy of them for a URL.
        config: the parsed `config.json`.
        tensors: every tensor by name, in the order of `files` and of the bytes in each.
        files: names of the weight files, sorted; empty when opened without weights.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[str]
    _headers: dict[str, bytes] = field(repr=False)
    _found: ModelFolder = field(repr=False)

    @property
    def reads_ahead(self) -> int:
        """How many reads are worth having under way at a time."""
        # Each read of a `.bin` file reads a whole tensor.
        return self._found.folder.reads_ahead if self._headers else 1

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor, or the part that slices of step 1 select, into a fresh array.

        Reads only the rows that the first slice needs and is safe to call from several threads.
        """
        info = self.tensors[name]
        if info.start < 0:
            return torch_bin.read_tensor(self.directory / info.file, info, index)
        return read_tensor(self._found.folder.files[info.file], info, index)

    def read_bytes(self, name: str, offset: int, length: int) -> bytes:
        """Read `length` bytes of a tensor from `offset` on, as they stand in its file.

        For a `.bin` file each call reads the whole tensor.
        """
        info = self.tensors[name]
        if info.start < 0:
            return self.read(name).reshape(-1).view(np.uint8)[offset : offset + length].tobytes()
        return read_range(self._found.folder.files[info.file], info, offset, length)

    def raw_header(self, file: str) -> bytes:
        """Return a safetensors file's header as JSON text, with its padding, without its length."""
        return self._headers[file]

    def file_headers(self) -> dict[str, bytes]:
        """`raw_header` of every safetensors file; empty for `.bin` files."""
        return dict(self._headers)

    def index_text(self) -> str | None:
        """Return the text of `model.safetensors.index.json`; None for one file and for `.bin`."""
        index = self._found.folder.files.get(SAFETENSORS_INDEX)
        return storage.read_text(index) if self._headers and index is not None else None

    def aux_files(self) -> list[Path]:
        """List the files to keep beside the weights (`model_files`), sorted."""
        return [self.directory / name for name in self._found.kept]


Check = Callable[[Mapping[str, Any], Collection[str] | None], None]
"""Given config.json and the names of all tensors, if there is an index; raises a ConfigError."""


def open_source(
    path: str | Path,
    revision: str | None = None,
    weights: bool = True,
    adapter: str | None = None,
    check: Check | None = None,
) -> HFSource:
    """Open a model directory, here, behind a URL or on the Hugging Face hub, and check its files.

    Args:
        path: a directory with `config.json`; a URL of one, whose weights stay where they are; else
            a hub id, which is downloaded unless cached.
        revision: branch, tag or commit of the hub repository.
        weights: False leaves the weights alone, neither downloading nor checking them.
        adapter: path of the adapter that goes with the model: it alone may lie in the same folder.
        check: called where weights are left alone, or before those of a hub id are downloaded.

    Raises:
        ConfigError: nothing there, or files that are missing, damaged or contradict one another.
    """
    found = open_model_folder(str(path), revision)
    _check_adapter(str(path), found.names, adapter)
    if check is not None and (not weights or found.repository is not None):
        index = _forms(found.names)[1]
        file = found.folder.files.get(index)
        check(found.config, None if file is None else _read_weight_map(file).keys())
    if not weights:
        return HFSource(found.directory, found.config, {}, [], {}, found)
    found = found.with_files(_weight_names(found.names))
    files, weight_map = _weight_files(found.folder)
    headers, infos = _read_headers(found.folder, files)
    raise_all(_contradictions(infos, weight_map))
    tensors = {info.name: info for info in infos}
    return HFSource(found.directory, found.config, tensors, files, headers, found)


def _check_adapter(path: str, names: Collection[str], adapter: str | None) -> None:
    """Refuse weights with an adapter beside them that nobody asked for."""
    if ADAPTER_CONFIG in names and _weight_names(names) and not _is_same(path, adapter):
        raise ConfigError(
            f"model.path: got {path!r} with weights and {ADAPTER_CONFIG}, expected one of the two: "
            "transformers would apply the adapter to the weights; give the folder as adapter.path "
            f"too to do so here, or remove {ADAPTER_CONFIG} to use the weights alone"
        )


def _is_same(path: str, other: str | None) -> bool:
    """Whether two paths or URLs are of one folder."""
    if other is None or is_url(path) or is_url(other):
        return other is not None and path.rstrip("/") == other.rstrip("/")
    return Path(path).expanduser().resolve() == Path(other).expanduser().resolve()


def _forms(names: Collection[str]) -> tuple[str, str]:
    """Names of the single weight file and of the index: `.bin` only where no safetensors are."""
    if any(_matches(name, _SAFETENSORS_FILES) for name in names):
        return SAFETENSORS, SAFETENSORS_INDEX
    return _TORCH, _TORCH_INDEX


def _weight_names(names: Collection[str]) -> list[str]:
    """List the weight files among the names of a repository's."""
    safetensors = [name for name in names if _matches(name, _SAFETENSORS_FILES)]
    return safetensors or [name for name in names if _matches(name, _TORCH_FILES)]


def _weight_files(folder: Folder) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's tensor -> file map where there is an index."""
    names = list(folder.files)
    single, index = _forms(names)
    if index not in names:
        if single not in names:
            raise ConfigError(_no_weights(folder, names))
        return [single], None
    weight_map = _read_weight_map(folder.files[index])
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if file not in names]
    stray = [
        name for name in names if name not in files and (name == single or _SHARD.fullmatch(name))
    ]
    problems = []
    if missing:
        problems.append(
            f"model.path: got {folder} without {', '.join(missing)}, expected the "
            f"{len(files)} files that {index} names; download the missing ones"
        )
    if stray:
        problems.append(
            f"model.path: got {', '.join(stray)} in {folder}, expected only weight files that "
            f"{index} names; remove what is left over from another save, or correct the index"
        )
    raise_all(problems)
    return files, weight_map


def _read_weight_map(path: File) -> dict[str, str]:
    weight_map = read_object(path, "model.path").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f"model.path: got {path} without a weight_map, expected tensor names with the files "
            "that hold them; download the index again"
        )
    odd = {repr(file) for file in weight_map.values() if not is_weight_file(file)}
    if odd:
        raise ConfigError(
            f"model.path: got {some(odd)} in {path}, expected names of .safetensors or .bin files "
            "beside it; correct its weight_map"
        )
    return weight_map


def _read_headers(
    folder: Folder, files: Sequence[str]
) -> tuple[dict[str, bytes], list[TensorInfo]]:
    """Return the raw headers of the safetensors files, and every file's tensors in order."""
    headers: dict[str, bytes] = {}
    infos: list[TensorInfo] = []
    problems: list[str] = []
    reads = [partial(_read_header, folder.files[name]) for name in files]
    for name, found in zip(files, in_order(reads, folder.reads_ahead), strict=True):
        if isinstance(found, ConfigError):
            problems.append(str(found))
            continue
        header, tensors = found
        infos += tensors
        if header is not None:
            headers[name] = header
    raise_all(problems)
    return headers, infos


def _read_header(file: File) -> tuple[bytes | None, list[TensorInfo]] | ConfigError:
    """Read the raw header of a safetensors file, any file's tensors; or what is wrong with it."""
    try:
        if file.name.endswith(".safetensors"):
            return read_header(file)
        if isinstance(file, RemoteFile):
            return ConfigError(
                f"model.path: got {file}, expected safetensors behind a URL; copy the folder to "
                "this machine, or convert it to safetensors"
            )
        return None, torch_bin.list_tensors(file)
    except ConfigError as error:
        return error


def _contradictions(infos: Sequence[TensorInfo], weight_map: Mapping[str, str] | None) -> list[str]:
    """Tensors in two files, and where the index and the files disagree."""
    places: dict[str, list[str]] = {}
    for info in infos:
        places.setdefault(info.name, []).append(info.file)
    problems = []
    twice = [f"{name} in {' and '.join(files)}" for name, files in places.items() if files[1:]]
    if twice:
        problems.append(f"model.path: got {some(twice)}, expected each tensor in one file")
    if weight_map is None:
        return problems
    absent = [
        f"{name} in {file}" for name, file in weight_map.items() if file not in places.get(name, [])
    ]
    if absent:
        problems.append(
            f"model.path: got an index that lists {some(absent)}, expected the files to hold what "
            "the index lists; these tensors are not there, download the file or the index again"
        )
    unlisted = [f"{name} in {files[0]}" for name, files in places.items() if name not in weight_map]
    if unlisted:
        problems.append(
            f"model.path: got {some(unlisted)}, expected the index to list every tensor; these "
            "are missing in it, download the index again"
        )
    return problems


def _no_weights(folder: Folder, names: Sequence[str]) -> str:
    shards = [name for name in names if _matches(name, (*_SAFETENSORS_FILES, *_TORCH_FILES))]
    if shards:
        return (
            f"model.path: got {some(shards)} in {folder} without an index, expected "
            f"{SAFETENSORS_INDEX} or {_TORCH_INDEX} beside the files; download it"
        )
    if folder.is_remote and "dsjax_checkpoint.json" in names:
        return (
            f"model.path: got {folder}, which to-flax wrote, expected a Hugging Face checkpoint "
            "behind a URL; copy the folder to this machine"
        )
    return (
        f"model.path: got {folder} without weights, expected {SAFETENSORS}, "
        f"{SAFETENSORS_INDEX}, {_TORCH} or {_TORCH_INDEX}; found {some(names)}"
    )


def is_weight_file(name: object) -> bool:
    """Whether an entry of an index names a weight file in the same directory."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith((".safetensors", ".bin"))
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def shard_names(count: int) -> list[str]:
    """File names of `count` safetensors shards, as transformers gives them."""
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_json(files: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """Return the text of `model.safetensors.index.json` for files of (tensor name, bytes)."""
    weight_map = {name: file for file, tensors in files.items() for name, _ in tensors}
    total = sum(size for tensors in files.values() for _, size in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
