# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face model directory lies on disk; the only place that knows.

In: a directory, a URL of one, or a hub id. Out: an `HFSource`: its config, the tensors of its
weight files, each readable by rows, and the files that belong beside the weights. Faults of the
files are found on opening and reported together. For export: the names and the index of the files
to write. Not here: what a tensor means and where it goes (`convert`), one weight file by itself
(`safetensors_file`, `torch_file`), downloading (`hf_hub`), reading behind a URL (`storage`).
Nothing of a checkpoint is executed.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dsjax import hf_hub, storage, torch_file
from dsjax.errors import ConfigError, raise_all
from dsjax.json_file import read_object
from dsjax.safetensors_file import (
    SafetensorsWriter,
    TensorInfo,
    is_lfs_pointer,
    lfs_problem,
    read_header,
    read_range,
    read_tensor,
)
from dsjax.storage import READS_AHEAD, File, Folder, RemoteFile, in_order, is_url, open_folder

__all__ = [
    "HFSource",
    "SafetensorsWriter",
    "TensorInfo",
    "index_json",
    "open_source",
    "shard_names",
]

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_SAFETENSORS_FILES = (SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors")
_TORCH_FILES = (_TORCH, _TORCH_INDEX, "pytorch_model-*.bin")
_NOT_AUX = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "consolidated*"),
    *("*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.msgpack.index.json", "*.npz"),
    *(
        "*.onnx",
        "*.onnx_data",
        "*.pkl",
        "*.py",
        "dsjax_export.json",
        "optimizer*",
        "scheduler*",
        "rng_state*",
        ".*",
    ),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_MOST_NAMES = 8


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
    _folder: Folder = field(repr=False)

    @property
    def reads_ahead(self) -> int:
        """How many reads are worth having under way at a time."""
        return READS_AHEAD if self._folder.is_remote else 1

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Shaped[np.ndarray, "..."]:
        """Read a tensor, or the part that slices of step 1 select, into a fresh array.

        Reads only the rows that the first slice needs and is safe to call from several threads.
        """
        info = self.tensors[name]
        if info.start < 0:
            return torch_file.read_tensor(self.directory / info.file, info, index)
        return read_tensor(self._folder.files[info.file], info, index)

    def read_bytes(self, name: str, offset: int, length: int) -> bytes:
        """Read `length` bytes of a tensor from `offset` on, as they stand in its file.

        For a `.bin` file each call reads the whole tensor.
        """
        info = self.tensors[name]
        if info.start < 0:
            return self.read(name).reshape(-1).view(np.uint8)[offset : offset + length].tobytes()
        return read_range(self._folder.files[info.file], info, offset, length)

    def raw_header(self, file: str) -> bytes:
        """The JSON text of a safetensors file's header, padding included, length bytes not."""
        return self._headers[file]

    def file_headers(self) -> dict[str, bytes]:
        """`raw_header` of every safetensors file; empty for `.bin` files."""
        return dict(self._headers)

    def index_text(self) -> str | None:
        """The text of `model.safetensors.index.json`; None for one file and for `.bin` files."""
        index = self._folder.files.get(SAFETENSORS_INDEX)
        return storage.read_text(index) if self._headers and index is not None else None

    def aux_files(self) -> list[Path]:
        """The files to keep beside the weights: config, tokenizer, templates, licences, README.

        Regular files of the top level, sorted; no weights in any format, optimizer state, Python
        code or hidden files.
        """
        return [path for path in _top_level(self.directory) if _is_aux(path.name)]

    def python_files(self) -> list[Path]:
        """The directory's Python files, which are neither executed nor copied."""
        return [path for path in _top_level(self.directory) if path.suffix == ".py"]


def open_source(path: str | Path, revision: str | None = None, weights: bool = True) -> HFSource:
    """Open a model directory, here, behind a URL or on the Hugging Face hub, and check its files.

    Args:
        path: a directory with `config.json`; a URL of one, whose weights stay where they are; else
            a hub id, which is downloaded unless cached.
        revision: branch, tag or commit of the hub repository.
        weights: False leaves the weights alone, neither downloading nor checking them.

    Raises:
        ConfigError: nothing there, or files that are missing, damaged or contradict one another.
    """
    if is_url(str(path)):
        folder, directory = _find_remote(str(path), revision)
    else:
        directory = _find_directory(str(path), revision, weights)
        folder = open_folder(directory, "model.path")
    raise_all(
        lfs_problem(file, "model.path")
        for file in _top_level(directory)
        if _is_aux(file.name) and is_lfs_pointer(file)
    )
    config = read_object(directory / CONFIG, "model.path")
    if not weights:
        return HFSource(directory, config, {}, [], {}, folder)
    files, weight_map = _weight_files(folder)
    headers, infos = _read_headers(folder, files)
    raise_all(_contradictions(infos, weight_map))
    return HFSource(directory, config, {info.name: info for info in infos}, files, headers, folder)


def _find_remote(url: str, revision: str | None) -> tuple[Folder, Path]:
    """The folder of a URL, and a copy of its small files."""
    if revision is not None:
        raise ConfigError(
            f"model.revision: got {revision!r} with the URL {url!r}, expected null; a revision of "
            "the hub is a part of the URL: hf://organization/name@revision"
        )
    folder = open_folder(url, "model.path")
    if CONFIG not in folder.files:
        raise ConfigError(_no_config(url, list(folder.files)))
    return folder, storage.copied(folder, [name for name in folder.files if _is_aux(name)])


def _find_directory(path: str, revision: str | None, weights: bool) -> Path:
    """The local directory of a path or hub id, with a config.json in it."""
    local = Path(path).expanduser()
    if not local.exists():
        if not _HUB_ID.fullmatch(path):
            raise ConfigError(
                f"model.path: got {path!r}, expected a directory or a hub id; there is no such "
                "directory and a hub id has the form organization/name"
            )
        return hf_hub.fetch(path, revision, lambda files: _wanted(path, files, weights))
    if not local.is_dir():
        raise ConfigError(
            f"model.path: got the file {path!r}, expected the directory that holds {CONFIG}; "
            f"give {str(local.parent)!r}"
        )
    if revision is not None:
        raise ConfigError(
            f"model.revision: got {revision!r} with the local directory {path!r}, expected null; "
            "a revision selects a version on the hub"
        )
    if not (local / CONFIG).is_file():
        raise ConfigError(_no_config(path, [file.name for file in _top_level(local)]))
    return local


def _wanted(name: str, files: Sequence[str], weights: bool) -> list[str]:
    """The files of a hub repository to download: `.bin` only where there is no safetensors."""
    top = [file for file in files if "/" not in file]
    if CONFIG not in top:
        raise ConfigError(_no_config(name, top))
    wanted = [file for file in top if _is_aux(file)]
    if weights:
        safetensors = [file for file in top if _matches(file, _SAFETENSORS_FILES)]
        wanted += safetensors or [file for file in top if _matches(file, _TORCH_FILES)]
    return wanted


def _weight_files(folder: Folder) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's tensor -> file map where there is an index."""
    names = list(folder.files)
    safetensors = any(_matches(name, _SAFETENSORS_FILES) for name in names)
    single, index = (SAFETENSORS, SAFETENSORS_INDEX) if safetensors else (_TORCH, _TORCH_INDEX)
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
    odd = {repr(file) for file in weight_map.values() if not _is_weight_file(file)}
    if odd:
        raise ConfigError(
            f"model.path: got {_some(odd)} in {path}, expected names of .safetensors or .bin files "
            "beside it; correct its weight_map"
        )
    return weight_map


def _read_headers(
    folder: Folder, files: Sequence[str]
) -> tuple[dict[str, bytes], list[TensorInfo]]:
    """The raw headers of the safetensors files, and every file's tensors in order."""
    headers: dict[str, bytes] = {}
    infos: list[TensorInfo] = []
    problems: list[str] = []
    reads = [partial(_read_header, folder.files[name]) for name in files]
    for name, found in zip(
        files, in_order(reads, READS_AHEAD if folder.is_remote else 1), strict=True
    ):
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
    """The raw header of a safetensors file, and any file's tensors; or what is wrong with it."""
    try:
        if file.name.endswith(".safetensors"):
            return read_header(file)
        if isinstance(file, RemoteFile):
            return ConfigError(
                f"model.path: got {file}, expected safetensors behind a URL; copy the folder to "
                "this machine, or convert it to safetensors"
            )
        return None, torch_file.list_tensors(file)
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
        problems.append(f"model.path: got {_some(twice)}, expected each tensor in one file")
    if weight_map is None:
        return problems
    absent = [
        f"{name} in {file}" for name, file in weight_map.items() if file not in places.get(name, [])
    ]
    if absent:
        problems.append(
            f"model.path: got an index that lists {_some(absent)}, expected the files to hold what "
            "the index lists; these tensors are not there, download the file or the index again"
        )
    unlisted = [f"{name} in {files[0]}" for name, files in places.items() if name not in weight_map]
    if unlisted:
        problems.append(
            f"model.path: got {_some(unlisted)}, expected the index to list every tensor; these "
            "are missing in it, download the index again"
        )
    return problems


def _no_config(place: str, found: Sequence[str]) -> str:
    adapter = "; it holds a PEFT adapter, give its path as adapter.path"
    hint = adapter if "adapter_config.json" in found else f"; found {_some(found)}"
    return f"model.path: got {place!r}, expected a model directory with {CONFIG}{hint}"


def _no_weights(folder: Folder, names: Sequence[str]) -> str:
    shards = [name for name in names if _matches(name, (*_SAFETENSORS_FILES, *_TORCH_FILES))]
    if shards:
        return (
            f"model.path: got {_some(shards)} in {folder} without an index, expected "
            f"{SAFETENSORS_INDEX} or {_TORCH_INDEX} beside the files; download it"
        )
    if folder.is_remote and "dsjax_checkpoint.json" in names:
        return (
            f"model.path: got {folder}, which to-flax wrote, expected a Hugging Face checkpoint "
            "behind a URL; copy the folder to this machine"
        )
    return (
        f"model.path: got {folder} without weights, expected {SAFETENSORS}, "
        f"{SAFETENSORS_INDEX}, {_TORCH} or {_TORCH_INDEX}; found {_some(names)}"
    )


def _top_level(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def _is_weight_file(name: object) -> bool:
    """Whether an entry of an index names a weight file in the same directory."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith((".safetensors", ".bin"))
    )


def _is_aux(name: str) -> bool:
    return not _matches(name, _NOT_AUX)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    known = sorted(names)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return ", ".join(known[:_MOST_NAMES]) + more if known else "nothing"


def shard_names(count: int) -> list[str]:
    """File names of `count` safetensors shards, as transformers gives them."""
    if count == 1:
        return [SAFETENSORS]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_json(files: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """The text of `model.safetensors.index.json` for files of (tensor name, bytes)."""
    weight_map = {name: file for file, tensors in files.items() for name, _ in tensors}
    total = sum(size for tensors in files.values() for _, size in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
